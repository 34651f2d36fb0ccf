"""All absolute schemes: full grids, distinct vectors, tracing, precision, error messages."""

import re

import pytest
import torch
from timm.models._features_fx import create_feature_extractor

from tests.positions.absolute.helpers import made
from vit_rope.models.vit import RopeViT
from vit_rope.positions.coords import grid

SPECS = [
    "hierarchical",
    'hierarchical(tables="axes")',
    "fourier",
    'fourier(bands="learned")',
    "recurrent",
    "floater",
    "multiplicative",
    "concat",
    "complexorder",
    "inject(learned, layers=(0, -1))",
]


@pytest.mark.parametrize(
    "spec", ["hierarchical", 'hierarchical(tables="axes")', "recurrent", "floater", "complexorder"]
)
def test_a_full_grid_equals_its_cells_one_by_one(spec):
    position, coords, x = made(spec, (4, 5)), grid((6, 3)).double(), torch.randn(1, 18, 24, dtype=torch.float64)
    torch.testing.assert_close(position.embed(x, coords, [6, 3]), position.embed(x, coords), rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_every_cell_of_the_grid_has_a_different_vector(spec):
    position = made(spec, (6, 6))
    x = torch.ones(1, 24, dtype=torch.float64).expand(36, -1)[None]
    vectors = position.embed(x, grid((6, 6)).double())[0]
    distances = torch.cdist(vectors, vectors) + torch.eye(36)
    assert position.reversible
    assert distances.min() > 1e-3


@pytest.mark.parametrize("spec", [*SPECS, "peg"])
def test_a_vit_with_the_scheme_can_be_traced(spec):
    torch.manual_seed(0)
    net = RopeViT(16, 4, position=spec, embed_dim=24, depth=2, num_heads=2, num_classes=3).eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(create_feature_extractor(net, ["head"])(x)["head"], net(x))


@pytest.mark.parametrize("spec", [*SPECS, "peg"])
def test_autocast_does_not_round_positions(spec):
    position, coords = made(spec, (5, 6)), grid((5, 6))
    x = torch.ones(1, 30, 24)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = position.embed(x, coords)
    exact = position.embed(x, coords)
    tolerance = 2e-2 if spec in ("concat", "peg") else 0  # these also transform the tokens, which may be rounded
    torch.testing.assert_close(rounded, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "hierarchical(alpha=0.5)",
            'digits with alpha 0.5; use a different alpha, such as 0.4, or tables="axes" with it',
        ),
        ("hierarchical(alpha=1)", "hierarchical needs an alpha between 0 and 1 and a std of 0 or more, got 1, 0.02"),
        ("hierarchical(std=-1)", "got 0.4, -1"),
        ("fourier(count=0)", "fourier needs a count and a hidden width of at least 1, got 0 and 24"),
        ("complexorder(base=0)", "complexorder needs a positive base and channel pairs for each of 2 axes, got base 0"),
        ("recurrent(extent=0.5)", "recurrent needs an extent of at least 1, the full training grid, got 0.5"),
        ("floater(steps=0)", "floater needs at least 1 step and 1 hidden channel, got 0 and 64"),
        ("concat(channels=0)", "concat needs at least 1 channel, got 0"),
        ("inject(learned, layers=(3,))", "inject names layer 3, but there are 3, counted from 0"),
        ("inject(axial)", "inject needs one scheme that acts on tokens; others join outside, inject(learned) + axial"),
        ("inject(learned + axial)", "inject needs one scheme that acts on tokens"),
    ],
)
def test_refusals(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        made(spec, (4, 5))
