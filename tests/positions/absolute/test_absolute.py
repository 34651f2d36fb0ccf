"""Learned tables and sinusoids against timm, and between cells."""

import math

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed

from vit_rope.positions import Layout, build
from vit_rope.positions.coords import grid


def vectors(position, coords, shape=None, width=24):
    """The vectors (N, C) that a scheme adds to tokens at these coordinates."""
    return position.embed(torch.zeros(1, len(coords), width), coords, shape)[0].detach()


@pytest.mark.parametrize("shape", [(14, 14), (20, 9), (7, 30), (3, 4)])
def test_learned_tables_are_resampled_as_timm_does(shape):
    position = build("learned", Layout(width=24, heads=2, grid=(14, 14)))
    table = position.table.detach().view(1, 196, 24)
    want = resample_abs_pos_embed(table, list(shape), (14, 14), num_prefix_tokens=0)[0]
    torch.testing.assert_close(vectors(position, grid(shape), list(shape)), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("shape", "other"), [((5,), (8,)), ((3, 4, 2), (5, 4, 3)), ((2, 3, 2, 2), (3, 2, 4, 2))])
def test_learned_tables_of_other_numbers_of_axes_are_resampled_linearly(shape, other):
    position = build("learned", Layout(width=24, heads=2, grid=shape))
    got = vectors(position, grid(other), list(other))
    points = (grid(other) + 0.5) * torch.tensor(shape) / torch.tensor(other) - 0.5  # the same extent in cells
    torch.testing.assert_close(got, vectors(position, points), rtol=0, atol=1e-6)
    if len(shape) == 3:
        table = position.table.detach().movedim(-1, 0)[None]
        want = torch.nn.functional.interpolate(table, other, mode="trilinear")[0].flatten(1).T
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 5), (3, 7)])
def test_sinusoids_match_mae(shape):
    module = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae")
    want = module.build_2d_sinusoidal_position_embedding(*shape, embed_dim=24)
    position = build("sincos", Layout(width=24, heads=2, grid=shape))
    torch.testing.assert_close(vectors(position, grid(shape), list(shape)), want, rtol=0, atol=1e-6)


def test_a_table_of_another_grid_is_resampled_when_loaded():
    small = build("learned", Layout(width=24, heads=2, grid=(4, 6)))
    large = build("learned", Layout(width=24, heads=2, grid=(9, 5)))
    large.load_state_dict(small.state_dict())
    torch.testing.assert_close(large.table.detach().flatten(0, 1), vectors(small, grid((9, 5)), [9, 5]))
    other = build("learned", Layout(width=26, heads=2, grid=(9, 5)))
    with pytest.raises(RuntimeError, match="size mismatch for table"):
        other.load_state_dict(small.state_dict())


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("unit", ["index", "centered"])
def test_learned_tables_are_linear_between_cells(shape, unit):
    layout = Layout(width=24, heads=2, grid=shape, unit=unit)
    position = build("learned", layout)
    torch.testing.assert_close(
        vectors(position, layout.coords()), position.table.detach().flatten(0, -2), rtol=0, atol=1e-5
    )
    cells = torch.rand(6, len(shape)) * (torch.tensor(shape) - 1)
    coords = cells if unit == "index" else 2 * (cells + 0.5) / torch.tensor(shape) - 1
    for point, got in zip(cells, vectors(position, coords), strict=True):
        want = torch.zeros(24)
        for cell in torch.tensor([[c] for c in range(math.prod(shape))])[:, 0]:
            index = torch.unravel_index(cell, shape)
            weight = math.prod(max(0.0, 1 - abs(float(p) - int(i))) for p, i in zip(point, index, strict=True))
            want += weight * position.table.detach()[tuple(index)]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_learned_tables_are_constant_beyond_the_border():
    position = build("learned", Layout(width=24, heads=2, grid=(3, 4)))
    far = vectors(position, torch.tensor([[-5.0, 1.0], [9.0, 99.0]]))
    torch.testing.assert_close(far, position.table.detach()[[0, 2], [1, 3]])


@pytest.mark.parametrize("shape", [(6, 6), (4, 7)])
def test_sinusoids_match_timm(shape):
    want = build_sincos2d_pos_embed(list(shape), dim=32, temperature=10000.0, interleave_sin_cos=True)
    position = build("sincos", Layout(width=32, heads=2, grid=shape))
    torch.testing.assert_close(vectors(position, grid(shape), width=32), want, rtol=0, atol=1e-5)


def test_sinusoids_of_one_axis_use_the_flattened_grid():
    position = build("sincos(axes=1)", Layout(width=24, heads=2, grid=(3, 4)))
    got = vectors(position, grid((3, 4)))
    for number in range(12):
        angles = [number * 10000 ** (-j / 12) for j in range(12)]
        want = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
        torch.testing.assert_close(got[number], want, rtol=0, atol=1e-5)
    wider = vectors(position, grid((2, 7)), [2, 7])
    torch.testing.assert_close(wider[:12], got, rtol=0, atol=1e-5)


def test_remaining_channels_are_zero():
    position = build("sincos", Layout(width=28, heads=2, grid=(2, 2, 2)))
    got = vectors(position, grid((2, 2, 2)), width=28)
    assert (got[:, 24:] == 0).all()
    assert (got[:, :24].abs().sum(0) > 0).all()


def test_vectors_are_exact_under_autocast():
    position = build("sincos", Layout(width=24, heads=2, grid=(300, 2)))
    want = vectors(position, grid((300, 2)))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(vectors(position, grid((300, 2))), want, rtol=0, atol=0)
