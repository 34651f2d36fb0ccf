"""Where tokens are.

Coordinates are the only thing a position scheme sees of an image, a video or a signal: (N, A) for all samples alike or
(B, N, A) for each its own, N tokens on A axes, rows before columns, time before both. They travel beside the tokens:
whoever drops, crops, packs or reorders tokens does the same to their coordinates, and no scheme needs to know.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.fx
from torch import Tensor

Unit = Literal["index", "centered", "centered_shorter", "centered_longer"]
UNITS = ("index", "centered", "centered_shorter", "centered_longer")


def grid(
    shape: Sequence[int],
    unit: str = "index",
    origin: float | str | Sequence[float] = 0.0,
    device: torch.device | None = None,
) -> Tensor:
    """Coordinates (N, A) in float32 of a grid of N = prod(shape) cells on A axes, in row-major order.

    Units: "index" counts cells from 0. "centered" places cell centres in [-1, 1] along every axis; "centered_shorter"
    and "centered_longer" measure all axes by the shorter or the longer one, so that cells stay square (the
    normalisations of DINOv3, arXiv:2508.10104: the first cell's outer border is at -1). `origin` is the place, in that
    unit, which becomes 0: a number, one for each axis, or "center". Tokens without a place sit at 0.

    Raises ValueError for an unknown unit, an empty shape, a size below 1 or an origin of another number of axes.
    """
    check_shape(shape)
    check_unit(unit)
    shift = _origin(origin, shape, unit)
    axes = [_axis(n, unit, shape, device) for n in shape]
    if any(value != 0.0 for value in shift):
        axes = [axis - value for axis, value in zip(axes, shift, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def cell(
    coords: Tensor, shape: Sequence[int], unit: str = "index", origin: float | str | Sequence[float] = 0.0
) -> Tensor:
    """Cell indices (…, A), fractional between cells, of coordinates (…, A) on a grid: the inverse of `grid`."""
    shift = torch.tensor(_origin(origin, shape, unit), dtype=coords.dtype, device=coords.device)
    coords = coords + shift
    if unit == "index":
        return coords
    spans = torch.tensor([_span(n, unit, shape) for n in shape], dtype=coords.dtype, device=coords.device)
    return (coords + 1) * spans / 2 - 0.5


def growth(shape: Sequence[int], larger: Sequence[int], unit: str = "index") -> list[float]:
    """How many times farther coordinates reach on a larger grid, along each axis; once where the unit goes with it."""
    sizes = zip(shape, larger, strict=True)
    return [m / n if unit == "index" else m / _span(m, unit, larger) * _span(n, unit, shape) / n for n, m in sizes]


def check(coords: Tensor, axes: int | None = None, finite: bool | None = None) -> Tensor:
    """The coordinates (N, A) or (B, N, A) themselves, as float32 or float64.

    Raises TypeError where they are no tensor or in half precision, which cannot tell 257 from 256, and ValueError where
    the shape is another, the number of axes is not `axes`, or a value is NaN or infinite. Looking at values waits for
    the device, so it happens on the CPU alone unless `finite` says otherwise.
    """
    if not isinstance(coords, Tensor):
        raise TypeError(f"coordinates must be a tensor (tokens, axes), got {type(coords).__name__}")
    if coords.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(f"coordinates in {coords.dtype} cannot tell neighbours apart beyond 256; make them float32")
    if coords.is_complex() or coords.dtype == torch.bool:
        raise TypeError(f"coordinates must be real numbers, got {coords.dtype}")
    if coords.ndim not in (2, 3):
        raise ValueError(
            f"coordinates must be (tokens, axes) or (batch, tokens, axes), got shape {tuple(coords.shape)}"
        )
    if axes is not None and coords.shape[-1] != axes:
        raise ValueError(
            f"coordinates have {coords.shape[-1]} axes, but the positions were made for {axes}; "
            f"give coordinates of shape (tokens, {axes}) or build positions for a grid of {coords.shape[-1]} axes"
        )
    if finite is None:
        finite = coords.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
    if finite and not coords.isfinite().all():
        bad = int((~coords.isfinite()).any(dim=-1).sum())
        raise ValueError(f"coordinates of {bad} tokens are NaN or infinite; drop those tokens instead")
    return coords if coords.is_floating_point() else coords.float()


def augment(coords: Tensor, shift: float = 0.0, jitter: float = 1.0, rescale: float = 1.0) -> Tensor:
    """Coordinates (…, A) shifted, then stretched, by numbers drawn once for all of them (DINOv3, arXiv:2508.10104).

    `shift`: up to so much along each axis, in the coordinates' unit. `jitter` and `rescale`: by factors between
    1 / factor and factor, log-uniform, one for each axis and one for all.
    """

    def draw(count: int) -> Tensor:
        return 2 * torch.rand(count, device=coords.device, dtype=coords.dtype) - 1

    axes = coords.shape[-1]
    if shift:
        coords = coords + shift * draw(axes)
    if jitter != 1:
        coords = coords * (math.log(jitter) * draw(axes)).exp()
    if rescale != 1:
        coords = coords * (math.log(rescale) * draw(1)).exp()
    return coords


@torch.fx.wrap
def take(coords: Tensor, keep: Tensor) -> Tensor:
    """Coordinates (B, K, A) of the tokens that `keep` (B, K) lists, from coordinates (N, A) or (B, N, A)."""
    if coords.ndim == 2:
        return coords[keep]
    return coords.gather(1, keep[..., None].expand(-1, -1, coords.shape[-1]))


def check_shape(shape: Sequence[int]) -> None:
    """Raise ValueError unless `shape` gives at least one cell along at least one axis."""
    if len(shape) == 0 or any(n < 1 for n in shape):
        raise ValueError(f"a grid needs at least one cell along each of its axes, got shape {tuple(shape)}")


def check_unit(unit: str) -> None:
    """Raise ValueError for a unit that does not exist."""
    if unit not in UNITS:
        raise ValueError(f"unknown unit {unit!r}; expected one of {', '.join(UNITS)}")


def _span(n: int, unit: str, shape: Sequence[int]) -> Any:
    """The number of cells that reach from -1 to 1 along an axis of n cells."""
    if unit == "centered":
        return n
    span = shape[0]
    for other in shape[1:]:  # sym_min and sym_max keep sizes symbolic in a compiled graph
        span = torch.sym_min(span, other) if unit == "centered_shorter" else torch.sym_max(span, other)
    return span


def _axis(n: int, unit: str, shape: Sequence[int], device: torch.device | None) -> Tensor:
    index = torch.arange(n, dtype=torch.float32, device=device)
    return index if unit == "index" else 2 * ((index + 0.5) / _span(n, unit, shape)) - 1


def _origin(origin: float | str | Sequence[float], shape: Sequence[int], unit: str) -> list[float]:
    if isinstance(origin, str):
        if origin != "center":
            raise ValueError(f'unknown origin {origin!r}; expected "center", a number or one number for each axis')
        return [(n - 1) / 2 if unit == "index" else n / _span(n, unit, shape) - 1 for n in shape]
    if isinstance(origin, (int, float)):
        return [float(origin)] * len(shape)
    if len(origin) != len(shape):
        raise ValueError(
            f"origin {tuple(origin)} gives {len(origin)} numbers for a grid {tuple(shape)} of {len(shape)} axes"
        )
    return [float(value) for value in origin]
