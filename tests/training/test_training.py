"""The training command line on a tiny model, in this process: folders, checkpoints, errors."""

import contextlib
import io
import json
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
import yaml
from lightning.pytorch import Trainer
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from tests.helpers import ROOT
from vit_rope.cli.fit import filter_warnings, train
from vit_rope.training.classification import Classification
from vit_rope.training.ema import EMA
from vit_rope.training.optim import OptimConfig, ScheduleConfig, make_optimizer, make_schedule, schedule_curve
from vit_rope.training.run import progress
from vit_rope.training.run.metrics import MetricsLogger

SIZES = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 1}
CONFIG = {
    "seed_everything": 0,
    "model": {
        "class_path": "Classification",
        "init_args": {
            "model": "vit_rope_tiny_patch16_224",
            "model_args": {**SIZES, "position": "axial(base=100)"},
            "optim": {"lr": 0.01},
            "schedule": {"warmup": 2},
        },
    },
    "data": {"class_path": "Digits", "init_args": {"batch_size": 64, "augment": "none"}},
    "trainer": {"max_epochs": 2, "limit_train_batches": 4, "accelerator": "cpu", "log_every_n_steps": 2},
    "ema": {"decay": 0.9},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return str(path)


def run(*args: object) -> str:
    """The output of a command on stdout."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        train([str(arg) for arg in args])
    return out.getvalue()


def score(text: str, name: str = "val/acc") -> float:
    last = text.rstrip().splitlines()[-1]
    assert last.startswith(f"{name} ")
    return float(last.split()[1])


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def load(folder: Path, name: str) -> dict:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def fitted(config, tmp_path_factory):
    """A finished run: its folder and its output."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return folder, run("fit", "--config", config, "--out", folder)


def test_folder_of_a_run(fitted):
    folder, _ = fitted
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) == [
        "checkpoints", "config.yaml", "exported", "metrics.jsonl", "summary.json",
    ]  # fmt: skip
    assert not (folder / ".lock").exists()
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert load(folder, "last")["epoch"] == 1
    for name in ("summary.json", "config.yaml"):
        assert str(folder) in (folder / name).read_text()


def test_last_line_is_the_best_score_as_in_the_folder(fitted):
    folder, text = fitted
    scores = [row["val/acc"] for row in rows(folder) if "val/acc" in row]
    summary = json.loads((folder / "summary.json").read_text())
    assert len(scores) == 2
    assert score(text) == pytest.approx(max(scores), abs=5e-5)
    assert summary["val/acc"] == pytest.approx(max(scores), abs=1e-6)
    assert str(folder / "metrics.jsonl") in text


def test_metrics_have_stage_loss_speed_and_learning_rate(fitted):
    metrics = rows(fitted[0])
    assert {row["stage"] for row in metrics} == {"fit"}
    names = {key for row in metrics for key in row}
    assert names >= {"train/loss", "train/lr", "train/images_per_s", "val/loss", "val/acc"}


def test_exported_weights_are_the_average_of_the_best_checkpoint_and_load_in_timm(fitted):
    folder, _ = fitted
    best = load(folder, "best")
    saved = json.loads((folder / "exported" / "config.json").read_text())
    assert saved["model_args"]["position"] == "axial(base=100)"
    path = str(folder / "exported" / "model.safetensors")
    model = timm.create_model(saved["architecture"], checkpoint_path=path, **saved["model_args"]).eval()
    again = timm.create_model(f"local-dir:{folder / 'exported'}", pretrained=True).eval()
    module = Classification(saved["architecture"], {**SIZES, "position": "axial(base=100)"}, 10, 1, 8).eval()
    module.load_state_dict(best["state_dict"])
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(images), module(images), rtol=0, atol=0)
        torch.testing.assert_close(again(images), module(images), rtol=0, atol=0)
    assert not torch.equal(best["state_dict"]["model.head.weight"], best["weights_in_training"]["model.head.weight"])
    assert again.pretrained_cfg["mean"] == [0.5, 0.5, 0.5] or tuple(again.pretrained_cfg["mean"]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_needs_only_the_checkpoint(fitted, command):
    folder, text = fitted
    before = (folder / "metrics.jsonl").read_text()
    name = {"validate": "val/acc", "test": "test/acc"}[command]
    value = score(run(command, "--ckpt_path", folder / "checkpoints" / "best.ckpt"), name)
    assert value == score(run(command, "--ckpt_path", folder, "--data.batch_size", "7"), name)
    if command == "validate":
        assert value == score(text)
    after = (folder / "metrics.jsonl").read_text()
    assert after.startswith(before)
    assert rows(folder)[-1]["stage"] == command


def test_a_moved_run_is_used_in_its_new_folder(fitted, tmp_path):
    moved = tmp_path / "moved"
    (moved / "checkpoints").mkdir(parents=True)
    (moved / "checkpoints" / "best.ckpt").write_bytes((fitted[0] / "checkpoints" / "best.ckpt").read_bytes())
    assert score(run("validate", "--ckpt_path", moved)) == score(fitted[1])
    assert rows(moved)


def test_command_line_overrides_the_checkpoint(fitted, tmp_path):
    folder, _ = fitted
    last = folder / "checkpoints" / "last.ckpt"
    out = tmp_path / "resumed"
    args = ("--out", out, "--trainer.max_epochs", 3, "--model.optim.lr", 0.123, "--model.optim.weight_decay", 0.7)
    run("fit", "--ckpt_path", last, *args, "--model.schedule.name", "constant")
    groups = load(out, "last")["optimizer_states"][0]["param_groups"]
    assert {group["lr"] for group in groups} == {0.123}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.7}
    text = (out / "config.yaml").read_text()
    assert yaml.safe_load(text)["model"]["init_args"]["optim"]["lr"] == 0.123
    assert load(out, "last")["config"] == text
    assert {row["epoch"] for row in rows(out)} == {2}


@pytest.mark.parametrize(("decay", "precision"), [(0.9, "32-true"), (0.0, "32-true"), (0.9, "bf16-true")])
def test_resumed_equals_uninterrupted(config, tmp_path, decay, precision):
    args = ("--config", config, "--model.schedule.name", "constant", "--ema.decay", decay)
    args += ("--trainer.precision", precision)
    run("fit", *args, "--out", tmp_path / "whole", "--trainer.max_epochs", 3)
    run("fit", *args, "--out", tmp_path / "halves", "--trainer.max_epochs", 1)
    before = (tmp_path / "halves" / "metrics.jsonl").read_text()
    run("fit", *args, "--out", tmp_path / "halves", "--trainer.max_epochs", 3, "--ckpt_path", "last")
    assert (tmp_path / "halves" / "metrics.jsonl").read_text().startswith(before)
    whole, halves = (load(tmp_path / name, "last") for name in ("whole", "halves"))
    for part in ("state_dict", "weights_in_training") if decay else ("state_dict",):
        for name, value in whole[part].items():
            torch.testing.assert_close(halves[part][name], value, rtol=0, atol=0)
            averaged = decay and part == "state_dict"
            assert value.dtype == (torch.bfloat16 if precision == "bf16-true" and not averaged else torch.float32)


def test_last_checkpoint_is_of_the_last_epoch_also_if_it_is_not_better(config, tmp_path):
    # the score of a model that does not learn never improves after the first epoch
    run("fit", "--config", config, "--out", tmp_path / "r", "--model.optim.lr", "1e-12", "--trainer.max_epochs", 3)
    assert load(tmp_path / "r", "best")["epoch"] == 0
    assert load(tmp_path / "r", "last")["epoch"] == 2


@pytest.mark.parametrize("source", ["config", "checkpoint"])
def test_a_single_model_argument_can_be_overridden(config, fitted, tmp_path, source):
    start = ("--config", config) if source == "config" else ("--ckpt_path", fitted[0])
    args = ("--out", tmp_path / "r", "--model.model_args.position", "mixed", "--print_config")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        train([str(arg) for arg in ("fit", *start, *args)])
    merged = yaml.safe_load(out.getvalue())["model"]["init_args"]["model_args"]
    assert merged == {**SIZES, "position": "mixed"}


def test_user_module_registers_a_scheme(config, tmp_path, monkeypatch):
    source = "from vit_rope.positions import Rotary, register\nfrom vit_rope.positions.rotary.axial import axial\n\n"
    source += '@register\ndef custom(layout):\n    """Mine."""\n    return axial(layout, base=7.0)\n'
    (tmp_path / "my_schemes.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    args = ("--config", config, "--out", "r", "--trainer.max_epochs", 1, "--model.model_args.position", "custom")
    run("fit", *args, "--import", "my_schemes")
    assert Path("r/summary.json").is_file()
    with pytest.raises(ValueError, match="--import no_such_module: No module named"):
        run("fit", "--import=no_such_module", *args)


# Bad input: an error of one line before anything is written


def refused(config: str, tmp_path: Path, *args: object, kind: type[Exception] = ValueError, match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        run("fit", "--config", config, "--out", tmp_path / "refused", *args)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (("--model.model", "vit_rop_tiny_patch16_224"), "timm has no model.*did you mean vit_rope_tiny_patch16_224"),
        (("--model.model_args.position", "axail"), "did you mean axial"),
        (("--model.model_args.in_chans", 3), "model_args give in_chans 3, but the data have 1"),
        (("--model.optim.opt", "adamv"), "unknown optimizer 'adamv'; did you mean adam"),
        (("--model.optim.lr", -1), "lr > 0.*got -1"),
        (("--model.optim.layer_decay", 2), "0 < layer_decay <= 1"),
        (("--model.schedule.warmup", -1), "warmup, decay and min_lr >= 0"),
        (("--model.schedule.warmup", 100), "warms up for 100 steps, but the training has only 8"),
        (("--trainer.max_epochs", -1), "schedule cosine needs the length of the training"),
        (("--model.label_smoothing", 1), "label_smoothing < 1"),
        (("--model.loss", "binary", "--model.label_smoothing", 0.1), "label_smoothing must be 0"),
        (("--ema.decay", 1), "ema.decay must be at least 0"),
        (("--data.batch_size", 0), "batch_size must be at least 1"),
        (("--data.batch_size", 5000), "batch_size 5000 exceeds the 1287 training images"),
        (("--model.weights", "nowhere.ckpt"), "no file nowhere.ckpt"),
    ],
)
def test_wrong_settings(config, tmp_path, args, match):
    kind = FileNotFoundError if "nowhere.ckpt" in args else ValueError
    refused(config, tmp_path, *args, kind=kind, match=match)


def test_wrong_option_of_the_model(config, tmp_path):
    refused(config, tmp_path, "--model.model_args.postion", "axial", kind=TypeError, match="argument 'postion'")


def test_an_occupied_folder_is_refused_or_replaced(config, tmp_path):
    out = tmp_path / "taken"
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "last.ckpt").write_text("old")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"already contains a run \(checkpoints\): resume it with --ckpt_path last"):
        run("fit", "--config", config, "--out", out)
    assert (out / "checkpoints" / "last.ckpt").read_text() == "old"
    with pytest.raises(ValueError, match="did you mean axial"):  # a run that cannot start overwrites nothing
        run("fit", "--config", config, "--out", out, "--overwrite", "true", "--model.model_args.position", "axail")
    assert (out / "checkpoints" / "last.ckpt").read_text() == "old"
    run("fit", "--config", config, "--out", out, "--overwrite", "true", "--trainer.max_epochs", 1)
    assert load(out, "last")["epoch"] == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert yaml.safe_load((out / "config.yaml").read_text())["overwrite"] is False


def test_missing_last_checkpoint_is_an_error(config, tmp_path):
    refused(config, tmp_path, "--ckpt_path", "last", kind=FileNotFoundError, match=r"no checkpoint .*last\.ckpt")


def test_checkpoint_of_a_different_architecture_lists_the_keys(fitted):
    with pytest.raises(ValueError, match="the weights do not fit vit_rope_tiny_patch16_224") as caught:
        run("validate", "--ckpt_path", fitted[0], "--model.model_args.depth", 2)
    assert "missing: model.blocks.1." in str(caught.value)
    with pytest.raises(ValueError, match=r"wrong shape: .*patch_embed\.proj\.weight is \(16, 1, 4, 4\), not"):
        run("validate", "--ckpt_path", fitted[0], "--model.model_args.patch_size", 2)
    with pytest.raises(ValueError, match=r"missing: model\.position"):
        run("validate", "--ckpt_path", fitted[0], "--model.model_args.position", "learned")


class Canary:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("option", ["--ckpt_path", "--model.weights"])
def test_code_in_a_checkpoint_is_not_run(config, tmp_path, option, legacy):
    path, canary = tmp_path / "bad.ckpt", tmp_path / "canary"
    if legacy:
        path.write_bytes(pickle.dumps({"state_dict": Canary(canary)}))
    else:
        torch.save({"state_dict": {}, "config": Canary(canary)}, path)
    refused(config, tmp_path, option, path, match="was not loaded: it holds more than tensors")
    with pytest.raises(ValueError, match="was not loaded"):
        run("validate", "--ckpt_path", path)
    assert not canary.exists()


def test_damaged_checkpoint(config, fitted, tmp_path):
    path = tmp_path / "half.ckpt"
    content = (fitted[0] / "checkpoints" / "last.ckpt").read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(config, tmp_path, "--ckpt_path", path, match=r"half\.ckpt is not a checkpoint or is damaged")


def test_checkpoint_may_not_name_any_class(fitted, tmp_path):
    checkpoint = load(fitted[0], "best")
    config = yaml.safe_load(checkpoint["config"])
    config["data"] = {"class_path": "subprocess.Popen", "init_args": {"args": ["true"]}}
    torch.save({**checkpoint, "config": yaml.safe_dump(config)}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"names the class subprocess\.Popen, which is not allowed"):
        run("validate", "--ckpt_path", tmp_path / "bad.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "bare.ckpt")
    with pytest.raises(ValueError, match="contains no configuration; give --config too"):
        run("validate", "--ckpt_path", tmp_path / "bare.ckpt")


# Fine-tuning, and checks of a batch


@pytest.mark.parametrize("file", ["exported/model.safetensors", "checkpoints/best.ckpt"])
def test_weights_initialize_a_model_for_other_classes(fitted, file):
    path = str(fitted[0] / file)
    best = load(fitted[0], "best")["state_dict"]
    args = ("vit_rope_tiny_patch16_224", {**SIZES, "position": "axial(base=100)"})
    same = Classification(*args, num_classes=10, in_chans=1, img_size=8, weights=path)
    other = Classification(*args, num_classes=3, in_chans=1, img_size=8, weights=path)
    for name, value in best.items():
        torch.testing.assert_close(same.state_dict()[name], value, rtol=0, atol=0)
        assert name.startswith("model.head.") or torch.equal(other.state_dict()[name], value)
    assert other.model.head.weight.shape == (3, 16)
    with pytest.raises(ValueError, match=r"missing: blocks\.1\."):
        Classification(args[0], {**args[1], "depth": 2}, 10, 1, 8, weights=path)


def test_a_checkpoint_replaces_initial_weights(config, fitted, tmp_path):
    copy = tmp_path / "start.safetensors"
    copy.write_bytes((fitted[0] / "exported" / "model.safetensors").read_bytes())
    out = tmp_path / "r"
    run("fit", "--config", config, "--out", out, "--model.weights", copy, "--trainer.max_epochs", 1)
    copy.unlink()
    assert score(run("validate", "--ckpt_path", out)) > 0


def tiny(**options) -> Classification:
    return Classification("vit_rope_tiny_patch16_224", SIZES, num_classes=10, in_chans=1, img_size=8, **options)


def test_wrong_channels_and_too_few_classes():
    with pytest.raises(ValueError, match="built for images of 1 channels, the data have 3"):
        tiny().validation_step((torch.zeros(2, 3, 8, 8), torch.zeros(2).long()), 0)
    with pytest.raises(ValueError, match="at least 2 classes, the data have 1"):
        Classification("vit_rope_tiny_patch16_224", SIZES, num_classes=1, in_chans=1, img_size=8, mixup=0.5)
    with pytest.raises(ValueError, match="mixup >= 0"):
        tiny(mixup=-0.5)


def test_convolutional_models_need_no_image_size():
    module = Classification("resnet10t", None, num_classes=4, in_chans=1, img_size=32).eval()
    assert module.model_args == {"num_classes": 4, "in_chans": 1}
    assert module(torch.zeros(1, 1, 32, 32)).shape == (1, 4)


@pytest.mark.parametrize("loss", ["cross_entropy", "binary"])
@pytest.mark.parametrize("count", [6, 5])
def test_mixup_trains_batches_of_even_and_odd_size(loss, count):
    module = tiny(mixup=0.5, cutmix=1.0, loss=loss)
    value = module.loss((torch.randn(count, 1, 8, 8), torch.arange(count)), 0)
    value.backward()
    assert torch.isfinite(value)
    assert all(p.grad is not None for p in module.parameters())


def test_compile_keeps_the_names():
    plain, compiled = tiny(), tiny(compile=True)
    assert compiled.model._compiled_call_impl is not None
    assert list(plain.state_dict()) == list(compiled.state_dict())


@pytest.mark.slow
def test_compiled_training(config, tmp_path):
    run("fit", "--config", config, "--out", tmp_path / "r", "--model.compile", "true", "--trainer.max_epochs", 1)
    assert score(run("validate", "--ckpt_path", tmp_path / "r", "--model.compile", "false")) > 0


@pytest.mark.slow
def test_digits_reach_the_score_in_the_yaml(tmp_path):
    text = run("fit", "--config", ROOT / "configs" / "digits_vit.yaml", "--out", tmp_path / "r")
    assert score(text) >= 0.975


@pytest.mark.parametrize(
    "args",
    [
        ("--trainer.precision", "bf16-mixed", "--trainer.gradient_clip_val", 1),
        ("--trainer.accumulate_grad_batches", 2, "--model.mixup", 0.2, "--model.label_smoothing", 0.1),
        ("--model.optim.opt", "lamb", "--model.optim.layer_decay", 0.5, "--model.schedule.name", "wsd"),
        ("--data.augment", "strong", "--data.workers", 1, "--model.optim.extra", '{"betas": [0.9, 0.95]}'),
        ("--trainer.logger", "false", "--trainer.enable_progress_bar", "false"),
    ],
)
def test_options_train(config, tmp_path, args):
    run("fit", "--config", config, "--out", tmp_path / "r", "--trainer.max_epochs", 1, *args)
    steps = 2 if "--trainer.accumulate_grad_batches" in args else 4
    assert load(tmp_path / "r", "last")["global_step"] == steps


def test_terminal_shows_loss_accuracy_speed_and_time_left(config, tmp_path, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=terminal, force_terminal=True, width=80))
    run("fit", "--config", config, "--out", tmp_path / "r", "--trainer.limit_train_batches", 10)
    run("validate", "--ckpt_path", tmp_path / "r")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert re.search(r"100%  epoch 2/2  loss \d\.\d+  val/acc 0\.\d+  [\d,]+ images/s  0:00 left", shown)
    assert "100%  batch 4 of 4" in shown


# Parts


def test_schedules():
    total = 100
    for name in ("cosine", "linear", "constant", "wsd"):
        curve = schedule_curve(ScheduleConfig(name=name, warmup=0.1, decay=0.2), total, floor=0.1)
        values = [curve(step) for step in range(total + 1)]
        assert 0 < values[0] < 0.2
        assert values[:10] == sorted(values[:10])
        assert values[10] == pytest.approx(1.0)
        assert values[100] == pytest.approx(1.0 if name == "constant" else 0.1)
        assert max(values) <= 1.0
    wsd = schedule_curve(ScheduleConfig(name="wsd", warmup=10, decay=20), total)
    assert wsd(79) == 1.0
    assert wsd(90) == pytest.approx(0.5)
    assert schedule_curve(ScheduleConfig(name="constant", warmup=5), float("inf"))(10**9) == 1.0
    assert schedule_curve(ScheduleConfig(warmup=0), total)(0) == 1.0


def test_optimizer_groups_have_layer_decay_and_weight_decay():
    model = timm.create_model(
        "vit_rope_tiny_patch16_224", **{**SIZES, "depth": 3}, position="learned + mixed", img_size=8
    )
    optimizer = make_optimizer(model, OptimConfig(lr=1.0, weight_decay=0.05, layer_decay=0.5))
    make_schedule(optimizer, ScheduleConfig(name="constant", warmup=0), 10, 1.0)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    rates = {name: groups[id(p)]["lr"] for name, p in model.named_parameters()}
    assert rates["head.weight"] == 1.0
    assert (
        rates["blocks.2.mlp.fc1.weight"] == 2 * rates["blocks.1.mlp.fc1.weight"] == 4 * rates["blocks.0.mlp.fc1.weight"]
    )
    assert rates["patch_embed.proj.weight"] < rates["blocks.0.mlp.fc1.weight"]
    undecayed = model.no_weight_decay()
    for name, p in model.named_parameters():
        assert groups[id(p)]["weight_decay"] == (0.0 if p.ndim < 2 or name in undecayed else 0.05), name
    with pytest.raises(TypeError, match="optimizer adamw with extra options"):
        make_optimizer(model, OptimConfig(extra={"nonsense": 1}))


class Steps:
    """The attributes of a trainer that EMA reads."""

    global_step = 0
    state = type("S", (), {"fn": "fit"})()


def test_average_warms_up_and_is_validated():
    module, trainer, ema = nn.Linear(1, 1, bias=False), Steps(), EMA(0.9)
    with torch.no_grad():
        module.weight.fill_(0.0)
    ema.on_fit_start(trainer, module)
    average = 0.0
    for step in range(200):
        with torch.no_grad():
            module.weight.fill_(step + 1.0)
        trainer.global_step = step + 1
        ema.on_train_batch_end(trainer, module, None, None, step)
        ema.on_train_batch_end(trainer, module, None, None, step)  # an accumulated batch: no new step, no update
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * (step + 1.0)
    ema.on_validation_epoch_start(trainer, module)
    assert module.weight.item() == pytest.approx(average, rel=1e-5)
    checkpoint = {"state_dict": {"weight": module.weight.detach()}}
    ema.on_validation_epoch_end(trainer, module)
    assert module.weight.item() == 200.0
    checkpoint = {"state_dict": {"weight": module.weight.detach().clone()}}
    ema.on_save_checkpoint(trainer, module, checkpoint)
    assert checkpoint["state_dict"]["weight"].item() == pytest.approx(average, rel=1e-5)
    assert checkpoint["weights_in_training"]["weight"].item() == 200.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_is_float32_for_bfloat16_weights(dtype):
    """The weight goes linearly from 1 to 2 over 20,000 steps; the average lags by 999 steps."""
    module, trainer, ema = nn.Linear(1, 1, bias=False, dtype=dtype), Steps(), EMA(0.999)
    nn.init.ones_(module.weight)
    ema.on_fit_start(trainer, module)
    for step in range(1, 20_001):
        nn.init.constant_(module.weight, 1 + step / 20_000)
        trainer.global_step = step
        ema.on_train_batch_end(trainer, module, None, None, step)
    ema.on_validation_epoch_start(trainer, module)
    ema.on_validation_epoch_end(trainer, module)  # must not round the average
    assert module.weight.item() == 2.0
    assert ema.average["weight"].dtype == torch.float32
    assert ema.average["weight"].item() == pytest.approx(1.950, abs=5e-4)


def test_average_does_not_change_a_model_before_the_first_step():
    module, ema = nn.Linear(1, 1), EMA(0.9)
    ema.on_fit_start(Steps(), module)
    with torch.no_grad():
        module.weight.fill_(3.0)
    ema.on_validation_epoch_start(Steps(), module)
    assert module.weight.item() == 3.0


def test_average_does_not_change_counters_and_buffers():
    module, trainer, ema = nn.BatchNorm1d(2), Steps(), EMA(0.9)
    ema.on_fit_start(trainer, module)
    for step in range(4):
        module(torch.randn(8, 2))
        trainer.global_step = step + 1
        ema.on_train_batch_end(trainer, module, None, None, step)
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    ema.on_validation_epoch_start(trainer, module)
    assert module.num_batches_tracked == 4
    assert all(torch.equal(value, buffers[name]) for name, value in module.named_buffers())


def test_checkpoint_of_a_module_created_in_python_is_plain(tmp_path):
    module = tiny(optim=OptimConfig(lr=0.1), schedule=ScheduleConfig(warmup=0))
    images = torch.utils.data.TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8))
    trainer = Trainer(max_epochs=1, default_root_dir=tmp_path, logger=False, accelerator="cpu", log_every_n_steps=1)
    with warnings.catch_warnings():
        filter_warnings()
        trainer.fit(module, *[torch.utils.data.DataLoader(images, batch_size=8)] * 2)
    (path,) = tmp_path.rglob("*.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 1


def test_averaging_can_be_switched_off_when_resuming(fitted, tmp_path):
    last = load(fitted[0], "last")
    args = ("--out", tmp_path / "r", "--trainer.max_epochs", 3, "--ema.decay", 0, "--trainer.limit_train_batches", 1)
    run("fit", "--ckpt_path", fitted[0] / "checkpoints" / "last.ckpt", *args, "--model.optim.lr", 1e-12)
    after = load(tmp_path / "r", "last")
    assert "weights_in_training" not in after
    for name, value in last["weights_in_training"].items():  # resumed from the trained weights, not the average
        torch.testing.assert_close(after["state_dict"][name], value, rtol=0, atol=1e-6)


def test_metrics_that_are_not_finite_are_valid_json(tmp_path):
    logger = MetricsLogger(str(tmp_path))
    logger.log_metrics({"a": float("nan"), "epoch": 3, "b": torch.tensor(0.5)}, step=7)
    logger.log_metrics({"a": float("inf")}, step=8)
    first, second = rows(tmp_path)
    assert (first["a"], first["b"], first["epoch"], first["step"], second["a"]) == ("nan", 0.5, 3, 7, "inf")


def test_import_is_light():
    code = "import sys, vit_rope.training as t; assert 'lightning' not in sys.modules; print(t.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Classification" in done.stdout


def test_exported_file_has_the_names_of_the_model(fitted):
    state = load_file(fitted[0] / "exported" / "model.safetensors")
    assert all(not name.startswith("model.") for name in state)
