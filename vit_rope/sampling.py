"""Images from a trained denoiser: `vit-rope sample runs/digits_ddpm --out digits.png`, or `sample(load(path), 64)`.

The schedulers are diffusers' own, stepped by one loop. What a model predicts is turned into the image that it means,
clipped to the range of images where the model's training says so, and handed on as a velocity. That keeps samplers
stable which do not clip by themselves, and asks of none of them to know the model's kind of prediction.

Image i is drawn from a generator of its own, `seed + i`, and networks see tiles of a fixed number of images, for the
last bit of a convolution depends on how many come together. So an image is the same however many were drawn with it.
"""

import argparse
import importlib
import inspect
import itertools
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from .positions import coords
from .training import checkpoints

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {  # by the names that samplers go by, diffusers' classes
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++1s": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Watch = Callable[[float, Tensor], None]


class Trained(NamedTuple):
    """A denoiser, called as diffusers calls one, and what sampling must know of its training.

    `noise` is the diffusers scheduler that it was trained with. Labels are below `classes`, 0 for a model without;
    `null_label` means "of any class" to a model that was trained with some labels left out.
    """

    unet: Any
    noise: Any
    classes: int = 0
    null_label: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in training."""
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def multiple(self) -> int:
        """What height and width of an image must divide by."""
        blocks = getattr(self.unet, "down_blocks", None)
        if blocks is None:
            return int(self.unet.config.patch_size)
        return 2 ** sum(getattr(block, "downsamplers", None) is not None for block in blocks)


# ---- sampling -------------------------------------------------------------------------------------------------------


def sample(
    trained: Trained,
    n: int = 1,
    steps: int = 50,
    scheduler: str = "ddim",
    size: Sequence[int] | None = None,
    labels: Sequence[int] | None = None,
    guidance: float = 1.0,
    seed: int = 0,
    watch: Watch | None = None,
    until: int | None = None,
) -> Tensor:
    """Images (n, C, H, W) in [-1, 1], float32 on the CPU, of which image i depends on `seed + i` and not on `n`.

    `size` (height, width) is that of training unless given. `labels` are used in turn; left out, a model with classes
    draws of any. `guidance` above 1 exaggerates what a label changes (classifier-free guidance, arXiv:2207.12598).
    `watch` is called before the first and after every step with the share that is done and the images at hand.
    With `until`, another seed, the images lie on the way from the noise of `seed` to that of `until`, the first and the
    last one included. Raises ValueError, before any work, for what the model cannot do.
    """
    return torch.cat(list(sample_batches(trained, n, steps, scheduler, size, labels, guidance, seed, n, watch, until)))


def sample_batches(
    trained: Trained,
    n: int = 1,
    steps: int = 50,
    scheduler: str = "ddim",
    size: Sequence[int] | None = None,
    labels: Sequence[int] | None = None,
    guidance: float = 1.0,
    seed: int = 0,
    batch: int = 64,
    watch: Watch | None = None,
    until: int | None = None,
) -> Iterator[Tensor]:
    """The images of `sample`, `batch` at a time, so that any number needs little memory."""
    if min(n, batch) < 1:
        raise ValueError(f"sampling wants at least one image and batches of at least one, got {n} and {batch}")
    size = trained.size if size is None else (size[0], size[1])
    check(trained, scheduler, steps, size, labels, guidance)
    device = next(trained.unet.parameters()).device
    count, shape = tile_size(size, device), (trained.unet.config.in_channels, *size)
    tiles = math.ceil(n / count)

    def images() -> Iterator[Tensor]:
        for tile in range(tiles):
            numbers = range(tile * count, (tile + 1) * count)  # the last tile is filled up with images nobody sees

            def seen(share: float, x: Tensor, tile: int = tile) -> None:
                if watch is not None:
                    watch((tile + share) / tiles, x[: n - tile * count])

            generators = [_generator(seed if until is not None else seed + i) for i in numbers]
            noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
            if until is not None:
                end = torch.randn(shape, generator=_generator(until))
                noise = torch.stack([between(x, end, i / max(n - 1, 1)) for i, x in zip(numbers, noise, strict=True)])
            yield from denoise(
                trained,
                make_scheduler(scheduler, trained.noise, steps, device),
                noise,
                generators,
                _labels(trained, labels, numbers, device),
                guidance,
                seen,
            )

    def batches() -> Iterator[Tensor]:
        drawn = itertools.islice(images(), n)
        while some := list(itertools.islice(drawn, batch)):
            yield torch.stack(some)

    return batches()


@torch.no_grad()
def denoise(
    trained: Trained,
    scheduler: Any,
    x: Tensor,
    generators: list[torch.Generator],
    labels: Tensor | None = None,
    guidance: float = 1.0,
    watch: Watch | None = None,
) -> Tensor:
    """Images out of noise x (B, C, H, W) by all steps of a scheduler from `make_scheduler`, with the model as it is.

    A scheduler that adds noise on the way takes that of image i from generator i.
    """
    unet, config = trained.unet, trained.noise.config
    parameter = next(unet.parameters())
    limit = config.clip_sample_range if config.get("clip_sample") else math.inf
    draws = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    if watch is not None:
        watch(0.0, x)
    x = x.to(parameter.device) * float(scheduler.init_noise_sigma)
    guided = guidance != 1.0 and labels is not None
    if labels is not None and guided:
        labels = torch.cat((labels, torch.full_like(labels, _null(trained))))
    for i, time in enumerate(scheduler.timesteps):
        noisy = scheduler.scale_model_input(x, time)
        signal, noise = levels(scheduler, time)
        seen = (torch.cat((noisy, noisy)) if guided else noisy).to(parameter.dtype)
        prediction = unet(seen, time, *(() if labels is None else (labels,))).sample.float()
        if guided:
            with_label, without = prediction.chunk(2)
            prediction = without + guidance * (with_label - without)
        image = to_image(config.prediction_type, noisy, prediction, signal, noise).clamp(-limit, limit)
        with _no_deprecations():
            x = scheduler.step((signal * noisy - image) / noise, time, x, **draws).prev_sample
        if watch is not None:
            last = i + 1 == len(scheduler.timesteps)
            watch((i + 1) / len(scheduler.timesteps), (x if last else noisy).clamp(-1, 1).cpu())
    return x.clamp(-1, 1).cpu()


def between(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Noise that is this share of the way from one to another, as strong as they are."""
    angle = share * math.pi / 2
    return math.cos(angle) * start + math.sin(angle) * end


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed % 2**63)


def make_scheduler(name: str, noise: Any, steps: int, device: torch.device | None = None) -> Any:
    """diffusers' scheduler of a short name, ready for `steps` steps under the training's schedule `noise`.

    It expects velocities. Raises ValueError, with all names, for an unknown one.
    """
    import diffusers  # by now the slow import is worth its time

    check_scheduler(name)
    kind, own = SCHEDULERS[name]
    options = {
        "trained_betas": noise.betas.double().tolist(),  # numbers, for not every scheduler knows every schedule's name
        "num_train_timesteps": len(noise.betas),
        "prediction_type": "v_prediction",
        "timestep_spacing": "leading",  # near pure noise, Heun is unstable and Euler's ancestral step can be NaN
        "clip_sample": False,
    }
    cls = getattr(diffusers, kind)
    known = inspect.signature(cls.__init__).parameters
    with _no_deprecations():
        scheduler = cls(**{key: value for key, value in options.items() if key in known}, **own)
        scheduler.set_timesteps(steps, device=device)
    return scheduler


@contextmanager
def _no_deprecations() -> Iterator[None]:
    """Keep quiet about what diffusers' schedulers ask of NumPy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def levels(scheduler: Any, time: Tensor) -> tuple[float, float]:
    """How much of the image and how much noise the model sees at this time; their squares sum to 1."""
    if float(scheduler.init_noise_sigma) > 1:  # a scheduler that counts in noise for each unit of image
        sigma = float(scheduler.sigmas[scheduler.step_index])
        return (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5
    kept = float(scheduler.alphas_cumprod[int(time)])
    return kept**0.5, (1 - kept) ** 0.5


def to_image(kind: str, noisy: Tensor, prediction: Tensor, signal: float, noise: float) -> Tensor:
    """The clean image that a prediction of this kind (diffusers' `prediction_type`) means."""
    if kind == "sample":
        return prediction
    if kind == "epsilon":
        return (noisy - noise * prediction) / signal
    return signal * noisy - noise * prediction


def tile_size(size: tuple[int, int], device: torch.device) -> int:
    """How many images of this size a network sees at once: as many as make up one large image, and at most 64."""
    side = 64 if device.type == "cpu" else 256
    return max(1, min(64, side**2 // (size[0] * size[1])))


def check(
    trained: Trained,
    scheduler: str,
    steps: int,
    size: tuple[int, int],
    labels: Sequence[int] | None = None,
    guidance: float = 1.0,
) -> None:
    """Raise a ValueError, of one line, for what `sample` cannot do with this model."""
    check_scheduler(scheduler)
    longest, factor = len(trained.noise.betas), trained.multiple
    if not 1 <= steps <= longest:
        raise ValueError(f"the model was trained with {longest} noise levels, so steps are 1 to {longest}, not {steps}")
    if any(side < 1 or side % factor for side in size):
        near = [max(1, round(side / factor)) * factor for side in size]
        raise ValueError(
            f"images of {size[0]} x {size[1]} do not divide by {factor}, which is how much this "
            f"{type(trained.unet).__name__} downsamples; take {near[0]} x {near[1]}"
        )
    if labels and not trained.classes:
        raise ValueError(f"the model was trained without labels, so it cannot draw label {labels[0]}; leave it out")
    for label in labels or ():
        if not 0 <= label < trained.classes:
            raise ValueError(f"the model knows the labels 0 to {trained.classes - 1}, not {label}")
    if not labels and trained.classes and trained.null_label is None:
        raise ValueError("the model was never trained without a label; give one")
    if guidance != 1.0 and (not labels or trained.null_label is None):
        missing = "was never trained without a label" if labels else "needs a label to be guided towards"
        raise ValueError(f"guidance {guidance:g} is of no use: the model {missing}")


def check_scheduler(name: str) -> None:
    """Raise a ValueError, with all names, for one that is not among `SCHEDULERS`."""
    if name not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}; there are {', '.join(SCHEDULERS)}")


def _labels(trained: Trained, labels: Sequence[int] | None, numbers: range, device: torch.device) -> Tensor | None:
    if not trained.classes:
        return None
    given = labels or [_null(trained)]
    return torch.tensor([given[i % len(given)] for i in numbers], device=device)


def _null(trained: Trained) -> int:
    return -1 if trained.null_label is None else trained.null_label


# ---- loading --------------------------------------------------------------------------------------------------------


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    scaling: str | None = None,
    size: Sequence[int] | None = None,
) -> Trained:
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
    trained = read(path, lambda config: {} if scaling is None else {"position": _scaled(config, scaling, size)})
    # not diffusers' own method, which warns of positions: they keep their precision by themselves
    return trained._replace(unet=torch.nn.Module.to(trained.unet, device, dtype).eval().requires_grad_(False))


def describe(trained: Trained) -> dict[str, Any]:
    """All but the weights, as plain values: what a checkpoint needs to carry so that `load` can read it."""
    return {
        "unet": json.loads(trained.unet.to_json_string()),
        "noise": json.loads(trained.noise.to_json_string()),
        "classes": trained.classes,
        "null_label": trained.null_label,
    }


def save(trained: Trained, folder: str | Path) -> None:
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


def _checkpoint(path: Path, changes: Callable[[dict[str, Any]], dict[str, Any]]) -> Trained:
    content = checkpoints.read(path)
    facts = content.get("denoiser")
    if facts is None:
        config = yaml.safe_load(content["config"]) if isinstance(content.get("config"), str) else {}
        name = str((config.get("model") or {}).get("class_path", "another program")).rpartition(".")[2]
        raise ValueError(f"{path} is a checkpoint of {name}; only models that Diffusion trained can be sampled")
    cls = _model_class(facts["unet"]["_class_name"])
    unet = cls.from_config(facts["unet"] | changes(facts["unet"]))
    weights = {k.removeprefix("model."): v for k, v in content["state_dict"].items() if k.startswith("model.")}
    checkpoints.check_fit(unet, weights, cls.__name__)
    unet.load_state_dict(weights)
    return Trained(unet, _noise(facts["noise"]), facts["classes"], facts["null_label"])


def _pipeline(path: Path, changes: Callable[[dict[str, Any]], dict[str, Any]]) -> Trained:
    folder, index = path.parent, json.loads(path.read_text())
    if not {"unet", "scheduler"} <= set(index):
        raise ValueError(f"{folder} is a {index.get('_class_name')}; sample wants a pipeline of a unet and a scheduler")
    changed = changes(json.loads((folder / "unet" / "config.json").read_text()))
    unet = _model_class(index["unet"][1]).from_pretrained(folder / "unet", local_files_only=True, **changed)
    noise = _noise(json.loads((folder / "scheduler" / "scheduler_config.json").read_text()))
    facts: dict[str, Any] = {"classes": unet.config.num_class_embeds or 0, "null_label": None}
    if (folder / "labels.json").is_file():
        facts |= json.loads((folder / "labels.json").read_text())
    return Trained(unet, noise, **facts)


def _noise(config: dict[str, Any]) -> Any:
    import diffusers

    return diffusers.DDPMScheduler.from_config(config)


def _model_class(name: str) -> Any:
    """A class of ours or of diffusers, and no other: the name may come with a download."""
    home = "vit_rope.denoiser" if name == "RopeDiT" else "vit_rope.unet" if name.startswith("Rope") else "diffusers"
    cls: Any = getattr(importlib.import_module(home), name, None)
    forward: Any = getattr(cls, "forward", None)
    if forward is None or list(inspect.signature(forward).parameters)[1:4] != ["sample", "timestep", "class_labels"]:
        raise ValueError(f"cannot sample a {name}: sample wants a UNet2DModel, RopeUNet2DModel or RopeDiT")
    return cls


# ---- pictures -------------------------------------------------------------------------------------------------------


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as bytes."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()


def picture(images: Tensor, columns: int = 0) -> Image.Image:
    """Images (B, C, H, W) in [-1, 1] in a grid, small ones enlarged: of mode L for one channel, RGB for three.

    It is about as wide as high, or a multiple of `columns` across where there are several.
    """
    count, _, height, width = images.shape
    zoom, border = max(1, 64 // max(height, width)), 2
    square = math.sqrt(count * height / width)
    columns = min(count, max(1, round(square / columns)) * columns if columns > 1 else math.ceil(square))
    rows = math.ceil(count / columns)
    cells = to_bytes(images).repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    cells = torch.nn.functional.pad(cells, (0, border, 0, border), value=255)
    blank = cells.new_full((rows * columns - count, *cells.shape[1:]), 255)
    sheet = torch.cat((cells, blank)).unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    return _image(torch.nn.functional.pad(sheet, (border, 0, border, 0), value=255))


def _image(pixels: Tensor) -> Image.Image:
    """Bytes (C, H, W) as a picture."""
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
    if array.ndim == 3 and array.shape[2] != 3:
        raise ValueError(f"a picture has 1 or 3 channels, not {array.shape[2]}")
    return Image.fromarray(array)


def write_gif(frames: Sequence[Tensor], path: Path, columns: int = 0) -> None:
    """Up to 25 of the frames (B, C, H, W) in [-1, 1] as a film of some four seconds that rests on the last one."""
    chosen = sorted({round(i * (len(frames) - 1) / 24) for i in range(25)})  # noise compresses badly
    pictures = [picture(frames[i], columns) for i in chosen]
    times = [100] * (len(pictures) - 1) + [1500]
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=times, loop=0)


# ---- command line ---------------------------------------------------------------------------------------------------


def main(args: Sequence[str] | None = None) -> None:
    """Run `vit-rope sample`; a message that begins with "error:" ends it where something does not fit."""
    options = _parser().parse_args(args)
    try:
        run(options)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    check_scheduler(options.scheduler)
    _check_free(options)
    trained = load(options.model, options.device, DTYPES[options.dtype], options.scaling, options.size)
    console, frames = Console(stderr=True), list[Tensor]()
    columns = (TextColumn("{task.percentage:>3.0f}%"), BarColumn(None), TimeRemainingColumn(), TextColumn("left"))
    with Progress(*columns, console=console, expand=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)

        def watch(share: float, images: Tensor) -> None:
            bar.update(task, completed=share)
            if options.gif:
                frames.append(images)

        drawn = []
        chosen = (options.n, options.steps, options.scheduler, options.size, options.label, options.guidance)
        for images in sample_batches(trained, *chosen, options.seed, options.batch, watch, options.until):
            if options.png_dir:
                options.png_dir.mkdir(parents=True, exist_ok=True)
                first = options.seed if options.until is None else 0
                for i, image in enumerate(to_bytes(images), start=first + sum(map(len, drawn))):
                    _image(image).save(options.png_dir / f"{i:06}.png")
            drawn.append(images)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    columns = len(options.label or ())
    picture(torch.cat(drawn), columns).save(options.out)
    if options.gif:
        count = sum(len(frame) for frame in frames) // options.n  # of every tile, one after the other
        write_gif([torch.cat(frames[i::count]) for i in range(count)], options.gif, columns)
    for path in (options.out, options.gif, options.png_dir):
        if path:
            print(path)


def _check_free(options: argparse.Namespace) -> None:
    for path in (options.out, options.gif, options.png_dir):
        taken = path and (any(path.iterdir()) if path.is_dir() else path.exists())
        if taken and not options.overwrite:
            raise ValueError(f"{path} exists; give --overwrite to replace it, or another name")
    for option, path, kind in (("--out", options.out, ".png"), ("--gif", options.gif, ".gif")):
        if path and path.suffix.lower() != kind:
            raise ValueError(f"{option} {path}: the name must end with {kind}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vit-rope sample", description="Draw images from a trained denoiser.")
    add = parser.add_argument
    add("model", type=Path, help="a run's folder, one of its checkpoints, or a diffusers pipeline's folder")
    add("--n", type=int, default=64, help="how many images (default: %(default)s)")
    add("--steps", type=int, default=50, help="calls of the network for each (default: %(default)s)")
    add("--scheduler", default="ddim", metavar="NAME", help=f"{', '.join(SCHEDULERS)} (default: %(default)s)")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="in pixels, also one that was never trained on")
    add(
        "--scaling", metavar="MODIFIER", help="of rotary positions for a larger --size: ntk, interpolate, yarn, dynamic"
    )
    add("--label", type=int, nargs="+", help="classes to draw, in turn; left out, a model with classes draws of any")
    add("--guidance", type=float, default=1.0, help="above 1 exaggerates what the label changes (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the first image, the next one's is one more (default: %(default)s)")
    add("--until", type=int, metavar="SEED", help="walk from the noise of --seed to that of this one, in --n images")
    add("--batch", type=int, default=64, help="images kept in memory until written to --png-dir (default: %(default)s)")
    add("--out", type=Path, default=Path("samples.png"), help="all images side by side (default: %(default)s)")
    add("--gif", type=Path, help="how they came out of the noise, as a film")
    add("--png-dir", type=Path, help="a folder for single files, named by their seeds, or numbered on a walk")
    add("--overwrite", action="store_true", help="replace files that exist")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="where the network runs (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="what it computes in (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
