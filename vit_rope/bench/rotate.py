"""Rotating queries and keys, against copying them, next to the installed libraries.

Every candidate starts from a projection (B, P + N, 3·H·D) and ends with queries, keys and values
(B, H, P + N, D). The cos-sin tables exist already. Class and register tokens are not rotated.

Shapes   B samples, P class and register tokens, N patch tokens, H heads, D = HEAD_DIM channels of a
         head; groups (B, P + N, 3, H, D): queries, keys and values of a projection
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ops.rotate import rotate_groups
from ..positions import Layout, build
from .measure import Ratio, ratios
from .peers import HEAD_DIM, RotateQueriesKeys, installed, peers

SHAPES = [  # batch, heads, cells along a side, class and register tokens; heads of 64 channels
    (8, 6, 14, 1),
    (32, 6, 14, 1),
    (8, 12, 14, 1),
    (32, 12, 14, 5),
    (8, 6, 24, 1),
    (8, 12, 24, 5),
    (8, 12, 32, 5),
]
RotateGroups = Callable[[Tensor], Sequence[Tensor]]


def bench(
    specs: Sequence[str] = ("axial", "mixed"), rounds: int = 9, against: Sequence[str] | None = None
) -> list[Ratio]:
    """Forward, and forward and backward, against a copy of queries and keys."""
    libraries = installed() if against is None else against
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch, heads, side, prefix in SHAPES:
            name = f"B{batch} H{heads} N{side * side}+{prefix} {str(dtype).removeprefix('torch.')}"
            torch.manual_seed(0)
            qkv = torch.randn(batch, side * side + prefix, 3 * heads * HEAD_DIM).to(dtype)
            candidates = {"copy": copy_groups} | own_rotations(specs, heads, side, prefix)
            candidates |= {
                key: _library_rotation(rotate, prefix) for key, rotate in peers(libraries, heads, side, dtype).items()
            }
            runs = {key: _forward(rotate, _split(qkv, heads)) for key, rotate in candidates.items()}
            results += ratios(f"forward, {name}", runs, rounds, at_least=0.01)
            runs = {key: _forward_backward(rotate, qkv, heads) for key, rotate in candidates.items()}
            for spec in specs:
                table, stride = _rotation_table(spec, heads, side)
                if table.requires_grad:
                    table = table.detach().requires_grad_()
                    runs[f"vit_rope {spec}, learned"] = _forward_backward(
                        _own_rotation(table, stride, prefix), qkv, heads, [table]
                    )
            results += ratios(f"forward and backward, {name}", runs, rounds, at_least=0.01)
    return results


def copy_groups(groups: Tensor) -> Sequence[Tensor]:
    """The lower bound: queries and keys are read once and written once."""
    if not groups.requires_grad:
        return (groups[:, :, :2].clone(),)
    q, k, v = groups.permute(2, 0, 3, 1, 4).unbind(0)
    return q.clone(), k.clone(), v


def own_rotations(specs: Sequence[str], heads: int, side: int, prefix: int) -> dict[str, RotateGroups]:
    """The rotations of this library, in place, with tables that exist already."""
    tables = {spec: _rotation_table(spec, heads, side) for spec in specs}
    return {
        f"vit_rope {spec}": _own_rotation(table.detach(), stride, prefix) for spec, (table, stride) in tables.items()
    }


def _rotation_table(spec: str, heads: int, side: int) -> tuple[Tensor, int]:
    """The table (1, N, H or 1, D / 2, 2) of a rotary scheme and the stride of its pairs."""
    layout = Layout(heads * HEAD_DIM, heads, (side, side), 1)
    encoding = build(spec, layout)(layout.coords(), grid=[side, side])
    table = encoding.rotation()
    if table is None:
        raise ValueError(f"{spec} rotates no queries, so there is no rotation to measure; --specs takes rotary schemes")
    return table, encoding.stride


def _own_rotation(table: Tensor, stride: int, prefix: int) -> RotateGroups:
    return lambda groups: rotate_groups(groups, table, 2, stride, prefix, overwrite=True)


def _library_rotation(rotate: RotateQueriesKeys, prefix: int) -> RotateGroups:
    """Another library's rotation of all but the first `prefix` tokens, as its models apply it."""

    def run(groups: Tensor) -> Sequence[Tensor]:
        q, k, v = groups.permute(2, 0, 3, 1, 4).unbind(0)
        rotated = rotate(q[:, :, prefix:], k[:, :, prefix:])
        q, k = (torch.cat((x[:, :, :prefix], y), dim=2).type_as(v) for x, y in zip((q, k), rotated, strict=True))
        return q, k, v

    return run


def _split(qkv: Tensor, heads: int) -> Tensor:
    return qkv.unflatten(-1, (3, heads, HEAD_DIM))


def _forward(rotate: RotateGroups, groups: Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            rotate(groups)

    return run


def _forward_backward(
    rotate: RotateGroups, qkv: Tensor, heads: int, learned: Sequence[Tensor] = ()
) -> Callable[[], object]:
    leaf = qkv.clone().requires_grad_()
    batch, tokens, _ = qkv.shape
    grads = [torch.randn(batch, tokens, heads, HEAD_DIM).to(qkv.dtype).transpose(1, 2) for _ in range(3)]

    def run() -> None:
        torch.autograd.grad(rotate(_split(leaf, heads)), [leaf, *learned], grads)

    return run
