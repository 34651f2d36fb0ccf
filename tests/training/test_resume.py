"""A run that was stopped, by whatever, and goes on is bit for bit the run that was not."""

import contextlib
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.helpers import CLASSIFIER, CONFIG, assert_same, last, numbers, run
from tests.processes import finish, start
from vit_rope.cli.fit import train
from vit_rope.training.data.loader import Loader, ResumableSampler, SeededDataset, loader
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
def whole(configs, tmp_path_factory) -> dict[str, Path]:
    """Runs that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    for name, config in configs.items():
        run("--config", config, "--out", folder / name)
    return {name: folder / name for name in configs}


@pytest.mark.parametrize("name", ["classifier", "denoiser"])
def test_same_seed_twice_is_the_same_run(configs, whole, tmp_path, name):
    run("--config", configs[name], "--out", tmp_path / "again")
    assert_same(whole[name], tmp_path / "again")
    run("--config", configs[name], "--out", tmp_path / "other", "--seed_everything", 4)
    with pytest.raises(AssertionError):
        assert_same(whole[name], tmp_path / "other")


@pytest.mark.parametrize("name", ["classifier", "denoiser"])
@pytest.mark.parametrize("steps", [12, 9], ids=["after an epoch", "within an epoch"])
def test_stopped_and_resumed_is_the_whole_run(configs, whole, tmp_path, name, steps):
    """The schedule of both parts is that of 24 steps, as of a run that was killed."""
    args = ("--config", configs[name], "--out", tmp_path / "r", "--model.schedule.warmup", 2)
    stop_after(args, steps)
    before = (tmp_path / "r" / "metrics.jsonl").read_text()
    assert last(tmp_path / "r")["global_step"] == steps
    run(*args, "--ckpt_path", "last")
    assert (tmp_path / "r" / "metrics.jsonl").read_text().startswith(before)
    assert_same(whole[name], tmp_path / "r")


OPTIONS = {
    "accumulation and workers": (("--trainer.accumulate_grad_batches", 2, "--data.workers", 1), 4),
    "right before a validation": (("--trainer.val_check_interval", 3, "--trainer.precision", "bf16-mixed"), 9),
}


@pytest.mark.parametrize(("options", "steps"), OPTIONS.values(), ids=OPTIONS)
def test_resumed_within_an_epoch_with(configs, tmp_path, options, steps):
    loss = ("--checkpoint.monitor", "val/loss", "--checkpoint.mode", "min")
    args = ("--config", configs["classifier"], *options, *loss, "--trainer.max_epochs", 2, "--ema.decay", 0.5)
    run(*args, "--out", tmp_path / "whole")
    stop_after((*args, "--out", tmp_path / "r"), steps)
    checkpoint = last(tmp_path / "r")
    assert checkpoint["global_step"] == steps
    scores = [row["val/loss"] for row in numbers(tmp_path / "r").values() if "val/loss" in row]
    assert scores[-1] == min(scores)
    (best,) = [state for name, state in checkpoint["callbacks"].items() if name.startswith("BestCheckpoint")]
    assert best["best_model_score"] == pytest.approx(scores[-1], rel=1e-5)  # it knows of the validation at this step
    run(*args, "--out", tmp_path / "r", "--ckpt_path", "last")
    assert_same(tmp_path / "whole", tmp_path / "r")


def test_runs_counted_in_steps_can_be_prolonged_within_an_epoch(configs, tmp_path):
    args = ("--config", configs["classifier"], "--trainer.max_epochs", -1, "--model.schedule.name", "constant")
    run(*args, "--out", tmp_path / "whole", "--trainer.max_steps", 15)
    run(*args, "--out", tmp_path / "r", "--trainer.max_steps", 8)
    assert last(tmp_path / "r")["global_step"] == 8
    run(*args, "--out", tmp_path / "r", "--trainer.max_steps", 15, "--ckpt_path", "last")
    assert_same(tmp_path / "whole", tmp_path / "r")


def best_of(folder: Path) -> tuple[float, int]:
    """The best score that the last checkpoint knows of, and the epoch of best.ckpt."""
    (state,) = [state for name, state in last(folder)["callbacks"].items() if name.startswith("BestCheckpoint")]
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    return float(state["best_model_score"]), best["epoch"]


def test_moved_run_keeps_its_best_checkpoint(configs, whole, tmp_path):
    """A rate that ruins the weights lets every later epoch be worse."""
    moved, ruin = tmp_path / "moved", ("--trainer.max_epochs", 5, "--model.optim.lr", 10, "--ema.decay", 0)
    shutil.copytree(whole["denoiser"], moved)
    before = best_of(moved)
    run("--ckpt_path", moved, *ruin)
    assert last(moved)["epoch"] == 4
    assert best_of(moved) == before
    assert json.loads((moved / "summary.json").read_text())["checkpoint"] == str(moved / "checkpoints" / "best.ckpt")
    (moved / "checkpoints" / "best.ckpt").unlink()  # then the best is the best from here on
    run("--ckpt_path", moved, "--trainer.max_epochs", 6)
    assert best_of(moved)[1] == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classifier", "denoiser"])
def test_killed_at_random_moments(configs, whole, tmp_path, name):
    """SIGKILL ten times in each: within steps, validations and while checkpoints are written."""
    args = ("--config", configs[name], "--out", tmp_path / "r", "--last.every_steps", 1)
    status, out, err = finish(start("tests.processes", "kill", 0, 10, "fit", *args), timeout=240)
    assert status == 0, err
    counts = json.loads(out.splitlines()[-1])
    assert counts["kills"] == 10
    assert counts["resumed"] >= 3
    assert_same(whole[name], tmp_path / "r")
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
def test_malformed_checkpoint_is_no_fresh_start(whole, tmp_path, name, value):
    content = last(whole["denoiser"])
    *outer, key = name.split("/")
    inner = content[outer[0]] if outer else content
    inner.update({key: value}) if value is not None else inner.pop(key)
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=rf"bad\.ckpt is no checkpoint to go on with: its {name}.*start afresh$"):
        run("--ckpt_path", tmp_path / "bad.ckpt", "--out", tmp_path / "r", "--trainer.max_epochs", 5)
    assert not (tmp_path / "r").exists()
    if name in ("state_dict", "callbacks", "loops"):
        with pytest.raises(ValueError, match=rf"bad\.ckpt is no checkpoint of a run: its {name}"):
            train(["validate", "--ckpt_path", str(tmp_path / "bad.ckpt")])


def test_weights_in_training_that_are_gone(whole, tmp_path):
    content = last(whole["denoiser"])
    name, _ = content["weights_in_training"].popitem()
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(
        ValueError, match=rf"^the checkpoint's weights_in_training lack {re.escape(name)} \(1 missing\); "
    ):
        run("--ckpt_path", tmp_path / "bad.ckpt", "--out", tmp_path / "r", "--trainer.max_epochs", 5)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("opt", ["sgd", "lion"])
def test_state_of_another_optimizer(whole, tmp_path, opt, named):
    content = last(whole["denoiser"])
    if not named:  # as one of another program
        for group in content["optimizer_states"][0]["param_groups"]:
            group.pop("opt")
    torch.save(content, tmp_path / "last.ckpt")
    args = ("--ckpt_path", tmp_path / "last.ckpt", "--out", tmp_path / "r", "--trainer.max_epochs", 5)
    was = "adamw" if named else "another optimizer"
    with pytest.raises(
        ValueError, match=rf"^the checkpoint has the state of {was}, not of {opt}: go on with .*start afresh$"
    ):
        run(*args, "--model.optim.opt", opt)
    assert not (tmp_path / "r").exists()
    if not named:
        run(*args)
        assert last(tmp_path / "r")["epoch"] == 4


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_denoiser_that_learned_another_prediction(whole, command):
    with pytest.raises(
        ValueError,
        match=r"^the checkpoint's model has learned to predict v, not epsilon: set prediction: v, or train anew$",
    ):
        train([command, "--ckpt_path", str(whole["denoiser"]), "--model.prediction", "epsilon"])


# The parts


def test_order_goes_on_where_it_is_told(configs):
    order = ResumableSampler(20, shuffle=True, repeats=2)
    order.set_epoch(3)
    whole = list(order)
    order.start = 7
    assert [(int(pick), pick.seed) for pick in order] == [(int(pick), pick.seed) for pick in whole[7:]]
    assert len({pick.seed for pick in whole}) == len(whole)  # an image that comes twice is changed twice


class Noise:
    """A dataset that is random alone."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[float, ...]:
        return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002


def draws(workers: int = 0, state: dict | None = None, take: int = 3) -> tuple[list, Loader]:
    torch.manual_seed(5)
    batches = loader(Noise(), "train", 4, workers, None)
    batches.sampler.set_epoch(2)
    if state:
        batches.load_state_dict(state)
    return [torch.stack(batch).tolist() for _, batch in zip(range(take), batches, strict=False)], batches


def test_random_changes_do_not_depend_on_the_process_nor_on_where_one_began():
    whole, _ = draws()
    assert len(whole) == 3
    assert draws(workers=1)[0] == whole
    first, batches = draws(take=1)
    state = batches.state_dict()
    assert state == {"epoch": 2, "batches": 1}
    assert first + draws(state=state)[0] == whole
    assert draws(state={"epoch": 1, "batches": 1})[0] == whole  # the end of an epoch before
    torch.manual_seed(6)
    before = torch.random.get_rng_state()
    assert (
        SeededDataset(Noise())[SeededIndex(0, 9)]
        == SeededDataset(Noise())[SeededIndex(1, 9)]
        != SeededDataset(Noise())[SeededIndex(0, 8)]
    )
    assert torch.equal(torch.random.get_rng_state(), before)  # nothing outside notices
    assert torch.initial_seed() == 6


class Stop(BaseException):
    pass


def stop_after(args: tuple, steps: int) -> None:
    """Train with a checkpoint at this step, and die a step later."""
    from vit_rope.training.ema import EMA

    def die(self, trainer, *rest):
        if trainer.global_step == steps + 1:
            raise Stop

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stop):
        patch.setattr(EMA, "on_train_batch_start", die, raising=False)
        run(*args, "--last.every_steps", steps)
