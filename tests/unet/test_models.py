"""Adding, changing and removing positions: everything or nothing, and clear errors."""

import copy
import re

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    UNet2DModel,
    UNetSpatioTemporalConditionModel,
)
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn

from tests.helpers import ROOT
from tests.unet.helpers import SELF, call, gap, plain, rope, text
from vit_rope.unet import (
    RopeUNet2DModel,
    add_positions,
    remove_positions,
)


@pytest.mark.parametrize("make", [plain, text])
@pytest.mark.parametrize("spec", ["none", "axial", "learned + mixed"])
@torch.no_grad()
def test_remove_positions_restores_everything(make, spec):
    model = make()
    stock, config, keys = call(model), dict(model.config), set(model.state_dict())
    types = [type(module) for module in model.modules()]
    assert remove_positions(add_positions(model, spec, "pixel", "center")) is model
    assert torch.equal(call(model), stock)
    assert dict(model.config) == config
    assert set(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == types
    assert {type(m.processor) for m in model.modules() if isinstance(m, Attention)} == {AttnProcessor2_0}
    add_positions(model, spec)  # and again
    assert gap(call(remove_positions(copy.deepcopy(model))), stock) == 0  # a copy can be undone too


def test_code_blocks_of_the_page_run(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "unet.md").read_text()
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    assert type(names["unet"]) is type(names["pipeline"].unet) is RopeUNet2DModel


def test_a_unet_without_self_attention():
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
    with pytest.raises(ValueError, match=r"this UNet2DModel has no self-attention over a feature map.*AttnDownBlock2D"):
        add_positions(plain(**blocks), "axial")
    with pytest.raises(ValueError, match="no self-attention"):
        rope(**blocks)
    joined = {  # of text and image keys
        "down_block_types": ("SimpleCrossAttnDownBlock2D",) * 2,
        "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 2,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "attention_head_dim": 8,
    }
    with pytest.raises(ValueError, match=r"positions do not reach down_blocks.0.attentions.0 of this UNet2DConditionM"):
        add_positions(text(**joined), "axial")
    only = joined | {"only_cross_attention": True, "mid_block_only_cross_attention": True}
    with pytest.raises(
        ValueError, match=r"this UNet2DConditionModel has no self-attention over a feature map that can have pos"
    ):
        add_positions(text(**only), "axial")


@pytest.mark.parametrize(
    ("down", "first"),
    [
        (("CrossAttnDownBlock2D", "KCrossAttnDownBlock2D"), "down_blocks.1.attentions.0.attn1"),
        (("KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"), "down_blocks.1.attentions.0.attn1"),
        (("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), f"down_blocks.0{SELF}"),
    ],
)
def test_unsupported_self_attention_is_refused(down, first):
    up = tuple(name.replace("Down", "Up") for name in reversed(down))
    if "SpatioTemporal" in down[0]:
        blocks = {"down_block_types": down, "up_block_types": up, "block_out_channels": (32, 64)}
        heads = {"num_attention_heads": (2, 4), "cross_attention_dim": 12}
        model = UNetSpatioTemporalConditionModel(16, layers_per_block=1, **blocks, **heads)
    else:
        model = text(down_block_types=down, up_block_types=up, mid_block_type=None)
    with pytest.raises(ValueError, match=rf"^positions do not reach {first} of this UNet.*; choose block types whose"):
        add_positions(model, "axial")
    assert "position" not in model.config
    assert not [module for module in model.modules() if hasattr(module, "layout")]


def test_a_head_that_the_scheme_cannot_use():
    wrong = (
        r"down_blocks.1.attentions.0 \(level 1, 32 channels, 5 heads of 6\): cannot build position 'axial': "
        r"head_dim 6 does not divide .*; attention_head_dim in the U-Net's config sets the channels of a head here"
    )
    model = plain(attention_head_dim=6)
    with pytest.raises(ValueError, match=wrong):
        add_positions(model, "axial")
    assert type(model) is UNet2DModel
    assert "position" not in model.config
    assert not [module for module in model.modules() if hasattr(module, "layout")]
    wrong = rf"down_blocks.0{SELF} \(level 0, 16 channels, 8 heads of 2\).*sets the number of heads here"
    with pytest.raises(ValueError, match=wrong):
        add_positions(text(attention_head_dim=8), "axial")


def test_an_invalid_size():
    with pytest.raises(
        ValueError, match="images of 16 x 15 are not divisible by 2, the factor by which this U-Net downsam"
    ):
        call(rope(), 16, 15)
    for size in (0, (8,), (8, 8, 8), (8.0, 8)):
        with pytest.raises(ValueError, match=r"sample_size is a number of pixels or \(height, width\)"):
            rope(sample_size=size)
    with pytest.raises(
        ValueError, match=r"size of its training images in its config; set it there.*register_to_config.*it is None"
    ):
        add_positions(plain(sample_size=None), "axial")
    with pytest.raises(ValueError, match=r"in its config.*got sample_size=32 in addition"):
        add_positions(plain(), "axial", sample_size=32)


def test_adding_positions_twice_or_removing_none():
    model = add_positions(plain(), "axial")
    with pytest.raises(
        ValueError, match=r"has positions already, 'axial'; call set_positions .*, or remove_positions first"
    ):
        add_positions(model, "mixed")
    with pytest.raises(ValueError, match="this UNet2DModel has no positions to remove"):
        remove_positions(plain())


def test_a_spec_a_unit_or_an_origin_that_does_not_exist():
    level = r"down_blocks.1.attentions.0 \(level 1, 32 channels, 4 heads of 8\): "
    with pytest.raises(ValueError, match=rf"{level}cannot build position 'axal': no position scheme .* did you mean"):
        add_positions(plain(), "axal")
    with pytest.raises(TypeError, match="a position spec is a string"):
        add_positions(plain(), None)
    with pytest.raises(ValueError, match="unknown unit 'metres'; expected one of index, pixel, centered, "):
        add_positions(plain(), "axial", unit="metres")
    with pytest.raises(ValueError, match="unknown origin 'corner'"):
        add_positions(plain(), "axial", origin="corner")
    for unit in ("index", "pixel"):
        with pytest.raises(ValueError, match="3 numbers"):
            add_positions(plain(), "axial", unit, (1.0, 2.0, 3.0))


def test_other_models_and_custom_attention():
    for model in (nn.Linear(1, 1), AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)):
        with pytest.raises(TypeError, match=f"takes a U-Net of diffusers or .*, got {type(model).__name__}"):
            add_positions(model, "axial")
    model = plain()
    model.mid_block.attentions[0].set_processor(AttnProcessor())
    with pytest.raises(
        ValueError,
        match=r"mid_block.attentions.0 computes attention with a AttnProcessor, which positions would replace",
    ):
        add_positions(model, "axial")
