"""Load and save denoisers: runs, Lightning checkpoints and diffusers pipelines.

No code in a file is run.
"""

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
from .schedulers import PREDICTION_TYPES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    scaling: str | None = None,
    size: Sequence[int] | None = None,
) -> Denoiser:
    """Load a denoiser from a run, a Lightning checkpoint or a diffusers pipeline.

    Args:
        path: a run's folder (its best checkpoint is loaded), a checkpoint file or a pipeline's
            folder. Checkpoints hold averaged weights if the run kept an average
        device: where the network will run
        dtype: data type of its weights; positions keep theirs
        scaling: a modifier of its rotary positions, such as "ntk" or "yarn(slow=0.3)", for a `size`
            larger than that of training; its factors are the ratios of the two along each axis
        size: height and width in pixels of the images to sample, for `scaling`

    Raises FileNotFoundError if there is nothing at the path, and ValueError for anything but a
    denoiser, such as a classifier, and if there is nothing to scale.
    """
    path = Path(files.expand_home(path))
    if path.is_dir():
        names = ("model_index.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "exported/model_index.json")
        file = next((path / name for name in names if (path / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{path} is neither a run nor a diffusers pipeline: none of {', '.join(names)}")
        path = file
    read = _read_pipeline if path.name == "model_index.json" else _read_checkpoint
    try:
        denoiser = read(path, lambda config: {} if scaling is None else {"position": _scaled(config, scaling, size)})
        _check_facts(denoiser)
    except Exception as error:  # an unknown file can make diffusers raise any exception
        if type(error) in (ValueError, FileNotFoundError):
            raise
        why = f"{type(error).__name__}: {files.one_line(error)}"
        raise ValueError(f"{path} is damaged, or does not hold a denoiser that can be sampled ({why})") from error
    # not diffusers' own `to`, which warns about float32 positions: they keep their precision
    # themselves
    model = torch.nn.Module.to(denoiser.model, device, dtype)
    return denoiser._replace(model=model.eval().requires_grad_(False))


def describe(denoiser: Denoiser) -> dict[str, Any]:
    """Everything but the weights, as plain values, for a checkpoint that `load` can read."""
    return {
        "unet": json.loads(denoiser.model.to_json_string()),
        "noise": json.loads(denoiser.noise.to_json_string()),
        "classes": denoiser.classes,
        "null_label": denoiser.null_label,
    }


def save(denoiser: Denoiser, folder: str | Path) -> None:
    """Write a folder for `load` and `DiffusionPipeline.from_pretrained`.

    labels.json has the number of classes and the label that stands for any class.
    """
    import diffusers  # slow to import, and not needed before

    pipeline: Any = diffusers.DDPMPipeline(denoiser.model, denoiser.noise)
    pipeline.save_pretrained(folder)
    if denoiser.classes:
        text = json.dumps({"classes": denoiser.classes, "null_label": denoiser.null_label})
        Path(folder, "labels.json").write_text(text + "\n")


# ---- positions for larger sizes ------------------------------------------------------------------
def _scaled(config: dict[str, Any], scaling: str, size: Sequence[int] | None) -> str:
    """The position spec of a config under a modifier, with factors for the size unless it has some.

    The config changes before the model is created, so the same code serves RopeDiT and U-Nets.
    """
    spec, unit, trained = config.get("position"), config.get("position_unit", "index"), config["sample_size"]
    if spec is None:
        raise ValueError(f"a {config['_class_name']} without positions has nothing to scale; leave scaling out")
    trained = (trained, trained) if isinstance(trained, int) else trained
    growth = coords.growth(trained, trained if size is None else size, "index" if unit == "pixel" else unit)
    if max(growth) <= 1:
        raise ValueError(
            f"scaling is for sizes larger than the {trained[0]} x {trained[1]} of training, in positions of unit "
            f"{unit!r}; give a larger size, or leave scaling out"
        )
    name, _, options = scaling.strip().removesuffix(")").partition("(")
    if name != "dynamic" and "factor" not in options:
        options = ", ".join(filter(None, (f"factor={tuple(max(1.0, factor) for factor in growth)}", options)))
    return f"{name}({spec}{options and ', '}{options})"


# ---- what files hold -----------------------------------------------------------------------------
def _read_checkpoint(path: Path, changes: Callable[[dict[str, Any]], dict[str, Any]]) -> Denoiser:
    """The denoiser in a Lightning checkpoint, with `changes(config)` in the config of its model."""
    content = files.read(path)
    facts = content.get("denoiser")
    if facts is None:
        config = yaml.safe_load(content["config"]) if isinstance(content.get("config"), str) else {}
        name = str((config.get("model") or {}).get("class_path", "another program")).rpartition(".")[2]
        raise ValueError(f"{path} is a checkpoint of {name}; only models trained by Diffusion can be sampled")
    cls = _model_class(facts["unet"]["_class_name"])
    model = cls.from_config(facts["unet"] | changes(facts["unet"]))
    weights = {k.removeprefix("model."): v for k, v in content["state_dict"].items() if k.startswith("model.")}
    files.check_fit(model, weights, cls.__name__)
    model.load_state_dict(weights)
    return Denoiser(model, _noise_schedule(facts["noise"]), facts["classes"], facts["null_label"])


def _read_pipeline(path: Path, changes: Callable[[dict[str, Any]], dict[str, Any]]) -> Denoiser:
    """The denoiser in a diffusers pipeline, with `changes(config)` in the config of its model."""
    folder, index = path.parent, json.loads(path.read_text())
    if not {"unet", "scheduler"} <= set(index):
        raise ValueError(
            f"{folder} is a {index.get('_class_name')}; sampling needs a pipeline of a unet and a scheduler"
        )
    changed = changes(json.loads((folder / "unet" / "config.json").read_text()))
    model = _model_class(index["unet"][1]).from_pretrained(folder / "unet", local_files_only=True, **changed)
    noise = _noise_schedule(json.loads((folder / "scheduler" / "scheduler_config.json").read_text()))
    facts: dict[str, Any] = {"classes": model.config.num_class_embeds or 0, "null_label": None}
    if (folder / "labels.json").is_file():
        facts |= json.loads((folder / "labels.json").read_text())
    return Denoiser(model, noise, **facts)


def _noise_schedule(config: dict[str, Any]) -> Any:
    """The noise schedule of a DDPM, from the config of any scheduler with the same settings.

    Raises ValueError for schedulers without them.
    """
    import diffusers  # slow to import, and not needed before

    name = config.get("_class_name", "DDPMScheduler")
    if name not in diffusers.schedulers.KarrasDiffusionSchedulers.__members__:
        raise ValueError(f"cannot sample with the noise schedule of a {name}; the model must be trained as a DDPM")
    return diffusers.DDPMScheduler.from_config(config)


def _check_facts(denoiser: Denoiser) -> None:
    """Raise ValueError for an unknown prediction type, or labels that the model does not embed."""
    kind, embedded = denoiser.noise.config.prediction_type, denoiser.model.config.num_class_embeds or 0
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"the model predicts {kind!r}; sampling supports {', '.join(PREDICTION_TYPES)}")
    labels = (denoiser.classes, 0 if denoiser.null_label is None else denoiser.null_label + 1)
    if min(labels) < 0 or max(labels) > embedded:
        raise ValueError(
            f"the model embeds {embedded} labels, but its files give {denoiser.classes} classes and null label "
            f"{denoiser.null_label}"
        )


def _model_class(name: str) -> Any:
    """A model class of this library or diffusers only, as the name may come with a download."""
    module = "vit_rope.models.dit" if name == "RopeDiT" else "vit_rope.unet" if name.startswith("Rope") else "diffusers"
    cls: Any = getattr(importlib.import_module(module), name, None)
    forward: Any = getattr(cls, "forward", None)
    if forward is None or list(inspect.signature(forward).parameters)[1:4] != ["sample", "timestep", "class_labels"]:
        raise ValueError(f"cannot sample a {name}; it must be a UNet2DModel, RopeUNet2DModel or RopeDiT")
    return cls
