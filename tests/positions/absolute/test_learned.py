"""Learned tables against timm and between cells; hierarchical, multiplicative, concatenated."""

import math

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from tests.positions.absolute.helpers import made, vectors, vectors32
from vit_rope.positions import Layout, Position, build
from vit_rope.positions.coords import grid


def test_hierarchical_on_a_signal_is_sus_formula():
    position, m, alpha = made("hierarchical", (6,)), 6, 0.4
    table = position.table.detach().double()
    units = [(table[i] - alpha * table[0]) / (1 - alpha) for i in range(m)]
    got = vectors(position, torch.arange(36.0)[:, None])
    for i in range(m):
        for j in range(m):
            torch.testing.assert_close(got[i * m + j], alpha * units[i] + (1 - alpha) * units[j], rtol=0, atol=1e-6)
    torch.testing.assert_close(got[:m], table, rtol=0, atol=1e-6)


def test_hierarchical_on_images_is_the_flattened_form():
    position, m, alpha = made("hierarchical(alpha=0.3)", (6, 6)), 6, 0.3
    u = position.table.detach().double()
    image = vectors(position, grid((6, 6))).view(6, 6, 24)
    for y in range(m):
        for x in range(m):
            torch.testing.assert_close(image[y, x], alpha * u[y] + (1 - alpha) * u[x], rtol=0, atol=1e-6)
    signal = made("hierarchical(alpha=0.3)", (6,))
    signal.load_state_dict(position.state_dict())
    flattened = (1 - alpha) * vectors(signal, torch.arange(36.0)[:, None]) + alpha * u[0]
    torch.testing.assert_close(image.flatten(0, 1), flattened, rtol=0, atol=1e-6)


def test_alpha_of_one_half_confuses_rows_with_columns_unless_tables_differ():
    u = torch.randn(6, 24)
    half = 0.5 * u[:, None] + 0.5 * u[None]
    assert torch.equal(half, half.transpose(0, 1))
    for spec, ratio in (("hierarchical", 0.4 / 0.6), ('hierarchical(tables="axes")', 1.0)):
        e = vectors(made(spec, (6, 6), width=768), grid((6, 6)), width=768).view(6, 6, 768)
        down, right = e.diff(dim=0).square().mean().sqrt(), e.diff(dim=1).square().mean().sqrt()
        assert float(down / right) == pytest.approx(ratio, abs=0.03)


@pytest.mark.parametrize(("shape", "weights"), [((4, 3, 2), [0.16, 0.24, 0.6]), ((4, 3), [0.4, 0.6]), ((4,), [1.0])])
def test_weights_of_the_axes(shape, weights):
    assert made("hierarchical", shape).weights == pytest.approx(weights)


def test_hierarchical_extends_beyond_the_table():
    position = made('hierarchical(tables="axes")', (3, 4))
    got = vectors(position, grid((9, 16)), [9, 16])
    distances = torch.cdist(got, got) + torch.eye(144)
    assert distances.min() > 1e-3


def test_multiplicative_multiplies_tokens_by_the_table():
    position, x = made("multiplicative", (4, 5)), torch.randn(2, 20, 24)
    assert position.table.detach().abs().max() < 0.1
    torch.testing.assert_close(position.embed(x, grid((4, 5))), x * (1 + position.table.flatten(0, 1)))
    nn.init.zeros_(position.table)
    assert torch.equal(position.embed(x, grid((4, 5))), x)


def test_concatenation_equals_a_sum():
    position, x = made("concat(channels=7)", (4, 5)), torch.randn(2, 20, 24)
    nn.init.normal_(position.weight)
    table = position.table.table.flatten(0, 1)
    want = x @ position.weight[:, :24].T + table @ position.weight[:, 24:].T
    torch.testing.assert_close(position.embed(x, grid((4, 5))), want, rtol=1e-5, atol=1e-4)


def test_concatenation_initially_keeps_the_tokens():
    position, x = made("concat", (4, 5)), torch.randn(2, 20, 24)
    nn.init.zeros_(position.table.table)
    torch.testing.assert_close(position.embed(x, grid((4, 5))), x)


def test_an_alpha_of_the_golden_ratio_is_refused_on_three_axes():
    golden = (math.sqrt(5) - 1) / 2  # alpha² = 1 - alpha, so time and columns would have the same weight
    with pytest.raises(ValueError, match="cannot distinguish digits"):
        made(f"hierarchical(alpha={golden!r})", (2, 3, 4))
    assert isinstance(made(f"hierarchical(alpha={golden!r})", (3, 4)), Position)


@pytest.mark.parametrize("shape", [(14, 14), (20, 9), (7, 30), (3, 4)])
def test_learned_tables_are_resampled_as_timm_does(shape):
    position = build("learned", Layout(width=24, heads=2, grid=(14, 14)))
    table = position.table.detach().view(1, 196, 24)
    want = resample_abs_pos_embed(table, list(shape), (14, 14), num_prefix_tokens=0)[0]
    torch.testing.assert_close(vectors32(position, grid(shape), list(shape)), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("shape", "other"), [((5,), (8,)), ((3, 4, 2), (5, 4, 3)), ((2, 3, 2, 2), (3, 2, 4, 2))])
def test_learned_tables_of_other_numbers_of_axes_are_resampled_linearly(shape, other):
    position = build("learned", Layout(width=24, heads=2, grid=shape))
    got = vectors32(position, grid(other), list(other))
    points = (grid(other) + 0.5) * torch.tensor(shape) / torch.tensor(other) - 0.5  # the same extent in cells
    torch.testing.assert_close(got, vectors32(position, points), rtol=0, atol=1e-6)
    if len(shape) == 3:
        table = position.table.detach().movedim(-1, 0)[None]
        want = torch.nn.functional.interpolate(table, other, mode="trilinear")[0].flatten(1).T
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_a_table_of_another_grid_is_resampled_when_loaded():
    small = build("learned", Layout(width=24, heads=2, grid=(4, 6)))
    large = build("learned", Layout(width=24, heads=2, grid=(9, 5)))
    large.load_state_dict(small.state_dict())
    torch.testing.assert_close(large.table.detach().flatten(0, 1), vectors32(small, grid((9, 5)), [9, 5]))
    other = build("learned", Layout(width=26, heads=2, grid=(9, 5)))
    with pytest.raises(RuntimeError, match="size mismatch for table"):
        other.load_state_dict(small.state_dict())


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("unit", ["index", "centered"])
def test_learned_tables_are_linear_between_cells(shape, unit):
    layout = Layout(width=24, heads=2, grid=shape, unit=unit)
    position = build("learned", layout)
    torch.testing.assert_close(
        vectors32(position, layout.coords()), position.table.detach().flatten(0, -2), rtol=0, atol=1e-5
    )
    cells = torch.rand(6, len(shape)) * (torch.tensor(shape) - 1)
    coords = cells if unit == "index" else 2 * (cells + 0.5) / torch.tensor(shape) - 1
    for point, got in zip(cells, vectors32(position, coords), strict=True):
        want = torch.zeros(24)
        for cell in torch.tensor([[c] for c in range(math.prod(shape))])[:, 0]:
            index = torch.unravel_index(cell, shape)
            weight = math.prod(max(0.0, 1 - abs(float(p) - int(i))) for p, i in zip(point, index, strict=True))
            want += weight * position.table.detach()[tuple(index)]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_learned_tables_are_constant_beyond_the_border():
    position = build("learned", Layout(width=24, heads=2, grid=(3, 4)))
    far = vectors32(position, torch.tensor([[-5.0, 1.0], [9.0, 99.0]]))
    torch.testing.assert_close(far, position.table.detach()[[0, 2], [1, 3]])


@pytest.mark.parametrize("cells", [(3, 4), (5, 6)])
def test_a_table_in_float64_is_not_rounded(cells):
    layout = Layout(width=8, heads=2, grid=(3, 4), depth=1)
    position = build("learned", layout).double()
    position.table.data = torch.randn(3, 4, 8, dtype=torch.float64)
    x = torch.zeros(1, cells[0] * cells[1], 8, dtype=torch.float64)
    whole = position.embed(x, layout.coords(cells).double(), list(cells))[0]
    points = position.embed(x, layout.coords(cells).double(), None)[0]
    assert not any(torch.equal(vectors, vectors.float().double()) for vectors in (whole, points))
    if cells == layout.grid:
        assert torch.equal(whole, position.table.detach().flatten(0, -2))
