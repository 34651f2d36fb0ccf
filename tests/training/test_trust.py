"""No file can run code: checkpoints, weights, YAML, specs, config.json name known classes only."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from tests.helpers import CLASSIFIER, CONFIG, run
from vit_rope import files, sampling
from vit_rope.positions import Layout, build


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A module that creates a file when it is imported, or when anything in it is called."""
    mark = tmp_path / "sang"
    source = f"from pathlib import Path\nimport torch\nsing = Path({str(mark)!r}).touch\nsing()\n"
    source += "def call(*args, **kwargs): sing()\nclass Data(torch.nn.Module):\n    def __init__(self): sing()\n"
    (tmp_path / "canary.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield mark
    assert not mark.exists()


THING = {"class_path": "canary.Data"}
SHELL = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "sang"]}}
ATTACKS = {
    "data": ("data", THING),
    "model": ("model", THING),
    "a callback": ("trainer.callbacks", [THING]),
    "a logger": ("trainer.logger", [THING]),
    "a profiler": ("trainer.profiler", THING),
    "a strategy": ("trainer.strategy", THING),
    "a plugin": ("trainer.plugins", [THING]),
    "a shell": ("trainer.callbacks", [SHELL]),
    "a transform": ("data.init_args.transforms", [THING]),
    "Lambda": ("data.init_args.transforms", [{"class_path": "Lambda", "init_args": {"lambd": "canary.call"}}]),
    "Lambda by another path": (
        "data.init_args.transforms",
        [{"class_path": "torchvision.transforms.v2._misc.Lambda", "init_args": {"lambd": "canary.call"}}],
    ),
    "a function for a transform": (
        "data.init_args.transforms",
        [{"class_path": "torchvision.transforms.v2.RandomChoice", "init_args": {"transforms": ["canary.call"]}}],
    ),
    "a system function": (
        "data.init_args.transforms",
        [{"class_path": "torchvision.transforms.v2.RandomOrder", "init_args": {"transforms": ["os.system"]}}],
    ),
    "a function for labels": (
        "data.init_args.transforms",
        [{"class_path": "SanitizeBoundingBoxes", "init_args": {"labels_getter": "canary.call"}}],
    ),
    "LambdaCallback": (
        "trainer.callbacks",
        [{"class_path": "LambdaCallback", "init_args": {"on_fit_start": "canary.call"}}],
    ),
    "a name that our module imports": ("trainer.callbacks", [{"class_path": "vit_rope.cli.fit.importlib.reload"}]),
    "a model's argument": ("model.init_args.model_args.norm_layer", "canary.Data"),
    "a class in a model's argument": ("model.init_args.model_args.norm_layer", THING),
    "an optimizer": ("model.init_args.optim.opt", "canary.Data"),
    "a position": ("model.init_args.model_args.position", "canary.call()"),
    "a position's option": ("model.init_args.model_args.position", "axial(base=__import__('canary'))"),
    "timm's checkpoint_path": ("model.init_args.model_args.checkpoint_path", "bad.pt"),
}


class Sing:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def refused(*args: object) -> str:
    """The error message of a command that must be refused."""
    with pytest.raises((ValueError, TypeError, SystemExit, pickle.UnpicklingError)) as caught:
        run(*args)
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 2
    return str(caught.value)


@pytest.mark.parametrize(("key", "value"), ATTACKS.values(), ids=ATTACKS)
def test_yaml_names_only_known_classes(canary, tmp_path, monkeypatch, key, value):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "x": Sing(canary)}, tmp_path / "bad.pt")
    config: dict = copy.deepcopy(CONFIG | {"model": CLASSIFIER})
    *parents, name = key.split(".")
    node = config
    for parent in parents:
        node = node.setdefault(parent, {})
    node[name] = value
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(config))
    refused("--config", "bad.yaml", "--out", "r")
    assert not (tmp_path / "r").exists()


def test_modules_that_the_user_imports_may_be_named(tmp_path, monkeypatch):
    (tmp_path / "mine_of_trust.py").write_text("from vit_rope.training import Digits\nclass Mine(Digits):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(CONFIG | {"model": CLASSIFIER}))
    args = ("--config", "good.yaml", "--out", "r", "--trainer.fast_dev_run", 2)
    with pytest.raises(SystemExit):
        run(*args, "--data", "mine_of_trust.Mine")
    run(*args, "--import", "mine_of_trust", "--data", "mine_of_trust.Mine")


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:canary.call []", "!!python/name:canary.call", "!!python/module:canary"]
)
def test_yaml_tags_create_no_objects(canary, tmp_path, text):
    (tmp_path / "bad.yaml").write_text(f"seed_everything: {text}\n")
    refused("--config", tmp_path / "bad.yaml", "--out", tmp_path / "r")


@pytest.mark.parametrize(
    "spec",
    ["__import__('canary')", "canary.call()", "axial(base=canary)", "axial.__init__()", "(lambda: 0)()", "axial[0]",
     "axial(**{'base': 1})", "axial(base=[x for x in ()])", "axial(base=f'{1}')", "axial if 1 else mixed"],
)  # fmt: skip
def test_specs_are_names_and_literals(canary, spec):
    with pytest.raises(ValueError, match=r"^cannot (build|read) position"):
        build(spec, Layout(width=16, heads=1, grid=(2, 2)))


def test_weights_are_tensors(canary, tmp_path):
    for name in ("legacy.pt", "zip.pt", "weights.safetensors"):
        path = tmp_path / name
        if name == "zip.pt":
            torch.save({"weight": Sing(canary)}, path)
        else:
            path.write_bytes(pickle.dumps({"weight": Sing(canary)}))
        with pytest.raises(ValueError, match=r"was not loaded: it holds more than|is not a checkpoint or is damaged"):
            files.read(path)
        with pytest.raises(Exception, match=r".+"):
            timm.create_model("vit_rope_tiny_patch16_224", checkpoint_path=str(path))
    save_file({"weight": torch.ones(1)}, tmp_path / "good.safetensors")
    assert files.read(tmp_path / "good.safetensors")["weight"] == 1


@pytest.mark.parametrize("name", ["canary.Data", "subprocess.Popen", "DiffusionPipeline", "../canary", "os"])
def test_config_of_a_pipeline_names_only_denoisers(canary, tmp_path, name):
    index = {"_class_name": "DDPMPipeline", "unet": ["canary", name], "scheduler": ["diffusers", "DDPMScheduler"]}
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"_class_name": name}))
    torch.save({"x": Sing(canary)}, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(Exception, match=r".+"):
        sampling.load(tmp_path)


def test_config_of_exported_weights_is_plain(canary, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "vit_rope_tiny_patch16_224", "model_args": {"position": "canary.call()"}})
    )
    torch.save({"x": Sing(canary)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r".+"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
