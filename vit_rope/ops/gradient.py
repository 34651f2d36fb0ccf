"""The backward pass of a rotation: the gradients of the channels, of the angles and of the table.

Pairs of channels are complex numbers. The forward pass is y = t x for a table t = exp(i theta).
Let g be the gradient of y. Then the gradient of x is conj(t) g, and that of the angle theta is
Im(conj(y) g). So the backward pass does not need x, only the table and, for learned angles, the
rotated y, which attention keeps anyway. The gradient of a table whose modulus may be learned too
is conj(x) g, which needs x.

Shapes   B samples, N tokens, H heads (1 if shared), D channels of a head, R pairs of channels;
         x, y and g (B, N, H, D), one of each for each rotated group;
         tables (B or 1, N, H or 1, R, 2)
"""

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


def rotate_back(
    rotated: Sequence[Tensor],
    grads: Sequence[Tensor],
    inverse_table: Tensor,
    stride: int,
    prefix: int,
    outs: Sequence[Tensor],
) -> Tensor:
    """Write the gradients of x into `outs`, and return the result of `angle_gradient`.

    `rotated` holds y, `grads` holds g, and `inverse_table` is conj(t). Both results share s = -i g:

        angles   Im(conj(y) g) = Re(y) Re(s) + Im(y) Im(s), summed over samples and heads
        x        conj(t) g = (i conj(t)) s

    The batch is processed in pieces, so that each piece is in the cache for both products.
    """
    width, per_sample = 2 * inverse_table.shape[-2], len(inverse_table) > 1
    example = rotated_slice(grads[0], width, prefix)
    batch, half = len(example), is_half(example)
    samples = samples_per_piece(example, SCRATCH // 2 if half else SCRATCH)
    minus_i = inverse_table.new_tensor([0.0, -1.0]).expand(1, 1, 1, width // 2, 2)
    table_times_i = expand_to_heads(torch.view_as_real(torch.view_as_complex(inverse_table) * 1j), example)
    sums = example.new_zeros(batch if per_sample else samples, *example.shape[1:], dtype=accumulation_dtype(example))
    buffers = [sums.new_empty(samples, *example.shape[1:]) for _ in range(2 if half else 1)]
    tables = [pieces(t, samples, batch) for t in (table_times_i, sums)]
    for y_group, grad, out in zip(rotated, grads, outs, strict=False):
        grad, out = rotated_part(grad, inverse_table, prefix, out)
        groups = [pieces(t, samples, batch) for t in (rotated_slice(y_group, width, prefix), grad, out)]
        for y, g, out_piece, table_piece, sum_piece in zip(*groups, *tables, strict=False):
            scratch, *y_buffer = (t[: len(g)] for t in buffers)
            if half:
                g, y = scratch.copy_(g), y_buffer[0].copy_(y)
            multiply_pairs(g, minus_i, stride, scratch)
            sum_piece[: len(g)].addcmul_(y, scratch)
            multiply_pairs(scratch, table_piece, stride, scratch if half else out_piece)
            if half:
                out_piece.copy_(scratch)
    real, imaginary = (sums if per_sample else sums.sum(dim=0, keepdim=True)).unflatten(-1, (-1, 2, stride)).unbind(-2)
    return _sum_shared((real + imaginary).flatten(-2), inverse_table)


def angle_gradient(
    rotated: Sequence[Tensor], grads: Sequence[Tensor], cos_sin: Tensor, stride: int, prefix: int
) -> Tensor:
    """Return the gradient (B or 1, N, H or 1, R) of the angles, Im(conj(y) g) summed over groups.

    It is also summed over the samples and heads that share an entry of the table `cos_sin`.
    """
    total: Any = 0
    for y_and_grad in zip(rotated, grads, strict=False):
        parts = (rotated_slice(t, 2 * cos_sin.shape[-2], prefix).to(accumulation_dtype(t)) for t in y_and_grad)
        (a, b), (c, d) = (part.unflatten(-1, (-1, 2, stride)).unbind(-2) for part in parts)
        total = total + _sum_shared((a * d - b * c).flatten(-2), cos_sin)
    return total


def _sum_shared(grad: Tensor, cos_sin: Tensor) -> Tensor:
    """Sum (B, N, H, …) over the samples and heads that share an entry of the table."""
    if len(cos_sin) < len(grad):
        grad = grad.sum(dim=0, keepdim=True)
    return grad.sum(dim=2, keepdim=True) if cos_sin.shape[2] < grad.shape[2] else grad


def along_circle(cos_sin: Tensor, angle_grad: Tensor) -> Tensor:
    """Return the gradient i t a of a table t of modulus 1, from the gradient a of its angles."""
    table, angle_grad = torch.view_as_complex(cos_sin), angle_grad.to(cos_sin.dtype)
    return torch.view_as_real(table * torch.complex(torch.zeros_like(angle_grad), angle_grad))


def table_gradient(
    unrotated: Sequence[Tensor], grads: Sequence[Tensor], cos_sin: Tensor, stride: int, prefix: int
) -> Tensor:
    """Return the gradient conj(x) g of a table of any modulus, summed as by `angle_gradient`.

    `unrotated` holds x, `grads` holds g.
    """
    total: Any = 0
    for x_and_grad in zip(unrotated, grads, strict=False):
        parts = (rotated_slice(t, 2 * cos_sin.shape[-2], prefix).to(accumulation_dtype(t)) for t in x_and_grad)
        (a, b), (c, d) = (part.unflatten(-1, (-1, 2, stride)).unbind(-2) for part in parts)
        each = torch.stack((a * c + b * d, a * d - b * c), dim=-1).flatten(-3, -2)
        total = total + _sum_shared(each, cos_sin)
    return total.to(cos_sin.dtype)
