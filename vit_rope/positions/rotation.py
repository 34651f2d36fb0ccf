"""Turning channel pairs, near the speed of copying them, and the tables of cosines and sines that say how far.

Pairs of interleaved channels are complex numbers as they lie in memory, and so is a table of cosines and sines: eager
rotation is one complex product, written over its input where the caller gives that away. 16-bit inputs pass through
float32 in pieces that stay in the cache. Nothing but the table is kept for the backward pass: with a turn of modulus 1
the gradient of a learned angle follows from the turned channels, which attention keeps anyway. Compilers, exporters,
function transforms and other devices get the same formula in real numbers.

Shapes   L layers and H heads (1 if shared), N tokens, A axes, R pairs of the D channels of a head;
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

SCRATCH = 2 * 2**20  # bytes of float32 at a time for 16-bit inputs on a CPU: they stay in its caches, with few calls


def angles(freqs: Tensor, coords: Tensor) -> Tensor:
    """Angles (L, B, N, H, R) at frequencies (L, H, A, R) of coordinates (N, A) or (B, N, A)."""
    if coords.ndim == 2:
        coords = coords[None]
    turned = coords[None, :, :, None, :, None] * freqs[:, None, None]
    return turned.sum(dim=-2)  # not a matmul, which autocast and TF32 would round


def turns(freqs: Tensor, coords: Tensor, grid: Sequence[int] | None = None) -> Tensor:
    """Cosines and sines (L, B, N, H, R, 2) of the angles at freqs (L, H, A, R) of coordinates (N, A) or (B, N, A).

    Coordinates (N, A) of a whole `grid` are products of its axes, as `positions.coords.grid` makes them: turns along
    the axes then multiply, which takes a cosine for each row and each column rather than for each cell.
    """
    if _eager(freqs, coords) and not coords.requires_grad:
        return _Turns.apply(freqs, coords, grid) if _tracked(freqs) else _tables(freqs, coords, grid)
    theta = angles(freqs, coords)
    return torch.stack((theta.cos(), theta.sin()), dim=-1)


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
    if _eager(x, turn):
        rotation = _Rotation.apply if _tracked(x, turn) else _rotated
        return rotation(x, turn, turning, stride, prefix, overwrite)
    groups = x.unbind(2)
    turned = [formula(group, turn, stride, prefix) for group in groups[:turning]]
    return tuple(group.transpose(1, 2) for group in (*turned, *groups[turning:]))


def formula(x: Tensor, turn: Tensor, stride: int = 1, prefix: int = 0) -> Tensor:
    """x (B, N, H, D) turned, in real numbers; tokens without a place are turned by nothing, which keeps one kernel."""
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = turn.to(precise).unbind(-1)
    if prefix:
        cos, sin = (F.pad(t, (0, 0, 0, 0, prefix, 0), value=rest) for t, rest in ((cos, 1.0), (sin, 0.0)))
    width = 2 * turn.shape[-2]
    cos, sin = (t.unflatten(-1, (-1, stride)) for t in (cos, sin))
    a, b = x[..., :width].to(precise).unflatten(-1, (-1, 2, stride)).unbind(-2)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-2).flatten(-3).to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)


def _eager(*tensors: Tensor) -> bool:
    """Whether complex numbers, in functions with a gradient of their own, will do."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if any(t.device.type not in ("cpu", "cuda") for t in tensors):
        return False
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


def _tracked(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


class _Turns(torch.autograd.Function):
    """`turns` with a gradient for the frequencies, which needs no angle of its own: a turn knows how it goes on."""

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
        angle = table[..., 0] * grads[0][..., 1] - table[..., 1] * grads[0][..., 0]
        places = coords.unsqueeze(0) if coords.ndim == 2 else coords
        with torch.autocast(coords.device.type, enabled=False):
            return torch.einsum("bna,lbnhr->lhar", places.to(angle.dtype), angle), None, None


def _tables(freqs: Tensor, coords: Tensor, grid: Sequence[int] | None) -> Tensor:
    if grid is None or coords.ndim != 2 or len(coords) != math.prod(grid):
        theta = angles(freqs, coords)
        return torch.view_as_real(torch.complex(theta.cos(), theta.sin()))
    coords, axes, table = coords.view(*grid, -1), len(grid), freqs.new_zeros(())
    for a in range(axes):
        along = coords[tuple(slice(None) if i == a else 0 for i in range(axes))][:, a]  # (n,)
        theta = along[:, None, None] * freqs[:, None, :, a]  # (L, n, H, R)
        turn = torch.complex(theta.cos(), theta.sin())
        table = turn if a == 0 else (table[:, :, None] * turn[:, None]).flatten(1, 2)
    return torch.view_as_real(table[:, None])


class _Rotation(torch.autograd.Function):
    """The groups of x, the first `turning` of them rotated; the backward pass turns their gradients back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, turn: Tensor, turning: int, stride: int, prefix: int, overwrite: bool
    ) -> tuple[Tensor, ...]:
        groups = _rotated(x, turn, turning, stride, prefix, overwrite)
        ctx.options, ctx.learned = (turning, stride, prefix), ctx.needs_input_grad[1]
        ctx.save_for_backward(turn, *(groups[:turning] if ctx.learned else ()))
        return groups

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        turn, *turned = ctx.saved_tensors
        turning, stride, prefix = ctx.options
        grads = tuple(grad.transpose(1, 2) for grad in grads)
        grad_turn = None
        if ctx.learned:
            there = [group.transpose(1, 2) for group in turned]
            grad_turn = _turn_gradient(there, grads[:turning], turn, stride, prefix)
        back = turn * turn.new_tensor([1.0, -1.0])
        if torch.is_grad_enabled():  # somebody will differentiate again
            found = torch.stack([*(formula(g, back, stride, prefix) for g in grads[:turning]), *grads[turning:]], dim=2)
            return found, grad_turn, None, None, None, None
        batch, tokens, heads, width = grads[0].shape
        found = grads[0].new_empty(batch, tokens, len(grads), heads, width)
        for i, grad in enumerate(grads):
            if i < turning:
                _turn(grad[:, :, None], back, stride, prefix, found[:, :, i : i + 1])
            else:
                found[:, :, i].copy_(grad)
        return found, grad_turn, None, None, None, None


def _rotated(x: Tensor, turn: Tensor, turning: int, stride: int, prefix: int, overwrite: bool) -> tuple[Tensor, ...]:
    part = x[:, :, :turning]
    out = part if overwrite else torch.empty_like(part, memory_format=torch.contiguous_format)
    _turn(part, turn, stride, prefix, out)
    return tuple(group.transpose(1, 2) for group in (*out.unbind(2), *x[:, :, turning:].unbind(2)))


def _turn(x: Tensor, turn: Tensor, stride: int, prefix: int, out: Tensor) -> None:
    """Write x (B, N, G, H, D) turned into `out`, which may be x itself."""
    width, low = 2 * turn.shape[-2], x.dtype in (torch.float16, torch.bfloat16)
    if out is not x:
        out[:, :prefix].copy_(x[:, :prefix])
        out[:, prefix:, ..., width:].copy_(x[:, prefix:, ..., width:])
    x, out = x[:, prefix:, ..., :width], out[:, prefix:, ..., :width]
    if x.is_cuda and (kernel := _kernel()) is not None and kernel.usable(x):
        kernel.turn_pairs(x, turn, stride, out)
        return
    turn = turn[:, :, None]
    if (low or width < 64) and len(x) > 2 and 4 * x[0].numel() < SCRATCH:
        turn = turn.expand(-1, -1, *x.shape[2:4], -1, -1).contiguous()  # one long loop where there were many short ones
    (_through_float32 if low else _product)(x, turn, stride, out)


def _through_float32(x: Tensor, turn: Tensor, stride: int, out: Tensor) -> None:
    samples = len(x) if x.is_cuda else max(1, SCRATCH // max(1, 4 * x[0].numel()))
    scratch = torch.empty(min(samples, len(x)), *x.shape[1:], dtype=torch.float32, device=x.device)
    pairs = as_complex(scratch)  # once: for every piece, the views would take a tenth of its time
    turn = torch.view_as_complex(turn) if stride == 1 else turn
    angles = turn.split(samples) if len(turn) > 1 else [turn] * len(x)
    for part, angle, place in zip(x.split(samples), angles, out.split(samples), strict=False):
        if len(part) < len(scratch):  # the last piece
            scratch, pairs = scratch[: len(part)], pairs[: len(part)]
        scratch.copy_(part)
        if stride == 1:
            pairs.mul_(angle)
        else:
            _product(scratch, angle, stride, scratch)
        place.copy_(scratch)


@functools.cache
def _kernel() -> Any:
    """The Triton kernel's module, or None where Triton is not installed; imported when a GPU first needs it."""
    return importlib.import_module(".kernel", __package__) if importlib.util.find_spec("triton") else None


def _product(x: Tensor, turn: Tensor, stride: int, out: Tensor) -> None:
    if stride == 1:
        target = as_complex(out)
        torch.mul(as_complex(x), torch.view_as_complex(turn.to(x.dtype)), out=target)
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
    pairs = x.unflatten(-1, (-1, 2))
    *outer, last = pairs.stride()
    if last != 1 or pairs.storage_offset() % 2 or any(stride % 2 for stride in outer):
        pairs = pairs.clone(memory_format=torch.contiguous_format)  # contiguous() leaves one token as is
    return torch.view_as_complex(pairs)


def _turn_gradient(turned: Any, grads: Any, turn: Tensor, stride: int, prefix: int) -> Tensor:
    """The gradient of the turn (B or 1, N, H or 1, R, 2) along its circle, from what was turned and its gradient.

    Of y = x t it is i t Im(conj(y) g) / |t|^2, summed over all that t turns; |t| is 1 but for a constant decay in it.
    """
    angle: Any = 0
    for y, grad in zip(turned, grads, strict=True):  # (B, N, H, D)
        samples = len(y) if y.is_cuda else max(1, 4 * SCRATCH // max(1, 4 * y[0].numel()))  # sums want longer pieces
        shared = len(turn) == 1
        found = []
        for part, back in zip(y.split(samples), grad.split(samples), strict=True):
            pairs, back = (_pairs(t[:, prefix:, :, : 2 * turn.shape[-2]], stride) for t in (part, back))
            some = torch.linalg.vecdot(pairs, back, dim=0).imag[None] if shared else (pairs.conj() * back).imag
            found.append(some if turn.shape[2] > 1 else some.sum(dim=2, keepdim=True))
        angle = angle + (sum(found) if shared else torch.cat(found))
    across = torch.stack((-turn[..., 1], turn[..., 0]), dim=-1) / turn.square().sum(dim=-1, keepdim=True)  # i t / |t|^2
    return across * angle[..., None].to(turn.dtype)


def _pairs(x: Tensor, stride: int) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    return as_complex(x) if stride == 1 else torch.complex(*x.unflatten(-1, (-1, 2, stride)).unbind(-2)).flatten(-2)
