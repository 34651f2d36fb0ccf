"""Several processes, also with shards: the same numbers as one, and all end when one ends."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from tests.helpers import CLASSIFIER, CONFIG, ROOT, last_checkpoint, run
from tests.processes import finish, start
from vit_rope import RopeViT
from vit_rope.training.classification import Classification
from vit_rope.training.run.checkpoints import LastCheckpoint

PLAIN = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 1, "position": "mixed + learned"}
SHARDED = "trainer.strategy={class_path: lightning.pytorch.strategies.ModelParallelStrategy, init_args: {%s}}"
SIZES = "data_parallel_size: 2, tensor_parallel_size: 1, save_distributed_checkpoint: false"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    init = {**CLASSIFIER["init_args"], "model_args": PLAIN, "mixup": 0.0, "optim": {"lr": 0.001}}
    init["schedule"] = {"name": "constant", "warmup": 0}
    data = {"class_path": "Digits", "init_args": {"batch_size": 16, "augment": "none"}}
    trainer = {**CONFIG["trainer"], "max_epochs": 1, "limit_train_batches": 10}
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    model = {"class_path": "Classification", "init_args": init}
    path.write_text(yaml.safe_dump({**CONFIG, "model": model, "data": data, "trainer": trainer}))
    return str(path)


def ranks(*args: object, timeout: float = 120) -> tuple[int, str]:
    status, out, err = finish(start("tests.processes", "ranks", 2, "fit", *args), timeout)
    return status, out + err


def close(one: dict, other: dict, tolerance: float) -> None:
    assert one["global_step"] == other["global_step"]
    for part in ("weights_in_training", "state_dict"):
        assert list(one[part]) == list(other[part])
        for name, value in one[part].items():
            torch.testing.assert_close(other[part][name], value, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def single(config, tmp_path_factory) -> Path:
    """Ten steps of one process with the batches of two."""
    out = tmp_path_factory.mktemp("single") / "r"
    run("--config", config, "--out", out, "--data.batch_size", 32)
    return out


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(config, single, tmp_path):
    out = tmp_path / "r"
    status, output = ranks("--config", config, "--out", out, "--trainer.devices", 2, "--trainer.strategy", "ddp")
    assert status == 0, output
    close(last_checkpoint(single), last_checkpoint(out), 1e-6)
    scores = [json.loads((folder / "summary.json").read_text())["last"]["val/loss"] for folder in (single, out)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


@pytest.mark.slow
def test_shards_equal_one_process_and_resume_in_one(config, single, tmp_path):
    out = tmp_path / "r"
    strategy = ("--trainer.devices", 2, f"--{SHARDED % SIZES}")
    status, output = ranks("--config", config, "--out", out, *strategy)
    assert status == 0, output
    close(last_checkpoint(single), last_checkpoint(out), 1e-6)
    # resumed in one process, and again in two
    more = ("--trainer.max_epochs", 2, "--ckpt_path", "last")
    run("--config", config, "--out", single, "--data.batch_size", 32, *more)
    run("--config", config, "--out", tmp_path / "one", *more[:2], "--ckpt_path", out, "--data.batch_size", 32)
    status, output = ranks("--config", config, "--out", out, *strategy, *more)
    assert status == 0, output
    close(last_checkpoint(single), last_checkpoint(tmp_path / "one"), 2e-6)
    close(last_checkpoint(single), last_checkpoint(out), 2e-6)
    assert (out / "exported" / "model.safetensors").is_file()


@pytest.mark.slow
def test_average_of_bfloat16_shards_is_float32_and_resumes_bit_for_bit(config, tmp_path):
    args = ("--config", config, "--trainer.devices", 2, f"--{SHARDED % SIZES}", "--trainer.precision", "bf16-true")
    args += ("--model.model_args.position", "axial")  # learned frequencies stay in float32, which FSDP2 does not mix
    for epochs, out, more in ((2, "whole", ()), (1, "halves", ()), (2, "halves", ("--ckpt_path", "last"))):
        status, output = ranks(*args, "--out", tmp_path / out, "--trainer.max_epochs", epochs, *more)
        assert status == 0, output
    whole, halves = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "halves")
    for name, value in whole["weights_in_training"].items():
        assert (value.dtype, whole["state_dict"][name].dtype) == (torch.bfloat16, torch.float32)
    close(whole, halves, 0)


@pytest.mark.slow
def test_process_that_is_killed_ends_the_run(config, tmp_path):
    """With Lightning's launcher, not torchrun: the first process starts the second."""
    out = tmp_path / "r"
    options = ("--trainer.devices", 2, "--trainer.strategy", "ddp", "--trainer.max_epochs", 10_000)
    process = start("vit_rope", "fit", "--config", config, "--out", out, *options)
    other = 0
    try:
        for _ in range(900):
            if (out / "checkpoints" / "last.ckpt").exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        other = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
        os.kill(other, signal.SIGKILL)
        began = time.monotonic()
        status, _, err = finish(process, 60)
    finally:
        process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.kill(other or process.pid, signal.SIGKILL)
    assert status == 1
    assert time.monotonic() - began < 60
    assert "process 1 ended before the others, with status -9" in err


@pytest.mark.slow
def test_signal_to_one_process_stops_all_after_the_same_step(config, tmp_path):
    """A job queue may signal any process: one checkpoint is saved, and the run can be resumed."""
    out = tmp_path / "r"
    options = ("--trainer.devices", 2, "--trainer.strategy", "ddp", "--trainer.max_epochs", 10_000)
    process = start("tests.processes", "ranks", 2, "fit", "--config", config, "--out", out, *options)
    try:
        for _ in range(600):
            if (out / "checkpoints" / "last.ckpt").exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGTERM)
        status, _, err = finish(process, 60)
    finally:
        process.kill()
    assert status == 128 + signal.SIGTERM, err
    message = re.search(r"Interrupted after step (\d+)\. Resume with: vit-rope fit --ckpt_path", err)
    assert last_checkpoint(out)["global_step"] == int(message[1])
    steps = int(message[1]) + 12
    one = ("--trainer.devices", 1, "--trainer.strategy", "auto", "--data.batch_size", 32)  # as many images in a step
    run("--ckpt_path", out, *one, "--trainer.max_steps", steps)
    assert last_checkpoint(out)["global_step"] == steps


@pytest.mark.slow
def test_error_in_one_process_ends_the_run_and_is_reported(tmp_path):
    for path in (tmp_path / split / name / f"{i}.png" for split in ("train", "val") for name in "ab" for i in range(4)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"")  # read by one process only
    data = {"class_path": "ImageFolder", "init_args": {"root": str(tmp_path), "img_size": 8, "batch_size": 4}}
    data["init_args"]["workers"] = 0
    model = {**CLASSIFIER, "init_args": {**CLASSIFIER["init_args"], "mixup": 0.0}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**CONFIG, "model": model, "data": data}))
    began = time.monotonic()
    status, output = ranks("--config", tmp_path / "c.yaml", "--out", tmp_path / "r", "--trainer.devices", 2)
    assert status == 1
    assert time.monotonic() - began < 60
    assert re.search(r"ValueError: cannot read the image .*train/a/0\.png", output)


# Models on the meta device


def test_model_from_the_meta_device_is_the_same_model(tmp_path):
    """Built on the meta device, moved to the CPU, then loaded: no table keeps its old values."""
    for position in ("axial", "mixed", "learned", "sincos + axial"):
        args = {**PLAIN, "position": position}
        whole = Classification("vit_rope_tiny_patch16_224", args, num_classes=10, in_chans=1, img_size=8).eval()
        with torch.device("meta"):
            empty = Classification("vit_rope_tiny_patch16_224", args, num_classes=10, in_chans=1, img_size=8).eval()
        assert all(p.is_meta for p in empty.parameters())
        empty.to_empty(device="cpu")
        for tensor in empty.state_dict().values():
            tensor.fill_(float("nan"))
        empty.load_state_dict(whole.state_dict())
        images = torch.randn(2, 1, 8, 8)
        assert torch.equal(empty(images), whole(images))


def test_tensor_parallel_is_refused():
    class Mesh(dict):
        def size(self):
            return 4

    module = Classification("vit_rope_tiny_patch16_224", PLAIN, num_classes=10, in_chans=1, img_size=8)
    module._device_mesh = Mesh(tensor_parallel=Mesh())
    with pytest.raises(ValueError, match="ModelParallelStrategy data_parallel_size: 4 and tensor_parallel_size: 1"):
        module.configure_model()


def test_checkpoint_in_parts_is_refused(config, tmp_path):
    strategy = SHARDED % "data_parallel_size: 1, tensor_parallel_size: 1"
    with pytest.raises(ValueError, match="set save_distributed_checkpoint: false of the strategy"):
        run("--config", config, "--out", tmp_path / "r", f"--{strategy}")
    assert not (tmp_path / "r").exists()


RANK = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from vit_rope import RopeViT

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
mesh = dist.init_device_mesh("cpu", (2,))
options = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=4, position="axial + mixed")
with torch.device("meta" if rank else "cpu"):
    net = RopeViT(**options).eval()
if rank:
    net.to_empty(device="cpu")
net.load_state_dict(torch.load(f"{folder}/weights.pt", weights_only=True))
for part in (*net.blocks, net):
    fully_shard(part, mesh=mesh)
with torch.no_grad():
    torch.save(net(torch.load(f"{folder}/images.pt", weights_only=True)), f"{folder}/out{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_pain_09_ranks_hold_the_same_tables(tmp_path):  # lmms-engine PR #185
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}
    net, images = RopeViT(**options, position="axial + mixed").eval(), torch.randn(3, 3, 16, 16)
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    torch.save(images, tmp_path / "images.pt")
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    running = [
        subprocess.Popen(
            [sys.executable, script, tmp_path, str(rank)],
            env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in running:
        status, _, err = finish(process)
        assert status == 0, err
    with torch.no_grad():
        want = net(images)
    for rank in range(2):
        out = torch.load(tmp_path / f"out{rank}.pt", weights_only=True)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("world", "agreed", "leaves"), [(1, False, True), (2, False, False), (2, True, True)])
def test_no_process_exits_before_all_have_agreed(world, agreed, leaves, tmp_path):
    """Not at the end of an epoch either, which saves whether or not all have got the signal."""
    callback = LastCheckpoint(str(tmp_path))
    callback.signal, callback.agreed = signal.SIGTERM, agreed
    trainer = SimpleNamespace(fast_dev_run=True, global_step=3, world_size=world, is_last_batch=True)
    with pytest.raises(SystemExit) if leaves else contextlib.nullcontext() as end:
        callback.on_train_epoch_end(trainer, None)
    assert callback.saved == 3
    assert end is None or end.value.code == 128 + signal.SIGTERM
