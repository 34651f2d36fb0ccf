"""A resumed run is bit-identical to an uninterrupted one, however it was stopped."""

import contextlib
import json
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from tests.helpers import CLASSIFIER, CONFIG, assert_same, last_checkpoint, metrics_by_step, run
from tests.processes import finish, start
from vit_rope.cli.fit import train
from vit_rope.training.data.loader import Loader, ResumableSampler, SeededDataset, make_loader
from vit_rope.training.seeds import SeededIndex

DENOISER = {
    "class_path": "Diffusion",
    "init_args": {
        "model": "RopeDiT",
        "model_args": {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 1, "position": "axial"},
        "conditional": True,
        "sample_every": 0,
        "schedule": {"warmup": 2},
    },
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("configs")
    parts = {"classifier": {"model": CLASSIFIER}}
    parts["denoiser"] = {"model": DENOISER, "checkpoint": {"monitor": "val/loss", "mode": "min"}}
    for name, part in parts.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(CONFIG | part))
    return {name: str(folder / f"{name}.yaml") for name in parts}


@pytest.fixture(scope="module")
def uninterrupted(configs, tmp_path_factory) -> dict[str, Path]:
    """Runs that were not interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for name, config in configs.items():
        run("--config", config, "--out", folder / name)
    return {name: folder / name for name in configs}


@pytest.mark.parametrize("name", ["classifier", "denoiser"])
def test_same_seed_twice_is_the_same_run(configs, uninterrupted, tmp_path, name):
    run("--config", configs[name], "--out", tmp_path / "again")
    assert_same(uninterrupted[name], tmp_path / "again")
    run("--config", configs[name], "--out", tmp_path / "other", "--seed_everything", 4)
    with pytest.raises(AssertionError):
        assert_same(uninterrupted[name], tmp_path / "other")


@pytest.mark.parametrize("name", ["classifier", "denoiser"])
@pytest.mark.parametrize("steps", [12, 9], ids=["after an epoch", "within an epoch"])
def test_resumed_run_equals_the_uninterrupted_one(configs, uninterrupted, tmp_path, name, steps):
    """Both parts have the schedule of 24 steps, as in a run that was killed."""
    args = ("--config", configs[name], "--out", tmp_path / "r", "--model.schedule.warmup", 2)
    stop_after(args, steps)
    before = (tmp_path / "r" / "metrics.jsonl").read_text()
    assert last_checkpoint(tmp_path / "r")["global_step"] == steps
    run(*args, "--ckpt_path", "last")
    assert (tmp_path / "r" / "metrics.jsonl").read_text().startswith(before)
    assert_same(uninterrupted[name], tmp_path / "r")


OPTIONS = {
    "accumulation and workers": (("--trainer.accumulate_grad_batches", 2, "--data.workers", 1), 4),
    "right before a validation": (("--trainer.val_check_interval", 3, "--trainer.precision", "bf16-mixed"), 9),
}


@pytest.mark.parametrize(("options", "steps"), OPTIONS.values(), ids=OPTIONS)
def test_resumed_within_an_epoch(configs, tmp_path, options, steps):
    loss = ("--checkpoint.monitor", "val/loss", "--checkpoint.mode", "min")
    args = ("--config", configs["classifier"], *options, *loss, "--trainer.max_epochs", 2, "--ema.decay", 0.5)
    run(*args, "--out", tmp_path / "uninterrupted")
    stop_after((*args, "--out", tmp_path / "r"), steps)
    checkpoint = last_checkpoint(tmp_path / "r")
    assert checkpoint["global_step"] == steps
    scores = [row["val/loss"] for row in metrics_by_step(tmp_path / "r").values() if "val/loss" in row]
    assert scores[-1] == min(scores)
    (best,) = [state for name, state in checkpoint["callbacks"].items() if name.startswith("BestCheckpoint")]
    assert best["best_model_score"] == pytest.approx(scores[-1], rel=1e-5)  # it includes the validation at this step
    run(*args, "--out", tmp_path / "r", "--ckpt_path", "last")
    assert_same(tmp_path / "uninterrupted", tmp_path / "r")


@pytest.mark.parametrize(("batch_size", "processes"), [(4, 2), (8, 1), (2, 1), (6, 2)])
def test_other_batches_within_an_epoch_are_refused(batch_size, processes):
    """A process of two that resumes with batches of two: the size of all together counts."""
    trainer = SimpleNamespace(global_rank=0, world_size=processes)
    batches = make_loader(range(64), "train", batch_size, 0, trainer)
    batches.load_state_dict({"epoch": 0, "batches": 3, "size": 4})
    with pytest.raises(ValueError, match=rf"3 batches of 4 images in all .* now are {batch_size * processes}: resume"):
        next(iter(batches))
    batches.sampler.set_epoch(1)  # the epoch had ended
    assert len(list(batches)) == len(batches)
    same = make_loader(range(64), "train", 2, 0, SimpleNamespace(global_rank=0, world_size=2))
    same.load_state_dict({"epoch": 0, "batches": 3, "size": 4})
    assert len(list(same)) == len(same) - 3


def test_run_with_other_batches_resumes_between_epochs_only(configs, tmp_path):
    args = ("--config", configs["classifier"], "--out", tmp_path / "r", "--trainer.max_epochs", 2)
    stop_after(args, 9)
    before = (tmp_path / "r" / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"within an epoch, after \d batches of 64 images .* now are 32: resume with"):
        run(*args, "--ckpt_path", "last", "--data.batch_size", 32)
    assert (tmp_path / "r" / "config.yaml").read_text() == before
    run(*args, "--ckpt_path", "last", "--trainer.max_epochs", 2)
    run(*args, "--ckpt_path", "last", "--trainer.max_epochs", 3, "--data.batch_size", 32)
    assert last_checkpoint(tmp_path / "r")["epoch"] == 2


def test_runs_with_max_steps_can_be_extended_within_an_epoch(configs, tmp_path):
    args = ("--config", configs["classifier"], "--trainer.max_epochs", -1, "--model.schedule.name", "constant")
    run(*args, "--out", tmp_path / "uninterrupted", "--trainer.max_steps", 15)
    run(*args, "--out", tmp_path / "r", "--trainer.max_steps", 8)
    assert last_checkpoint(tmp_path / "r")["global_step"] == 8
    run(*args, "--out", tmp_path / "r", "--trainer.max_steps", 15, "--ckpt_path", "last")
    assert_same(tmp_path / "uninterrupted", tmp_path / "r")


def best_of(folder: Path) -> tuple[float, int]:
    """The best score stored in last.ckpt, and the epoch of best.ckpt."""
    (state,) = [
        state for name, state in last_checkpoint(folder)["callbacks"].items() if name.startswith("BestCheckpoint")
    ]
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    return float(state["best_model_score"]), best["epoch"]


def test_moved_run_keeps_its_best_checkpoint(configs, uninterrupted, tmp_path):
    """A learning rate that ruins the weights makes every later epoch worse."""
    moved, ruin = tmp_path / "moved", ("--trainer.max_epochs", 5, "--model.optim.lr", 10, "--ema.decay", 0)
    shutil.copytree(uninterrupted["denoiser"], moved)
    before = best_of(moved)
    run("--ckpt_path", moved, *ruin)
    assert last_checkpoint(moved)["epoch"] == 4
    assert best_of(moved) == before
    assert json.loads((moved / "summary.json").read_text())["checkpoint"] == str(moved / "checkpoints" / "best.ckpt")
    (moved / "checkpoints" / "best.ckpt").unlink()  # now only later epochs compete
    run("--ckpt_path", moved, "--trainer.max_epochs", 6)
    assert best_of(moved)[1] == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classifier", "denoiser"])
def test_killed_at_random_moments(configs, uninterrupted, tmp_path, name):
    """Ten SIGKILLs: within steps, during validations and while checkpoints are written."""
    args = ("--config", configs[name], "--out", tmp_path / "r", "--last.every_steps", 1)
    status, out, err = finish(start("tests.processes", "kill", 0, 10, "fit", *args), timeout=240)
    assert status == 0, err
    counts = json.loads(out.splitlines()[-1])
    assert counts["kills"] == 10
    assert counts["resumed"] >= 3
    assert_same(uninterrupted[name], tmp_path / "r")
    assert not [path for path in (tmp_path / "r").rglob("*.ckpt") if path.name not in ("last.ckpt", "best.ckpt")]


MALFORMED = {
    "state_dict": [1],
    "callbacks": [],
    "loops": {},
    "loops/fit_loop": {},
    "optimizer_states": [],
    "lr_schedulers": None,
    "global_step": "x",
    "pytorch-lightning_version": None,
}


@pytest.mark.parametrize(("name", "value"), MALFORMED.items(), ids=MALFORMED)
def test_malformed_checkpoint_is_refused(uninterrupted, tmp_path, name, value):
    content = last_checkpoint(uninterrupted["denoiser"])
    *outer, key = name.split("/")
    inner = content[outer[0]] if outer else content
    inner.update({key: value}) if value is not None else inner.pop(key)
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=rf"bad\.ckpt cannot be resumed: its {name}.* is .*start from scratch$"):
        run("--ckpt_path", tmp_path / "bad.ckpt", "--out", tmp_path / "r", "--trainer.max_epochs", 5)
    assert not (tmp_path / "r").exists()
    if name in ("state_dict", "callbacks", "loops"):
        with pytest.raises(ValueError, match=rf"bad\.ckpt is not the checkpoint of a run: its {name}"):
            train(["validate", "--ckpt_path", str(tmp_path / "bad.ckpt")])


def test_missing_weights_in_training(uninterrupted, tmp_path):
    content = last_checkpoint(uninterrupted["denoiser"])
    name, _ = content["weights_in_training"].popitem()
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(
        ValueError, match=rf"^the checkpoint's weights_in_training lack {re.escape(name)} \(1 missing\); "
    ):
        run("--ckpt_path", tmp_path / "bad.ckpt", "--out", tmp_path / "r", "--trainer.max_epochs", 5)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("opt", ["sgd", "lion"])
def test_state_of_a_different_optimizer(uninterrupted, tmp_path, opt, named):
    content = last_checkpoint(uninterrupted["denoiser"])
    if not named:  # as in a checkpoint of a different program
        for group in content["optimizer_states"][0]["param_groups"]:
            group.pop("opt")
    torch.save(content, tmp_path / "last.ckpt")
    args = ("--ckpt_path", tmp_path / "last.ckpt", "--out", tmp_path / "r", "--trainer.max_epochs", 5)
    was = "adamw" if named else "a different optimizer"
    with pytest.raises(
        ValueError, match=rf"^the checkpoint has the state of {was}, not of {opt}: resume with .*start from scratch$"
    ):
        run(*args, "--model.optim.opt", opt)
    assert not (tmp_path / "r").exists()
    if not named:
        run(*args)
        assert last_checkpoint(tmp_path / "r")["epoch"] == 4


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_denoiser_that_learned_a_different_prediction(uninterrupted, command):
    with pytest.raises(
        ValueError,
        match=r"^the checkpoint's model was trained to predict v, not epsilon: set prediction: v, or train from",
    ):
        train([command, "--ckpt_path", str(uninterrupted["denoiser"]), "--model.prediction", "epsilon"])


# The parts


def test_sampler_starts_at_any_index():
    order = ResumableSampler(20, shuffle=True, repeats=2)
    order.set_epoch(3)
    complete = list(order)
    order.start = 7
    assert [(int(index), index.seed) for index in order] == [(int(index), index.seed) for index in complete[7:]]
    assert len({index.seed for index in complete}) == len(complete)  # a repeated image gets different changes


class Noise:
    """A dataset that returns nothing but random numbers."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[float, ...]:
        return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002


def draws(workers: int = 0, state: dict | None = None, take: int = 3) -> tuple[list, Loader]:
    torch.manual_seed(5)
    batches = make_loader(Noise(), "train", 4, workers, None)
    batches.sampler.set_epoch(2)
    if state:
        batches.load_state_dict(state)
    return [torch.stack(batch).tolist() for _, batch in zip(range(take), batches, strict=False)], batches


def test_random_changes_do_not_depend_on_the_process_or_the_first_batch():
    epoch, _ = draws()
    assert len(epoch) == 3
    assert draws(workers=1)[0] == epoch
    first, batches = draws(take=1)
    state = batches.state_dict()
    assert state == {"epoch": 2, "batches": 1, "size": 4}
    assert first + draws(state=state)[0] == epoch
    assert draws(state={"epoch": 1, "batches": 1})[0] == epoch  # saved at the end of the previous epoch
    assert draws(state={"epoch": 2, "batches": 1})[0] == draws(state=state)[0]  # of an earlier release
    torch.manual_seed(6)
    before = torch.random.get_rng_state()
    assert (
        SeededDataset(Noise())[SeededIndex(0, 9)]
        == SeededDataset(Noise())[SeededIndex(1, 9)]
        != SeededDataset(Noise())[SeededIndex(0, 8)]
    )
    assert torch.equal(torch.random.get_rng_state(), before)  # the global generator is untouched
    assert torch.initial_seed() == 6


class Stop(BaseException):
    """Ends a run as a crash would."""


def stop_after(args: tuple, steps: int) -> None:
    """Train with a checkpoint at this step, and crash one step later."""
    from vit_rope.training.ema import EMA

    def crash(self, trainer, *_):
        if trainer.global_step == steps + 1:
            raise Stop

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stop):
        patch.setattr(EMA, "on_train_batch_start", crash, raising=False)
        run(*args, "--last.every_steps", steps)
