"""Another spec for a U-Net that has positions: what was learned stays, or nothing changes."""

import copy
import json

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from tests.unet.helpers import call, gap, plain, rope, text
from vit_rope.unet import RopeUNet2DModel, add_positions, rope_class, set_positions


def positions(model):
    return {name: value for name, value in model.state_dict().items() if ".position." in name}


@pytest.mark.parametrize("make", [plain, text])
@torch.no_grad()
def test_a_modifier_keeps_learned_frequencies_and_changes_outputs(make, tmp_path):
    model = add_positions(make(), "mixed", "pixel", "center")
    for value in positions(model).values():
        value.mul_(1.5)  # as if trained
    before, learned = call(model), copy.deepcopy(positions(model))
    assert set_positions(model, "yarn(mixed, factor=2)") is model
    assert positions(model).keys() == learned.keys()
    assert all(torch.equal(value, learned[name]) for name, value in positions(model).items())
    assert gap(call(model), before) > 1e-4
    assert type(model) is rope_class(type(make()))
    assert {name: model.config[name] for name in ("position", "position_unit", "position_origin", "attention")} == {
        "position": "yarn(mixed, factor=2)",
        "position_unit": "pixel",
        "position_origin": "center",
        "attention": "softmax",
    }
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["position"] == "yarn(mixed, factor=2)"
    assert torch.equal(call(type(model).from_pretrained(tmp_path)), call(model))
    model.set_position("mixed")  # the method, and back again
    assert torch.equal(call(model), before)


@torch.no_grad()
def test_the_result_equals_a_unet_made_with_the_new_spec():
    model, wanted = rope("axial"), rope("axial(base=10) + sincos")
    wanted.load_state_dict(model.state_dict())
    assert torch.equal(call(set_positions(model, "axial(base=10) + sincos")), call(wanted))
    assert torch.equal(call(set_positions(copy.deepcopy(model), "axial")), call(set_positions(model, "axial")))


@pytest.mark.parametrize("make", [plain, text])
def test_positions_still_train_and_keep_their_mode(make):
    model = set_positions(add_positions(make(), "mixed").train(), "interpolate(mixed, factor=2)")
    call(model).square().mean().backward()
    grads = [p.grad for name, p in model.named_parameters() if ".position." in name]
    assert grads
    assert all(grad.abs().sum() > 0 for grad in grads)
    assert all(module.training for module in model.modules())


REFUSED = {
    "other parameters": ("learned", r"learns .*table.*, but the model's positions learned .*freqs"),
    "no parameters": ("axial", r"learns nothing, but"),
    "unknown": ("axail", "did you mean axial"),
    "options": ("yarn(mixed, fcator=2)", "yarn has no option 'fcator'"),
}


@pytest.mark.parametrize(("spec", "message"), REFUSED.values(), ids=REFUSED)
@torch.no_grad()
def test_a_spec_that_does_not_fit_changes_nothing(spec, message):
    model = rope("mixed")
    before, config, modules = call(model), dict(model.config), list(model.modules())
    with pytest.raises(ValueError, match=message) as caught:
        set_positions(model, spec)
    assert "attentions.0 (level" in str(caught.value)
    assert torch.equal(call(model), before)
    assert dict(model.config) == config
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


@torch.no_grad()
def test_one_attention_that_cannot_take_the_spec_leaves_all_unchanged():
    types = {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2}
    model = rope("none", **types)
    last = model.up_blocks[1].attentions[-1]
    last.position.made_for = copy.copy(last.position.made_for)
    object.__setattr__(last.position.made_for, "head", 6)  # only here do heads not divide by four
    before = call(model)
    with pytest.raises(ValueError, match=r"up_blocks.1.attentions.1 .*head_dim 6 .*attention_head_dim in the U-Net's"):
        set_positions(model, "axial")
    assert torch.equal(call(model), before)
    assert model.config.position == "none"


@torch.no_grad()
def test_linear_attention_stays_linear_and_refuses_a_bias():
    model = RopeUNet2DModel.from_config({**rope().config, "attention": "linear"}).eval()
    before = call(model)
    with pytest.raises(ValueError, match="linear attention has no logits"):
        set_positions(model, "alibi")
    assert torch.equal(call(model), before)
    assert gap(call(set_positions(model, "axial(base=10)")), before) > 1e-5
    assert {m.processor.attention for m in model.modules() if hasattr(m, "layout")} == {"linear"}


def test_other_models_and_unets_without_positions():
    for model in (nn.Linear(1, 1), AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)):
        with pytest.raises(
            TypeError, match=f"set_positions takes a U-Net of diffusers or .*, got {type(model).__name__}"
        ):
            set_positions(model, "axial")
    with pytest.raises(ValueError, match="this UNet2DModel has no positions to change; call add_positions"):
        set_positions(plain(), "axial")
    with pytest.raises(TypeError, match="a position spec is a string"):
        set_positions(rope(), None)
