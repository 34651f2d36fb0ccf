"""Faults around a run: disks, second runs, signals, bad numbers. One-line errors, nothing lost."""

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from tests.helpers import CLASSIFIER, CONFIG, assert_same, last_checkpoint, metrics_by_step, run
from vit_rope import files
from vit_rope.cli.fit import train
from vit_rope.files import replacing
from vit_rope.training.classification import Classification
from vit_rope.training.data.loader import make_loader
from vit_rope.training.ema import EMA
from vit_rope.training.run import progress
from vit_rope.training.run.checkpoints import AtomicIO, LastCheckpoint, resume_command
from vit_rope.training.run.locks import FolderLock
from vit_rope.training.run.metrics import MetricsLogger


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"model": CLASSIFIER}))
    return str(path)


# Disks


class FullDisk:
    """A file that accepts a limited number of bytes."""

    def __init__(self, file, free: int):
        self.file, self.free = file, free

    def write(self, content) -> int:
        if len(content) > self.free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.free -= len(content)
        return self.file.write(content)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("free", [0, 100, 5000])
def test_full_disk_keeps_the_previous_checkpoint(tmp_path, free, monkeypatch):
    path, io = tmp_path / "last.ckpt", AtomicIO()
    io.save_checkpoint({"weights": torch.ones(10)}, path)
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda content, file: save(content, FullDisk(file, free)))
    message = rf"^could not write {re.escape(str(path))}: No space left on device; the previous version is unchanged$"
    with pytest.raises(OSError, match=message):
        io.save_checkpoint({"weights": torch.zeros(100_000)}, path)
    assert torch.load(path, weights_only=True)["weights"].sum() == 10
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_real_file_size_limit_keeps_the_previous_checkpoint(tmp_path):
    """The closest a process can get to a full disk by itself."""
    path, io = tmp_path / "last.ckpt", AtomicIO()
    io.save_checkpoint({"weights": torch.ones(10)}, path)
    _, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard_limit))
    try:
        with pytest.raises(OSError, match=r"File too large; the previous version is unchanged$"):
            io.save_checkpoint({"weights": torch.ones(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard_limit, hard_limit))
    assert torch.load(path, weights_only=True)["weights"].sum() == 10


def test_power_cut_while_writing_keeps_the_previous_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("before")
    with contextlib.suppress(KeyboardInterrupt), replacing(path) as file:  # like a kill: nothing cleans up
        file.write(b"half of wha")
        raise KeyboardInterrupt
    assert path.read_text() == "before"


def test_content_is_flushed_before_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda handle: calls.append("sync") or fsync(handle))
    monkeypatch.setattr(files.os, "replace", lambda *paths: calls.append("rename") or replace(*paths))
    with replacing(tmp_path / "x") as file:
        file.write(b"x")
    assert calls == ["sync", "rename", "sync"]


@pytest.mark.parametrize("trouble", ["gone", "read-only"])
def test_folder_that_becomes_unwritable(config, tmp_path, monkeypatch, trouble):
    out = tmp_path / "r"

    def spoil(self, trainer, module):
        if trainer.current_epoch == 1:
            if trouble == "gone":
                shutil.rmtree(out)
            else:  # the tests may run as root, who can always write, so the error is simulated
                monkeypatch.setattr(Path, "open", refuse)

    def refuse(path, mode="r", *args, **kwargs):
        if "r" not in mode and path.is_relative_to(out):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return open(path, mode, *args, **kwargs)

    monkeypatch.setattr(LastCheckpoint, "on_train_epoch_start", spoil, raising=False)
    reason = "No such file" if trouble == "gone" else "Read-only file system"
    with pytest.raises(OSError, match=rf"^could not write .*\.ckpt: {reason}[^\n]*$"):
        run("--config", config, "--out", out, "--trainer.logger", "false")
    if trouble == "read-only":
        assert last_checkpoint(out)["epoch"] == 0


@pytest.mark.parametrize("option", [("save_top_k", 2), ("save_top_k", -1), ("filename", "m-{epoch}")])
def test_number_and_name_of_best_checkpoints_are_fixed(config, tmp_path, option):
    with pytest.raises(ValueError, match=rf"^a run keeps best\.ckpt and last\.ckpt only.* got .*{option[1]}"):
        run("--config", config, "--out", tmp_path / "r", f"--checkpoint.{option[0]}", option[1])
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("callback", ["checkpoint", "EarlyStopping"])
def test_monitor_that_is_not_logged_is_refused_before_the_first_epoch(config, tmp_path, callback):
    options = ["--checkpoint.monitor", "val/nope", "--checkpoint.mode", "max"]
    if callback == "EarlyStopping":
        options = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/nope"]
    with pytest.raises(
        ValueError, match=rf"{callback}.* is val/nope, which Classification does not log: .*val/acc, val/loss"
    ):
        run("--config", config, "--out", tmp_path / "r", *options)
    assert not (tmp_path / "r").exists()
    with pytest.raises(ValueError, match=f"^{'the monitor of ' * (callback != 'checkpoint')}{callback}"):
        run("--config", config, "--out", tmp_path / "r", *options, "--trainer.num_sanity_val_steps", 0)


def test_folder_that_cannot_be_created(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^could not write .*file/r: Not a directory$"):
        run("--config", config, "--out", tmp_path / "file" / "r")


def test_partial_row_is_cut_off_when_the_run_resumes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2, "b')
    logger = MetricsLogger(str(tmp_path))
    logger.log_metrics({"a": 3}, step=1)
    logger.log_metrics({"a": 4}, step=2)
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [1, 3, 4]


# Two runs


LOCK = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit("taken")
file.write("process 7 on a machine")
file.flush()
print("mine", flush=True)
time.sleep(60)
"""


def other_process_with_lock(out: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", LOCK, str(out / ".lock")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_runs_into_one_folder(config, tmp_path):
    out = tmp_path / "r"
    out.mkdir()
    with other_process_with_lock(out) as other:
        try:
            assert other.stdout.readline() == "mine\n"
            for options in ((), ("--overwrite", "true")):
                with pytest.raises(ValueError, match=rf"{out} is in use by process 7 on a machine: .*--out$"):
                    run("--config", config, "--out", out, *options)
            assert [path.name for path in out.iterdir()] == [".lock"]
        finally:
            other.kill()
    run("--config", config, "--out", out, "--trainer.max_epochs", 1)  # the lock ended with its holder
    assert last_checkpoint(out)["epoch"] == 0


def test_resumed_run_does_not_remove_its_own_checkpoint(config, tmp_path):
    out = tmp_path / "r"
    run("--config", config, "--out", out, "--trainer.max_epochs", 1)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match=rf"^--overwrite true would remove {out}/checkpoints/last\.ckpt, .*leave out one of the two$"
    ):
        run("--config", config, "--out", out, "--ckpt_path", "last", "--overwrite", "true")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_summary_uses_the_last_checkpoint_if_the_best_is_gone(config, tmp_path, monkeypatch):
    out = tmp_path / "r"
    best = out / "checkpoints" / "best.ckpt"
    monkeypatch.setattr(EMA, "on_train_end", lambda *_: best.unlink(), raising=False)
    run("--config", config, "--out", out, "--trainer.max_epochs", 1)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["checkpoint"] == str(out / "checkpoints" / "last.ckpt")
    assert summary["val/acc"] == summary["last"]["val/acc"]
    assert (out / "exported" / "model.safetensors").is_file()


def test_resuming_a_finished_run_changes_nothing(config, tmp_path, capsys):
    out = tmp_path / "r"
    run("--config", config, "--out", out, "--trainer.max_epochs", 2)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    for options in ((), ("--trainer.max_epochs", 1), ("--out", tmp_path / "other")):
        train(["fit", "--ckpt_path", str(out), *map(str, options)])
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "had finished" in line]
        advice = f"Train longer with: vit-rope fit --ckpt_path {out}/checkpoints/last.ckpt --trainer.max_epochs N"
        assert re.search(r"last\.ckpt had finished at epoch 2, step 12: nothing was trained\. ", line)
        assert line.endswith(advice)
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "other").exists()
    (out / "summary.json").unlink()  # as after a kill during the export, which is then done again
    shutil.rmtree(out / "exported")
    run("--ckpt_path", out)
    assert json.loads((out / "summary.json").read_text())["val/acc"] > 0
    assert (out / "exported" / "model.safetensors").is_file()


def test_lock_excludes_other_processes(tmp_path):
    lock = FolderLock(tmp_path)
    lock.take()
    assert other_process_with_lock(tmp_path).communicate(timeout=30)[1] == "taken\n"
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    lock.release()
    assert list(tmp_path.iterdir()) == []
    with other_process_with_lock(tmp_path) as other:
        assert other.stdout.readline() == "mine\n"
        other.kill()


def test_lock_whose_file_was_removed_by_its_last_holder_is_taken_anew(tmp_path, monkeypatch):
    """Between opening and locking it; else a third process could lock the next file meanwhile."""
    lock, path = FolderLock(tmp_path), tmp_path / ".lock"
    opened, lockf = [], fcntl.lockf

    def slow(file, flags):
        if not opened:
            path.unlink()
        opened.append(file)
        lockf(file, flags)

    monkeypatch.setattr(fcntl, "lockf", slow)
    lock.take()
    assert len(opened) == 2
    assert other_process_with_lock(tmp_path).communicate(timeout=30)[1] == "taken\n"
    lock.release()
    assert not path.exists()


def test_run_that_fails_in_its_first_batch_does_not_occupy_its_folder(config, tmp_path, monkeypatch):
    out = tmp_path / "r"
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "loss", poison(Classification, 0, math.nan))
        with pytest.raises(ValueError, match=r"^the loss is nan at step 0 "):
            run("--config", config, "--out", out)
    assert (out / "config.yaml").exists()  # it belongs to nonfinite.jsonl, which names that batch
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "loss", lambda *_: [].pop())
        with pytest.raises(IndexError):
            run("--config", config, "--out", tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []
    run("--config", config, "--out", tmp_path / "other", "--trainer.max_epochs", 1)


def test_folder_is_checked_again_after_it_is_locked(config, tmp_path, monkeypatch):
    take = FolderLock.take
    monkeypatch.setattr(FolderLock, "take", lambda lock: take(lock) or (tmp_path / "r" / "config.yaml").write_text("x"))
    with pytest.raises(ValueError, match=r"already contains a run \(config\.yaml\)"):
        run("--config", config, "--out", tmp_path / "r")
    assert (tmp_path / "r" / "config.yaml").read_text() == "x"


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_prints_how_to_resume(config, tmp_path, number, monkeypatch, capfd):
    run("--config", config, "--out", tmp_path / "uninterrupted")
    out = tmp_path / "r"
    before = signal.getsignal(number)

    def interrupt(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 8 and not (out / "checkpoints").exists() - 1:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "on_train_batch_start", interrupt, raising=False)
        with pytest.raises(SystemExit) as caught:
            run("--config", config, "--out", out)
    assert caught.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert last_checkpoint(out)["global_step"] == 9
    assert "stopping after this step (Ctrl-C again: quit without saving)" in capfd.readouterr().err
    run("--ckpt_path", out)
    assert_same(tmp_path / "uninterrupted", out)


def interrupt(*_) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("hook", ["on_sanity_check_start", "on_train_epoch_end"])
def test_ctrl_c_between_steps_prints_how_to_resume(config, tmp_path, monkeypatch, capsys, hook):
    """Before the first step, and after the last epoch."""
    handler = signal.getsignal(signal.SIGINT)
    out = tmp_path / "with space"
    (tmp_path / "fix_run_mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LastCheckpoint, "on_fit_end", interrupt, raising=False)
    if hook == "on_sanity_check_start":
        monkeypatch.setattr(LastCheckpoint, hook, interrupt, raising=False)
    args = ["--import", "fix_run_mine", "--config", config, "--out", str(out), "--trainer.max_epochs", "1"]
    try:
        with pytest.raises(SystemExit) as caught:
            train(["fit", *args])
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves the signal ignored
    assert caught.value.code == 130
    line = capsys.readouterr().err.splitlines()[-1]
    if hook == "on_sanity_check_start":
        assert line == "Interrupted before a step was saved. Run the same command again to start over"
    else:
        command = f"vit-rope fit --import fix_run_mine --ckpt_path '{out}'"
        assert line == f"Interrupted; the last saved step is 6. Resume with: {command}"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("train.py", "python train.py"),
        ("../my code/train.py", "python '../my code/train.py'"),
        ("/home/me/vit_rope/__main__.py", "python -m vit_rope"),
        ("/usr/bin/vit-rope", "vit-rope"),
        ("/usr/lib/pytest/__main__.py", "vit-rope"),
        ("", "vit-rope"),
    ],
)
def test_resume_command_names_the_program_that_was_used(monkeypatch, program, words):
    monkeypatch.setattr(sys, "argv", [program, "fit"])
    assert resume_command("runs/x") == f"{words} fit --ckpt_path runs/x"
    assert resume_command("a b", ["mine"], "--x") == f"{words} fit --import mine --ckpt_path 'a b' --x"


def test_second_signal_does_not_wait(config, tmp_path, monkeypatch):
    def interrupt(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        monkeypatch.setattr(LastCheckpoint, "on_train_batch_start", interrupt, raising=False)
        with pytest.raises(SystemExit):
            run("--config", config, "--out", tmp_path / "r")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [1]


# Numbers


def poison(module, step: int, value: float):
    """A `loss` that is multiplied by a value at one step."""
    loss = type(module).loss if not isinstance(module, type) else module.loss

    def poisoned(self, batch, batch_idx):
        healthy = loss(self, batch, batch_idx)
        return healthy * value if self.trainer.global_step == step and self.training else healthy

    return poisoned


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_and_names_the_images(config, tmp_path, monkeypatch, value):
    monkeypatch.setattr(Classification, "loss", poison(Classification, 8, value))
    out = tmp_path / "r"
    with pytest.raises(
        ValueError, match=rf"^the loss is {value} at step 8 \(epoch 1, batch 2, rank 0\); .*nonfinite\.jsonl"
    ):
        run("--config", config, "--out", out)
    row = json.loads((out / "nonfinite.jsonl").read_text())
    assert (row["step"], row["epoch"], row["batch"], row["loss"]) == (8, 1, 2, str(value))
    torch.manual_seed(3)
    batches = make_loader(range(1287), "train", 64, 0, None)
    batches.sampler.set_epoch(1)
    assert row["indices"] == [int(index) for index in list(batches.sampler)[128:192]]
    assert last_checkpoint(out)["epoch"] == 0  # the checkpoint of the epoch before, from which to resume


def test_batch_with_a_loss_that_is_not_finite_can_be_skipped(config, tmp_path, monkeypatch):
    out = tmp_path / "r"
    with monkeypatch.context() as patch:
        seen = []

        def loss(self, batch, batch_idx, healthy=Classification.loss):
            seen.append((self.trainer.current_epoch, batch_idx))
            return healthy(self, batch, batch_idx) * (math.nan if seen[-1] == (1, 2) else 1.0)

        patch.setattr(Classification, "loss", loss)
        run("--config", config, "--out", out, "--model.nonfinite", "skip")
    rows = [json.loads(line) for line in (out / "nonfinite.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["batch"]) for row in rows] == [(1, 2)]
    steps = {state["step"].item() for state in last_checkpoint(out)["optimizer_states"][0]["state"].values()}
    assert (steps, last_checkpoint(out)["global_step"]) == (
        {23},
        24,
    )  # the schedule counts the step, the optimizer does not
    assert all(torch.isfinite(value).all() for value in last_checkpoint(out)["weights_in_training"].values())


def test_bar_of_a_terminal_keeps_the_loss_before_a_skipped_batch(config, tmp_path, monkeypatch):
    """The bar reads the loss of each fifth batch, which has none if it was skipped."""
    terminal = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=terminal, force_terminal=True, width=200))
    monkeypatch.setattr(Classification, "loss", poison(Classification, 9, math.nan))
    options = ("--model.nonfinite", "skip", "--trainer.max_epochs", 2, "--trainer.enable_progress_bar", "true")
    run("--config", config, "--out", tmp_path / "r", *options)
    assert (tmp_path / "r" / "nonfinite.jsonl").exists()
    assert "epoch 2/2  loss " in terminal.getvalue()
    assert "nan" not in terminal.getvalue()


def test_gradient_norm_is_logged_before_clipping(config, tmp_path, monkeypatch):
    seen = {}

    def norm(self, optimizer, original=Classification.on_before_optimizer_step):
        grads = torch.cat([p.grad.flatten() for p in self.parameters()])
        seen[self.trainer.global_step] = float(grads.double().square().sum().sqrt())
        original(self, optimizer)

    monkeypatch.setattr(Classification, "on_before_optimizer_step", norm)
    run("--config", config, "--out", tmp_path / "r", "--trainer.gradient_clip_val", 0.01, "--trainer.max_epochs", 1)
    logged = {
        step[1]: row["train/grad_norm"]
        for step, row in metrics_by_step(tmp_path / "r").items()
        if "train/grad_norm" in row
    }
    assert logged == {step: pytest.approx(seen[step], rel=1e-4) for step in (1, 3, 5)}
    assert min(logged.values()) > 0.01


def test_accumulated_batches_are_one_large_batch(config, tmp_path):
    plain = ("--model.mixup", 0, "--model.model_args.proj_drop_rate", 0, "--model.model_args.drop_path_rate", 0)
    plain += ("--model.model_args.patch_drop_rate", 0, "--data.augment", "none", "--model.optim.opt", "sgd")
    args = ("--config", config, *plain, "--trainer.max_epochs", 1, "--model.schedule.name", "constant")
    run(*args, "--out", tmp_path / "large", "--trainer.limit_train_batches", 4)
    small = ("--data.batch_size", 16, "--trainer.limit_train_batches", 16, "--trainer.accumulate_grad_batches", 4)
    run(*args, "--out", tmp_path / "small", *small)
    large, small = last_checkpoint(tmp_path / "large"), last_checkpoint(tmp_path / "small")
    assert large["global_step"] == small["global_step"] == 4
    for name, value in large["weights_in_training"].items():
        torch.testing.assert_close(small["weights_in_training"][name], value, rtol=0, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 needs a GPU: on the CPU, Lightning uses bfloat16")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_half_precision(config, tmp_path, precision):
    run("--config", config, "--out", tmp_path / "r", "--trainer.accelerator", "gpu", "--trainer.precision", precision)
    state = last_checkpoint(tmp_path / "r")
    assert ("MixedPrecision" in state) == (precision == "16-mixed")  # the loss scale
    assert all(value.dtype == torch.float32 for value in state["weights_in_training"].values())


# A long run


def test_early_stopping_and_tensorboard_on_request(config, tmp_path):
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/acc", "--trainer.callbacks.mode=max"]
    stop += ["--trainer.callbacks.patience=1", "--model.optim.lr=1e-12"]
    board = ["--trainer.logger=TensorBoardLogger", f"--trainer.logger.save_dir={tmp_path / 'board'}"]
    run("--config", config, "--out", tmp_path / "r", *stop, *board)
    assert (
        last_checkpoint(tmp_path / "r")["epoch"] == 1
    )  # of four: the score of a model that does not learn is constant
    assert (tmp_path / "r" / "metrics.jsonl").exists()
    assert any(path.name.startswith("events.") for path in (tmp_path / "board").rglob("*"))


def test_memory_is_logged(config, tmp_path):
    run("--config", config, "--out", tmp_path / "r", "--trainer.enable_progress_bar", "true", "--trainer.max_epochs", 1)
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    used = [row["train/memory_gb"] for row in rows if "train/memory_gb" in row]
    assert len(used) == 1
    assert 0.1 < used[0] < 20


@pytest.mark.slow
def test_memory_does_not_grow(config, tmp_path, monkeypatch):
    """2,000 steps with validations and checkpoints; resident memory from step 500 on."""
    used = {}

    def measure(self, trainer, *_):
        if trainer.global_step % 250 == 0:
            used[trainer.global_step] = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    monkeypatch.setattr(LastCheckpoint, "on_train_batch_start", measure, raising=False)
    args = ("--trainer.max_epochs", 100, "--trainer.limit_train_batches", 20, "--trainer.check_val_every_n_epoch", 10)
    run("--config", config, "--out", tmp_path / "r", *args)
    print({step: round(size, 1) for step, size in used.items()})
    assert max(used.values()) - used[500] < 16  # MiB
