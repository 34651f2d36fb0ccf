"""Sinusoids, Fourier features and complex order against formulas, timm and MAE."""

import math

import pytest
import torch
from timm.layers.pos_embed_sincos import build_fourier_pos_embed, build_sincos2d_pos_embed

from tests import oracles
from tests.positions.absolute.helpers import made, vectors, vectors32
from vit_rope.positions import Layout, build
from vit_rope.positions.coords import grid


@pytest.mark.parametrize("spec", ["fourier", 'fourier(bands="learned")'])
def test_features_stretch_to_other_grids(spec):
    position, x = made(spec, (4, 5)), torch.zeros(1, 18, 24)
    cells = (grid((6, 3)) + 0.5) / torch.tensor([6, 3]) * torch.tensor([4, 5]) - 0.5
    full = position.embed(x, grid((6, 3)), [6, 3])
    torch.testing.assert_close(full, position.embed(x, cells), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("shape", "count"), [((8, 8), 3), ((5, 14), 4)])
def test_octaves_match_timm(shape, count):
    sin, cos = build_fourier_pos_embed(list(shape), num_bands=count, max_res=2**count, linear_bands=False)
    position = made(f"fourier(count={count})", shape)
    ends = torch.meshgrid(
        *(torch.linspace(-1, 1, n) for n in shape), indexing="ij"
    )  # timm has corner cells at -1 and 1
    cells = [(end + 1) * n / 2 - 0.5 for end, n in zip(ends, shape, strict=True)]
    waves = position.waves(torch.stack(cells, -1).flatten(0, 1), None)
    want = torch.cat((sin.flatten(-2), cos.flatten(-2)), dim=-1).flatten(0, 1)
    torch.testing.assert_close(waves, want, rtol=0, atol=1e-4)


def test_the_shortest_octave_has_a_period_of_two_cells():
    for cells, octaves in ((2, 1), (4, 2), (14, 4), (16, 4), (17, 5)):
        assert made("fourier", (cells,)).count == octaves


@pytest.mark.parametrize("unit", ["index", "centered"])
def test_learned_features_match_the_formula(unit):
    position = made('fourier(bands="learned", count=5, hidden=7)', (4, 6), unit=unit)
    freqs, inner, bias, outer = (
        p.detach().double() for p in (position.freqs, position.inner, position.inner_bias, position.outer)
    )
    got = vectors(position, position.layout.coords())
    for y in range(4):
        for x in range(6):
            point = torch.tensor([2 * (y + 0.5) / 4 - 1, 2 * (x + 0.5) / 6 - 1], dtype=torch.float64)
            theta = [sum(float(point[a] * freqs[a, f]) for a in range(2)) for f in range(5)]
            waves = [math.sin(t) for t in theta] + [math.cos(t) for t in theta]
            hidden = inner @ torch.tensor(waves, dtype=torch.float64) + bias
            hidden = torch.tensor([h * 0.5 * (1 + math.erf(h / math.sqrt(2))) for h in hidden.tolist()])
            torch.testing.assert_close(got[y * 6 + x], outer @ hidden.double(), rtol=0, atol=1e-5)


def test_complex_order_rotates_tokens_and_keeps_their_inner_products_relative():
    position = made("complexorder", (4, 5))
    freqs = position.freqs.detach().double()[0, 0]
    token, other = torch.randn(2, 24, dtype=torch.float64)
    first = position.embed(token.expand(1, 20, -1), grid((4, 5)).double())[0].detach()
    second = position.embed(other.expand(1, 20, -1), grid((4, 5)).double())[0].detach()
    for n, point in enumerate(oracles.grid((4, 5))):
        torch.testing.assert_close(first[n], oracles.rotation_matrix(point, freqs) @ token, rtol=0, atol=1e-6)
    pairs = [torch.view_as_complex(t.view(12, 2)) for t in (token, other)]
    for m, p in enumerate(oracles.grid((4, 5))):
        for n, q in enumerate(oracles.grid((4, 5))):
            total = 0.0
            for j in range(12):
                r, s = abs(complex(pairs[0][j])), abs(complex(pairs[1][j]))
                phase = float(pairs[0][j].angle() - pairs[1][j].angle())
                total += r * s * math.cos(sum(float(freqs[a, j]) * (p[a] - q[a]) for a in range(2)) + phase)
            assert float(first[m] @ second[n]) == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("shape", [(5, 5), (3, 7)])
def test_sinusoids_match_mae(shape):
    module = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae")
    want = module.build_2d_sinusoidal_position_embedding(*shape, embed_dim=24)
    position = build("sincos", Layout(width=24, heads=2, grid=shape))
    torch.testing.assert_close(vectors32(position, grid(shape), list(shape)), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 6), (4, 7)])
def test_sinusoids_match_timm(shape):
    want = build_sincos2d_pos_embed(list(shape), dim=32, temperature=10000.0, interleave_sin_cos=True)
    position = build("sincos", Layout(width=32, heads=2, grid=shape))
    torch.testing.assert_close(vectors32(position, grid(shape), width=32), want, rtol=0, atol=1e-5)


def test_sinusoids_of_one_axis_use_the_flattened_grid():
    position = build("sincos(axes=1)", Layout(width=24, heads=2, grid=(3, 4)))
    got = vectors32(position, grid((3, 4)))
    for number in range(12):
        angles = [number * 10000 ** (-j / 12) for j in range(12)]
        want = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
        torch.testing.assert_close(got[number], want, rtol=0, atol=1e-5)
    wider = vectors32(position, grid((2, 7)), [2, 7])
    torch.testing.assert_close(wider[:12], got, rtol=0, atol=1e-5)


def test_remaining_channels_are_zero():
    position = build("sincos", Layout(width=28, heads=2, grid=(2, 2, 2)))
    got = vectors32(position, grid((2, 2, 2)), width=28)
    assert (got[:, 24:] == 0).all()
    assert (got[:, :24].abs().sum(0) > 0).all()


def test_vectors_are_exact_under_autocast():
    position = build("sincos", Layout(width=24, heads=2, grid=(300, 2)))
    want = vectors32(position, grid((300, 2)))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(vectors32(position, grid((300, 2))), want, rtol=0, atol=0)
