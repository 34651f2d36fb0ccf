"""Eager rotation: one complex product for each tensor, written in place if the caller allows it.

Interleaved channel pairs have the memory layout of complex numbers, and so does a table of cosines
and sines, so a rotation is one complex product. Inputs of 16 bits pass through float32 in pieces
that stay in the cache. On CUDA devices with Triton, the kernel in `triton` takes over.

Shapes   B samples, N tokens, H heads (1 if shared), R pairs of the D channels of a head;
         x (B, N, H, D) or (B, N, G, H, D): G groups (queries, keys, values);
         cos_sin (B or 1, N, H, R, 2) in float32
Stride   distance between the two channels of a pair: 1 interleaved, R half, R / A half within the
         block of each of A axes
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

# Bytes of float32 that a CPU processes at a time: more leave its caches, fewer need more calls.
SCRATCH = 3 * 2**20


def is_eager(*tensors: Tensor) -> bool:
    """Return whether complex numbers and custom autograd functions work for these tensors."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if any(t.device.type not in ("cpu", "cuda") for t in tensors):
        return False
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


def needs_grad(*tensors: Tensor) -> bool:
    """Return whether autograd records operations on any of the tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def rotate_into(x: Tensor, cos_sin: Tensor, stride: int, prefix: int, out: Tensor) -> None:
    """Rotate x (B, N, H, D) or (B, N, G, H, D) into `out`, which may be x itself."""
    x, out = rotated_part(x, cos_sin, prefix, out)
    if x.is_cuda and (kernel := triton_kernel()) is not None and kernel.usable(x):
        kernel.rotate_pairs(x, cos_sin, stride, out)
    elif is_half(x):
        _rotate_in_float32(x, cos_sin, stride, out)
    else:
        multiply_pairs(x, expand_to_heads(cos_sin, x), stride, out)


def rotated_part(x: Tensor, cos_sin: Tensor, prefix: int, out: Tensor) -> tuple[Tensor, Tensor]:
    """Return the parts of x and of `out` that a rotation changes, and copy the other parts.

    If `out` is x, both results are the same tensor.
    """
    width = 2 * cos_sin.shape[-2]
    if out is x:
        out = x = rotated_slice(x, width, prefix)
        return x, out
    if prefix:
        out[:, :prefix].copy_(x[:, :prefix])
    if width < x.shape[-1]:
        out[..., width:].copy_(x[..., width:])
    return rotated_slice(x, width, prefix), rotated_slice(out, width, prefix)


def rotated_slice(x: Tensor, width: int, prefix: int) -> Tensor:
    """Return x without its first `prefix` tokens, and only its first `width` channels."""
    x = x[:, prefix:] if prefix else x
    return x[..., :width] if width < x.shape[-1] else x


def expand_to_heads(cos_sin: Tensor, x: Tensor) -> Tensor:
    """Return the table in a shape that broadcasts to x.

    It is copied to the size of a sample if one long loop then replaces many short ones.
    """
    if x.ndim == 5:
        cos_sin = cos_sin[:, :, None]
    if (is_half(x) or x.shape[-1] < 64) and len(x) > 2 and bytes_per_sample(x) < SCRATCH:
        cos_sin = cos_sin.expand(-1, -1, *x.shape[2:-1], -1, -1).contiguous()
    return cos_sin


def _rotate_in_float32(x: Tensor, cos_sin: Tensor, stride: int, out: Tensor) -> None:
    """Rotate 16-bit tensors group by group and piece by piece, in a buffer that is allocated once.

    Reusing a buffer is faster than new memory for each piece, because it stays in the cache.
    """
    groups, outs = ((t.unbind(2) if t.ndim == 5 else (t,)) for t in (x, out))
    example, samples = groups[0], samples_per_piece(groups[0], SCRATCH)
    expand = stride == 1 and len(cos_sin) == 1 and cos_sin.shape[2] < example.shape[2]
    buffer = example.new_empty(samples + expand, *example.shape[1:-1], example.shape[-1] // 2, dtype=torch.complex64)
    if stride == 1:
        cos_sin = torch.view_as_complex(cos_sin)
    if expand:  # copy the table to all heads: one long loop instead of many short ones
        cos_sin = buffer[samples:].copy_(cos_sin)
    for x, out in zip(groups, outs, strict=True):
        pairs, scratch = buffer[:samples], buffer[:samples].view(torch.float32)
        x_pieces, out_pieces, tables = (pieces(t, samples, len(x)) for t in (x, out, cos_sin))
        for x_piece, out_piece, table in zip(x_pieces, out_pieces, tables, strict=False):
            if len(x_piece) < samples:  # the last piece
                pairs, scratch = pairs[: len(x_piece)], scratch[: len(x_piece)]
            scratch.copy_(x_piece)
            if stride == 1:
                pairs.mul_(table)
            else:
                multiply_pairs(scratch, table, stride, scratch)
            out_piece.copy_(scratch)


def samples_per_piece(x: Tensor, limit: int) -> int:
    """Return how many samples of x make a piece of at most `limit` bytes, in equal pieces."""
    most = len(x) if x.is_cuda else max(1, limit // max(1, bytes_per_sample(x)))
    return math.ceil(len(x) / math.ceil(len(x) / most)) if len(x) else 0


def pieces(x: Tensor, samples: int, batch: int) -> Sequence[Tensor]:
    """Split x into pieces of `samples` samples, or repeat x if all samples share it."""
    if len(x) < batch:
        return [x] * batch
    return x.split(samples) if samples < batch else (x,)


def bytes_per_sample(x: Tensor) -> int:
    """Return the size of one sample of x in float32, in bytes."""
    return 4 * (x.numel() // max(1, len(x)))


def is_half(x: Tensor) -> bool:
    """Return whether x is float16 or bfloat16."""
    return x.dtype in (torch.float16, torch.bfloat16)


@functools.cache
def triton_kernel() -> Any:
    """Import the module of the Triton kernel when a GPU first needs it; None without Triton."""
    return importlib.import_module(".triton", __package__) if importlib.util.find_spec("triton") else None


def multiply_pairs(x: Tensor, cos_sin: Tensor, stride: int, out: Tensor) -> None:
    """Multiply pairs of x by a table that broadcasts to it, in the dtype of x, into `out`."""
    if stride == 1:
        target = as_complex(out)
        torch.mul(target if out is x else as_complex(x), torch.view_as_complex(cos_sin.to(x.dtype)), out=target)
        if target.data_ptr() != out.data_ptr():
            out.copy_(torch.view_as_real(target).flatten(-2))
        return
    cos, sin = (t.unflatten(-1, (-1, stride)) for t in cos_sin.to(x.dtype).unbind(-1))
    x, out = (t.unflatten(-1, (-1, 2, stride)) for t in (x, out))
    rotated = x * cos[..., None, :]
    rotated[..., 0, :].addcmul_(x[..., 1, :], sin, value=-1)
    rotated[..., 1, :].addcmul_(x[..., 0, :], sin)
    out.copy_(rotated)


def as_complex(x: Tensor) -> Tensor:
    """View interleaved pairs x (…, 2R) as complex numbers (…, R), or copy if strides forbid it."""
    *outer, last = x.stride()
    if last != 1 or x.storage_offset() % 2 or any(stride % 2 for stride in outer):
        x = x.clone(memory_format=torch.contiguous_format)  # contiguous() would not copy a single token
    return x.view(x.dtype.to_complex())


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
