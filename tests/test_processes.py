"""Several processes: the same numbers as one, in shards too, and an end for all when one ends."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from .processes import finish, start
from .test_resume import CLASSIFIER, CONFIG, last, run

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
def test_two_processes_are_one_with_twice_the_batch(config, single, tmp_path):
    out = tmp_path / "r"
    status, said = ranks("--config", config, "--out", out, "--trainer.devices", 2, "--trainer.strategy", "ddp")
    assert status == 0, said
    close(last(single), last(out), 1e-6)
    scores = [json.loads((folder / "summary.json").read_text())["last"]["val/loss"] for folder in (single, out)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


@pytest.mark.slow
def test_shards_are_one_process_and_go_on_in_one(config, single, tmp_path):
    out = tmp_path / "r"
    strategy = ("--trainer.devices", 2, f"--{SHARDED % SIZES}")
    status, said = ranks("--config", config, "--out", out, *strategy)
    assert status == 0, said
    close(last(single), last(out), 1e-6)
    # one process takes over, and two take over from one
    more = ("--trainer.max_epochs", 2, "--ckpt_path", "last")
    run("--config", config, "--out", single, "--data.batch_size", 32, *more)
    run("--config", config, "--out", tmp_path / "one", *more[:2], "--ckpt_path", out, "--data.batch_size", 32)
    status, said = ranks("--config", config, "--out", out, *strategy, *more)
    assert status == 0, said
    close(last(single), last(tmp_path / "one"), 2e-6)
    close(last(single), last(out), 2e-6)
    assert (out / "exported" / "model.safetensors").is_file()
