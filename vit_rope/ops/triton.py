"""The rotation as one Triton kernel for CUDA: it reads and writes each channel once, in its dtype.

It replaces the complex products of `eager` where Triton runs. Queries and keys are rotated in one
launch, with any strides, in place or not. The backward pass uses it with the inverse table.
Compiled graphs do not use it.

Shapes   B samples, N tokens, G groups (queries, keys), H heads (1 if shared), R pairs of channels;
         x (B, N, G, H, 2R); cos_sin (B or 1, N, H or 1, R, 2) in float32
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = 16  # rotated by one program, for one sample and head


@triton.jit
def rotate_kernel(
    x,
    cos_sin,
    out,
    tokens,
    blocks,
    heads,
    x_batch,
    x_token,
    x_group,
    x_head,
    out_batch,
    out_token,
    out_group,
    out_head,
    table_batch,
    table_token,
    table_head,
    pairs: tl.constexpr,
    lanes: tl.constexpr,
    stride: tl.constexpr,
    rows: tl.constexpr,
):
    """Rotate pairs of x into out. Programs run over samples times blocks of tokens, and over groups
    times heads. Offsets have 64 bits, because tensors may have more than 2^31 entries.
    """
    batch, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    group, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    token = (block * rows + tl.arange(0, rows)[:, None]).to(tl.int64)
    pair = tl.arange(0, lanes)[None, :]
    inside = (token < tokens) & (pair < pairs)
    first = pair // stride * 2 * stride + pair % stride
    entry = cos_sin + batch * table_batch + token * table_token + head * table_head + 2 * pair
    cos = tl.load(entry, mask=inside, other=1.0)
    sin = tl.load(entry + 1, mask=inside, other=0.0)
    pointer = x + batch * x_batch + token * x_token + group * x_group + head * x_head + first
    a = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(pointer + stride, mask=inside, other=0.0).to(tl.float32)
    pointer = out + batch * out_batch + token * out_token + group * out_group + head * out_head + first
    tl.store(pointer, (a * cos - b * sin).to(out.dtype.element_ty), mask=inside)
    tl.store(pointer + stride, (b * cos + a * sin).to(out.dtype.element_ty), mask=inside)


def usable(x: Tensor) -> bool:
    """Return whether x is on a CUDA device of capability 8.0 or higher, in a dtype of `TYPES`."""
    return x.is_cuda and x.dtype in TYPES and torch.cuda.get_device_capability(x.device) >= (8, 0)


def rotate_pairs(x: Tensor, cos_sin: Tensor, stride: int, out: Tensor) -> None:
    """Rotate x (B, N, H, 2R) or (B, N, G, H, 2R) into `out`, which may be x itself."""
    if x.stride(-1) != 1 or out.stride(-1) != 1:  # the kernel needs adjacent channels
        adjacent = x.clone(memory_format=torch.contiguous_format)
        rotate_pairs(adjacent, cos_sin, stride, adjacent)
        out.copy_(adjacent)
        return
    x, out = (t[:, :, None] if t.ndim == 4 else t for t in (x, out))
    cos_sin = cos_sin.contiguous()
    batch, tokens, groups, heads, width = x.shape
    steps: list[Any] = [*x.stride()[:4], *out.stride()[:4]]
    steps += [cos_sin.stride(i) if cos_sin.shape[i] > 1 else 0 for i in (0, 1, 2)]
    pairs, blocks = width // 2, triton.cdiv(tokens, TOKENS)
    launch: Any = rotate_kernel[(batch * blocks, groups * heads)]  # only the first size may exceed 65,535
    launch(
        x,
        cos_sin,
        out,
        tokens,
        blocks,
        heads,
        *steps,
        pairs=pairs,
        lanes=triton.next_power_of_2(pairs),
        stride=stride,
        rows=TOKENS,
    )
