"""What the tests of bias schemes share."""

import math

import torch

from tests import oracles
from vit_rope.positions import Layout, build

SHAPES = [(5,), (3, 4), (2, 3, 2)]


def layout_of(shape, heads=3, depth=2, **options):
    return Layout(width=8 * heads, heads=heads, grid=shape, depth=depth, **options)


def scheme(spec, layout, seed=0):
    """A scheme with random parameters."""
    position = build(spec, layout)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in position.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return position


def logits(position, coords, layer=0, **options):
    """The total (H, N, M) that a scheme adds to the logits, by a bias or by extra channels."""
    encoding = position(coords, **options)
    bias = encoding.bias(layer)
    total = 0 if bias is None else bias[0]
    if encoding.q.extra:
        q, k = (part.extra[layer % len(part.extra)][0] for part in (encoding.q, encoding.k))
        total = total + q @ k.transpose(-2, -1)
    return total.detach()


def loop(function, shape, heads=3):
    """function(h, Δ) for all pairs of a grid (H, N, N), in float64."""
    points = oracles.grid(shape)
    rows = [
        [[function(h, [b - a for a, b in zip(p, q, strict=True)]) for q in points] for p in points]
        for h in range(heads)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def same(got, want, atol=1e-9):
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=atol)


NORMS = {
    "euclidean": lambda delta: math.sqrt(sum(d * d for d in delta)),
    "manhattan": lambda delta: sum(abs(d) for d in delta),
    "quadratic": lambda delta: sum(d * d for d in delta),
}
