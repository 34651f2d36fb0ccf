"""Denoisers: training, sampling, the command line around both, and scores of samples."""

import contextlib
import csv
import io
import json
import math
import re
import struct
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageSequence
from torch import nn

from tests.helpers import ROOT, TINY, dit_denoiser, perturbed, unet_denoiser
from vit_rope import sampling
from vit_rope.__main__ import main
from vit_rope.cli import study
from vit_rope.models.dit import RopeDiT
from vit_rope.plots import plot_study
from vit_rope.sampling import SCHEDULERS, Denoiser, SampleConfig, load, sample, sample_batches
from vit_rope.training import quality
from vit_rope.training.data import in_memory
from vit_rope.training.diffusion import Diffusion
from vit_rope.training.objective import make_noise, make_target, snr_weight
from vit_rope.training.quality import Inception, Judge, connected_parts, copy_error, frechet_distance, scores
from vit_rope.unet import RopeUNet2DModel

CONFIGS = sorted((ROOT / "configs").glob("*ddpm*.yaml"))
CONFIG = {
    "seed_everything": 0,
    "model": {
        "class_path": "Diffusion",
        "init_args": {
            "model": "RopeDiT",
            "model_args": TINY,
            "conditional": True,
            "sample_every": 2,
            "sample_count": 12,
            "sample_steps": 3,
            "optim": {"lr": 0.01},
            "schedule": {"name": "constant", "warmup": 0},
        },
    },
    "data": {"class_path": "Digits", "init_args": {"batch_size": 64, "augment": "none"}},
    "trainer": {"max_epochs": 2, "limit_train_batches": 4, "accelerator": "cpu"},
    "checkpoint": {"monitor": "val/loss", "mode": "min"},
    "ema": {"decay": 0.9},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def run(*args: object) -> str:
    """What a command prints on stdout."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        main([str(arg) for arg in args])
    return out.getvalue()


@pytest.fixture(scope="module")
def fitted(config, tmp_path_factory):
    """A finished run with classes: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return folder, run("fit", "--config", config, "--out", folder)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """The finished run of a classifier."""
    folder = tmp_path_factory.mktemp("judge")
    learner = {"class_path": "Classification", "init_args": {"model": "vit_rope_tiny_patch16_224", "model_args": TINY}}
    settings = {**CONFIG, "model": learner, "trainer": {"max_epochs": 1, "accelerator": "cpu"}}
    del settings["checkpoint"]
    (folder / "judge.yaml").write_text(yaml.safe_dump(settings))
    run("fit", "--config", folder / "judge.yaml", "--out", folder / "run")
    return folder / "run"


# Targets and losses


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_targets_and_weights_are_the_formulas(kind):
    noise = make_noise(1000, "squaredcos_cap_v2", kind)
    steps, gamma = torch.tensor([0, 100, 500, 900]), 5.0
    images, drawn = torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2)
    kept = torch.tensor([noise.alphas_cumprod[t] for t in steps]).view(4, 1, 1, 1)
    signal, sigma = kept.sqrt(), (1 - kept).sqrt()
    noisy = signal * images + sigma * drawn
    target = make_target(noise, images, drawn, steps)
    # an error of the prediction is `scale` times that error in the image, whose square min-SNR
    # weighs by min(SNR, 5)
    wanted, scale = {
        "epsilon": (drawn, sigma / signal),
        "sample": (images, torch.ones(4, 1, 1, 1)),
        "v_prediction": (signal * drawn - sigma * images, sigma),
    }[kind]
    torch.testing.assert_close(target, wanted)
    for i in range(4):
        image = sampling.predicted_x0(kind, noisy[i], target[i], float(signal[i]), float(sigma[i]))
        torch.testing.assert_close(image, images[i], rtol=1e-3, atol=1e-3)
    snr = (kept / (1 - kept)).flatten()
    found = snr_weight(noise, steps, gamma)
    torch.testing.assert_close(found, snr.clamp(max=gamma) * scale.flatten() ** 2, rtol=1e-3, atol=1e-7)
    published = {"epsilon": snr, "sample": torch.ones(4), "v_prediction": snr + 1}[kind]  # arXiv:2303.09556
    torch.testing.assert_close(found, torch.minimum(snr, torch.tensor(gamma)) / published)


@pytest.mark.parametrize("size", [4000, 250, 3])
def test_losses_are_the_squared_error_by_noise_level(monkeypatch, size):
    """The same for every batch size: the next image is at the next level."""
    module = Diffusion("RopeDiT", TINY, num_classes=10, in_chans=1, img_size=8).eval()  # predicts zeros
    logged = {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: value.item()}))
    strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: tensor)
    module.trainer = SimpleNamespace(global_rank=0, world_size=1, strategy=strategy, num_val_batches=[0])
    module.on_validation_epoch_start()
    for index, images in enumerate(torch.zeros(4000, 1, 8, 8).split(size)):
        module.validation_step((images, torch.zeros(len(images)).long()), index)
    module.on_validation_epoch_end()
    kept = module.noise.alphas_cumprod  # of black images, the velocity is the noise times the signal
    for level in range(10):
        wanted = kept[100 * level : 100 * (level + 1)].mean()
        assert logged[f"val/loss_t{100 * level:03}"] == pytest.approx(float(wanted), rel=0.1, abs=2e-3)
    assert logged["val/loss"] == pytest.approx(float(kept.mean()), rel=0.02)


def test_validation_noise_is_the_same_each_time_and_does_not_affect_training(monkeypatch):
    module = Diffusion("RopeDiT", TINY, num_classes=10, in_chans=1, img_size=8).eval()
    perturbed(module.model)
    found = []
    monkeypatch.setattr(module, "log", lambda name, value, **_: found.append(value.item()))
    strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: tensor)
    module.trainer = SimpleNamespace(global_rank=0, world_size=1, strategy=strategy, num_val_batches=[0])
    batch = (torch.rand(12, 1, 8, 8), torch.zeros(12).long())
    before = torch.random.get_rng_state()
    for index in (3, 3, 4):
        module.on_validation_epoch_start()
        module.validation_step(batch, index)
        module.on_validation_epoch_end()
    assert torch.equal(before, torch.random.get_rng_state())
    assert found[:11] == found[11:22] != found[22:]


@pytest.mark.parametrize("conditional", [True, False])
def test_labels_are_left_out_for_guidance(monkeypatch, conditional):
    options = {"conditional": conditional, "label_dropout": 0.5}
    module = Diffusion("RopeDiT", TINY, num_classes=10, in_chans=1, img_size=8, **options)
    seen = []
    monkeypatch.setattr(module.model, "forward", lambda x, t, *labels: seen.extend(labels) or SimpleNamespace(sample=x))
    module.trainer = SimpleNamespace(global_rank=0, current_epoch=0)
    module.loss((torch.rand(400, 1, 8, 8), torch.arange(400) % 10), 0)
    assert len(seen) == conditional
    if conditional:
        hidden = seen[0] == 10
        assert 0.4 < hidden.float().mean() < 0.6
        assert torch.equal(seen[0][~hidden], (torch.arange(400) % 10)[~hidden])


def test_positions_and_labels_do_not_decay():
    model = {"embed_dim": 16, "depth": 1, "num_heads": 2, "position": "mixed + learned"}
    module = Diffusion("RopeDiT", model, num_classes=10, in_chans=1, img_size=8, conditional=True)
    module.trainer = SimpleNamespace(estimated_stepping_batches=10, optimizers=[])
    names = module.no_weight_decay()
    assert names == {f"model.{name}" for name in module.model.no_weight_decay()}
    assert len(names) == 3
    unet = unet_denoiser().model
    module.model = RopeUNet2DModel.from_config({**unet.config, "position": "mixed + learned"})
    assert len(module.no_weight_decay()) == 2 * 4  # a table and directions in each of four attentions


# Schedulers


class Exact(nn.Module):
    """The best denoiser of pixels that are -0.6 or 0.5.

    Its predictions have normal errors, whose deviation is `error` times their own.
    """

    config = SimpleNamespace(in_channels=1)

    def __init__(self, noise, error: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.noise, self.error, self.generator = noise, error, torch.Generator().manual_seed(1)

    def forward(self, x, time):
        sigmas = ((1 - self.noise.alphas_cumprod) / self.noise.alphas_cumprod).double().sqrt()
        low = int(time)
        sigma = torch.lerp(sigmas[low], sigmas[min(low + 1, 999)], float(time) - low)
        signal = (1 + sigma**2) ** -0.5
        spread, x = sigma * signal, x.double()
        odds = [-((x - signal * value) ** 2) / (2 * spread**2) for value in (-0.6, 0.5)]
        image = torch.stack(odds).softmax(dim=0)[1] * 1.1 - 0.6
        eps = (x - signal * image) / spread
        kind = self.noise.config.prediction_type
        out = {"epsilon": eps, "sample": image, "v_prediction": signal * eps - spread * image}[kind]
        out = out + self.error * out.std() * torch.randn(out.shape, generator=self.generator, dtype=out.dtype)
        return SimpleNamespace(sample=out.float())


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear", "sigmoid"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_draws_what_an_exact_denoiser_knows(name, schedule):
    for kind in ("v_prediction", "epsilon", "sample"):
        noise = make_noise(1000, schedule, kind)
        for error, most in (
            (0.0, 0.03),
            (0.05, 0.08),
        ):  # without clipping, the second grows by a factor of 100
            scheduler = sampling.make_scheduler(name, noise, 20)
            generators = [torch.Generator().manual_seed(i) for i in range(4)]
            start = torch.cat([torch.randn(1, 1, 16, 16, generator=generator) for generator in generators])
            images = sampling.denoise(Denoiser(Exact(noise, error), noise), scheduler, start, generators)
            nearest = torch.where(images > -0.05, 0.5, -0.6)
            # pndm and deis overshoot, but remain stable
            assert (images - nearest).abs().mean() < most * (3 if name in ("pndm", "deis") else 1), (kind, error)
            assert 0.4 < (images > -0.05).float().mean() < 0.6


def test_ddpm_is_what_the_pipeline_of_diffusers_draws(tmp_path):
    denoiser = unet_denoiser()
    sampling.save(denoiser, tmp_path / "pipeline")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    theirs = pipeline(2, generators, num_inference_steps=20, output_type="pt").images * 2 - 1
    torch.testing.assert_close(sample(denoiser, 2, 20, "ddpm"), theirs, rtol=0, atol=2e-3)


# Seeds, tiles, sizes, labels


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm++sde", "euler-a"])
@pytest.mark.parametrize("make", [dit_denoiser, unet_denoiser])
def test_an_image_does_not_depend_on_how_many_are_drawn(make, name):
    denoiser = make(size=(20, 24))  # tiles of eight
    assert sampling.tile_size((20, 24), torch.device("cpu")) == 8
    many = sample(denoiser, 13, 3, name, seed=5)
    assert torch.equal(sample(denoiser, 3, 3, name, seed=5), many[:3])
    for batch in (4, 100):
        parts = list(sample_batches(denoiser, SampleConfig(11, 3, name, seed=5, batch=batch)))
        assert {len(part) for part in parts[:-1]} <= {batch}
        assert torch.equal(torch.cat(parts), many[:11])
    torch.testing.assert_close(sample(denoiser, 1, 3, name, seed=7), many[2:3], rtol=0, atol=1e-3)
    assert not torch.equal(many[0], many[1])


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_interpolation_between_seeds(name):
    denoiser = dit_denoiser(size=32)
    images = sample(denoiser, 6, 4, name, seed=3, end_seed=8)
    assert torch.equal(images[0], sample(denoiser, 1, 4, name, seed=3)[0])
    if name == "ddim":  # it adds no noise at its steps; ddpm adds that of the first seed
        torch.testing.assert_close(images[-1], sample(denoiser, 1, 4, name, seed=8)[0])
    steps = (images[1:] - images[:-1]).flatten(1).norm(dim=1)
    assert steps.min() > 0.1
    assert steps.max() < (images[-1] - images[0]).norm()
    parts = torch.cat(list(sample_batches(denoiser, SampleConfig(6, 4, name, seed=3, end_seed=8, batch=4))))
    assert torch.equal(parts, images)
    noise = torch.randn(2, 50_000)
    for fraction in (0, 0.3, 1):
        assert sampling.slerp(noise[0], noise[1], fraction).std() == pytest.approx(1, abs=0.02)


def test_guidance_and_labels():
    denoiser = dit_denoiser(classes=3)
    of_one = sample(denoiser, 4, 3, labels=[1])
    in_turn = sample(denoiser, 4, 3, labels=[0, 1])
    assert torch.equal(in_turn[1::2], of_one[1::2])
    assert not torch.equal(in_turn[0], of_one[0])
    anything = sample(denoiser, 4, 3)
    assert not torch.equal(anything, of_one)
    torch.testing.assert_close(sample(denoiser, 4, 3, labels=[1], guidance=1 + 1e-6), of_one, rtol=0, atol=1e-3)
    torch.testing.assert_close(sample(denoiser, 4, 3, labels=[1], guidance=0.0), anything, rtol=0, atol=1e-3)
    assert (sample(denoiser, 4, 3, labels=[1], guidance=3.0) - of_one).abs().max() > 0.01


@pytest.mark.parametrize(("size", "shape"), [((4, 12), (4, 12)), (None, (8, 8)), ([16, 8], (16, 8))])
def test_sizes_other_than_that_of_training(size, shape):
    assert sample(dit_denoiser(), 2, 2, size=size).shape == (2, 1, *shape)
    if size != (4, 12):
        assert sample(unet_denoiser(size=8), 2, 2, size=size).shape == (2, 3, *shape)


def test_callback():
    seen = []
    images = sample(dit_denoiser(), 70, 4, callback=lambda fraction, x: seen.append((fraction, x.clone())))
    assert [fraction for fraction, _ in seen] == [i / 8 for i in (0, 1, 2, 3, 4, 4, 5, 6, 7, 8)]
    assert torch.equal(torch.cat((seen[4][1], seen[9][1])), images)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scheduler": "dpm"}, r"unknown scheduler 'dpm'; there are ddim, ddpm, dpm\+\+, .*pndm"),
        (
            {"size": (8, 10)},
            "8 x 10 are not divisible by 4, the factor by which this RopeDiT downsamples; take 8 x 8",
        ),
        ({"size": (0, 8)}, "images of 0 x 8"),
        ({"labels": [3]}, "knows the labels 0 to 2, not 3"),
        ({"labels": [1, -1]}, "knows the labels 0 to 2, not -1"),
        ({"guidance": 2.0}, "guidance 2 has no effect: no label is given to guide towards"),
        ({"steps": 1001}, "1000 noise levels, so steps are 1 to 1000, not 1001"),
        ({"steps": 0}, "steps are 1 to 1000, not 0"),
        ({"n": 0}, "n and batch must be at least 1, got 0 and 0"),
    ],
)
def test_impossible_requests_are_refused_before_any_work(options, match):
    denoiser = dit_denoiser(classes=3)
    denoiser.model.forward = None
    with pytest.raises(ValueError, match=match) as caught:
        sample(denoiser, **options)
    assert "\n" not in str(caught.value)


def test_unknown_labels():
    with pytest.raises(ValueError, match="trained without labels, so it cannot draw label 3; leave it out"):
        sample(dit_denoiser(), labels=[3])
    always = dit_denoiser(classes=3)._replace(null_label=None)
    with pytest.raises(ValueError, match="never trained without a label; give one"):
        sample(always)
    with pytest.raises(ValueError, match="guidance 2 has no effect: the model was never trained without a label"):
        sample(always, labels=[1], guidance=2.0)


# The transformer


@pytest.mark.parametrize("spec", ["none", "axial", "mixed + learned", "flat", "sincos"])
def test_transformer(spec, tmp_path):
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_class_embeds": 3}
    model = RopeDiT(sample_size=(4, 8), in_channels=2, position=spec, **sizes)
    x, time, labels = torch.randn(2, 2, 4, 8), torch.tensor([3, 700]), torch.tensor([0, 2])
    assert not model(x, time, labels).sample.any()  # zero at the start
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    out = model(x, time, labels).sample
    assert out.shape == x.shape
    torch.testing.assert_close(model(x[:1], 3, labels[:1], return_dict=False)[0], out[:1])
    assert model(torch.randn(2, 2, 6, 10), time, labels).sample.shape == (2, 2, 6, 10)
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    gradient = model.embed.weight.grad.clone()
    model.enable_gradient_checkpointing()
    model.zero_grad()
    model(x, time, labels).sample.square().sum().backward()
    torch.testing.assert_close(model.embed.weight.grad, gradient)
    model.save_pretrained(tmp_path)
    again = RopeDiT.from_pretrained(tmp_path)
    assert again.config["position"] == spec
    assert torch.equal(again(x, time, labels).sample, model.eval()(x, time, labels).sample)
    half = model.to(torch.bfloat16)(x.bfloat16(), time, labels).sample
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), out, rtol=0.1, atol=0.1)


def test_parameters_missing_in_a_folder_are_initialised(tmp_path):
    dit_denoiser(position="axial").model.save_pretrained(tmp_path)
    model = RopeDiT.from_pretrained(tmp_path, position="learned")
    assert 0.01 < model.position.table.std() < 0.03
    assert model.config.position == "learned"


def test_transformer_locates_patches_only_by_positions():
    x = torch.randn(1, 1, 8, 8)
    for spec, moved in (("none", True), ("axial", False)):
        model = dit_denoiser(position=spec, patch_size=2).model
        rolled = model(x.roll(2, dims=3), 5).sample.roll(-2, dims=3)
        assert torch.allclose(rolled, model(x, 5).sample, atol=1e-5) == moved


def test_transformer_refuses():
    with pytest.raises(ValueError, match="images of 7 x 8 do not divide into patches of 2; pad, crop or resize"):
        RopeDiT(sample_size=(7, 8))
    with pytest.raises(ValueError, match="did you mean axial"):
        RopeDiT(position="axail")
    with pytest.raises(ValueError, match="class_labels must not be given to this model"):
        dit_denoiser().model(torch.randn(1, 1, 8, 8), 0, torch.tensor([0]))
    with pytest.raises(ValueError, match="class_labels must be given to this model"):
        dit_denoiser(classes=2).model(torch.randn(1, 1, 8, 8), 0)


# Training from the command line


def test_one_folder_keeps_the_run(fitted):
    folder, text = fitted
    assert sorted(path.name for path in folder.iterdir() if path.name != ".lock") == [
        "checkpoints", "config.yaml", "exported", "metrics.jsonl", "samples", "summary.json",
    ]  # fmt: skip
    last = text.rstrip().splitlines()[-1]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val/loss"] for row in rows if "val/loss" in row]
    assert last == f"val/loss {min(losses):.4f}"
    assert {f"val/loss_t{100 * i:03}" for i in range(10)} <= {key for row in rows for key in row}
    exported = sorted(str(path.relative_to(folder / "exported")) for path in (folder / "exported").rglob("*.*"))
    assert exported == [
        "labels.json", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert "val/loss" in run("validate", "--ckpt_path", folder).splitlines()[-1]
    assert "test/loss" in run("test", "--ckpt_path", folder).splitlines()[-1]


def test_sample_images_use_averaged_weights_and_the_same_noise(fitted):
    folder, _ = fitted
    assert [path.name for path in (folder / "samples").iterdir()] == ["epoch_0002.png"]
    with Image.open(folder / "samples" / "epoch_0002.png") as image:
        assert (image.mode, image.size) == ("L", (2 + 10 * 66, 2 + 2 * 66))  # ten classes, 8x8 enlarged
        found = np.asarray(image)
    images = sample(load(folder / "checkpoints" / "last.ckpt"), 12, 3, labels=list(range(10)))
    assert np.array_equal(found, np.asarray(sampling.image_grid(images, 10)))


@pytest.mark.parametrize("first", [True, False])
def test_every_process_draws_and_the_first_one_writes(tmp_path, monkeypatch, first):
    learner = Diffusion(**{**CONFIG["model"]["init_args"], "num_classes": 10, "in_chans": 1, "img_size": 8})
    learner._trainer = SimpleNamespace(
        current_epoch=1, max_epochs=2, state=SimpleNamespace(fn="fit"), fast_dev_run=False, is_global_zero=first,
        checkpoint_callback=SimpleNamespace(dirpath=str(tmp_path / "checkpoints")),
    )  # fmt: skip
    drawn = []
    monkeypatch.setattr(sampling, "sample", lambda _, n, *args, **options: drawn.append(n) or torch.zeros(n, 1, 8, 8))
    learner._draw()
    assert drawn == [12]
    assert [path.name for path in tmp_path.rglob("*.png")] == ["epoch_0002.png"] * first


def test_run_checkpoint_and_pipeline_draw_the_same(fitted):
    folder, _ = fitted
    paths = (folder, folder / "checkpoints" / "best.ckpt", folder / "exported")
    drawn = [sample(load(path), 3, 3, "dpm++", labels=[1, 2], guidance=2.0) for path in paths]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "exported")
    assert isinstance(pipeline.unet, RopeDiT)
    assert pipeline.unet.config["position"] == TINY["position"]
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    denoiser = load(folder)
    assert (denoiser.classes, denoiser.null_label, denoiser.size, denoiser.multiple) == (10, 10, (8, 8), 4)


def test_code_blocks_of_the_page_run(fitted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for name in ("digits_ddpm", "fashion_ddpm"):
        Path("runs", name).symlink_to(fitted[0])
    names = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "diffusion.md").read_text(), re.DOTALL):
        exec(code, names)
    assert names["images"].shape == (16, 1, 8, 8)
    assert Path("threes.png").is_file()
    assert type(names["pipeline"].unet) is RopeDiT


def test_resumed_equals_uninterrupted(config, fitted, tmp_path):
    run("fit", "--config", config, "--out", tmp_path, "--trainer.max_epochs", 1)
    run("fit", "--config", config, "--out", tmp_path, "--ckpt_path", "last")
    uninterrupted, resumed = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (fitted[0], tmp_path)
    )
    for part in ("state_dict", "weights_in_training"):
        for name, value in uninterrupted[part].items():
            assert torch.equal(resumed[part][name], value), name


@pytest.mark.parametrize(
    "args",
    [
        ("--model.prediction", "epsilon", "--model.snr_gamma", 5, "--model.conditional", "false"),
        ("--model.prediction", "sample", "--model.beta_schedule", "sigmoid", "--trainer.precision", "bf16-mixed"),
        ("--model.label_dropout", 0, "--model.sample_scheduler", "heun", "--ema.decay", 0),
    ],
)
def test_options_train(config, tmp_path, args):
    run("fit", "--config", config, "--out", tmp_path / "r", "--model.sample_every", 1, "--trainer.max_epochs", 1, *args)
    run("sample", tmp_path / "r", "--n", 2, "--steps", 2, "--out", tmp_path / "r.png", *label(args))
    assert (tmp_path / "r" / "samples" / "epoch_0001.png").is_file()


def label(args) -> tuple[object, ...]:
    return ("--label", 3) if "--model.label_dropout" in args else ()


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (("--model.model_args.postion", "axial"), "RopeDiT has no argument 'postion'; did you mean position"),
        (("--model.model_args.in_channels", 1), "model_args give in_channels, which comes from the data"),
        (("--model.model_args.position", "axail"), "did you mean axial"),
        (
            ("--model.timesteps", 100, "--model.beta_schedule", "linear"),
            "the linear schedule leaves 60% of",
        ),
        (("--model.timesteps", 1), "at least 2 timesteps"),
        (("--model.sample_scheduler", "dpm"), "unknown scheduler 'dpm'; there are ddim"),
        (("--model.sample_steps", 2000), "steps are 1 to 1000, not 2000"),
        (("--model.label_dropout", 1), "0 <= label_dropout < 1"),
        (("--model.snr_gamma", -1), "snr_gamma and sample_every >= 0"),
    ],
)
def test_wrong_settings(config, tmp_path, args, match):
    with pytest.raises(SystemExit, match=f"^error: .*{match}") as caught:
        run("fit", "--config", config, "--out", tmp_path / "refused", *args)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "refused").exists()


def test_images_of_a_different_range_or_shape_are_refused():
    module = Diffusion("RopeDiT", TINY, num_classes=10, in_chans=1, img_size=8)
    with pytest.raises(ValueError, match=r"a DDPM needs images in \[-1, 1\], the data reach 2.00; use mean and"):
        module._check((torch.full((2, 1, 8, 8), 2.0), torch.zeros(2).long()), 0)
    with pytest.raises(ValueError, match=r"built for images \(1, 8, 8\), the data have \(3, 8, 8\)"):
        module._check((torch.zeros(2, 3, 8, 8), torch.zeros(2).long()), 0)
    with pytest.raises(ValueError, match="a conditional model needs at least 2 classes, the data have 1"):
        Diffusion("RopeDiT", TINY, num_classes=1, in_chans=1, img_size=8, conditional=True)
    with pytest.raises(ValueError, match="unknown model 'UNet'; there are RopeUNet2DModel, RopeDiT"):
        Diffusion("UNet", {}, in_chans=1, img_size=8)


class Photographs:
    """CIFAR's arrays, with few images."""

    def __init__(self, root: str, train: bool):
        self.data, self.targets = np.zeros((100, 32, 32, 3), np.uint8), list(range(100))


def little_data(root: Path) -> None:
    """Files for all data sets named in configurations."""
    for part in ("train", "t10k"):
        for name, array in (("images-idx3", np.zeros((40, 28, 28), np.uint8)), ("labels-idx1", np.arange(40) % 10)):
            array = array.astype(np.uint8)
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (root / f"{part}-{name}-ubyte").write_bytes(head + array.tobytes())
    for path in (root / split / name / f"{i}.png" for split in ("train", "val") for name in "ab" for i in range(4)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 70)).save(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_trains_a_step(path, tmp_path, monkeypatch):
    little_data(tmp_path)
    monkeypatch.setattr(in_memory, "CIFAR10", Photographs)
    settings = yaml.safe_load(path.read_text())
    options = ["--data.batch_size", 4, "--data.workers", 0, "--trainer.precision", "32-true"]
    if settings["data"]["class_path"] != "Digits":
        options += ["--data.root", tmp_path]
    if settings["model"]["init_args"].get("model_args", {}).get("layers_per_block") == 2:  # too large for a test
        options += [
            "--model.model_args.block_out_channels",
            "[32, 64, 64, 64]",
            "--model.model_args.layers_per_block",
            1,
        ]
    out = tmp_path / "run"
    with contextlib.redirect_stderr(io.StringIO()) as said:
        main([str(a) for a in ("fit", "--config", path, "--out", out, "--trainer.fast_dev_run", "true", *options)])
    assert "val/loss" in said.getvalue()
    assert not out.exists()


# Sampling from the command line


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_on_the_command_line_takes_two_steps(fitted, tmp_path, name):
    run("sample", fitted[0], "--n", 2, "--steps", 2, "--scheduler", name, "--label", 3, "--out", tmp_path / "a.png")
    assert (tmp_path / "a.png").is_file()


def test_grids_animations_and_single_files(fitted, tmp_path):
    out, film, folder = tmp_path / "new" / "a.png", tmp_path / "b.gif", tmp_path / "single"
    args = ("sample", fitted[0], "--n", 5, "--steps", 30, "--label", 0, 1, "--seed", 7, "--size", 16, 8, "--batch", 2)
    files = ("--out", out, "--gif", film, "--png-dir", folder)
    assert run(*args, *files).split() == [str(out), str(film), str(folder)]
    with Image.open(out) as image:
        assert (image.mode, image.size) == ("L", (2 + 4 * (8 * 4 + 2), 2 + 2 * (16 * 4 + 2)))
    with Image.open(film) as image:
        assert 20 < len(list(ImageSequence.Iterator(image))) <= 25  # of 31; equal ones are merged
    assert sorted(path.name for path in folder.iterdir()) == [f"{i:06}.png" for i in range(7, 12)]
    drawn = sample(load(fitted[0]), 5, 30, labels=[0, 1], seed=7, size=(16, 8))
    with Image.open(folder / "000009.png") as image:
        assert (image.mode, image.size) == ("L", (8, 16))
        assert np.array_equal(np.asarray(image), sampling.to_bytes(drawn)[2, 0].numpy())
    before = out.read_bytes()
    for taken in (("--out", out), ("--gif", film), ("--png-dir", folder)):
        with pytest.raises(SystemExit, match=r"error: .* exists; give --overwrite to replace it, or another name"):
            run(*args, "--out", tmp_path / "c.png", *taken)
    assert out.read_bytes() == before
    run(*args, *files, "--overwrite", "--seed", 8)
    assert out.read_bytes() != before
    walk = tmp_path / "walk"
    run(
        "sample",
        fitted[0],
        "--n",
        3,
        "--steps",
        2,
        "--seed",
        7,
        "--end-seed",
        9,
        "--out",
        tmp_path / "w.png",
        "--png-dir",
        walk,
    )
    assert sorted(path.name for path in walk.iterdir()) == [f"{i:06}.png" for i in range(3)]


def test_three_channels_are_rgb(tmp_path):
    sampling.save(unet_denoiser(), tmp_path / "pipeline")
    run("sample", tmp_path / "pipeline", "--n", 3, "--steps", 2, "--out", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert (image.mode, image.size) == ("RGB", (2 + 2 * 66, 2 + 2 * 66))
    with pytest.raises(ValueError, match="an image file has 1 or 3 channels, got 2"):
        sampling.image_grid(torch.zeros(1, 2, 4, 4))


@pytest.mark.parametrize(
    ("scaling", "spec"),
    [
        ("ntk", "ntk(sincos + axial(base=100), factor=(2.0, 1.0))"),
        ("yarn(slow=0.1)", "yarn(sincos + axial(base=100), factor=(2.0, 1.0), slow=0.1)"),
        ("interpolate(factor=3)", "interpolate(sincos + axial(base=100), factor=3)"),
        ("dynamic", "dynamic(sincos + axial(base=100))"),
    ],
)
def test_larger_sizes_with_scaled_positions(fitted, tmp_path, scaling, spec):
    denoiser = load(fitted[0], scaling=scaling, size=(16, 8))
    assert denoiser.model.config.position == spec
    assert load(fitted[0], scaling=scaling, size=(16, 4)).model.config.position == spec  # a shorter axis stays as it is
    again = load(fitted[0] / "exported", scaling=scaling, size=(16, 8))
    images = sample(denoiser, 2, 2, size=(16, 8), labels=[1])
    assert torch.equal(images, sample(again, 2, 2, size=(16, 8), labels=[1]))
    assert not torch.equal(images, sample(load(fitted[0]), 2, 2, size=(16, 8), labels=[1]))
    out = tmp_path / "wide.png"
    run("sample", fitted[0], "--n", 2, "--steps", 2, "--size", 16, 8, "--scaling", scaling, "--label", 1, "--out", out)
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(sampling.image_grid(images)))


def test_learned_frequencies_are_scaled_as_they_were_trained(tmp_path):
    denoiser = dit_denoiser(position="mixed")
    sampling.save(denoiser, tmp_path)
    scaled = load(tmp_path, scaling="interpolate", size=(16, 16)).model
    assert torch.equal(scaled.position.freqs, denoiser.model.position.freqs)
    coords = scaled.layout.coords([4, 4])
    torch.testing.assert_close(scaled.position.frequencies(coords) * 2, denoiser.model.position.freqs)


@pytest.mark.parametrize(
    ("scaling", "size", "match"),
    [
        (
            "ntk",
            None,
            "sizes larger than the 8 x 8 of training, in positions of unit 'index'",
        ),
        ("yarn", (8, 4), "give a larger size, or leave scaling out"),
        ("flat", (16, 16), "flat modifies no other scheme, got 1"),
        ("ntc", (16, 16), "no position scheme is called 'ntc'; did you mean ntk"),
        ("yarn(slow)", (16, 16), "cannot read position spec"),
    ],
)
def test_nothing_to_scale(tmp_path, scaling, size, match):
    sampling.save(dit_denoiser(), tmp_path)
    with pytest.raises(ValueError, match=match):
        load(tmp_path, scaling=scaling, size=size)


def test_models_without_positions_cannot_be_scaled(tmp_path):
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    sampling.save(Denoiser(unet, make_noise(1000, "linear", "epsilon")), tmp_path)
    with pytest.raises(ValueError, match="a UNet2DModel without positions has nothing to scale; leave scaling out"):
        load(tmp_path, scaling="ntk", size=(16, 16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(fitted, tmp_path, dtype):
    out = tmp_path / "a.png"
    run("sample", fitted[0], "--n", 2, "--steps", 5, "--label", 1, "--dtype", dtype, "--out", out)
    half = sample(load(fitted[0], dtype=sampling.DTYPES[dtype]), 2, 5, labels=[1])
    assert half.dtype == torch.float32
    assert 0 < (half - sample(load(fitted[0]), 2, 5, labels=[1])).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (("--scheduler", "dpm"), "error: unknown scheduler 'dpm'; there are ddim"),
        (("--label", 10), "error: the model knows the labels 0 to 9, not 10"),
        (("--size", 8, 9), "error: images of 8 x 9 are not divisible by 4"),
        (("--guidance", 2), "error: guidance 2 has no effect"),
        (("--out", "a.jpg"), r"error: --out a.jpg: the name must end with .png"),
    ],
)
def test_invalid_options(fitted, tmp_path, monkeypatch, args, match):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=match):
        run("sample", fitted[0], *args)
    assert not list(tmp_path.iterdir())


def test_files_without_a_denoiser(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*nowhere"):
        run("sample", tmp_path / "nowhere", "--out", tmp_path / "a.png")
    with pytest.raises(SystemExit, match=r"is neither a run nor a diffusers pipeline: none of model_index\.json, "):
        run("sample", tmp_path, "--out", tmp_path / "a.png")
    classifier = {"state_dict": {}, "config": yaml.safe_dump({"model": {"class_path": "vit_rope.x.Classification"}})}
    torch.save(classifier, tmp_path / "c.ckpt")
    with pytest.raises(SystemExit, match=r"c\.ckpt is a checkpoint of Classification; only models trained by D"):
        run("sample", tmp_path / "c.ckpt", "--out", tmp_path / "a.png")
    torch.save({"state_dict": {}, "denoiser": {"unet": {"_class_name": "AutoencoderKL"}}}, tmp_path / "v.ckpt")
    with pytest.raises(SystemExit, match="cannot sample a AutoencoderKL; it must be a UNet2DModel, RopeUNet2D"):
        run("sample", tmp_path / "v.ckpt", "--out", tmp_path / "a.png")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "A"]}')
    with pytest.raises(SystemExit, match="is a StableDiffusionPipeline; sampling needs a pipeline of a unet and"):
        run("sample", tmp_path, "--out", tmp_path / "a.png")


# Scores of samples


def test_scores_of_images():
    images = torch.full((2, 1, 6, 12), -1.0)
    images[0, 0, 1:3, 1:3] = images[0, 0, 4, 4:9] = 1.0
    images[0, 0, 3, 3] = 0.5  # touches both by a corner
    images[1, 0, 0, ::2] = 1.0
    assert connected_parts(images) == (1 + 6) / 2
    assert connected_parts(torch.ones(1, 1, 4, 4)) == 1
    assert copy_error(torch.cat((images, images), dim=3)) == 0
    assert copy_error(torch.tensor([[[[0.0, 1.0]]]])) == 1


def test_scores_of_a_run(fitted, judge, tmp_path):
    text = run(
        *("quality", fitted[0], "--judge", judge, "--n", 100, "--steps", 2),
        *("--out", tmp_path / "scores.json"),
    )
    found = json.loads((tmp_path / "scores.json").read_text())
    assert [line.split()[0] for line in text.splitlines()] == list(found)
    assert list(found) == ["n", "fd", "fd_floor", "asked", "parts", "parts_real"]
    assert 0 < found["fd_floor"] < found["fd"]
    with pytest.raises(
        ValueError,
        match="needs as many test images as samples, but there are only 258; lower n, or leave the floor out",
    ):
        scores(fitted[0], judge, n=300, steps=2)
    jury = Judge(judge)
    real, other = torch.rand(500, 1, 8, 8) * 2 - 1, torch.rand(500, 1, 8, 8) - 1
    same, far = frechet_distance(jury, iter(real.split(100)), real, other)
    assert abs(same) < 1e-3
    features = [jury(images).double() for images in (real, other)]
    means, spreads = [f.mean(dim=0) for f in features], [f.T.cov() for f in features]
    roots = torch.linalg.eigvals(spreads[0] @ spreads[1]).real.clamp(min=0).sqrt().sum()
    wanted = (means[0] - means[1]).square().sum() + spreads[0].trace() + spreads[1].trace() - 2 * roots
    assert far == pytest.approx(float(wanted), rel=0.02)
    with pytest.raises(SystemExit, match=r"error: .*no model\.safetensors; --judge needs a finished run"):
        run("quality", fitted[0], "--judge", tmp_path)


class Pools(nn.Module):
    """A stand-in for the Inception network: means of patches as features."""

    def __init__(self, name, features_list, feature_extractor_weights_path, antialias):
        super().__init__()
        self.made_with = (name, features_list, feature_extractor_weights_path, antialias)

    def forward(self, images):
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def test_inception_as_a_judge_needs_its_weights(fitted, tmp_path, monkeypatch):
    weights = tmp_path / "inception.pth"
    asked = ("quality", fitted[0], "--n", 30, "--steps", 2, "--reference", 60, "--judge", "inception")
    refusals = {
        "error: --judge inception needs --weights, your copy of weights-inception-2015": asked,
        r"error: .*inception.pth is not a file; --weights needs your copy of": (*asked, "--weights", weights),
        "error: --weights is for --judge inception only": (*asked[:-1], fitted[0], "--weights", weights),
    }
    monkeypatch.setattr(quality.importlib.util, "find_spec", lambda name: name)
    for message, args in refusals.items():
        with pytest.raises(SystemExit, match=message):
            run(*args)
    for content, message in (
        ({"fc.weight": torch.zeros(10, 2048)}, "has the weights of a different network; --weights needs"),
        ({"fc.weight": Path}, "holds more than weights; --weights needs"),
    ):
        torch.save(content, weights)
        with pytest.raises(SystemExit, match=message):
            run(*asked, "--weights", weights)
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, weights)
    monkeypatch.setattr(quality, "NoTrainInceptionV3", Pools)
    monkeypatch.setattr(Inception, "num_features", 12)
    found = dict(line.split() for line in run(*asked, "--weights", weights).splitlines())
    assert list(found) == ["n", "fd", "fd_floor", "parts", "parts_real"]  # it does not know the data's classes
    assert 0 < float(found["fd_floor"]) < float(found["fd"])
    assert (Inception(weights)(torch.zeros(1, 1, 4, 4)) == 128).all()
    assert Inception(weights).model.made_with == ("inception-v3-compat", ["2048"], str(weights), False)
    without = dict(line.split() for line in run(*asked, "--weights", weights, "--no-floor").splitlines())
    assert without == {key: value for key, value in found.items() if key != "fd_floor"}
    monkeypatch.setattr(quality.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="needs the network of torch-fidelity: pip install torch-fidelity"):
        run(*asked, "--weights", weights)


def test_inception_sees_what_the_fid_of_torchmetrics_sees(tmp_path, monkeypatch):
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with monkeypatch.context() as patch:  # a network of random weights, in place of those that a release has
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **options: None)
        patch.setattr(nn.Module, "load_state_dict", lambda *args, **options: None)
        torch.manual_seed(0)
        network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), tmp_path / "random.pth")
    images = torch.rand(2, 1, 32, 24) * 2 - 1
    (wanted,) = network(((images + 1) * 127.5).round().byte().repeat(1, 3, 1, 1))
    assert wanted.std(dim=0).max() > 0
    torch.testing.assert_close(Inception(tmp_path / "random.pth")(images), wanted)


def test_study_resumes_and_its_table_has_all_finished_runs(judge, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("host.yaml").write_text(yaml.safe_dump({**CONFIG, "out": "host"}))
    made = ["host.yaml", "--seed", "3", "--judge", str(judge), "--n", "20", "--steps", "2", "--trainer.max_epochs=2"]
    study.main([*made, "--position", "none", "--csv", "first.csv"])
    times = {path: path.stat().st_mtime_ns for path in Path("host/none").rglob("*")}
    study.main([*made, "--position", "sincos + axial", "none", "--csv", "all.csv"])
    assert {path: path.stat().st_mtime_ns for path in Path("host/none").rglob("*")} == times
    first, rows = (list(csv.DictReader(Path(name).read_text().splitlines())) for name in ("first.csv", "all.csv"))
    assert [{key: row[key] for key in first[0]} for row in rows[:2]] == first
    assert {row["host"] for row in rows} == {"RopeDiT on Digits"}
    steps = [json.loads(line) for line in Path("host/none/3/metrics.jsonl").read_text().splitlines()]
    steps = [(line["step"] + 1, line["val/loss"]) for line in steps if "val/loss" in line]
    assert [(int(row["step"]), float(row["val/loss"])) for row in first] == steps
    assert [(row["position"], row["seed"]) for row in rows] == 2 * [("none", "3")] + 2 * [("sincos + axial", "3")]
    assert [bool(row["seconds"] and row["fd"] and row["parts"]) for row in rows] == [False, True] * 2
    assert "val/loss_t900" in first[0]
    main(["plot", "study", "all.csv", "--out", "deep/study.png"])
    assert capsys.readouterr().out.splitlines()[-1] == "deep/study.png"
    with Image.open("deep/study.png") as image:
        assert image.size[0] < image.size[1]  # one host, four panels


def test_a_model_without_scores_has_curves_only(tmp_path):
    scored = "U-Net,none,0,10,0.5,30,3,1,2,1\nU-Net,none,1,10,0.4,30,4,1,2,1\n"
    table = "host,position,seed,step,val/loss,seconds,fd,fd_floor,parts,parts_real\n" + scored
    (tmp_path / "a.csv").write_text(table + "ViT,none,0,10,0.5,30,,,,\n")
    with Image.open(plot_study(tmp_path / "a.csv", str(tmp_path / "a.png"))) as image:
        pixels = np.asarray(image.convert("L"))
    left, right = (half[len(half) // 2 :] for half in np.split(pixels[:, : pixels.shape[1] // 2 * 2], 2, axis=1))
    assert left.min() < 100
    assert right.min() == 255


def test_study_and_its_plot_report_what_is_missing(tmp_path, capsys):
    Path(tmp_path, "c.yaml").write_text(f"out: {tmp_path / 'none'}")
    with pytest.raises(SystemExit, match=r"error: no finished runs in .*none; make some with --position"):
        study.main([str(tmp_path / "c.yaml")])
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit):
        main(["plot", "study", str(tmp_path / "other.csv"), "--out", str(tmp_path / "a.png")])
    assert "other.csv is not the table of a study; vit-rope study writes" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_study_data(tmp_path):
    from vit_rope.training.data.in_memory import FashionPairs, SmallFashion

    little_data(tmp_path)
    for kind, shape in ((SmallFashion, (1, 14, 14)), (FashionPairs, (1, 14, 28))):
        module = kind(str(tmp_path), batch_size=4, augment="none")
        module.setup()
        images, _ = next(iter(module.test_dataloader()))
        assert images.shape[1:] == shape
        assert math.prod(shape[1:]) == (module.img_size**2 if isinstance(module.img_size, int) else 14 * 28)


@pytest.mark.slow
def test_digits_reach_the_loss_given_in_the_yaml(tmp_path):
    text = run("fit", "--config", CONFIGS[0].with_name("digits_ddpm.yaml"), "--out", tmp_path / "r")
    assert float(text.split()[-1]) < 0.32
