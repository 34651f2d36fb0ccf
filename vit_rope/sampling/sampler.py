"""From noise to images, step by step.

The schedulers are diffusers' own, stepped by one loop. What a model predicts is turned into the image that it means,
clipped to the range of images where the model's training says so, and handed on as a velocity. That keeps samplers
stable which do not clip by themselves, and asks of none of them to know the model's kind of prediction.

Image i is drawn from a generator of its own, `seed + i`, and networks see tiles of a fixed number of images, for the
last bit of a convolution depends on how many come together. So an image is the same however many were drawn with it.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .schedulers import _no_deprecations, alpha_sigma, check_scheduler, make_scheduler, predicted_x0

Callback = Callable[[float, Tensor], None]


class Denoiser(NamedTuple):
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


@dataclass(frozen=True)
class SampleConfig:
    """What to sample.

    Args:
        n: number of images
        steps: calls of the network for each image
        scheduler: name of the sampler, a key of `SCHEDULERS`
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
    """Images (n, C, H, W) in [-1, 1], float32 on the CPU; image i depends on `seed + i` and not on `n`.

    Options are those of `SampleConfig`. `callback` is called before the first step and after every step with the
    fraction that is done and the current images. Raises ValueError, before any work, for what the model cannot do.
    """
    height_width = None if size is None else (size[0], size[1])
    config = SampleConfig(n, steps, scheduler, height_width, labels, guidance, seed, n, end_seed)
    return torch.cat(list(sample_batches(denoiser, config, callback)))


def sample_batches(denoiser: Denoiser, config: SampleConfig, callback: Callback | None = None) -> Iterator[Tensor]:
    """The images of `sample`, `config.batch` at a time, so that any number needs little memory."""
    n, seed, end_seed = config.n, config.seed, config.end_seed
    if min(n, config.batch) < 1:
        raise ValueError(f"n and batch must be at least 1, got {n} and {config.batch}")
    size = denoiser.size if config.size is None else config.size
    check(denoiser, config.scheduler, config.steps, size, config.labels, config.guidance)
    device = next(denoiser.unet.parameters()).device
    count, shape = tile_size(size, device), (denoiser.unet.config.in_channels, *size)
    tiles = math.ceil(n / count)

    def images() -> Iterator[Tensor]:
        for tile in range(tiles):
            numbers = range(tile * count, (tile + 1) * count)  # the last tile is filled up with images nobody sees

            def seen(share: float, x: Tensor, tile: int = tile) -> None:
                if callback is not None:
                    callback((tile + share) / tiles, x[: n - tile * count])

            generators = [_generator(seed if end_seed is not None else seed + i) for i in numbers]
            noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
            if end_seed is not None:
                end = torch.randn(shape, generator=_generator(end_seed))
                noise = torch.stack([slerp(x, end, i / max(n - 1, 1)) for i, x in zip(numbers, noise, strict=True)])
            yield from denoise(
                denoiser,
                make_scheduler(config.scheduler, denoiser.noise, config.steps, device),
                noise,
                generators,
                _labels(denoiser, config.labels, numbers, device),
                config.guidance,
                seen,
            )

    def batches() -> Iterator[Tensor]:
        drawn = itertools.islice(images(), n)
        while some := list(itertools.islice(drawn, config.batch)):
            yield torch.stack(some)

    return batches()


@torch.no_grad()
def denoise(
    denoiser: Denoiser,
    scheduler: Any,
    x: Tensor,
    generators: list[torch.Generator],
    labels: Tensor | None = None,
    guidance: float = 1.0,
    callback: Callback | None = None,
) -> Tensor:
    """Images out of noise x (B, C, H, W) by all steps of a scheduler from `make_scheduler`, with the model as it is.

    A scheduler that adds noise on the way takes that of image i from generator i.
    """
    unet, config = denoiser.unet, denoiser.noise.config
    parameter = next(unet.parameters())
    limit = config.clip_sample_range if config.get("clip_sample") else math.inf
    draws = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    if callback is not None:
        callback(0.0, x)
    x = x.to(parameter.device) * float(scheduler.init_noise_sigma)
    guided = guidance != 1.0 and labels is not None
    if labels is not None and guided:
        labels = torch.cat((labels, torch.full_like(labels, _null(denoiser))))
    for i, time in enumerate(scheduler.timesteps):
        noisy = scheduler.scale_model_input(x, time)
        signal, noise = alpha_sigma(scheduler, time)
        seen = (torch.cat((noisy, noisy)) if guided else noisy).to(parameter.dtype)
        prediction = unet(seen, time, *(() if labels is None else (labels,))).sample.float()
        if guided:
            with_label, without = prediction.chunk(2)
            prediction = without + guidance * (with_label - without)
        image = predicted_x0(config.prediction_type, noisy, prediction, signal, noise).clamp(-limit, limit)
        with _no_deprecations():
            x = scheduler.step((signal * noisy - image) / noise, time, x, **draws).prev_sample
        if callback is not None:
            last = i + 1 == len(scheduler.timesteps)
            callback((i + 1) / len(scheduler.timesteps), (x if last else noisy).clamp(-1, 1).cpu())
    return x.clamp(-1, 1).cpu()


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Noise that is this share of the way from one to another, as strong as they are."""
    angle = share * math.pi / 2
    return math.cos(angle) * start + math.sin(angle) * end


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed % 2**63)


def tile_size(size: tuple[int, int], device: torch.device) -> int:
    """How many images of this size a network sees at once: as many as make up one large image, and at most 64."""
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
    """Raise a ValueError, of one line, for what `sample` cannot do with this model."""
    check_scheduler(scheduler)
    longest, factor = len(denoiser.noise.betas), denoiser.multiple
    if not 1 <= steps <= longest:
        raise ValueError(f"the model was trained with {longest} noise levels, so steps are 1 to {longest}, not {steps}")
    if any(side < 1 or side % factor for side in size):
        near = [max(1, round(side / factor)) * factor for side in size]
        raise ValueError(
            f"images of {size[0]} x {size[1]} do not divide by {factor}, which is how much this "
            f"{type(denoiser.unet).__name__} downsamples; take {near[0]} x {near[1]}"
        )
    channels = (denoiser.unet.config.in_channels, denoiser.unet.config.out_channels or denoiser.unet.config.in_channels)
    if channels[0] != channels[1]:
        raise ValueError(f"the model makes {channels[1]} channels of {channels[0]}; sample wants as many as it sees")
    if scheduler == "dpm++1s" and not denoiser.noise.alphas_cumprod[-1]:
        raise ValueError("dpm++1s divides by what the last noise level leaves of an image, nothing here; take dpm++")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance is a finite number, got {guidance}")
    if labels and not denoiser.classes:
        raise ValueError(f"the model was trained without labels, so it cannot draw label {labels[0]}; leave it out")
    for label in labels or ():
        if not 0 <= label < denoiser.classes:
            raise ValueError(f"the model knows the labels 0 to {denoiser.classes - 1}, not {label}")
    if not labels and denoiser.classes and denoiser.null_label is None:
        raise ValueError("the model was never trained without a label; give one")
    if guidance != 1.0 and (not labels or denoiser.null_label is None):
        missing = "was never trained without a label" if labels else "needs a label to be guided towards"
        raise ValueError(f"guidance {guidance:g} is of no use: the model {missing}")


def _labels(denoiser: Denoiser, labels: Sequence[int] | None, numbers: range, device: torch.device) -> Tensor | None:
    if not denoiser.classes:
        return None
    given = labels or [_null(denoiser)]
    return torch.tensor([given[i % len(given)] for i in numbers], device=device)


def _null(denoiser: Denoiser) -> int:
    return -1 if denoiser.null_label is None else denoiser.null_label
