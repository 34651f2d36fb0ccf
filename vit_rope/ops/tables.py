"""Tables of cosines and sines, from frequencies and coordinates.

A table of a whole grid is a product of its axes: it takes a cosine for each row and each column, not for each cell. The
gradient of the frequencies needs no angle, for a turn knows how it goes on.

Shapes   L layers, B samples and H heads (1 if shared), N tokens, A axes, R pairs of channels
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .eager import is_eager, needs_grad


def angles(freqs: Tensor, coords: Tensor) -> Tensor:
    """Angles (L, B, N, H, R) at frequencies (L, H, A, R) of coordinates (N, A) or (B, N, A)."""
    if coords.ndim == 2:
        coords = coords[None]
    turned = coords[None, :, :, None, :, None] * freqs[:, None, None]
    return turned.sum(dim=-2)  # not a matmul, which autocast and TF32 would round


def cos_sin(freqs: Tensor, coords: Tensor, grid: Sequence[int] | None = None) -> Tensor:
    """Cosines and sines (L, B, N, H, R, 2) of the angles at freqs (L, H, A, R) of coordinates (N, A) or (B, N, A).

    Coordinates (N, A) of a whole `grid` are products of its axes, as `positions.coords.grid` makes them: turns along
    the axes then multiply, which takes a cosine for each row and each column rather than for each cell.
    """
    if is_eager(freqs, coords) and not coords.requires_grad:
        return _Turns.apply(freqs, coords, grid) if needs_grad(freqs) else _tables(freqs, coords, grid)
    theta = angles(freqs, coords)
    return torch.stack((theta.cos(), theta.sin()), dim=-1)


class _Turns(torch.autograd.Function):
    """`cos_sin` with the gradient of the frequencies."""

    @staticmethod
    def forward(ctx: Any, freqs: Tensor, coords: Tensor, grid: Sequence[int] | None) -> Tensor:
        table = _tables(freqs, coords, grid)
        ctx.save_for_backward(coords, table)
        return table

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        coords, table = ctx.saved_tensors  # (N, A) or (B, N, A); (L, B, N, H, R, 2)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        places = (coords.unsqueeze(0) if coords.ndim == 2 else coords).flatten(0, 1)  # (B · N, A)
        with torch.autocast(coords.device.type, enabled=False):
            angle = (torch.view_as_complex(table).conj() * torch.view_as_complex(grads[0].contiguous())).imag
            summed = places.to(angle.dtype).T @ angle.flatten(1, 2).flatten(2)  # (L, A, H · R)
        return summed.unflatten(-1, angle.shape[-2:]).transpose(1, 2), None, None


def _tables(freqs: Tensor, coords: Tensor, grid: Sequence[int] | None) -> Tensor:
    if grid is None or coords.ndim != 2 or len(coords) != math.prod(grid):
        theta = angles(freqs, coords)
        return torch.view_as_real(torch.complex(theta.cos(), theta.sin()))
    table, step = freqs.new_ones(()), len(coords)
    for a, cells in enumerate(grid):
        every, step = step, step // cells
        theta = coords[:every:step, a].view(-1, 1, 1) * freqs[:, None, :, a]  # (L, n, H, R)
        turn = torch.complex(theta.cos(), theta.sin())
        table = turn if a == 0 else (table[:, :, None] * turn[:, None]).flatten(1, 2)
    return torch.view_as_real(table[:, None])
