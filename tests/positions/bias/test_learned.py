"""T5, Swin and Kerple against loops and published implementations."""

import math

import pytest
import torch
from timm.layers.pos_embed_rel import RelPosBias, RelPosBiasTf
from torch.nn import functional as F

from tests.positions.bias.helpers import NORMS, SHAPES, layout_of, logits, loop, same, scheme
from vit_rope.positions import build
from vit_rope.positions.coords import grid


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 14), (32, 9), (16, 20), (8, 64), (4, 50)])
def test_t5_buckets_match_t5(buckets, max_distance):
    published = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention._relative_position_bucket
    position = build(f"t5(buckets={buckets}, max_distance={max_distance})", layout_of((14,)))
    delta = torch.arange(-300, 301)
    want = published(delta, True, buckets, max_distance)
    assert torch.equal(position.bucket(delta[:, None].double())[:, 0], want)
    assert torch.equal(position.bucket(delta[:, None] + 0.3)[:, 0], want)  # rounded


def test_t5_matches_udop_on_images():
    udop = pytest.importorskip("transformers.models.udop.modeling_udop")
    both = [udop.RelativePositionBiasVertical, udop.RelativePositionBiasHorizontal]
    both = [kind(num_heads=3, scaling_factor=100, max_distance=100) for kind in both]
    position = scheme("t5(max_distance=100)", layout_of((3, 5)))
    with torch.no_grad():
        for axis, published in enumerate(both):
            published.relative_attention_bias.weight.copy_(position.table[axis])
    points = (grid((3, 5)).flip(-1) + 0.01) / 100  # UDOP truncates to cells
    box = torch.cat((points, points), dim=-1)[None]
    want = udop.RelativePositionBiasAggregated(both)(torch.ones(1, 15), box)[0]
    same(logits(position, grid((3, 5))), want.detach(), atol=1e-6)


@pytest.mark.parametrize(("spec", "rows"), [("t5", 729), ("t5(max_distance=128)", 361), ("swin", 729), ("alibi", 94)])
def test_number_of_displacements_that_a_scheme_distinguishes(spec, rows):
    layout = layout_of((14, 14))
    position = scheme(spec, layout)
    values = logits(position, torch.tensor([[13.0, 13.0]]), key_coords=grid((27, 27)))[:, 0]
    assert len(values.round(decimals=4).unique(dim=1).T) == rows


def test_swin_matches_timm_with_reversed_displacements():
    layout = layout_of((3, 5), depth=3)
    position = scheme("swin", layout)
    for kind, flipped in ((RelPosBias, True), (RelPosBiasTf, False)):
        for layer in range(3):
            theirs = kind((3, 5), num_heads=3)
            table = position.table.detach()[layer]
            with torch.no_grad():
                if flipped:
                    theirs.relative_position_bias_table.copy_(table.flip(0, 1).flatten(0, 1))
                else:
                    theirs.relative_position_bias_table.copy_(table.movedim(-1, 0))
            want = theirs.get_bias().detach().reshape(3, 15, 15)
            same(logits(position, grid((3, 5)), layer), want, atol=1e-6)


def test_swin_is_linear_between_cells_and_constant_beyond_the_border():
    position = scheme("swin", layout_of((3, 4)))
    origin = torch.zeros(1, 2, dtype=torch.float64)
    table = position.table.detach()[1].double()  # (5, 7, H), Δ = 0 at (2, 3)
    keys = torch.tensor([[0.25, -1.5], [9.0, -9.0]], dtype=torch.float64)
    near, far = logits(position, origin, 1, key_coords=keys)[:, 0].unbind(-1)
    same(near, 0.75 * (table[2, 1] + table[2, 2]) / 2 + 0.25 * (table[3, 1] + table[3, 2]) / 2)
    same(far, table[4, 0])


def test_a_centered_unit_resamples_the_table_of_swin():
    layout = layout_of((4,), heads=1, unit="centered")
    position = scheme("swin", layout)
    finer = logits(position, layout.coords((8,)), grid=[8])[0]
    table = position.table.detach()[0, :, 0]
    same(finer[2, 6], table[3 + 2], atol=1e-5)  # four fine cells are two coarse ones
    same(finer[2, 5], (table[3 + 1] + table[3 + 2]) / 2, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["log", "power"])
@pytest.mark.parametrize("distance", ["euclidean", "manhattan"])
def test_kerple(shape, kind, distance):
    position = scheme(f'kerple(kind="{kind}", distance="{distance}")', layout_of(shape))
    for layer in range(2):
        first, second = position.rates.detach().double()[:, layer].tolist()

        def kernel(h, delta, first=first, second=second):
            length, r1 = NORMS[distance](delta), math.log1p(math.exp(first[h]))
            if kind == "log":
                return -r1 * math.log(1 + math.log1p(math.exp(second[h])) * length)
            return -r1 * length ** ({"euclidean": 2, "manhattan": 1}[distance] / (1 + math.exp(-second[h])))

        bias = logits(position, grid(shape).double(), layer)
        same(bias, loop(kernel, shape), atol=1e-6)
        middle = torch.eye(bias.shape[-1]).double() - 1 / bias.shape[-1]
        assert torch.linalg.eigvalsh(middle @ bias.double() @ middle).min() > -1e-9  # conditionally positive definite


@pytest.mark.parametrize("distance", ["euclidean", "manhattan"])
def test_kerple_limits_exponents_to_those_of_kernels(distance):
    limit = build(f'kerple(kind="power", distance="{distance}")', layout_of((6, 6))).max_exponent
    middle = torch.eye(36).double() - 1 / 36
    for factor, definite in ((0.99, True), (1.0, True), (1.1, False)):
        bias = loop(lambda h, delta, power=factor * limit: -(NORMS[distance](delta) ** power), (6, 6), 1)[0]
        assert (torch.linalg.eigvalsh(middle @ bias @ middle).min() > -1e-9) == definite


@pytest.mark.parametrize("kind", ["log", "power"])
def test_kerple_is_initialized_as_published(kind):
    position = build(f'kerple(kind="{kind}")', layout_of((4, 4), heads=16, depth=64))
    first = F.softplus(position.rates[0])
    second = F.softplus(position.rates[1]) if kind == "log" else 2 * position.rates[1].sigmoid()
    for rate, high in zip((first, second), (2, 1) if kind == "log" else (1, 2), strict=True):
        assert 0 < rate.min() < 0.05 * high
        assert 0.95 * high < rate.max() < high
