"""TODO ops.rotate from ['positions.rotation']."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .eager import accumulation_dtype, is_eager, needs_grad, rotate_into
from .gradient import angle_gradient, rotate_back, table_gradient


def rotate(x: Tensor, turn: Tensor, stride: int = 1, prefix: int = 0, overwrite: bool = False) -> Tensor:
    """Turn the first 2R channels of x (B, H, N, D), after its first `prefix` tokens, by turn (B, N - prefix, H, R, 2).

    Computes in float32, or float64 where x is that, and returns x's dtype. With `overwrite` the result may lie where x
    did. Raises ValueError where x is too narrow.
    """
    return rotate_groups(x.transpose(1, 2)[:, :, None], turn, 1, stride, prefix, overwrite)[0]


def rotate_groups(
    x: Tensor, turn: Tensor, turning: int, stride: int = 1, prefix: int = 0, overwrite: bool = False
) -> tuple[Tensor, ...]:
    """The G groups (B, H, N, D) of x (B, N, G, H, D), the first `turning` of them rotated as `rotate` does."""
    if 2 * turn.shape[-2] > x.shape[-1]:
        pairs = turn.shape[-2]
        raise ValueError(f"a rotation of {pairs} pairs needs heads of {2 * pairs} channels or more, got {x.shape[-1]}")
    if is_eager(x, turn):
        rotation = _Rotation.apply if needs_grad(x, turn) else _rotated
        return rotation(x, turn, turning, stride, prefix, overwrite)
    groups = x.unbind(2)
    turned = [formula(group, turn, stride, prefix) for group in groups[:turning]]
    return tuple(group.transpose(1, 2) for group in (*turned, *groups[turning:]))


def formula(x: Tensor, turn: Tensor, stride: int = 1, prefix: int = 0) -> Tensor:
    """x (B, N, H, D) turned, in real numbers; tokens without a place are turned by nothing, which keeps one kernel."""
    precise = accumulation_dtype(x)
    cos, sin = turn.to(precise).unbind(-1)
    if prefix:
        cos, sin = (F.pad(t, (0, 0, 0, 0, prefix, 0), value=rest) for t, rest in ((cos, 1.0), (sin, 0.0)))
    width = 2 * turn.shape[-2]
    cos, sin = (t.unflatten(-1, (-1, stride)) for t in (cos, sin))
    a, b = x[..., :width].to(precise).unflatten(-1, (-1, 2, stride)).unbind(-2)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-2).flatten(-3).to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)


class _Rotation(torch.autograd.Function):
    """The groups of x, the first `turning` of them rotated; the backward pass turns their gradients back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, turn: Tensor, turning: int, stride: int, prefix: int, overwrite: bool
    ) -> tuple[Tensor, ...]:
        groups = _rotated(x, turn, turning, stride, prefix, overwrite)
        ctx.options = turning, stride, prefix
        ctx.save_for_backward(turn, *(groups[:turning] if ctx.needs_input_grad[1] else ()))
        return groups

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        turn, *turned = ctx.saved_tensors
        turning, stride, prefix = ctx.options
        there, turned = ([t.transpose(1, 2) for t in tensors] for tensors in (grads, turned))
        back, angle = torch.view_as_real(torch.view_as_complex(turn).conj_physical()), None
        if torch.is_grad_enabled():  # somebody will differentiate again
            found = torch.stack([*(formula(g, back, stride, prefix) for g in there[:turning]), *there[turning:]], dim=2)
        else:
            batch, tokens, heads, width = there[0].shape
            found = there[0].new_empty(batch, tokens, len(there), heads, width)
            outs = found.unbind(2)
            if turned and not turn.is_cuda:
                angle = rotate_back(turned, there, back, stride, prefix, outs)
            else:
                for grad, out in zip(there[:turning], outs, strict=False):
                    rotate_into(grad, back, stride, prefix, out)
            for grad, out in zip(there[turning:], outs[turning:], strict=True):
                out.copy_(grad)
        if turned and angle is None:
            angle = angle_gradient(turned, there, turn, stride, prefix)
        return found, None if angle is None else table_gradient(turn, angle), None, None, None, None


def _rotated(x: Tensor, turn: Tensor, turning: int, stride: int, prefix: int, overwrite: bool) -> tuple[Tensor, ...]:
    part = x[:, :, :turning] if turning < x.shape[2] else x
    if overwrite:
        rotate_into(part, turn, stride, prefix, part)
        return x.transpose(1, 3).unbind(2)
    out = torch.empty_like(part, memory_format=torch.contiguous_format)
    rotate_into(part, turn, stride, prefix, out)
    return (*out.transpose(1, 3).unbind(2), *x[:, :, turning:].transpose(1, 3).unbind(2))
