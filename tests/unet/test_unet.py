"""Positions in U-Nets: what diffusers users have goes on working, and no position is ever dropped without a word."""

import contextlib
import copy
import io
import json
import logging
import pickle
import re
import subprocess
import sys

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.training_utils import EMAModel
from torch import nn

from tests.helpers import ROOT, spec_of
from vit_rope import unet as unets
from vit_rope.positions import Layout, Rotary, build, schemes
from vit_rope.unet import RopeUNet2DConditionModel, RopeUNet2DModel, add_positions, remove_positions
from vit_rope.unet.attention import PlacedAttention, PositionProcessor
from vit_rope.unet.maps import build_at, map_layout

FITTING = {"comrope_ap": "comrope_ap(block=4)", "comrope_ld": "comrope_ld(block=4)"}  # for heads of 8 channels
SPECS = [FITTING.get(name, spec_of(name)) for name in schemes() if name != "xpos"]  # which has one axis
SPECS += ["learned + mixed", 'sincos + axial(pairs="half")']
SMALL = {
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
TEXT = SMALL | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}
SELF = ".attentions.0.transformer_blocks.0.attn1"  # of the conditional U-Net


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def plain(**changes):
    return UNet2DModel(**SMALL | changes).eval()


def text(**changes):
    return UNet2DConditionModel(**TEXT | changes).eval()


def call(model, height=16, width=16, batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 1, height, width, generator=generator).to(dtype)
    words = torch.randn(batch, 5, 12, generator=generator).to(dtype)
    inputs = (x, 5, words) if hasattr(model, "encoder_hid_proj") else (x, 5)
    return model(*inputs, return_dict=False)[0]


def still(model):
    """The same model with every rotation the identity."""
    for module in model.modules():
        if isinstance(module, Rotary):
            module.initial = torch.zeros_like(module.initial)
            module.reset_parameters()
    return model


def gap(a, b):
    return (a - b).abs().max().item()


def loud(model):
    """Tables as large as trained ones, which begin small."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("position.table"):
                parameter.normal_()
    return model


@contextlib.contextmanager
def log(caplog):
    """Records of diffusers' own loggers, which do not propagate."""
    names = "configuration_utils", "models.modeling_utils", "models.attention_processor"
    loggers = [logging.getLogger(f"diffusers.{name}") for name in names]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(caplog.handler)


# ---- the attention is diffusers' own --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [plain, text])
@pytest.mark.parametrize("size", [(16, 16), (8, 24), (20, 12)])
@torch.no_grad()
def test_none_is_bit_identical_to_stock_and_the_identity_rotation_close(make, size):
    model = make()
    stock = call(model, *size)
    assert torch.equal(call(add_positions(copy.deepcopy(model), "none"), *size), stock)
    for spec in ("axial", "mixed"):
        assert gap(call(still(add_positions(copy.deepcopy(model), spec)), *size), stock) <= 1e-6
        assert gap(call(add_positions(copy.deepcopy(model), spec), *size), stock) > 1e-3


@torch.no_grad()
def test_the_conditional_unet_keeps_its_odd_sizes():
    model = text()
    stock = call(model, 13, 9)
    assert torch.equal(call(add_positions(model, "none"), 13, 9), stock)


ATTENTION = {
    "bare": {},
    "group norm and residual": {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 1.4},
    "q/k norm": {"qk_norm": "rms_norm", "bias": True},
    "wide heads": {"heads": 3, "dim_head": 16},
    "spatial norm": {"spatial_norm_dim": 6, "norm_num_groups": 4},
}


def attention(spec="none", grid=(4, 6), unit="index", origin=0.0, level=0, **options):
    torch.manual_seed(0)
    module = Attention(32, **{"heads": 2, "dim_head": 8} | options)
    size = tuple(n * 2**level for n in grid)
    layout = map_layout(32, module.heads, module.inner_dim // module.heads, level, size, unit, origin)
    position = build_at("attention", level, spec, layout, "")
    module.__class__, module.layout, module.position = PlacedAttention, layout, position
    module.set_processor(PositionProcessor())
    return module


@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
@torch.no_grad()
def test_every_option_of_attention_behaves_as_stock(options):
    placed, x = attention(**options), torch.randn(2, 32, 4, 6)
    stock = Attention(32, **{"heads": 2, "dim_head": 8} | options)
    stock.load_state_dict(placed.state_dict())
    assert type(stock.processor) is AttnProcessor2_0
    norm = {"temb": torch.randn(2, 6, 2, 3)} if "spatial_norm_dim" in options else {}
    assert torch.equal(placed(x, **norm), stock(x, **norm))
    if not norm:
        tokens, mask = x.flatten(2).transpose(1, 2), torch.randn(2, 1, 24)
        wanted = stock(tokens, attention_mask=mask)
        if not options.get("residual_connection"):
            assert torch.equal(placed(tokens, attention_mask=mask, grid=(4, 6)), wanted)


@torch.no_grad()
def test_axial_attention_by_hand_of_maps_and_of_their_tokens():
    module, x = attention("axial(base=10)"), torch.randn(1, 32, 4, 6)
    tokens = x[0].flatten(1).T
    q, k, v = (project(tokens).view(24, 2, 8).double() for project in (module.to_q, module.to_k, module.to_v))
    speeds = torch.tensor([1.0, 10**-0.5], dtype=torch.float64)
    cells = torch.tensor([(row, column) for row in range(4) for column in range(6)], dtype=torch.float64)
    theta = torch.cat((cells[:, :1] * speeds, cells[:, 1:] * speeds), dim=1)[:, None]
    turn = torch.polar(torch.ones_like(theta), theta)
    q, k = (torch.view_as_complex(t.unflatten(-1, (4, 2))) * turn for t in (q, k))
    weights = (torch.einsum("mhj,nhj->hmn", q, k.conj()).real / 8**0.5).softmax(-1)
    wanted = module.to_out[0](torch.einsum("hmn,nhd->mhd", weights, v).flatten(1).float())
    assert gap(module(x)[0].flatten(1).T, wanted) < 1e-6
    assert gap(module(tokens[None], grid=(4, 6))[0], wanted) < 1e-6


@torch.no_grad()
def test_transformers_hand_their_grid_on_to_self_attention_alone(caplog):
    model, seen = add_positions(text(), "axial"), {}
    for name, module in model.named_modules():
        if isinstance(module, PlacedAttention):
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: seen.update({name: kwargs}), with_kwargs=True
            )
    with log(caplog):
        call(model, 8, 24)
    grids = {name.split(".")[0]: tuple(kwargs["grid"]) for name, kwargs in seen.items()}
    assert grids == {"down_blocks": (8, 24), "mid_block": (4, 12), "up_blocks": (8, 24)}
    assert caplog.text == ""  # cross-attention would say here that it does not know what a grid is


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_moving_all_places_changes_nothing_where_a_scheme_is_relative(spec):
    x = torch.randn(2, 32, 4, 6)
    here, there = attention(spec), attention(spec, origin=(2.3, -1.7))
    there.load_state_dict(here.state_dict())
    moved = gap(here(x), there(x))
    if here.position.relative:
        assert moved < 1e-5
    elif "sincos" in spec:  # a learned table knows its cells wherever they are
        assert moved > 1e-3


@pytest.mark.parametrize("make", [plain, text])
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != "none"])
@torch.no_grad()
def test_every_scheme_changes_the_output_at_sizes_it_was_not_made_for(make, spec):
    model = make()
    placed = loud(add_positions(copy.deepcopy(model), spec))
    for size in ((16, 16), (8, 24), (32, 16)):
        assert gap(call(placed, *size), call(model, *size)) > 1e-4


def test_only_self_attention_over_maps_has_a_place():
    model = add_positions(text(), "axial")
    placed = {name for name, module in model.named_modules() if isinstance(module, PlacedAttention)}
    assert placed == {f"{block}{SELF}" for block in ("down_blocks.0", "mid_block", "up_blocks.1")} | {
        "up_blocks.1.attentions.1.transformer_blocks.0.attn1"
    }
    video = UNet3DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=12,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    names = [name for name, module in add_positions(video, "axial").named_modules() if hasattr(module, "layout")]
    assert len(names) == 4
    assert not any("temp_attentions" in name or "attn2" in name for name in names)


def test_parameters_belong_to_positions_alone():
    keys = set(plain().state_dict())
    for spec in SPECS:
        more = set(add_positions(plain(), spec).state_dict()) - keys
        assert all(".position." in key for key in more)
        assert bool(more) == build(spec, Layout(width=16, heads=2, grid=(4, 4), depth=1)).learned


@pytest.mark.parametrize("make", [plain, text])
@pytest.mark.parametrize("spec", ["mixed", "learned"])
def test_every_parameter_of_a_scheme_gets_a_gradient(make, spec):
    model = add_positions(make(), spec)
    call(model).square().mean().backward()
    grads = [p.grad for name, p in model.named_parameters() if ".position." in name]
    assert grads
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


# ---- where cells are ------------------------------------------------------------------------------------------------


def test_levels_speak_of_the_same_image():
    for unit in ("pixel", "centered", "centered_shorter", "centered_longer"):
        for origin in (0.0, "center", (3.0, -1.0)):
            fine = map_layout(8, 1, 8, 0, (8, 16), unit, origin).coords().view(4, 2, 8, 2, 2).mean((1, 3))
            coarse = map_layout(8, 1, 8, 1, (8, 16), unit, origin).coords().view(4, 8, 2)
            torch.testing.assert_close(coarse, fine, rtol=0, atol=1e-6)
    pixel = map_layout(8, 1, 8, 2, (16, 16), "pixel", 0.0)
    assert pixel.coords().view(4, 4, 2)[0, :, 1].tolist() == [1.5, 5.5, 9.5, 13.5]
    torch.testing.assert_close(pixel.cell(pixel.coords()), map_layout(8, 1, 8, 2, (16, 16), "index", 0.0).coords())
    index = map_layout(8, 1, 8, 2, (16, 16), "index", 0.0)
    assert index.coords().view(4, 4, 2)[0, :, 1].tolist() == [0, 1, 2, 3]


def test_each_attention_knows_the_grid_of_its_level():
    types = ("AttnDownBlock2D",) * 3, ("AttnUpBlock2D",) * 3
    for size, grids in ((16, [(16, 16), (8, 8), (4, 4)]), ([16, 24], [(16, 24), (8, 12), (4, 6)])):
        model = RopeUNet2DModel(
            **SMALL
            | {
                "sample_size": size,
                "block_out_channels": (16, 16, 32),
                "down_block_types": types[0],
                "up_block_types": types[1],
                "position": "learned",
            }
        )
        tables = {name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith("table")}
        for level, grid in enumerate(grids):
            width = (16, 16, 32)[level]
            assert tables[f"down_blocks.{level}.attentions.0.position.table"] == (*grid, width)
            assert tables[f"up_blocks.{2 - level}.attentions.1.position.table"] == (*grid, width)
        assert tables["mid_block.attentions.0.position.table"] == (*grids[2], 32)


@torch.no_grad()
def test_units_and_origins_reach_the_attention():
    outputs = []
    for unit, origin in (("index", 0.0), ("pixel", 0.0), ("centered", 0.0)):
        outputs.append(call(add_positions(plain(), "axial", unit, origin)))
        torch.manual_seed(0)
    assert gap(outputs[0], outputs[1]) > 1e-3
    assert gap(outputs[0], outputs[2]) > 1e-3
    torch.manual_seed(0)
    model = add_positions(plain(), "axial", origin="center")
    assert gap(call(model), outputs[0]) < 1e-6  # relative


# ---- nothing is dropped without a word ------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("make", "ours"), [(plain, RopeUNet2DModel), (text, RopeUNet2DConditionModel)])
@torch.no_grad()
def test_a_patched_unet_reloads_with_its_positions_and_the_stock_class_warns(make, ours, tmp_path, caplog):
    model = loud(add_positions(make(), "learned + axial(base=10)", "pixel", (1.0, 2.5)))
    assert type(model) is ours
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == ours.__name__
    assert config["position"] == "learned + axial(base=10)"
    assert (config["position_unit"], config["position_origin"]) == ("pixel", [1.0, 2.5])
    assert torch.equal(call(ours.from_pretrained(tmp_path)), call(model))
    with log(caplog):
        stock = type(make()).from_pretrained(tmp_path)
    assert "'position': 'learned + axial(base=10)'" in caplog.text
    assert "will be ignored" in caplog.text
    assert gap(call(stock), call(model)) > 1e-3


@torch.no_grad()
def test_other_unets_get_a_class_of_their_own(tmp_path):
    class Mine(UNet2DModel):
        pass

    model = add_positions(Mine(**SMALL).eval(), "axial")
    assert type(model).__name__ == "RopeMine"
    assert isinstance(model, Mine)
    model.save_pretrained(tmp_path)
    assert torch.equal(call(unets.rope_class(Mine).from_pretrained(tmp_path)), call(model))
    DDPMPipeline(model, DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    again = DDPMPipeline.from_pretrained(tmp_path / "pipeline").unet
    assert type(again) is type(model)
    assert torch.equal(call(again), call(model))
    assert unets.RopeUNet3DConditionModel is unets.rope_class(UNet3DConditionModel)
    assert unets.rope_class(UNet2DModel) is RopeUNet2DModel
    with pytest.raises(AttributeError, match="no attribute 'RopeNothing'"):
        unets.RopeNothing  # noqa: B018


@pytest.mark.parametrize(("cls", "take"), [(ControlNetModel, "from_unet"), (UNetMotionModel, "from_unet2d")])
def test_whoever_takes_weights_over_is_told_that_positions_stay_behind(cls, take):
    both = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    model = text(**both)
    getattr(cls, take)(model)
    add_positions(model, "axial(base=10)")
    nn.ModuleDict({"model": model}).state_dict()  # a part of something larger, but whole
    with pytest.warns(UserWarning, match="read without its positions; .* call add_positions on that one too"):
        taken = getattr(cls, take)(model)
    assert not any(hasattr(module, "layout") for module in taken.modules())


def test_whatever_would_replace_the_processor_raises():
    model = add_positions(text(), "axial")
    before = call(model)
    drop = r"SlicedAttnProcessor would drop the positions of this attention: .* call remove_positions first"
    with pytest.raises(ValueError, match=drop):
        model.set_attention_slice(1)
    with pytest.raises(ValueError, match="AttnProcessor would drop the positions"):
        model.set_attn_processor(AttnProcessor())
    with pytest.raises(ValueError, match="PositionProcessor"):
        model.set_default_attn_processor()
    with pytest.raises(ValueError, match="cannot fuse its projections; call remove_positions first"):
        model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="would drop the positions"):
        model.disable_xformers_memory_efficient_attention()
    model.set_attn_processor(model.attn_processors)  # what is in place already may be set again
    assert torch.equal(call(model), before)
    model = add_positions(plain(), "axial")
    model.mid_block.attentions[0].processor = AttnProcessor2_0()  # behind everybody's back
    with pytest.raises(ValueError, match="AttnProcessor2_0 would drop the positions"):
        call(model)


def test_attention_with_positions_wants_a_grid_and_no_other_keys():
    module, x = attention("axial"), torch.randn(2, 24, 32)
    with pytest.raises(ValueError, match=r"give it a map \(B, C, H, W\), or tokens and grid"):
        module(x)
    with pytest.raises(ValueError, match="keys from elsewhere"):
        module(x, encoder_hidden_states=x, grid=(4, 6))
    with pytest.raises(ValueError, match="places 12 tokens, but there are 24"):
        module(x, grid=(4, 3))


# ---- the model class ------------------------------------------------------------------------------------------------


def rope(spec="axial", **changes):
    return RopeUNet2DModel(**SMALL | changes, position=spec).eval()


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_save_and_load(spec, tmp_path):
    model = loud(rope(spec))
    model.save_pretrained(tmp_path)
    again = RopeUNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(call(again), call(model))
    assert again.config.position == spec
    assert not [name for name, tensor in again.named_parameters() if tensor.is_meta]


@pytest.mark.parametrize("spec", ["mixed", "learned + axial"])
def test_what_a_folder_does_not_have_begins_anew(spec, tmp_path):
    plain().save_pretrained(tmp_path)
    model, facts = RopeUNet2DModel.from_pretrained(tmp_path, position=spec, output_loading_info=True)
    assert all(".position." in key for key in facts["missing_keys"])
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model.config.position == spec
    places = model.mid_block.attentions[0].position
    places = getattr(places, "parts", [places])[0]
    assert 0 < next(places.parameters()).std() < 1
    assert call(model).isfinite().all()


def test_config_keys_stand_beside_the_stock_ones():
    stock, ours = plain().config, rope().config
    keys = {
        "position": "axial",
        "position_unit": "index",
        "position_origin": 0.0,
        "zero_init": False,
        "attention": "softmax",
    }
    assert {key: ours[key] for key in set(ours) - set(stock)} == keys
    with pytest.raises(TypeError, match="positoin"):
        RopeUNet2DModel(**SMALL, positoin="axial")


@pytest.mark.parametrize("spec", SPECS)
def test_meta_device(spec):
    with torch.device("meta"):
        model = rope(spec)
    assert all(parameter.is_meta for parameter in model.parameters())
    again = model.to_empty(device="cpu")
    again.load_state_dict(rope(spec).state_dict())
    assert call(again).isfinite().all()


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, steps=2):
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(
        pipeline(batch_size=2, num_inference_steps=steps, generator=generator, output_type="np").images
    )


def test_pipeline_round_trip_and_a_fresh_process(tmp_path):
    pipeline = quiet(DDPMPipeline(add_positions(plain(), "mixed + learned"), DDPMScheduler(num_train_timesteps=50)))
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["unet"] == ["vit_rope.unet", "RopeUNet2DModel"]
    again = quiet(DDPMPipeline.from_pretrained(tmp_path))
    assert type(again.unet) is RopeUNet2DModel
    images = draw(pipeline)
    assert torch.equal(draw(again), images)
    code = (
        "import sys, torch, vit_rope.unet; from diffusers import DDPMPipeline; torch.set_num_threads(1)\n"
        "p = DDPMPipeline.from_pretrained(sys.argv[1]); p.set_progress_bar_config(disable=True)\n"
        "g = torch.Generator().manual_seed(0)\n"
        "x = p(batch_size=2, num_inference_steps=2, generator=g, output_type='np').images\n"
        "torch.save(torch.from_numpy(x), sys.argv[1] + '/images.pt')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
    assert gap(torch.load(tmp_path / "images.pt"), images) < 1e-6


SCHEDULERS = [
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
]


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@torch.no_grad()
def test_schedulers_take_steps(scheduler):
    model, scheduler = rope(), scheduler(beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(4)
    x = torch.randn(1, 1, 8, 16) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
    assert x.shape == (1, 1, 8, 16)
    assert x.isfinite().all()


def test_ddim_pipeline():
    assert draw(quiet(DDIMPipeline(rope(), DDIMScheduler()))).shape == (2, 16, 16, 1)


@pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained model name:FutureWarning")
def test_ema_round_trip(tmp_path):
    model = rope("mixed + learned")
    ema = EMAModel(model.parameters(), decay=0.9, model_cls=RopeUNet2DModel, model_config=model.config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    ema.step(model.parameters())
    ema.save_pretrained(tmp_path)
    again = EMAModel.from_pretrained(tmp_path, RopeUNet2DModel)
    assert again.optimization_step == 1
    assert again.model_config["position"] == "mixed + learned"
    for a, b in zip(ema.shadow_params, again.shadow_params, strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_copies_and_pickles():
    model = add_positions(plain(), "mixed + learned")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(call(again), call(model))


@torch.no_grad()
def test_half_precision_keeps_frequencies(tmp_path):
    model = loud(rope("mixed + learned"))
    model.save_pretrained(tmp_path)
    loaded = RopeUNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    for again in (copy.deepcopy(model).to(torch.bfloat16), copy.deepcopy(model).bfloat16(), loaded):
        assert again.dtype == torch.bfloat16
        assert {p.dtype for name, p in again.named_parameters() if name.endswith("freqs")} == {torch.float32}
        output = call(again, dtype=torch.bfloat16)
        assert output.dtype == torch.bfloat16
        assert gap(output.float(), call(model)) < 0.05
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gap(call(model).float(), call(model)) < 0.05


@torch.no_grad()
def test_channels_last():
    model = loud(rope("mixed + learned"))
    before = call(model)
    assert gap(call(model.to(memory_format=torch.channels_last)), before) < 1e-5


@pytest.mark.parametrize("make", [plain, text])
def test_gradient_checkpointing_gives_the_same_gradients_also_with_shapes_in_between(make):
    model = add_positions(make(), "learned + mixed").train()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        first = call(model, 8, 16)
        second = call(model, 16, 8)  # as many tokens on another grid, before the first is run again
        (first.square().sum() + second.square().sum()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.enable_gradient_checkpointing()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize(
    ("make", "backend"), [(plain, "eager"), (text, "eager"), pytest.param(plain, "aot_eager", marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_one_graph_serves_all_sizes(make, backend):
    torch._dynamo.reset()
    model = add_positions(make(), "learned + mixed")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((8, 24), (16, 16), (24, 8), (20, 12)):
            assert gap(call(compiled, *size), call(model, *size)) < 1e-5


@torch.no_grad()
def test_export_takes_all_sizes():
    model = rope("axial + learned")
    batch, high, wide = (torch.export.Dim(name, max=32) for name in ("batch", "high", "wide"))
    shapes = {"sample": {0: batch, 2: 2 * high, 3: 2 * wide}, "timestep": {0: batch}}
    program = torch.export.export(model, (torch.randn(2, 1, 16, 8), torch.tensor([3, 9])), dynamic_shapes=shapes)
    others = torch.randn(3, 1, 8, 24), torch.tensor([1, 2, 3])
    assert gap(program.module()(*others).sample, model(*others).sample) < 1e-5


@torch.no_grad()
def test_zero_init_begins_at_zero():
    model = rope(zero_init=True)
    assert model.config.zero_init
    assert call(model).abs().max() == 0
    assert model.mid_block.attentions[0].to_out[0].weight.abs().max() == 0
    assert model.down_blocks[0].resnets[0].conv2.weight.abs().max() == 0
    assert model.down_blocks[0].resnets[0].conv1.weight.abs().max() > 0
    other = RopeUNet2DConditionModel(**TEXT, zero_init=True)
    assert call(other).abs().max() == 0
    assert other.mid_block.attentions[0].proj_out.weight.abs().max() == 0
    assert other.mid_block.attentions[0].transformer_blocks[0].attn1.to_out[0].weight.abs().max() > 0


def test_what_the_page_shows(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "unet.md").read_text()
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    assert type(names["unet"]) is type(names["pipeline"].unet) is RopeUNet2DModel


def test_a_command_line_reads_all_options():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RopeUNet2DModel, "model")
    options = parser.parse_args(["--model.sample_size=16", "--model.position=mixed", "--model.position_origin=center"])
    assert (options.model.sample_size, options.model.position, options.model.position_origin) == (16, "mixed", "center")
    with pytest.raises(jsonargparse.ArgumentError, match="positoin"):
        parser.parse_args(["--model.positoin=mixed"])


# ---- bad input ------------------------------------------------------------------------------------------------------


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
        ValueError, match=r"this UNet2DConditionModel has no self-attention over a feature map that pos"
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
def test_self_attention_of_another_kind_is_refused(down, first):
    up = tuple(name.replace("Down", "Up") for name in reversed(down))
    if "SpatioTemporal" in down[0]:
        blocks = {"down_block_types": down, "up_block_types": up, "block_out_channels": (32, 64)}
        heads = {"num_attention_heads": (2, 4), "cross_attention_dim": 12}
        model = UNetSpatioTemporalConditionModel(16, layers_per_block=1, **blocks, **heads)
    else:
        model = text(down_block_types=down, up_block_types=up, mid_block_type=None)
    with pytest.raises(ValueError, match=rf"^positions do not reach {first} of this UNet.*; choose block types that"):
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


def test_a_size_that_cannot_be():
    with pytest.raises(ValueError, match="images of 16 x 15 do not divide by 2, which is how much this U-Net downsam"):
        call(rope(), 16, 15)
    for size in (0, (8,), (8, 8, 8), (8.0, 8)):
        with pytest.raises(ValueError, match=r"sample_size is a number of pixels or \(height, width\)"):
            rope(sample_size=size)
    with pytest.raises(ValueError, match=r"trained at in its config; set it there.*register_to_config.*it is None"):
        add_positions(plain(sample_size=None), "axial")
    with pytest.raises(ValueError, match=r"in its config.*got sample_size=32 beside it"):
        add_positions(plain(), "axial", sample_size=32)


def test_positions_twice_or_none_to_remove():
    model = add_positions(plain(), "axial")
    with pytest.raises(ValueError, match="has positions already, 'axial'; call remove_positions first"):
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


def test_other_models_and_attention_of_its_own():
    for model in (nn.Linear(1, 1), AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)):
        with pytest.raises(TypeError, match=f"takes a U-Net of diffusers or .*, got {type(model).__name__}"):
            add_positions(model, "axial")
    model = plain()
    model.mid_block.attentions[0].set_processor(AttnProcessor())
    with pytest.raises(ValueError, match=r"mid_block.attentions.0 computes attention its own way, by AttnProcessor"):
        add_positions(model, "axial")


# ---- denoising-diffusion-pytorch ------------------------------------------------------------------------------------


@pytest.fixture
def lucid():
    package = pytest.importorskip("denoising_diffusion_pytorch", reason="denoising-diffusion-pytorch is not installed")

    def make(**options):
        torch.manual_seed(0)
        options = {"dim_mults": (1, 2), "attn_dim_head": 8, "attn_heads": 2, "channels": 1} | options
        return package.Unet(16, **options).eval()

    return make


def denoise(model, height=16, width=16):
    generator = torch.Generator().manual_seed(1)
    return model(torch.randn(2, 1, height, width, generator=generator), torch.tensor([3, 9]))


@pytest.mark.parametrize("options", [{}, {"full_attn": True}, {"full_attn": True, "flash_attn": True}])
@torch.no_grad()
def test_lucidrains_identity_is_stock_and_rotation_is_not(lucid, options):
    model = lucid(**options)
    for size in ((16, 16), (8, 24)):
        stock = denoise(model, *size)
        for spec in SPECS:
            placed = add_positions(copy.deepcopy(model), spec, sample_size=16)
            if not any(name in spec for name in ("learned", "sincos", "yarn")):  # which do more than turn
                assert gap(denoise(still(copy.deepcopy(placed)), *size), stock) < 2e-6
            if spec != "none":
                assert gap(denoise(loud(placed), *size), stock) > 1e-5
            assert torch.equal(denoise(remove_positions(placed), *size), stock)
            assert set(placed.state_dict()) == set(model.state_dict())


@torch.no_grad()
def test_lucidrains_attention_is_relative_and_its_memory_has_no_place(lucid):
    def module(origin, full):
        return add_positions(lucid(full_attn=full), "axial", origin=origin, sample_size=8).downs[0][2]

    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(2))
    for full in (True, False):
        here, there = (module(origin, full)(x) for origin in (0.0, (3.0, -2.0)))
        assert gap(here, there) > 1e-6  # memory sits at the origin, un-rotated
    here, there = (module(origin, False) for origin in (0.0, (3.0, -2.0)))
    for linear in (here, there):
        linear.mem_kv[0] = -1e4  # keys whose softmax is zero
    assert gap(here(x), there(x)) < 1e-5


@torch.no_grad()
def test_linear_attention_turns_the_numerator_alone():
    lucidrains = pytest.importorskip("vit_rope.unet.lucidrains", reason="denoising-diffusion-pytorch is not installed")
    layout = map_layout(8, 1, 8, 0, (3, 4), "index", 0.0)
    encoding = build_at("", 0, "axial", layout, "")(layout.coords())
    q, k, v = torch.rand(3, 1, 1, 12, 8).unbind(0)
    out = lucidrains.attend_features(q, k, v, encoding)
    turn = encoding.q.rotation[0][0, :, 0]  # (N, R, 2)
    rotation = torch.stack([torch.block_diag(*(torch.stack((c, -s, s, c)).view(2, 2) for c, s in t)) for t in turn])
    for m in range(12):  # RoFormer, equation 19, one token at a time
        weights = torch.stack([(rotation[m] @ q[0, 0, m]) @ (rotation[n] @ k[0, 0, n]) for n in range(12)])
        torch.testing.assert_close(out[0, 0, m], weights @ v[0, 0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="linear attention has no logits"):
        lucidrains.attend_features(q, k, v, encoding._replace(biases=[torch.zeros(1, 1, 12, 12)]))


def test_lucidrains_bad_input(lucid):
    with pytest.raises(ValueError, match="does not know the size that it is trained at; give sample_size"):
        add_positions(lucid(), "axial")
    wrong = r"downs.0.2 \(level 0, 16 channels, 2 heads of 6\).*attn_dim_head of the Unet sets the channels of a head"
    with pytest.raises(ValueError, match=wrong):
        add_positions(lucid(attn_dim_head=6), "axial", sample_size=16)
    with pytest.raises(ValueError, match="positions already; call remove_positions first"):
        add_positions(add_positions(lucid(), "axial", sample_size=16), "axial", sample_size=16)
    with pytest.raises(ValueError, match="this Unet has no positions to remove"):
        remove_positions(lucid())
    import denoising_diffusion_pytorch as package

    with pytest.raises(TypeError, match="positions go into Unet alone, not KarrasUnet"):
        add_positions(package.KarrasUnet(image_size=8, dim=8), "axial", sample_size=8)


def test_lucidrains_trains_and_samples(lucid):
    import denoising_diffusion_pytorch as package

    model = add_positions(lucid(), "learned + mixed", sample_size=8)
    diffusion = package.GaussianDiffusion(model, image_size=8, timesteps=4)
    diffusion(torch.rand(2, 1, 8, 8)).backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if ".position." in name)


@torch.no_grad()
def test_projections_that_somebody_watches_are_asked_themselves():
    placed = add_positions(plain(), "axial")
    attention = placed.mid_block.attentions[0]
    want, seen = call(placed, 16, 16), []
    handle = attention.to_k.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0], out)))
    assert gap(call(placed, 16, 16), want) < 1e-5
    handle.remove()
    tokens, keys = seen[0]
    torch.testing.assert_close(keys, attention.to_k(tokens), rtol=0, atol=0)  # not rotated
    attention.to_k.forward = lambda tokens: keys * 0  # as tools that move weights about do
    assert gap(call(placed, 16, 16), want) > 1e-6
