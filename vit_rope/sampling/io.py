"""Denoisers in files: runs, Lightning checkpoints and diffusers pipelines, read without running any code of theirs."""

import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from .. import files
from ..positions import coords
from .sampler import Denoiser
from .schedulers import KINDS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    scaling: str | None = None,
    size: Sequence[int] | None = None,
) -> Denoiser:
    """The denoiser in a run's folder (its best checkpoint), a Lightning checkpoint or a diffusers pipeline's folder.

    Checkpoints hold averaged weights where the run kept an average. For a `size` (height, width) beyond that of
    training, `scaling` names a modifier of its rotary positions, such as "ntk" or "yarn(slow=0.3)", whose factors are
    how much farther the size reaches. No code in a file is run. Raises FileNotFoundError where there is nothing and
    ValueError for anything else than a denoiser, such as a classifier, and where there is nothing to scale.
    """
    path = Path(path)
    if path.is_dir():
        places = ("model_index.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "exported/model_index.json")
        found = next((path / name for name in places if (path / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{path} is neither a run nor a diffusers pipeline: none of {', '.join(places)}")
        path = found
    read = _pipeline if path.name == "model_index.json" else _checkpoint
    try:
        trained = read(path, lambda config: {} if scaling is None else {"position": _scaled(config, scaling, size)})
        _check_facts(trained)
    except Exception as error:  # what comes from elsewhere can hold anything, at which diffusers raises about anything
        if type(error) in (ValueError, FileNotFoundError):
            raise
        why = f"{type(error).__name__}: {files.one_line(error)}"
        raise ValueError(f"{path} is damaged, or of no denoiser that can be sampled ({why})") from error
    # not diffusers' own method, which warns of positions: they keep their precision by themselves
    return trained._replace(unet=torch.nn.Module.to(trained.unet, device, dtype).eval().requires_grad_(False))


def describe(trained: Denoiser) -> dict[str, Any]:
    """All but the weights, as plain values: what a checkpoint needs to carry so that `load` can read it."""
    return {
        "unet": json.loads(trained.unet.to_json_string()),
        "noise": json.loads(trained.noise.to_json_string()),
        "classes": trained.classes,
        "null_label": trained.null_label,
    }


def save(trained: Denoiser, folder: str | Path) -> None:
    """Write a folder that `DiffusionPipeline.from_pretrained` and `load` read; labels.json says what labels mean."""
    import diffusers

    pipeline: Any = diffusers.DDPMPipeline(trained.unet, trained.noise)
    pipeline.save_pretrained(folder)
    if trained.classes:
        text = json.dumps({"classes": trained.classes, "null_label": trained.null_label})
        Path(folder, "labels.json").write_text(text + "\n")


def _scaled(config: dict[str, Any], scaling: str, size: Sequence[int] | None) -> str:
    """The positions of a model of this config under a modifier, with factors that fit the size unless it has some."""
    spec, unit, trained = config.get("position"), config.get("position_unit", "index"), config["sample_size"]
    if spec is None:
        raise ValueError(f"a {config['_class_name']} without positions has nothing to scale; leave scaling out")
    trained = (trained, trained) if isinstance(trained, int) else trained
    growth = coords.growth(trained, trained if size is None else size, "index" if unit == "pixel" else unit)
    if max(growth) <= 1:
        raise ValueError(
            f"scaling is for sizes that reach farther than the {trained[0]} x {trained[1]} of training, in positions "
            f"of unit {unit!r}; give a larger size, or leave scaling out"
        )
    name, _, options = scaling.strip().removesuffix(")").partition("(")
    if name != "dynamic" and "factor" not in options:
        options = ", ".join(filter(None, (f"factor={tuple(max(1.0, factor) for factor in growth)}", options)))
    return f"{name}({spec}{options and ', '}{options})"


def _checkpoint(path: Path, changes: Callable[[dict[str, Any]], dict[str, Any]]) -> Denoiser:
    content = files.read(path)
    facts = content.get("denoiser")
    if facts is None:
        config = yaml.safe_load(content["config"]) if isinstance(content.get("config"), str) else {}
        name = str((config.get("model") or {}).get("class_path", "another program")).rpartition(".")[2]
        raise ValueError(f"{path} is a checkpoint of {name}; only models that Diffusion trained can be sampled")
    cls = _model_class(facts["unet"]["_class_name"])
    unet = cls.from_config(facts["unet"] | changes(facts["unet"]))
    weights = {k.removeprefix("model."): v for k, v in content["state_dict"].items() if k.startswith("model.")}
    files.check_fit(unet, weights, cls.__name__)
    unet.load_state_dict(weights)
    return Denoiser(unet, _noise(facts["noise"]), facts["classes"], facts["null_label"])


def _pipeline(path: Path, changes: Callable[[dict[str, Any]], dict[str, Any]]) -> Denoiser:
    folder, index = path.parent, json.loads(path.read_text())
    if not {"unet", "scheduler"} <= set(index):
        raise ValueError(f"{folder} is a {index.get('_class_name')}; sample wants a pipeline of a unet and a scheduler")
    changed = changes(json.loads((folder / "unet" / "config.json").read_text()))
    unet = _model_class(index["unet"][1]).from_pretrained(folder / "unet", local_files_only=True, **changed)
    noise = _noise(json.loads((folder / "scheduler" / "scheduler_config.json").read_text()))
    facts: dict[str, Any] = {"classes": unet.config.num_class_embeds or 0, "null_label": None}
    if (folder / "labels.json").is_file():
        facts |= json.loads((folder / "labels.json").read_text())
    return Denoiser(unet, noise, **facts)


def _noise(config: dict[str, Any]) -> Any:
    """The schedule of a DDPM, by the config of any scheduler that shares its settings; ValueError for others."""
    import diffusers

    name = config.get("_class_name", "DDPMScheduler")
    if name not in diffusers.schedulers.KarrasDiffusionSchedulers.__members__:
        raise ValueError(f"cannot sample by the schedule of a {name}: sample wants a model that was trained as a DDPM")
    return diffusers.DDPMScheduler.from_config(config)


def _check_facts(trained: Denoiser) -> None:
    """Raise a ValueError where what files say of a model's labels or predictions cannot be."""
    kind, known = trained.noise.config.prediction_type, trained.unet.config.num_class_embeds or 0
    if kind not in KINDS:
        raise ValueError(f"the model predicts {kind!r}; sample knows {', '.join(KINDS)}")
    labels = (trained.classes, 0 if trained.null_label is None else trained.null_label + 1)
    if min(labels) < 0 or max(labels) > known:
        raise ValueError(
            f"the model embeds {known} labels, but is said to have {trained.classes}, and {trained.null_label} for any"
        )


def _model_class(name: str) -> Any:
    """A class of ours or of diffusers, and no other: the name may come with a download."""
    home = "vit_rope.models.dit" if name == "RopeDiT" else "vit_rope.unet" if name.startswith("Rope") else "diffusers"
    cls: Any = getattr(importlib.import_module(home), name, None)
    forward: Any = getattr(cls, "forward", None)
    if forward is None or list(inspect.signature(forward).parameters)[1:4] != ["sample", "timestep", "class_labels"]:
        raise ValueError(f"cannot sample a {name}: sample wants a UNet2DModel, RopeUNet2DModel or RopeDiT")
    return cls
