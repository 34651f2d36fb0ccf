"""What the tests of relative schemes share."""

import math

import torch

from tests import oracles
from vit_rope.attention import attend
from vit_rope.positions import Layout, build
from vit_rope.positions.coords import grid

SHAPES = [(5,), (3, 4), (2, 3, 2)]


HEADS, CHANNELS = 3, 8


def layout_of(shape, depth=2):
    return Layout(width=HEADS * CHANNELS, heads=HEADS, grid=shape, depth=depth)


def scheme(spec, layout):
    """A scheme with random parameters."""
    position = build(spec, layout)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in position.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return position


def qkv(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 1, HEADS, count, CHANNELS, generator=generator, dtype=torch.float64).unbind(0)


def loop(q, k, v, shape, logit, value=None):
    """Attention (H, N, D) with logits logit(h, q_i, k_j, Δ) and values v_j + value(Δ)."""
    points = oracles.grid(shape)
    out = torch.zeros_like(q[0])
    for h in range(HEADS):
        for i, query in enumerate(points):
            deltas = [[b - a for a, b in zip(query, key, strict=True)] for key in points]
            weights = torch.stack([logit(h, q[0, h, i], k[0, h, j], d) for j, d in enumerate(deltas)]).softmax(0)
            for j, delta in enumerate(deltas):
                out[h, i] += weights[j] * (v[0, h, j] + (0 if value is None else value(delta)))
    return out


def assert_equals_loop(position, shape, logit, value=None, layer=1):
    """Coordinates without a grid, with their grid, and shifted: all equal the loop."""
    q, k, v = qkv(math.prod(shape))
    want, coords = loop(q, k, v, shape, logit, value), grid(shape).double()
    for points, options in ((coords, {}), (coords, {"grid": list(shape)}), (coords + 7.3, {})):
        got = attend(q, k, v, position(points, **options), layer)[0].detach()
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def split(table, sizes):
    """Split a table into one for each axis, in float64."""
    return [part.double() for part in table.detach().split(sizes)]
