"""From noise to images, step by step.

diffusers has pipelines with loops of their own, and its schedulers are used here; the loop is not,
because a pipeline does not offer what this one does:

* Labels and classifier-free guidance for unconditional U-Nets and RopeDiT.
* Every scheduler with every type of prediction. A prediction is turned into the clean image, which
  is clipped to the range of images if the model's training says so, and passed to the scheduler as
  a velocity. This keeps schedulers stable that do not clip.
* Images that do not depend on how many are drawn together. Image i is drawn from its own generator,
  `seed + i`, and networks see tiles of a fixed number of images, because the last bit of a
  convolution depends on the number of images in a batch.

Shapes   B images of a tile, n images in total, C channels, H and W height and width in pixels
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .schedulers import Spaced, check_scheduler, make_scheduler, predicted_x0

Callback = Callable[[float, Tensor], None]  # fraction done, current images (B, C, H, W) in [-1, 1]


class Denoiser(NamedTuple):
    """A denoising network and what sampling must know of its training.

    Args:
        model: RopeUNet2DModel, UNet2DModel or RopeDiT, called as diffusers calls a U-Net
        noise: the diffusers scheduler that it was trained with
        classes: number of classes, whose labels are 0 to `classes` - 1; 0 for a model without
        null_label: the label for any class, in a model trained with some labels left out
    """

    model: Any
    noise: Any
    classes: int = 0
    null_label: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in training."""
        size = self.model.config.sample_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def multiple(self) -> int:
        """What height and width of an image must be divisible by."""
        blocks = getattr(self.model, "down_blocks", None)
        if blocks is None:
            return int(self.model.config.patch_size)
        return 2 ** sum(getattr(block, "downsamplers", None) is not None for block in blocks)


@dataclass(frozen=True)
class SampleConfig:
    """What to sample.

    Args:
        n: number of images
        steps: calls of the network for each image
        scheduler: ddim, ddpm, dpm++, dpm++sde, dpm++1s, unipc, deis, euler, euler-a, heun or pndm
        size: height and width in pixels; those of training unless given
        labels: classes, used in turn; without them a model with classes samples unconditionally
        guidance: classifier-free guidance scale (arXiv:2207.12598); 1 is none
        seed: seed of the first image; each next image adds 1
        batch: images that are yielded at once, which bounds the memory they take
        end_seed: interpolate from the noise of `seed` to that of this seed, both included
    """

    n: int = 1
    steps: int = 50
    scheduler: str = "ddim"
    size: tuple[int, int] | None = None
    labels: Sequence[int] | None = None
    guidance: float = 1.0
    seed: int = 0
    batch: int = 64
    end_seed: int | None = None


def sample(
    denoiser: Denoiser,
    n: int = 1,
    steps: int = 50,
    scheduler: str = "ddim",
    size: Sequence[int] | None = None,
    labels: Sequence[int] | None = None,
    guidance: float = 1.0,
    seed: int = 0,
    callback: Callback | None = None,
    end_seed: int | None = None,
) -> Tensor:
    """Sample images (n, C, H, W) in [-1, 1], float32 on the CPU.

    Image i depends on `seed + i` and not on `n`. Options are those of `SampleConfig`. `callback` is
    called before the first step and after every step of each tile, with the fraction done and the
    current images. Raises ValueError, before any work, for what the model cannot do.
    """
    height_width = None if size is None else (size[0], size[1])
    config = SampleConfig(n, steps, scheduler, height_width, labels, guidance, seed, n, end_seed)
    return torch.cat(list(sample_batches(denoiser, config, callback)))


def sample_batches(denoiser: Denoiser, config: SampleConfig, callback: Callback | None = None) -> Iterator[Tensor]:
    """The images of `sample`, `config.batch` at a time, so that any number needs little memory.

    Raises ValueError when it is called, not at the first image, for what the model cannot do.
    """
    if min(config.n, config.batch) < 1:
        raise ValueError(f"n and batch must be at least 1, got {config.n} and {config.batch}")
    size = denoiser.size if config.size is None else config.size
    check(denoiser, config.scheduler, config.steps, size, config.labels, config.guidance)
    images = itertools.islice(_images(denoiser, config, size, callback), config.n)

    def batches() -> Iterator[Tensor]:
        while batch := list(itertools.islice(images, config.batch)):
            yield torch.stack(batch)

    return batches()


def _images(
    denoiser: Denoiser, config: SampleConfig, size: tuple[int, int], callback: Callback | None
) -> Iterator[Tensor]:
    """Images (C, H, W), one by one, drawn in tiles; images beyond n fill up the last tile."""
    device = next(denoiser.model.parameters()).device
    count = tile_size(size, device)
    tiles = math.ceil(config.n / count)
    for tile in range(tiles):
        numbers = range(tile * count, (tile + 1) * count)

        def tile_callback(fraction: float, x: Tensor, tile: int = tile) -> None:
            if callback is not None:
                callback((tile + fraction) / tiles, x[: config.n - tile * count])

        noise, generators = _initial_noise((denoiser.model.config.in_channels, *size), config, numbers)
        yield from denoise(
            denoiser,
            make_scheduler(config.scheduler, denoiser.noise, config.steps, device),
            noise,
            generators,
            _labels(denoiser, config.labels, numbers, device),
            config.guidance,
            tile_callback,
        )


def _initial_noise(
    shape: tuple[int, ...], config: SampleConfig, numbers: range
) -> tuple[Tensor, list[torch.Generator]]:
    """The noise (B, C, H, W) that images of these numbers start from, and their generators."""
    walk = config.end_seed is not None
    generators = [_generator(config.seed if walk else config.seed + i) for i in numbers]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    if config.end_seed is not None:
        end = torch.randn(shape, generator=_generator(config.end_seed))
        steps = max(config.n - 1, 1)
        noise = torch.stack([slerp(x, end, i / steps) for i, x in zip(numbers, noise, strict=True)])
    return noise, generators


@torch.no_grad()
def denoise(
    denoiser: Denoiser,
    scheduler: Spaced,
    x: Tensor,
    generators: list[torch.Generator],
    labels: Tensor | None = None,
    guidance: float = 1.0,
    callback: Callback | None = None,
) -> Tensor:
    """Turn noise x (B, C, H, W) into images, by all steps of a scheduler from `make_scheduler`.

    A scheduler that adds noise at its steps takes that of image i from generator i. `labels` are
    (B,). The model is called in its current mode. Returns images in [-1, 1] on the CPU.
    """
    model, config = denoiser.model, denoiser.noise.config
    parameter = next(model.parameters())
    limit = config.clip_sample_range if config.get("clip_sample") else math.inf
    if callback is not None:
        callback(0.0, x)
    x = x.to(parameter.device) * scheduler.init_noise_sigma
    guided = guidance != 1.0 and labels is not None
    if labels is not None and guided:
        labels = torch.cat((labels, torch.full_like(labels, _null(denoiser))))
    for i, time in enumerate(scheduler.timesteps):
        noisy = scheduler.scale_model_input(x, time)
        alpha, sigma = scheduler.alpha_sigma(time)
        inputs = (torch.cat((noisy, noisy)) if guided else noisy).to(parameter.dtype)
        prediction = model(inputs, time, *(() if labels is None else (labels,))).sample.float()
        if guided:
            with_label, without = prediction.chunk(2)
            prediction = without + guidance * (with_label - without)
        image = predicted_x0(config.prediction_type, noisy, prediction, alpha, sigma).clamp(-limit, limit)
        x = scheduler.step((alpha * noisy - image) / sigma, time, x, generators).prev_sample
        if callback is not None:
            last = i + 1 == len(scheduler.timesteps)
            callback((i + 1) / len(scheduler.timesteps), (x if last else noisy).clamp(-1, 1).cpu())
    return x.clamp(-1, 1).cpu()


def slerp(start: Tensor, end: Tensor, fraction: float) -> Tensor:
    """Spherical interpolation between two independent noises; the result has their variance."""
    angle = fraction * math.pi / 2
    return math.cos(angle) * start + math.sin(angle) * end


def tile_size(size: tuple[int, int], device: torch.device) -> int:
    """Number of images of this size that a network sees at once, at most 64.

    Together they have as many pixels as one of 64 x 64 on a CPU, 256 x 256 on other devices.
    """
    side = 64 if device.type == "cpu" else 256
    return max(1, min(64, side**2 // (size[0] * size[1])))


def check(
    denoiser: Denoiser,
    scheduler: str,
    steps: int,
    size: tuple[int, int],
    labels: Sequence[int] | None = None,
    guidance: float = 1.0,
) -> None:
    """Raise ValueError, with a message of one line, for what `sample` cannot do with this model."""
    check_scheduler(scheduler)
    levels, multiple, config = len(denoiser.noise.betas), denoiser.multiple, denoiser.model.config
    if not 1 <= steps <= levels:
        raise ValueError(f"the model was trained with {levels} noise levels, so steps are 1 to {levels}, not {steps}")
    if any(side < 1 or side % multiple for side in size):
        near = [max(1, round(side / multiple)) * multiple for side in size]
        raise ValueError(
            f"images of {size[0]} x {size[1]} are not divisible by {multiple}, the factor by which this "
            f"{type(denoiser.model).__name__} downsamples; take {near[0]} x {near[1]}"
        )
    inputs, outputs = config.in_channels, config.out_channels or config.in_channels
    if inputs != outputs:
        raise ValueError(f"the model predicts {outputs} channels from {inputs}; sampling needs equal numbers")
    if scheduler == "dpm++1s" and not denoiser.noise.alphas_cumprod[-1]:
        raise ValueError("dpm++1s divides by the signal of the last noise level, which is zero here; take dpm++")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance is a finite number, got {guidance}")
    _check_labels(denoiser, labels, guidance)


def _check_labels(denoiser: Denoiser, labels: Sequence[int] | None, guidance: float) -> None:
    """The part of `check` about labels."""
    if labels and not denoiser.classes:
        raise ValueError(f"the model was trained without labels, so it cannot draw label {labels[0]}; leave it out")
    for label in labels or ():
        if not 0 <= label < denoiser.classes:
            raise ValueError(f"the model knows the labels 0 to {denoiser.classes - 1}, not {label}")
    if not labels and denoiser.classes and denoiser.null_label is None:
        raise ValueError("the model was never trained without a label; give one")
    if guidance != 1.0 and (not labels or denoiser.null_label is None):
        reason = "the model was never trained without a label" if labels else "no label is given to guide towards"
        raise ValueError(f"guidance {guidance:g} has no effect: {reason}")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed % 2**63)


def _labels(denoiser: Denoiser, labels: Sequence[int] | None, numbers: range, device: torch.device) -> Tensor | None:
    """Labels (B,) of images of these numbers, used in turn; None for a model without classes."""
    if not denoiser.classes:
        return None
    labels = labels or [_null(denoiser)]
    return torch.tensor([labels[i % len(labels)] for i in numbers], device=device)


def _null(denoiser: Denoiser) -> int:
    return -1 if denoiser.null_label is None else denoiser.null_label
