"""Rotate channel pairs by a table of cosines and sines: the functions that other modules call.

`rotate` and `rotate_groups` choose between two implementations of one formula. Eager tensors on a
CPU or a CUDA device take the fast path of `eager`, in an autograd function with a gradient of its
own. Compilers, exporters, function transforms and other devices get `formula`, in real numbers.
The backward pass needs the table only. If the angles of a table need a gradient, it also needs the
rotated channels, which attention keeps anyway. If its modulus may need one too, as a decay does,
the backward pass needs the channels before rotation, which are then not overwritten.

Shapes   B samples, N tokens, H heads (1 if shared), D channels of a head, R pairs of channels,
         G groups (queries, keys, values);
         x (B, N, G, H, D); cos_sin (B or 1, N, H, R, 2) in float32
Stride   distance between the two channels of a pair: 1 interleaved, R half, R / A half within the
         block of each of A axes
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _global_forward_hooks

from .eager import accumulation_dtype, is_eager, needs_grad, rotate_into
from .gradient import along_circle, angle_gradient, rotate_back, table_gradient
from .tables import on_circle


def rotate(x: Tensor, cos_sin: Tensor, stride: int = 1, prefix: int = 0, overwrite: bool = False) -> Tensor:
    """Rotate the first 2R channels of x (B, H, N, D) by a table `cos_sin` (B, N - prefix, H, R, 2).

    The first `prefix` tokens stay as they are. Computes in float32, or in float64 if x is float64,
    and returns the dtype of x. With `overwrite` the result may use the memory of x, unless that
    would change a leaf that learns. Raises ValueError if x has fewer than 2R channels.
    """
    overwrite = overwrite and not (x.is_leaf and x.requires_grad)
    return rotate_groups(x.transpose(1, 2)[:, :, None], cos_sin, 1, stride, prefix, overwrite)[0]


def rotate_groups(
    x: Tensor, cos_sin: Tensor, count: int, stride: int = 1, prefix: int = 0, overwrite: bool = False
) -> tuple[Tensor, ...]:
    """Split x (B, N, G, H, D) into groups (B, H, N, D) and rotate the first `count` by `rotate`."""
    if 2 * cos_sin.shape[-2] > x.shape[-1]:
        pairs = cos_sin.shape[-2]
        raise ValueError(f"a rotation of {pairs} pairs needs heads of {2 * pairs} channels or more, got {x.shape[-1]}")
    if is_eager(x, cos_sin):
        rotation = _Rotation.apply if needs_grad(x, cos_sin) else _rotate_eagerly
        return rotation(x, cos_sin, count, stride, prefix, overwrite)
    groups = x.unbind(2)
    rotated = [formula(group, cos_sin, stride, prefix) for group in groups[:count]]
    return tuple(group.transpose(1, 2) for group in (*rotated, *groups[count:]))


def formula(x: Tensor, cos_sin: Tensor, stride: int = 1, prefix: int = 0) -> Tensor:
    """Rotate x (B, N, H, D) in real numbers, out of place.

    Prefix tokens are rotated by an angle of 0, so that compilers make one kernel for all tokens.
    """
    precise = accumulation_dtype(x)
    cos, sin = cos_sin.to(precise).unbind(-1)
    if prefix:
        cos, sin = (F.pad(t, (0, 0, 0, 0, prefix, 0), value=value) for t, value in ((cos, 1.0), (sin, 0.0)))
    width = 2 * cos_sin.shape[-2]
    cos, sin = (t.unflatten(-1, (-1, stride)) for t in (cos, sin))
    a, b = x[..., :width].to(precise).unflatten(-1, (-1, 2, stride)).unbind(-2)
    rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-2).flatten(-3).to(x.dtype)
    return rotated if width == x.shape[-1] else torch.cat((rotated, x[..., width:]), dim=-1)


class _Rotation(torch.autograd.Function):
    """`rotate_groups` for eager tensors; backward rotates the gradients by the inverse table."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos_sin: Tensor, count: int, stride: int, prefix: int, overwrite: bool
    ) -> tuple[Tensor, ...]:
        learns = ctx.needs_input_grad[1]
        exact = learns and not on_circle(cos_sin)
        groups = _rotate_eagerly(x, cos_sin, count, stride, prefix, overwrite and not exact)
        ctx.options = count, stride, prefix, exact
        ctx.save_for_backward(cos_sin, *([x] if exact else groups[:count] if learns else ()))
        return groups

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos_sin, *kept = ctx.saved_tensors
        count, stride, prefix, exact = ctx.options
        upstream = [grad.transpose(1, 2) for grad in grads]
        rotated = [] if exact else [t.transpose(1, 2) for t in kept]
        inverse_table, angle_grad = torch.view_as_real(torch.view_as_complex(cos_sin).conj_physical()), None
        if torch.is_grad_enabled():  # create_graph=True: the gradient must be differentiable
            rotated_back = [formula(grad, inverse_table, stride, prefix) for grad in upstream[:count]]
            x_grad = torch.stack([*rotated_back, *upstream[count:]], dim=2)
        else:
            batch, tokens, heads, width = upstream[0].shape
            x_grad = upstream[0].new_empty(batch, tokens, len(upstream), heads, width)
            outs = x_grad.unbind(2)
            if rotated and not cos_sin.is_cuda:
                angle_grad = rotate_back(rotated, upstream, inverse_table, stride, prefix, outs)
            else:
                for grad, out in zip(upstream[:count], outs, strict=False):
                    rotate_into(grad, inverse_table, stride, prefix, out)
            for grad, out in zip(upstream[count:], outs[count:], strict=True):
                out.copy_(grad)
        if rotated and angle_grad is None:
            angle_grad = angle_gradient(rotated, upstream, cos_sin, stride, prefix)
        table_grad = None if angle_grad is None else along_circle(cos_sin, angle_grad)
        if exact:
            table_grad = table_gradient(kept[0].unbind(2)[:count], upstream, cos_sin, stride, prefix)
        return x_grad, table_grad, None, None, None, None


def _rotate_eagerly(
    x: Tensor, cos_sin: Tensor, count: int, stride: int, prefix: int, overwrite: bool
) -> tuple[Tensor, ...]:
    """`rotate_groups` without a gradient."""
    part = x[:, :, :count] if count < x.shape[2] else x
    if overwrite:
        rotate_into(part, cos_sin, stride, prefix, part)
        return x.transpose(1, 3).unbind(2)
    out = torch.empty_like(part, memory_format=torch.contiguous_format)
    rotate_into(part, cos_sin, stride, prefix, out)
    return (*out.transpose(1, 3).unbind(2), *x[:, :, count:].transpose(1, 3).unbind(2))


def only_attention_reads(*projections: nn.Module) -> bool:
    """Whether nothing else keeps the outputs of these modules, so that they may be overwritten.

    So it is for a plain `nn.Linear`. A forward hook may keep outputs (e.g. DINO's keys), and so may
    any other module: an adapter around a layer with hooks, or a subclass that records its result.
    """
    plain = all(type(module) is nn.Linear and "forward" not in vars(module) for module in projections)
    return plain and not (_global_forward_hooks or any(module._forward_hooks for module in projections))


def may_overwrite(*tensors: Tensor) -> bool:
    """Whether these tensors can be overwritten one by one: none is a leaf that learns, shares its
    memory with another one, or has several entries at one address. False for compilers.
    """
    if not is_eager(*tensors) or any(t.is_leaf and t.requires_grad for t in tensors):
        return False
    storages = {t.untyped_storage().data_ptr() for t in tensors}
    return len(storages) == len(tensors) and not any(_overlaps_itself(t) for t in tensors)


def _overlaps_itself(x: Tensor) -> bool:
    """Whether two entries of a tensor may share an address, as those of an expanded tensor do."""
    reach = 0
    for step, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += step * (size - 1)
    return False
