"""Every file in configs/ gives its command; every classifier trains and validates for one step."""

import contextlib
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.helpers import ROOT
from vit_rope.cli.fit import train
from vit_rope.training.data import in_memory

CONFIGS = sorted((ROOT / "configs").glob("**/*.yaml"))
CLASSIFIERS = [path for path in CONFIGS if yaml.safe_load(path.read_text())["model"]["class_path"] == "Classification"]
KEYS = {"out", "seed_everything", "model", "data", "trainer", "checkpoint", "last", "ema"}
SMALL = ["--data.batch_size", "4", "--data.workers", "0", "--model.model_args.depth", "1"]


class FewImages:
    """torchvision's CIFAR with 100 images."""

    def __init__(self, root: str, train: bool):
        self.data, self.targets = np.zeros((100, 32, 32, 3), np.uint8), list(range(100))


def write_fashion(root: Path) -> None:
    """The files of Fashion-MNIST with 40 images each."""
    for part in ("train", "t10k"):
        images, labels = np.zeros((40, 28, 28), np.uint8), np.arange(40, dtype=np.uint8) % 10
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (root / name).write_bytes(header + array.tobytes())


def write_folders(root: Path) -> None:
    """An ImageFolder with two classes."""
    for path in (root / split / name / f"{i}.png" for split in ("train", "val") for name in "ab" for i in range(4)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(path)


def small_options(config: dict, root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options that make a configuration small enough for a test; writes the data that it needs."""
    match config["data"]["class_path"].rpartition(".")[2]:
        case "FashionMNIST" | "SmallFashion":
            write_fashion(root)
            return [*SMALL, "--data.root", str(root)]
        case "CIFAR":
            monkeypatch.setattr(in_memory, "CIFAR100", FewImages)
            return [*SMALL, "--trainer.precision", "32-true"]
        case "ImageFolder":
            write_folders(root)
            sizes = ["--data.img_size", "32", "--model.model_args.embed_dim", "24", "--model.model_args.num_heads", "3"]
            machine = ["accelerator=cpu", "devices=1", "num_nodes=1", "strategy=auto", "precision=32-true"]
            options = [f"--trainer.{option}" for option in machine]
            others = ["--data.root", str(root), "--model.compile", "false", "--model.weights", ""]
            return [*SMALL, *sizes, *options, *others]
    return []


def test_there_are_configs():
    assert {"digits_vit", "fashion_vit", "cifar100_vit", "imagenet_vit_small"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_header_gives_the_command(path):
    text = path.read_text()
    config = yaml.safe_load(text)
    header = text[: text.index("\nout:")]
    assert f"python train.py fit --config configs/{path.name}" in header
    assert all(line.startswith("#") for line in header.splitlines())
    assert set(config) <= KEYS
    assert config["out"] == f"runs/{path.stem}"
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("path", CLASSIFIERS, ids=lambda path: path.stem)
def test_config_trains_one_step(path, tmp_path, monkeypatch):
    options = small_options(yaml.safe_load(path.read_text()), tmp_path, monkeypatch)
    out = tmp_path / "run"
    with contextlib.redirect_stderr(io.StringIO()) as output:
        train(["fit", "--config", str(path), "--out", str(out), "--trainer.fast_dev_run", "true", *options])
    assert "val/loss" in output.getvalue()
    assert not out.exists()  # fast_dev_run writes nothing
