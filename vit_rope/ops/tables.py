"""Tables of cosines and sines, from frequencies and coordinates.

The table of a full grid is a product over its axes: it needs one cosine for each row and for each
column, not one for each cell. The gradient of the frequencies needs no angles, because the
derivative of a table entry t = exp(i theta) with respect to theta is i t.

Shapes   L layers, B samples and H heads (1 if shared), N tokens, A axes, R pairs of channels
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .eager import is_eager, needs_grad


def angles(freqs: Tensor, coords: Tensor) -> Tensor:
    """Return angles (L, B, N, H, R) of freqs (L, H, A, R) at coordinates (N, A) or (B, N, A)."""
    if coords.ndim == 2:
        coords = coords[None]
    products = coords[None, :, :, None, :, None] * freqs[:, None, None]
    return products.sum(dim=-2)  # not a matmul, which autocast and TF32 would round


def cos_sin(freqs: Tensor, coords: Tensor, grid: Sequence[int] | None = None) -> Tensor:
    """Return a table (L, B, N, H, R, 2) of the cosines and sines of `angles(freqs, coords)`.

    With a `grid`, coordinates (N, A) must be those of all its cells, in the order of
    `positions.coords.grid`. The table is then a product of the tables along the axes.
    """
    if is_eager(freqs, coords) and not coords.requires_grad:
        return _CosSin.apply(freqs, coords, grid) if needs_grad(freqs) else _make_table(freqs, coords, grid)
    theta = angles(freqs, coords)
    return torch.stack((theta.cos(), theta.sin()), dim=-1)


def on_circle(table: Tensor) -> bool:
    """Whether `cos_sin` made this table, or the one that it is a layer of: then its entries have
    modulus 1 whatever is learned, and only their angles have a gradient. False if unknown.
    """
    node = table.grad_fn
    if node is not None and node.name() in ("UnbindBackward0", "SelectBackward0"):
        node = node.next_functions[0][0]
    return node is not None and node.name() == "_CosSinBackward"


class _CosSin(torch.autograd.Function):
    """`cos_sin` with the gradient of the frequencies."""

    @staticmethod
    def forward(ctx: Any, freqs: Tensor, coords: Tensor, grid: Sequence[int] | None) -> Tensor:
        table = _make_table(freqs, coords, grid)
        ctx.save_for_backward(coords, table)
        return table

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        coords, table = ctx.saved_tensors  # (N, A) or (B, N, A); (L, B, N, H, R, 2)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        points = (coords.unsqueeze(0) if coords.ndim == 2 else coords).flatten(0, 1)  # (B · N, A)
        with torch.autocast(coords.device.type, enabled=False):
            angle_grad = (torch.view_as_complex(table).conj() * torch.view_as_complex(grads[0].contiguous())).imag
            freqs_grad = points.to(angle_grad.dtype).T @ angle_grad.flatten(1, 2).flatten(2)  # (L, A, H · R)
        return freqs_grad.unflatten(-1, angle_grad.shape[-2:]).transpose(1, 2), None, None


def _make_table(freqs: Tensor, coords: Tensor, grid: Sequence[int] | None) -> Tensor:
    """`cos_sin` without a gradient."""
    if grid is None or coords.ndim != 2 or len(coords) != math.prod(grid):
        theta = angles(freqs, coords)
        return torch.view_as_real(torch.complex(theta.cos(), theta.sin()))
    table, step = freqs.new_ones(()), len(coords)
    for a, cells in enumerate(grid):
        period, step = step, step // cells
        theta = coords[:period:step, a].view(-1, 1, 1) * freqs[:, None, :, a]  # (L, n, H, R)
        axis_table = torch.complex(theta.cos(), theta.sin())
        table = axis_table if a == 0 else (table[:, :, None] * axis_table[:, None]).flatten(1, 2)
    return torch.view_as_real(table[:, None])
