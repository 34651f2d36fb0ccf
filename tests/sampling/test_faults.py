"""vit-rope sample and quality with bad files and options: one line of error, nothing written."""

import json
import re
import shutil

import pytest
import torch

pytest.importorskip("diffusers")

from safetensors import SafetensorError

from tests.helpers import TINY, dit_denoiser, unet_denoiser
from vit_rope import sampling
from vit_rope.cli import quality
from vit_rope.cli import sample as cli_sample
from vit_rope.sampling import images, sample
from vit_rope.training.diffusion import Diffusion


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    sampling.save(dit_denoiser(classes=2), folder)
    return folder


@pytest.fixture
def copy(pipeline, tmp_path):
    return shutil.copytree(pipeline, tmp_path / "copy")


@pytest.fixture(scope="module")
def checkpoint():
    denoiser = dit_denoiser(classes=2)
    return {
        "state_dict": {f"model.{key}": value for key, value in denoiser.model.state_dict().items()},
        "denoiser": sampling.describe(denoiser),
        "pytorch-lightning_version": "2.6.6",
    }


def refused(*args: object) -> str:
    with pytest.raises(SystemExit) as end:
        cli_sample.main([str(arg) for arg in args])
    text = str(end.value.code)
    assert text.startswith("error: ")
    assert len(text.splitlines()) == 1
    return text


def change(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
            "does not hold a denoiser that can be sampled",
        ),
        (
            lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(bytes(50)),
            "does not hold a denoiser that can",
        ),
        (lambda f: (f / "unet" / "config.json").unlink(), "config.json"),
        (lambda f: (f / "model_index.json").write_text("[1]"), "(AttributeError"),
        (lambda f: (f / "model_index.json").write_text("{bad"), "(JSONDecodeError"),
        (lambda f: change(f, "model_index.json", unet=None), "(TypeError"),
        (
            lambda f: change(f, "model_index.json", unet=[1, 2]),
            "model_index.json is damaged, or does not hold",
        ),
        (lambda f: (f / "labels.json").write_text('{"foo": 1}'), "(TypeError"),
        (lambda f: change(f, "labels.json", classes="a"), "(TypeError"),
        (
            lambda f: change(f, "labels.json", classes=50),
            "3 labels, but its files give 50 classes and null label 2",
        ),
        (lambda f: change(f, "unet/config.json", patch_size=0), "model_index.json"),
        (
            lambda f: change(f, "scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"),
            "cannot sample with the noise schedule of a FlowMatchEulerDiscreteScheduler",
        ),
        (
            lambda f: change(f, "scheduler/scheduler_config.json", prediction_type="flow_prediction"),
            "the model predicts 'flow_prediction'; sampling supports epsilon, sample, v_prediction",
        ),
    ],
)
def test_damaged_pipelines_are_named_in_one_line(copy, tmp_path, damage, message):
    damage(copy)
    assert message in refused(copy, "--label", 1, "--n", 1, "--steps", 1, "--out", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.pop("state_dict"), "KeyError"),
        (lambda c: c.update(state_dict=[1]), "AttributeError"),
        (lambda c: c.update(denoiser=5), "TypeError"),
        (lambda c: c["denoiser"].update(unet=None), "TypeError"),
        (lambda c: c["denoiser"]["unet"].pop("_class_name"), "KeyError"),
        (lambda c: c["denoiser"]["unet"].update(_class_name=5), "damaged"),
        (lambda c: c["denoiser"].pop("classes"), "KeyError"),
        (lambda c: c["denoiser"]["noise"].update(beta_schedule="foo"), "NotImplementedError"),
        (lambda c: c["denoiser"].update(noise=5), "AttributeError"),
        (lambda c: c["denoiser"]["unet"].update(sample_size="x"), "damaged"),
    ],
)
def test_damaged_checkpoints_are_named_in_one_line(checkpoint, tmp_path, damage, message):
    content = {
        **checkpoint,
        "denoiser": {k: dict(v) if isinstance(v, dict) else v for k, v in checkpoint["denoiser"].items()},
    }
    damage(content)
    torch.save(content, tmp_path / "a.ckpt")
    text = refused(tmp_path / "a.ckpt", "--label", 1, "--n", 1, "--steps", 1, "--out", tmp_path / "a.png")
    assert message in text
    assert "a.ckpt" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "foo"), "device"),
        (("--out", "taken/x.png"), "cannot write taken/x.png: taken is a file, not a folder"),
        (("--png-dir", "taken", "--overwrite"), "cannot write taken: taken is a file, not a folder"),
        (("--guidance", ".nan"), "guidance is a finite number, got nan"),
    ],
)
def test_impossible_options(pipeline, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("mine")
    assert message in refused(pipeline, "--label", 1, "--n", 1, "--steps", 1, *options)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_models_whose_images_cannot_be_written(tmp_path):
    four = unet_denoiser(channels=4)
    sampling.save(four, tmp_path / "four")
    assert "images of 4 channels; a picture has 1 or 3" in refused(tmp_path / "four", "--out", tmp_path / "a.png")
    assert sample(four, 1, 1).shape == (1, 4, 16, 16)
    wide = dit_denoiser(out_channels=2)
    with pytest.raises(ValueError, match="predicts 2 channels from 1; sampling needs equal numbers"):
        sample(wide, 1, 1)
    wide = dit_denoiser()
    wide.noise.alphas_cumprod[-1] = 0.0
    with pytest.raises(ValueError, match=re.escape("dpm++1s divides by the signal of the last noise level")):
        sample(wide, 1, 2, "dpm++1s")


def test_full_disks_leave_no_partial_files(pipeline, tmp_path, monkeypatch):
    def full(image, file, *args, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images.Image.Image, "save", full)
    out = ("--out", tmp_path / "a.png", "--png-dir", tmp_path / "images")
    assert "No space left on device" in refused(pipeline, "--label", 1, "--n", 1, "--steps", 1, *out)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_interrupt_reports_what_is_written(pipeline, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_sample, "sample_batches", interrupted)
    with pytest.raises(SystemExit) as end:
        cli_sample.main([str(pipeline), "--label", "1", "--out", str(tmp_path / "a.png")])
    assert end.value.code == 130
    assert "stopped; images in --png-dir are complete" in capsys.readouterr().err


def test_quality_checks_options_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("mine")
    for options, message in (
        (["--out", str(tmp_path / "taken")], "taken exists; give --out another name"),
        (["--out", str(tmp_path / "taken" / "x.json")], "taken"),
        (["--n", "1"], "needs at least 2 samples, got n = 1"),
    ):
        with pytest.raises(SystemExit) as end:
            quality.main(["run", "--judge", "judge", *options])
        assert re.match(rf"error: .*{re.escape(message)}", str(end.value.code))
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_failed_export_keeps_the_previous_one(tmp_path, monkeypatch):
    module = Diffusion("RopeDiT", TINY, num_classes=10, in_chans=1, img_size=8)
    state, folder = module.state_dict(), tmp_path / "exported"
    module.export(folder, state, {})
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}

    def full(denoiser, temporary):
        temporary.mkdir()
        (temporary / "half").write_text("half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(sampling, "save", full)
    with pytest.raises(
        OSError, match=r"^could not write .*exported: .*No space left .*; the previous version is unchanged"
    ):
        module.export(folder, state, {})
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
