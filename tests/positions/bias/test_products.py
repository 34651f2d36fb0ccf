"""Sandwich, TUPE and position-only attention against loops."""

import math

import pytest
import torch

from tests.positions.bias.helpers import SHAPES, layout_of, logits, loop, same, scheme
from vit_rope.attention import attend
from vit_rope.positions import build
from vit_rope.positions.coords import grid


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("flash", [True, False])
def test_sandwich_is_the_inner_product_of_sinusoids(shape, flash):
    position = build(f"sandwich(channels=24, base=50, flash={flash})", layout_of(shape))
    pairs = 12 // len(shape)
    speeds = [50 ** (-j / pairs) for j in range(pairs)]

    def product(h, delta):
        return (sum(math.cos(t * d) for t in speeds for d in delta) - 12) * 3 / (8 * (h + 1))

    same(logits(position, grid(shape).double() + 40.25), loop(product, shape))
    encoding = position(grid(shape))
    assert (encoding.biases is None, encoding.q.extra is None) == (flash, not flash)


def test_sandwich_on_one_axis_matches_the_paper():
    position = build("sandwich", layout_of((6,)))  # 128 channels, θ_j = 10000^(-2j / 128)
    want = loop(
        lambda h, d: (sum(math.cos(1e4 ** (-2 * j / 128) * d[0]) for j in range(64)) - 64) / (8 * (h + 1) / 3), (6,)
    )
    same(logits(position, grid((6,)).double()), want)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["tupe", "positiononly"])
def test_content_and_position_are_untied(shape, name):
    layout = layout_of(shape)
    position, count = scheme(name, layout), math.prod(shape)
    q, k = torch.randn(2, 1, 3, count, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = torch.eye(count).double().expand(1, 3, -1, -1)
    vectors = position.table.detach().double().flatten(0, -2)
    vectors = (vectors - vectors.mean(1, keepdim=True)) / (vectors.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    for layer in range(2):
        ours = position.projections.detach().double()[:, layer % position.projections.shape[1]]
        projected = [(vectors @ weight).view(count, 3, 8) for weight in ours]
        got = attend(q, k, values, position(grid(shape).double(), grid=list(shape)), layer)[0]
        for h in range(3):
            want = torch.zeros(count, count, dtype=torch.float64)
            for i in range(count):
                for j in range(count):
                    content, position_term = (
                        float(q[0, h, i] @ k[0, h, j]),
                        float(projected[0][i, h] @ projected[1][j, h]),
                    )
                    want[i, j] = (content + position_term) / 4 if name == "tupe" else position_term / math.sqrt(8)
            same(got[h], want.softmax(-1), atol=1e-4)


def test_tupe_r_is_a_sum():
    layout = layout_of((3, 4))
    both = scheme("tupe + t5", layout)
    encoding = both(grid((3, 4)))
    assert encoding.scale == 2**-0.5
    assert encoding.biases is not None
    assert encoding.q.extra is not None
