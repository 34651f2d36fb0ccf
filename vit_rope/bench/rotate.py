"""The rotation of queries and keys alone, against copying them, beside the libraries that are installed.

Everybody starts at a projection (B, N, 3·H·D) with class or register tokens in front and ends with queries, keys and
values (B, H, N, D), rotated by a table that is at hand.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ops.rotate import rotate_groups
from ..positions import Layout, build
from .measure import Ratio, ratios
from .peers import HEAD, Turn, installed, peers

SHAPES = [  # batch, heads, cells along a side, tokens in front; heads of 64 channels
    (8, 6, 14, 1),
    (32, 6, 14, 1),
    (8, 12, 14, 1),
    (32, 12, 14, 5),
    (8, 6, 24, 1),
    (8, 12, 24, 5),
    (8, 12, 32, 5),
]
Rotate = Callable[[Tensor], Sequence[Tensor]]


def bench(
    specs: Sequence[str] = ("axial", "mixed"), rounds: int = 9, against: Sequence[str] | None = None
) -> list[Ratio]:
    """Forward against `clone` of queries and keys; forward and backward against the same with autograd."""
    libraries = installed() if against is None else against
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch, heads, side, prefix in SHAPES:
            name = f"B{batch} H{heads} N{side * side}+{prefix} {str(dtype).removeprefix('torch.')}"
            torch.manual_seed(0)
            qkv = torch.randn(batch, side * side + prefix, 3 * heads * HEAD).to(dtype)
            candidates = {"copy": copied} | ours(specs, heads, side, prefix)
            candidates |= {key: _theirs(turn, prefix) for key, turn in peers(libraries, heads, side, dtype).items()}
            runs = {key: _forward(rotate, _split(qkv, heads)) for key, rotate in candidates.items()}
            found += ratios(f"forward, {name}", runs, rounds, at_least=0.01)
            runs = {key: _both(rotate, qkv, heads) for key, rotate in candidates.items()}
            for spec in specs:
                table, stride = _table(spec, heads, side)
                if table.requires_grad:
                    table = table.detach().requires_grad_()
                    runs[f"vit_rope {spec}, learned"] = _both(_ours(table, stride, prefix), qkv, heads, [table])
            found += ratios(f"forward and backward, {name}", runs, rounds, at_least=0.01)
    return found


def copied(groups: Tensor) -> Sequence[Tensor]:
    """What nobody can beat by much: queries and keys read once and written once."""
    if not groups.requires_grad:
        return (groups[:, :, :2].clone(),)
    q, k, v = groups.permute(2, 0, 3, 1, 4).unbind(0)
    return q.clone(), k.clone(), v


def ours(specs: Sequence[str], heads: int, side: int, prefix: int) -> dict[str, Rotate]:
    """The library's rotations, in place, by tables made once."""
    tables = {spec: _table(spec, heads, side) for spec in specs}
    return {f"vit_rope {spec}": _ours(table.detach(), stride, prefix) for spec, (table, stride) in tables.items()}


def _table(spec: str, heads: int, side: int) -> tuple[Tensor, int]:
    layout = Layout(heads * HEAD, heads, (side, side), 1)
    encoding = build(spec, layout)(layout.coords(), grid=[side, side])
    if not encoding.q.rotation:
        raise ValueError(f"{spec} turns no queries, so it has no rotation to measure; --specs takes rotary schemes")
    return encoding.q.rotation[0], encoding.stride


def _ours(table: Tensor, stride: int, prefix: int) -> Rotate:
    return lambda groups: rotate_groups(groups, table, 2, stride, prefix, overwrite=True)


def _theirs(turn: Turn, prefix: int) -> Rotate:
    """Another library's rotation of all but the tokens in front, as its models do it."""

    def run(groups: Tensor) -> Sequence[Tensor]:
        q, k, v = groups.permute(2, 0, 3, 1, 4).unbind(0)
        turned = turn(q[:, :, prefix:], k[:, :, prefix:])
        q, k = (torch.cat((x[:, :, :prefix], y), dim=2).type_as(v) for x, y in zip((q, k), turned, strict=True))
        return q, k, v

    return run


def _split(qkv: Tensor, heads: int) -> Tensor:
    return qkv.unflatten(-1, (3, heads, HEAD))


def _forward(rotate: Rotate, groups: Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            rotate(groups)

    return run


def _both(rotate: Rotate, qkv: Tensor, heads: int, learned: Sequence[Tensor] = ()) -> Callable[[], object]:
    leaf = qkv.clone().requires_grad_()
    batch, tokens, _ = qkv.shape
    grads = [torch.randn(batch, tokens, heads, HEAD).to(qkv.dtype).transpose(1, 2) for _ in range(3)]

    def run() -> None:
        torch.autograd.grad(rotate(_split(leaf, heads)), [leaf, *learned], grads)

    return run
