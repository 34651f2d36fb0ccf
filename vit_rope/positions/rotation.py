"""Turning channel pairs, near the speed of copying them.

Pairs of interleaved channels are complex numbers as they lie in memory, and so is a table of cosines and sines: eager
rotation is one complex product, written over its input where the caller gives that away. 16-bit inputs pass through
float32 in pieces that stay in the cache. Nothing but the table is kept for the backward pass: with a turn of modulus 1
the gradient of a learned angle follows from the turned channels, which attention keeps anyway. Compilers, exporters,
function transforms and other devices get the same formula in real numbers.

Shapes   B samples, N tokens, H heads (1 if shared), R pairs of the D channels of a head;
         x (B, N, G, H, D): G groups (queries, keys, values); turn (B or 1, N, H, R, 2) in float32
Stride   how far the partners of a pair are apart: 1 interleaved, R half, R / A half within each axis's block
"""

import functools
import importlib
import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

SCRATCH = 3 * 2**20  # bytes of float32 at a time on a CPU: more would leave its caches, and less takes more calls


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
    if eager(x, turn):
        rotation = _Rotation.apply if tracked(x, turn) else _rotated
        return rotation(x, turn, turning, stride, prefix, overwrite)
    groups = x.unbind(2)
    turned = [formula(group, turn, stride, prefix) for group in groups[:turning]]
    return tuple(group.transpose(1, 2) for group in (*turned, *groups[turning:]))


def formula(x: Tensor, turn: Tensor, stride: int = 1, prefix: int = 0) -> Tensor:
    """x (B, N, H, D) turned, in real numbers; tokens without a place are turned by nothing, which keeps one kernel."""
    precise = _precise(x)
    cos, sin = turn.to(precise).unbind(-1)
    if prefix:
        cos, sin = (F.pad(t, (0, 0, 0, 0, prefix, 0), value=rest) for t, rest in ((cos, 1.0), (sin, 0.0)))
    width = 2 * turn.shape[-2]
    cos, sin = (t.unflatten(-1, (-1, stride)) for t in (cos, sin))
    a, b = x[..., :width].to(precise).unflatten(-1, (-1, 2, stride)).unbind(-2)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-2).flatten(-3).to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)


def eager(*tensors: Tensor) -> bool:
    """Whether complex numbers, in functions with a gradient of their own, will do."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if any(t.device.type not in ("cpu", "cuda") for t in tensors):
        return False
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


def tracked(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


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
                angle = _turn_back(turned, there, back, stride, prefix, outs)
            else:
                for grad, out in zip(there[:turning], outs, strict=False):
                    _turn(grad, back, stride, prefix, out)
            for grad, out in zip(there[turning:], outs[turning:], strict=True):
                out.copy_(grad)
        if turned and angle is None:
            angle = _angle_gradient(turned, there, turn, stride, prefix)
        return found, None if angle is None else _along_circle(turn, angle), None, None, None, None


def _rotated(x: Tensor, turn: Tensor, turning: int, stride: int, prefix: int, overwrite: bool) -> tuple[Tensor, ...]:
    part = x[:, :, :turning] if turning < x.shape[2] else x
    if overwrite:
        _turn(part, turn, stride, prefix, part)
        return x.transpose(1, 3).unbind(2)
    out = torch.empty_like(part, memory_format=torch.contiguous_format)
    _turn(part, turn, stride, prefix, out)
    return (*out.transpose(1, 3).unbind(2), *x[:, :, turning:].transpose(1, 3).unbind(2))


def _turn(x: Tensor, turn: Tensor, stride: int, prefix: int, out: Tensor) -> None:
    """Write x (B, N, H, D) or (B, N, G, H, D), turned, into `out`, which may be x itself."""
    x, out = _places(x, turn, prefix, out)
    if x.is_cuda and (kernel := _kernel()) is not None and kernel.usable(x):
        kernel.turn_pairs(x, turn, stride, out)
    elif _low(x):
        _through_float32(x, turn, stride, out)
    else:
        _product(x, _fitted(turn, x), stride, out)


def _places(x: Tensor, turn: Tensor, prefix: int, out: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens and channels of x and of out that turn; the others are copied. Where out is x, it stays so."""
    width = 2 * turn.shape[-2]
    if out is x:
        out = x = _turning(x, width, prefix)
        return x, out
    if prefix:
        out[:, :prefix].copy_(x[:, :prefix])
    if width < x.shape[-1]:
        out[..., width:].copy_(x[..., width:])
    return _turning(x, width, prefix), _turning(out, width, prefix)


def _turning(x: Tensor, width: int, prefix: int) -> Tensor:
    x = x[:, prefix:] if prefix else x
    return x[..., :width] if width < x.shape[-1] else x


def _fitted(turn: Tensor, x: Tensor) -> Tensor:
    """The turn, broadcastable to x; of the size of a sample where one long loop then replaces many short ones."""
    if x.ndim == 5:
        turn = turn[:, :, None]
    if (_low(x) or x.shape[-1] < 64) and len(x) > 2 and _bytes(x) < SCRATCH:
        turn = turn.expand(-1, -1, *x.shape[2:-1], -1, -1).contiguous()
    return turn


def _through_float32(x: Tensor, turn: Tensor, stride: int, out: Tensor) -> None:
    """Group by group and piece by piece, in room that is taken once, for memory at hand is faster than new."""
    groups, outs = ((t.unbind(2) if t.ndim == 5 else (t,)) for t in (x, out))
    like, samples = groups[0], _samples(groups[0], SCRATCH)
    spread = stride == 1 and len(turn) == 1 and turn.shape[2] < like.shape[2]
    room = like.new_empty(samples + spread, *like.shape[1:-1], like.shape[-1] // 2, dtype=torch.complex64)
    if stride == 1:
        turn = torch.view_as_complex(turn)
    if spread:  # to all heads: one long loop where there were many short ones
        turn = room[samples:].copy_(turn)
    for x, out in zip(groups, outs, strict=True):
        pairs, scratch = room[:samples], room[:samples].view(torch.float32)
        parts, places, turns = (_split(t, samples, len(x)) for t in (x, out, turn))
        for part, place, angle in zip(parts, places, turns, strict=False):
            if len(part) < samples:  # the last piece
                pairs, scratch = pairs[: len(part)], scratch[: len(part)]
            scratch.copy_(part)
            if stride == 1:
                pairs.mul_(angle)
            else:
                _product(scratch, angle, stride, scratch)
            place.copy_(scratch)


def _samples(x: Tensor, room: int) -> int:
    """How many samples of x to take at a time, in pieces of one size, whose float32 numbers fit in so many bytes."""
    most = len(x) if x.is_cuda else max(1, room // max(1, _bytes(x)))
    return math.ceil(len(x) / math.ceil(len(x) / most)) if len(x) else 0


def _split(x: Tensor, samples: int, batch: int) -> Sequence[Tensor]:
    """Pieces of so many samples, or x itself for each if all samples share it."""
    if len(x) < batch:
        return [x] * batch
    return x.split(samples) if samples < batch else (x,)


def _bytes(x: Tensor) -> int:
    """Of a sample, in float32."""
    return 4 * (x.numel() // max(1, len(x)))


def _low(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


@functools.cache
def _kernel() -> Any:
    """The Triton kernel's module, or None where Triton is not installed; imported when a GPU first needs it."""
    return importlib.import_module(".kernel", __package__) if importlib.util.find_spec("triton") else None


def _product(x: Tensor, turn: Tensor, stride: int, out: Tensor) -> None:
    if stride == 1:
        target = as_complex(out)
        torch.mul(target if out is x else as_complex(x), torch.view_as_complex(turn.to(x.dtype)), out=target)
        if target.data_ptr() != out.data_ptr():
            out.copy_(torch.view_as_real(target).flatten(-2))
        return
    cos, sin = (t.unflatten(-1, (-1, stride)) for t in turn.to(x.dtype).unbind(-1))
    x, out = (t.unflatten(-1, (-1, 2, stride)) for t in (x, out))
    turned = x * cos[..., None, :]
    turned[..., 0, :].addcmul_(x[..., 1, :], sin, value=-1)
    turned[..., 1, :].addcmul_(x[..., 0, :], sin)
    out.copy_(turned)


def as_complex(x: Tensor) -> Tensor:
    """The pairs (…, R) of interleaved channels x (…, 2R) as complex numbers, where they lie if that is possible."""
    *outer, last = x.stride()
    if last != 1 or x.storage_offset() % 2 or any(stride % 2 for stride in outer):
        x = x.clone(memory_format=torch.contiguous_format)  # contiguous() leaves one token as is
    return x.view(x.dtype.to_complex())


# ---- the gradient of angles -----------------------------------------------------------------------------------------


def _turn_back(
    turned: Sequence[Tensor], grads: Sequence[Tensor], back: Tensor, stride: int, prefix: int, outs: Sequence[Tensor]
) -> Tensor:
    """Write the grads (B, N, H, D) of what was turned, turned `back`, into `outs`, and return `_angle_gradient`.

    Im(conj(y) g) is the sum of the two channels of y · (-i g), and where -i g is at hand, a product with i conj(t) is
    all that it takes to turn it back. So it goes piece by piece through the caches once.
    """
    width, own = 2 * back.shape[-2], len(back) > 1
    like = _turning(grads[0], width, prefix)
    batch, low = len(like), _low(like)
    samples = _samples(like, SCRATCH // 2 if low else SCRATCH)
    quarter = back.new_tensor([0.0, -1.0]).expand(1, 1, 1, width // 2, 2)  # -i
    rest = _fitted(torch.view_as_real(torch.view_as_complex(back) * 1j), like)
    sums = like.new_zeros(batch if own else samples, *like.shape[1:], dtype=_precise(like))
    room = [sums.new_empty(samples, *like.shape[1:]) for _ in range(2 if low else 1)]
    tables = [_split(t, samples, batch) for t in (rest, sums)]
    for y, grad, out in zip(turned, grads, outs, strict=False):
        grad, out = _places(grad, back, prefix, out)
        pieces = [_split(t, samples, batch) for t in (_turning(y, width, prefix), grad, out)]
        for y, g, place, angle, total in zip(*pieces, *tables, strict=False):
            scratch, *other = (t[: len(g)] for t in room)
            if low:
                g, y = scratch.copy_(g), other[0].copy_(y)
            _product(g, quarter, stride, scratch)
            total[: len(g)].addcmul_(y, scratch)
            _product(scratch, angle, stride, scratch if low else place)
            if low:
                place.copy_(scratch)
    a, b = (sums if own else sums.sum(dim=0, keepdim=True)).unflatten(-1, (-1, 2, stride)).unbind(-2)
    return _shared((a + b).flatten(-2), back)


def _angle_gradient(
    turned: Sequence[Tensor], grads: Sequence[Tensor], turn: Tensor, stride: int, prefix: int
) -> Tensor:
    """The gradient (B or 1, N, H or 1, R) of the angles by which y (B, N, H, D) were turned: Im(conj(y) g), summed."""
    angle: Any = 0
    for pair in zip(turned, grads, strict=False):
        parts = (_turning(t, 2 * turn.shape[-2], prefix).to(_precise(t)) for t in pair)
        (a, b), (c, d) = (part.unflatten(-1, (-1, 2, stride)).unbind(-2) for part in parts)
        angle = angle + _shared((a * d - b * c).flatten(-2), turn)
    return angle


def _shared(angle: Tensor, turn: Tensor) -> Tensor:
    """Summed over the samples and heads that a turn serves."""
    if len(turn) < len(angle):
        angle = angle.sum(dim=0, keepdim=True)
    return angle.sum(dim=2, keepdim=True) if turn.shape[2] < angle.shape[2] else angle


def _along_circle(turn: Tensor, angle: Tensor) -> Tensor:
    """The gradient i t a / |t|^2 of turns t from that of their angles, a; |t| is 1 but for a constant decay in it."""
    circle = torch.view_as_complex(turn)
    angle = angle.to(turn.dtype) / (circle * circle.conj()).real
    return torch.view_as_real(circle * torch.complex(torch.zeros_like(angle), angle))


def _precise(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
