"""Coordinates of tokens: units, origins, and error messages."""

import re

import pytest
import torch

from tests import oracles
from vit_rope.positions import Layout, build
from vit_rope.positions.coords import UNITS, cell, check_coords, grid, take_coords


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4), (2, 1, 2, 3)])
def test_index_counts_cells_in_row_major_order(shape):
    torch.testing.assert_close(grid(shape), torch.tensor(oracles.grid(shape), dtype=torch.float32))


@pytest.mark.parametrize(
    ("unit", "rows", "columns"),
    [
        ("centered", [-0.5, 0.5], [-0.75, -0.25, 0.25, 0.75]),
        ("centered_shorter", [-0.5, 0.5], [-0.5, 0.5, 1.5, 2.5]),
        ("centered_longer", [-0.75, -0.25], [-0.75, -0.25, 0.25, 0.75]),
    ],
)
def test_centered_units(unit, rows, columns):
    want = torch.tensor([[r, c] for r in rows for c in columns])
    torch.testing.assert_close(grid((2, 4), unit), want, rtol=0, atol=1e-7)


def test_origins():
    torch.testing.assert_close(grid((3, 5), origin="center"), grid((3, 5)) - torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(grid((3, 5), origin=(1, 0.5)), grid((3, 5)) - torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(grid((3, 5), origin=2), grid((3, 5)) - 2)
    for unit in UNITS:
        middle = grid((3, 5), unit, origin="center").mean(dim=0)
        torch.testing.assert_close(middle, torch.zeros(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("origin", [0.0, 1.5, (0.25, -2.0), "center"])
def test_cells_are_the_inverse_of_the_grid(unit, origin):
    torch.testing.assert_close(cell(grid((3, 5), unit, origin), (3, 5), unit, origin), grid((3, 5)), rtol=0, atol=1e-5)


def test_flattening_counts_cells_in_any_unit():
    for unit in UNITS:
        layout = Layout(width=8, heads=1, grid=(2, 3, 4), unit=unit)
        torch.testing.assert_close(layout.flatten(layout.coords())[:, 0], torch.arange(24.0), rtol=0, atol=1e-4)


def test_take_coords_follows_the_tokens():
    coords, keep = grid((2, 3)), torch.tensor([[5, 0], [2, 3]])
    want = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]]])
    torch.testing.assert_close(take_coords(coords, keep), want)
    torch.testing.assert_close(take_coords(coords.expand(2, -1, -1), keep), want)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: grid((2, 2), "pixels"), ValueError, "unknown unit 'pixels'; expected one of index, centered"),
        (lambda: grid(()), ValueError, "a grid needs at least one cell along each of its axes, got shape ()"),
        (
            lambda: grid((2, 2), origin="left"),
            ValueError,
            "unknown origin 'left'; expected \"center\", a number or one",
        ),
        (lambda: grid((2, 2), origin=(1,)), ValueError, "origin (1,) gives 1 numbers for a grid (2, 2) of 2 axes"),
        (lambda: check_coords([1, 2]), TypeError, "coordinates must be a tensor (tokens, axes), got list"),
        (
            lambda: check_coords(torch.zeros(3)),
            ValueError,
            "coordinates must be (tokens, axes) or (batch, tokens, axes), got",
        ),
        (
            lambda: check_coords(torch.zeros(3, 2, dtype=torch.bool)),
            TypeError,
            "coordinates must be real numbers, got torch.bool",
        ),
        (
            lambda: check_coords(torch.zeros(3, 2).bfloat16()),
            TypeError,
            "coordinates in torch.bfloat16 cannot tell neighbours apart beyond 256; make them float32",
        ),
        (
            lambda: check_coords(torch.zeros(3, 3), axes=2),
            ValueError,
            "coordinates have 3 axes, but the positions were made for 2; give coordinates of shape (tokens, 2)",
        ),
        (
            lambda: check_coords(torch.tensor([[0.0, float("nan")], [float("inf"), 1.0], [0.0, 0.0]]), finite=True),
            ValueError,
            "coordinates of 2 tokens are NaN or infinite; drop those tokens instead",
        ),
        (
            lambda: build("axial", Layout(width=32, heads=2, grid=(3, 3)))(torch.full((4, 2), float("nan"))),
            ValueError,
            "coordinates of 4 tokens are NaN or infinite; drop those tokens instead",
        ),
        (
            lambda: build("axial", Layout(width=32, heads=2, grid=(3, 3)))(torch.zeros(4, 3)),
            ValueError,
            "coordinates have 3 axes, but the positions were made for 2",
        ),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_integers_become_float32():
    assert check_coords(torch.zeros(3, 2, dtype=torch.long)).dtype == torch.float32
    assert check_coords(torch.zeros(3, 2, dtype=torch.float64)).dtype == torch.float64
