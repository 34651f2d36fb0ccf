"""TODO ops.gradient from ['positions.rotation']."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .eager import (
    SCRATCH,
    accumulation_dtype,
    expand_to_heads,
    is_half,
    multiply_pairs,
    pieces,
    rotated_part,
    rotated_slice,
    samples_per_piece,
)


# ---- the gradient of angles -----------------------------------------------------------------------------------------
def rotate_back(
    turned: Sequence[Tensor], grads: Sequence[Tensor], back: Tensor, stride: int, prefix: int, outs: Sequence[Tensor]
) -> Tensor:
    """Write the grads (B, N, H, D) of what was turned, turned `back`, into `outs`, and return `angle_gradient`.

    Im(conj(y) g) is the sum of the two channels of y · (-i g), and where -i g is at hand, a product with i conj(t) is
    all that it takes to turn it back. So it goes piece by piece through the caches once.
    """
    width, own = 2 * back.shape[-2], len(back) > 1
    like = rotated_slice(grads[0], width, prefix)
    batch, low = len(like), is_half(like)
    samples = samples_per_piece(like, SCRATCH // 2 if low else SCRATCH)
    quarter = back.new_tensor([0.0, -1.0]).expand(1, 1, 1, width // 2, 2)  # -i
    rest = expand_to_heads(torch.view_as_real(torch.view_as_complex(back) * 1j), like)
    sums = like.new_zeros(batch if own else samples, *like.shape[1:], dtype=accumulation_dtype(like))
    room = [sums.new_empty(samples, *like.shape[1:]) for _ in range(2 if low else 1)]
    tables = [pieces(t, samples, batch) for t in (rest, sums)]
    for y, grad, out in zip(turned, grads, outs, strict=False):
        grad, out = rotated_part(grad, back, prefix, out)
        parts = [pieces(t, samples, batch) for t in (rotated_slice(y, width, prefix), grad, out)]
        for y, g, place, angle, total in zip(*parts, *tables, strict=False):
            scratch, *other = (t[: len(g)] for t in room)
            if low:
                g, y = scratch.copy_(g), other[0].copy_(y)
            multiply_pairs(g, quarter, stride, scratch)
            total[: len(g)].addcmul_(y, scratch)
            multiply_pairs(scratch, angle, stride, scratch if low else place)
            if low:
                place.copy_(scratch)
    a, b = (sums if own else sums.sum(dim=0, keepdim=True)).unflatten(-1, (-1, 2, stride)).unbind(-2)
    return _shared((a + b).flatten(-2), back)


def angle_gradient(turned: Sequence[Tensor], grads: Sequence[Tensor], turn: Tensor, stride: int, prefix: int) -> Tensor:
    """The gradient (B or 1, N, H or 1, R) of the angles by which y (B, N, H, D) were turned: Im(conj(y) g), summed."""
    angle: Any = 0
    for pair in zip(turned, grads, strict=False):
        parts = (rotated_slice(t, 2 * turn.shape[-2], prefix).to(accumulation_dtype(t)) for t in pair)
        (a, b), (c, d) = (part.unflatten(-1, (-1, 2, stride)).unbind(-2) for part in parts)
        angle = angle + _shared((a * d - b * c).flatten(-2), turn)
    return angle


def _shared(angle: Tensor, turn: Tensor) -> Tensor:
    """Summed over the samples and heads that a turn serves."""
    if len(turn) < len(angle):
        angle = angle.sum(dim=0, keepdim=True)
    return angle.sum(dim=2, keepdim=True) if turn.shape[2] < angle.shape[2] else angle


def table_gradient(turn: Tensor, angle: Tensor) -> Tensor:
    """The gradient i t a / |t|^2 of turns t from that of their angles, a; |t| is 1 but for a constant decay in it."""
    circle = torch.view_as_complex(turn)
    angle = angle.to(turn.dtype) / (circle * circle.conj()).real
    return torch.view_as_real(circle * torch.complex(torch.zeros_like(angle), angle))
