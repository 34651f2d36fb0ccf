"""Coordinates of tokens: grids, units, checks and augmentation.

Coordinates are everything that a position scheme sees of an image, a video or a signal. They are
passed alongside the tokens. Code that drops, crops, packs or reorders tokens does the same to their
coordinates, and schemes need no change.

Shapes   B samples, N tokens, A axes (time before rows before columns);
         coordinates (N, A) if all samples share them, else (B, N, A)
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Unit = Literal["index", "centered", "centered_shorter", "centered_longer"]
UNITS = ("index", "centered", "centered_shorter", "centered_longer")


def grid(
    shape: Sequence[int],
    unit: str = "index",
    origin: float | str | Sequence[float] = 0.0,
    device: torch.device | None = None,
) -> Tensor:
    """Return coordinates (N, A) of a grid of N = prod(shape) cells, in float32, row-major.

    `unit` is one of:

    - "index": cells are counted from 0.
    - "centered": cell centers, with the outer borders of the grid at -1 and 1 along every axis.
    - "centered_shorter", "centered_longer": cell centers, with the first border at -1 and the last
      at 1 along the shorter or the longer axis. The other axes use the same scale, so that cells
      stay square.

    The centered units are the normalizations of DINOv3 (arXiv:2508.10104). `origin` is the point,
    in this unit, that becomes 0: a number, one number for each axis, or "center". Tokens without a
    position are treated as if they were at 0.

    Raises ValueError for an unknown unit, an empty shape, a size below 1, or an origin with a
    different number of axes.
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
    """Return the cell indices (…, A) of coordinates (…, A), fractional between cells.

    The inverse of `grid`. Raises ValueError for a shape of another number of axes.
    """
    check_axes(shape, coords)
    shift = torch.tensor(_origin(origin, shape, unit), dtype=coords.dtype, device=coords.device)
    coords = coords + shift
    if unit == "index":
        return coords
    spans = torch.tensor([_span(n, unit, shape) for n in shape], dtype=coords.dtype, device=coords.device)
    return (coords + 1) * spans / 2 - 0.5


def growth(shape: Sequence[int], larger: Sequence[int], unit: str = "index") -> list[float]:
    """Return the ratio of the extents of two grids along each axis, in units of `unit`.

    It is 1 for units that scale with the grid.
    """
    sizes = zip(shape, larger, strict=True)
    return [m / n if unit == "index" else m / _span(m, unit, larger) * _span(n, unit, shape) / n for n, m in sizes]


def check_coords(coords: Tensor, axes: int | None = None, finite: bool | None = None) -> Tensor:
    """Return the coordinates (N, A) or (B, N, A), as float32 or float64, if they are valid.

    Values are checked for NaN and infinity if `finite` is True. By default they are checked on the
    CPU only, because a check on another device would have to wait for it.

    Raises TypeError for an argument that is not a tensor, or for half precision, in which 257
    equals 256. Raises ValueError for a wrong shape, a number of axes other than `axes`, or a value
    that is NaN or infinite.
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


def augment_coords(coords: Tensor, shift: float = 0.0, jitter: float = 1.0, rescale: float = 1.0) -> Tensor:
    """Shift and stretch coordinates by random numbers, drawn once per call (arXiv:2508.10104).

    Args:
        coords: coordinates (…, A).
        shift: the largest shift along each axis, in the unit of the coordinates; uniform.
        jitter: the largest factor along each axis, log-uniform between 1 / jitter and jitter.
        rescale: the largest factor of all axes, log-uniform between 1 / rescale and rescale.
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


def take_coords(coords: Tensor, keep: Tensor) -> Tensor:
    """Select coordinates (B, K, A) of the tokens `keep` (B, K), from (N, A) or (B, N, A)."""
    if coords.ndim == 2:
        return coords[keep]
    return coords.gather(1, keep[..., None].expand(-1, -1, coords.shape[-1]))


def check_shape(shape: Sequence[int]) -> None:
    """Raise ValueError unless `shape` has an axis, and at least one cell along each axis."""
    if len(shape) == 0 or any(n < 1 for n in shape):
        raise ValueError(f"a grid needs at least one cell along each of its axes, got shape {tuple(shape)}")


def check_axes(shape: Sequence[int] | None, coords: Tensor) -> None:
    """Raise ValueError for a grid with another number of axes than its coordinates (…, A) have."""
    if shape is not None and len(shape) != coords.shape[-1]:
        raise ValueError(
            f"grid {list(shape)} has {len(shape)} axes, but the coordinates have {coords.shape[-1]}; "
            f"give the number of cells along each axis"
        )


def check_unit(unit: str) -> None:
    """Raise ValueError for an unknown unit."""
    if unit not in UNITS:
        raise ValueError(f"unknown unit {unit!r}; expected one of {', '.join(UNITS)}")


def _span(n: int, unit: str, shape: Sequence[int]) -> Any:
    """Return the number of cells between -1 and 1 along an axis of n cells."""
    if unit == "centered":
        return n
    span = shape[0]
    for size in shape[1:]:  # sym_min and sym_max keep sizes symbolic in a compiled graph
        span = torch.sym_min(span, size) if unit == "centered_shorter" else torch.sym_max(span, size)
    return span


def _axis(n: int, unit: str, shape: Sequence[int], device: torch.device | None) -> Tensor:
    """Return the coordinates (n,) along an axis of n cells, before the origin is subtracted."""
    index = torch.arange(n, dtype=torch.float32, device=device)
    return index if unit == "index" else 2 * ((index + 0.5) / _span(n, unit, shape)) - 1


def _origin(origin: float | str | Sequence[float], shape: Sequence[int], unit: str) -> list[float]:
    """Return the origin as one number for each axis."""
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
