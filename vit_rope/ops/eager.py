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

SCRATCH = 3 * 2**20  # bytes of float32 at a time on a CPU: more would leave its caches, and less takes more calls


def is_eager(*tensors: Tensor) -> bool:
    """Whether complex numbers, in functions with a gradient of their own, will do."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if any(t.device.type not in ("cpu", "cuda") for t in tensors):
        return False
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


def needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def rotate_into(x: Tensor, turn: Tensor, stride: int, prefix: int, out: Tensor) -> None:
    """Write x (B, N, H, D) or (B, N, G, H, D), turned, into `out`, which may be x itself."""
    x, out = rotated_part(x, turn, prefix, out)
    if x.is_cuda and (kernel := triton_kernel()) is not None and kernel.usable(x):
        kernel.rotate_pairs(x, turn, stride, out)
    elif is_half(x):
        _through_float32(x, turn, stride, out)
    else:
        multiply_pairs(x, expand_to_heads(turn, x), stride, out)


def rotated_part(x: Tensor, turn: Tensor, prefix: int, out: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens and channels of x and of out that turn; the others are copied. Where out is x, it stays so."""
    width = 2 * turn.shape[-2]
    if out is x:
        out = x = rotated_slice(x, width, prefix)
        return x, out
    if prefix:
        out[:, :prefix].copy_(x[:, :prefix])
    if width < x.shape[-1]:
        out[..., width:].copy_(x[..., width:])
    return rotated_slice(x, width, prefix), rotated_slice(out, width, prefix)


def rotated_slice(x: Tensor, width: int, prefix: int) -> Tensor:
    x = x[:, prefix:] if prefix else x
    return x[..., :width] if width < x.shape[-1] else x


def expand_to_heads(turn: Tensor, x: Tensor) -> Tensor:
    """The turn, broadcastable to x; of the size of a sample where one long loop then replaces many short ones."""
    if x.ndim == 5:
        turn = turn[:, :, None]
    if (is_half(x) or x.shape[-1] < 64) and len(x) > 2 and bytes_per_sample(x) < SCRATCH:
        turn = turn.expand(-1, -1, *x.shape[2:-1], -1, -1).contiguous()
    return turn


def _through_float32(x: Tensor, turn: Tensor, stride: int, out: Tensor) -> None:
    """Group by group and piece by piece, in room that is taken once, for memory at hand is faster than new."""
    groups, outs = ((t.unbind(2) if t.ndim == 5 else (t,)) for t in (x, out))
    like, samples = groups[0], samples_per_piece(groups[0], SCRATCH)
    spread = stride == 1 and len(turn) == 1 and turn.shape[2] < like.shape[2]
    room = like.new_empty(samples + spread, *like.shape[1:-1], like.shape[-1] // 2, dtype=torch.complex64)
    if stride == 1:
        turn = torch.view_as_complex(turn)
    if spread:  # to all heads: one long loop where there were many short ones
        turn = room[samples:].copy_(turn)
    for x, out in zip(groups, outs, strict=True):
        pairs, scratch = room[:samples], room[:samples].view(torch.float32)
        parts, places, cos_sin = (pieces(t, samples, len(x)) for t in (x, out, turn))
        for part, place, angle in zip(parts, places, cos_sin, strict=False):
            if len(part) < samples:  # the last piece
                pairs, scratch = pairs[: len(part)], scratch[: len(part)]
            scratch.copy_(part)
            if stride == 1:
                pairs.mul_(angle)
            else:
                multiply_pairs(scratch, angle, stride, scratch)
            place.copy_(scratch)


def samples_per_piece(x: Tensor, room: int) -> int:
    """How many samples of x to take at a time, in pieces of one size, whose float32 numbers fit in so many bytes."""
    most = len(x) if x.is_cuda else max(1, room // max(1, bytes_per_sample(x)))
    return math.ceil(len(x) / math.ceil(len(x) / most)) if len(x) else 0


def pieces(x: Tensor, samples: int, batch: int) -> Sequence[Tensor]:
    """Pieces of so many samples, or x itself for each if all samples share it."""
    if len(x) < batch:
        return [x] * batch
    return x.split(samples) if samples < batch else (x,)


def bytes_per_sample(x: Tensor) -> int:
    """Of a sample, in float32."""
    return 4 * (x.numel() // max(1, len(x)))


def is_half(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


@functools.cache
def triton_kernel() -> Any:
    """The Triton kernel's module, or None where Triton is not installed; imported when a GPU first needs it."""
    return importlib.import_module(".triton", __package__) if importlib.util.find_spec("triton") else None


def multiply_pairs(x: Tensor, turn: Tensor, stride: int, out: Tensor) -> None:
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


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
