"""The classes of U-Nets with positions: saving, loading, pipelines, copies, precision."""

import copy
import io
import json
import pickle
import subprocess
import sys

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UniPCMultistepScheduler,
)
from diffusers.training_utils import EMAModel
from torch import nn

from tests.unet.helpers import SMALL, SPECS, TEXT, call, gap, log, plain, rope, text, with_large_tables
from vit_rope import unet as unets
from vit_rope.unet import (
    RopeUNet2DConditionModel,
    RopeUNet2DModel,
    add_positions,
)


@pytest.mark.parametrize(("make", "ours"), [(plain, RopeUNet2DModel), (text, RopeUNet2DConditionModel)])
@torch.no_grad()
def test_a_patched_unet_reloads_with_its_positions_and_the_stock_class_warns(make, ours, tmp_path, caplog):
    model = with_large_tables(add_positions(make(), "learned + axial(base=10)", "pixel", (1.0, 2.5)))
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
def test_other_unets_get_their_own_class(tmp_path):
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
def test_taking_over_the_weights_of_a_part_warns_that_positions_are_lost(cls, take):
    both = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    model = text(**both)
    getattr(cls, take)(model)
    add_positions(model, "axial(base=10)")
    nn.ModuleDict({"model": model}).state_dict()  # all of the U-Net, as a part of a larger module
    with pytest.warns(UserWarning, match="read without its positions; .* call add_positions on that model too"):
        taken = getattr(cls, take)(model)
    assert not any(hasattr(module, "layout") for module in taken.modules())


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_save_and_load(spec, tmp_path):
    model = with_large_tables(rope(spec))
    model.save_pretrained(tmp_path)
    again = RopeUNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(call(again), call(model))
    assert again.config.position == spec
    assert not [name for name, tensor in again.named_parameters() if tensor.is_meta]


@pytest.mark.parametrize("spec", ["mixed", "learned + axial"])
def test_parameters_missing_in_a_folder_are_initialised(spec, tmp_path):
    plain().save_pretrained(tmp_path)
    model, facts = RopeUNet2DModel.from_pretrained(tmp_path, position=spec, output_loading_info=True)
    assert all(".position." in key for key in facts["missing_keys"])
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model.config.position == spec
    position = model.mid_block.attentions[0].position
    first = getattr(position, "parts", [position])[0]
    assert 0 < next(first.parameters()).std() < 1
    assert call(model).isfinite().all()


def test_config_has_the_stock_keys_and_those_of_positions():
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
    model = with_large_tables(rope("mixed + learned"))
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
def test_zero_init_starts_with_zero_outputs():
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


def test_a_command_line_reads_all_options():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RopeUNet2DModel, "model")
    options = parser.parse_args(["--model.sample_size=16", "--model.position=mixed", "--model.position_origin=center"])
    assert (options.model.sample_size, options.model.position, options.model.position_origin) == (16, "mixed", "center")
    with pytest.raises(jsonargparse.ArgumentError, match="positoin"):
        parser.parse_args(["--model.positoin=mixed"])
