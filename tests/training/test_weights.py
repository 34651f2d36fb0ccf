"""Weights to start from: files of other programs, and what is told of files without weights."""

import argparse
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.helpers import ROOT
from vit_rope.files import find, read
from vit_rope.training.classification import create_classifier, load_weights

SIZE = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 1, "img_size": 8}


@pytest.fixture(scope="module")
def weights() -> dict:
    torch.manual_seed(0)
    return timm.create_model("vit_rope_tiny_patch16_224", num_classes=3, **SIZE).state_dict()


def loads(path, wanted: dict) -> bool:
    torch.manual_seed(1)
    model, _ = create_classifier("vit_rope_tiny_patch16_224", {**SIZE}, 3, 3, 8)
    load_weights(model, str(path), "a ViT")
    return all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "state_dict", "model", None])
@pytest.mark.parametrize(
    "prefix",
    ["", "_orig_mod.", "module.", "model.", "module._orig_mod.", "_orig_mod.module.", "model._orig_mod.module."],
)
def test_prefixes_of_other_programs(weights, tmp_path, prefix, key):
    state = {f"{prefix}{name}": value for name, value in weights.items()}
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "a.pth")
    assert loads(tmp_path / "a.pth", weights)
    save_file(state, tmp_path / "a.safetensors")
    assert loads(tmp_path / "a.safetensors", weights)


def test_prefix_of_a_part_and_the_count_of_an_average(weights, tmp_path):
    state = {name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in weights.items()}
    torch.save(state, tmp_path / "part.pth")
    assert loads(tmp_path / "part.pth", weights)
    average = torch.optim.swa_utils.AveragedModel(timm.create_model("vit_rope_tiny_patch16_224", num_classes=3, **SIZE))
    torch.save(average.state_dict(), tmp_path / "average.pth")
    assert loads(tmp_path / "average.pth", average.module.state_dict())


def test_names_that_meet_without_their_prefix_are_refused(weights, tmp_path):
    torch.save(weights | {f"_orig_mod.{name}": value for name, value in weights.items()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth has the same weights twice"):
        loads(tmp_path / "a.pth", weights)


def test_file_of_timms_train_script(weights, tmp_path):
    model = timm.create_model("vit_rope_tiny_patch16_224", num_classes=3, **SIZE)
    model.load_state_dict(weights)
    args = argparse.Namespace(model="vit_rope_tiny_patch16_224", lr=0.1, mean=(0.5, 0.5), opt_betas=[0.9, 0.95])
    optimizer = torch.optim.SGD(model.parameters())
    saver = timm.utils.CheckpointSaver(model, optimizer, args, checkpoint_dir=tmp_path, recovery_dir=tmp_path)
    saver.save_checkpoint(0, 0.5)
    assert read(tmp_path / "last.pth.tar")["args"].lr == 0.1
    assert loads(tmp_path / "last.pth.tar", weights)


class Code:
    def __reduce__(self):
        return print, ("code has run",)


@pytest.mark.parametrize("content", [Code(), argparse.Namespace(inside=Code())])
def test_code_is_not_run(tmp_path, content, capsys):
    torch.save({"args": content}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="it holds more than tensors and plain values, and could run code"):
        read(tmp_path / "a.pth")
    assert not capsys.readouterr().out


@pytest.mark.parametrize("content", [None, b"", b"text", b"{}", b"\x89PNG\r\n", b"<html>", b"version https://git-lfs"])
def test_files_that_are_no_checkpoints(tmp_path, content):
    path = ROOT / "README.md" if content is None else tmp_path / "a.ckpt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name} is not a checkpoint") as caught:
        read(path)
    assert "code" not in str(caught.value)


def test_other_pickles_are_no_checkpoints(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match=r"a\.pkl"):
        read(tmp_path / "a.pkl")


def test_a_run_without_a_best_checkpoint_is_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*best\.ckpt; give the file of a checkpoint, or the"):
        find(str(tmp_path), "", "best")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    assert find(str(tmp_path), "", "best") == tmp_path / "checkpoints" / "last.ckpt"
    (tmp_path / "checkpoints" / "best.ckpt").touch()
    assert find(str(tmp_path), "", "best").name == "best.ckpt"
    assert find(str(tmp_path), "", "last").name == "last.ckpt"
