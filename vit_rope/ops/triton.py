"""The rotation as one Triton kernel for CUDA: each channel read once and written once, in any of the types.

It replaces `rotation`'s eager products where Triton runs, forwards and, with the turns turned back, backwards: queries
and keys in one launch, strided as they lie, in place or not. Compiled graphs do without it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = 16  # that one program turns, for one sample and head


@triton.jit
def rotate_kernel(
    x,
    turn,
    out,
    tokens,
    heads,
    x_batch,
    x_token,
    x_group,
    x_head,
    out_batch,
    out_token,
    out_group,
    out_head,
    turn_batch,
    turn_token,
    turn_head,
    pairs: tl.constexpr,
    lanes: tl.constexpr,
    stride: tl.constexpr,
    rows: tl.constexpr,
):
    """Write pairs of x, turned, into out: programs over tokens, samples, and groups times heads."""
    batch = tl.program_id(1).to(tl.int64)
    group, head = tl.program_id(2) // heads, tl.program_id(2) % heads
    token = tl.program_id(0) * rows + tl.arange(0, rows)[:, None]
    pair = tl.arange(0, lanes)[None, :]
    inside = (token < tokens) & (pair < pairs)
    first = pair // stride * 2 * stride + pair % stride
    angle = turn + batch * turn_batch + token * turn_token + head * turn_head + 2 * pair
    cos = tl.load(angle, mask=inside, other=1.0)
    sin = tl.load(angle + 1, mask=inside, other=0.0)
    place = x + batch * x_batch + token * x_token + group * x_group + head * x_head + first
    a = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(place + stride, mask=inside, other=0.0).to(tl.float32)
    place = out + batch * out_batch + token * out_token + group * out_group + head * out_head + first
    tl.store(place, (a * cos - b * sin).to(out.dtype.element_ty), mask=inside)
    tl.store(place + stride, (b * cos + a * sin).to(out.dtype.element_ty), mask=inside)


def usable(x: Tensor) -> bool:
    """Whether the kernel can turn x: on a CUDA device of capability 8 or more, and of a type that it knows."""
    return x.is_cuda and x.dtype in TYPES and torch.cuda.get_device_capability(x.device) >= (8, 0)


def rotate_pairs(x: Tensor, turn: Tensor, stride: int, out: Tensor) -> None:
    """Write x (B, N, H, 2R) or (B, N, G, H, 2R), turned by turn (B or 1, N, H or 1, R, 2), into `out`: x, maybe."""
    x, out = (t[:, :, None] if t.ndim == 4 else t for t in (x, out))
    x, turn = x if x.stride(-1) == 1 else x.contiguous(), turn.contiguous()
    batch, tokens, groups, heads, width = x.shape
    steps: list[Any] = [*x.stride()[:4], *out.stride()[:4]]
    steps += [turn.stride(i) if turn.shape[i] > 1 else 0 for i in (0, 1, 2)]
    pairs = width // 2
    launch: Any = rotate_kernel[(triton.cdiv(tokens, TOKENS), batch, groups * heads)]
    launch(
        x,
        turn,
        out,
        tokens,
        heads,
        *steps,
        pairs=pairs,
        lanes=triton.next_power_of_2(pairs),
        stride=stride,
        rows=TOKENS,
    )
