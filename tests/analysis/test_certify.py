"""Certificates, and published bugs that they detect, each reproduced as it was published."""

import math
import re

import pytest
import torch

from vit_rope.analysis import CertificateError, assert_relative, assert_reversible, relativity_error
from vit_rope.models.vit import RopeViT
from vit_rope.positions import Encoding, Layout, Position, Rotary, build
from vit_rope.positions.rotary.base import geometric
from vit_rope.positions.rotary.generators import exponential
from vit_rope.positions.transform import Transform, rotation_of

LAYOUT = Layout(width=48, heads=2, grid=(6, 7), depth=2)


@pytest.mark.parametrize("spec", ["axial", "mixed", "string", "none", "simplex + goldengate", "valuerope"])
def test_relative_schemes_pass(spec):
    assert assert_relative(build(spec, LAYOUT)) < 1e-9


@pytest.mark.parametrize("spec", ["axial", "mixed", "learned", "pope", "quaternion", "sumcoords + learned"])
def test_reversible_schemes_pass(spec):
    assert assert_reversible(build(spec, LAYOUT), (6, 7)) > 1e-4


def test_a_model_is_certified_through_its_position_scheme():
    model = RopeViT(64, 16, position="axial", embed_dim=48, depth=2, num_heads=2)
    assert assert_relative(model) < 1e-9
    assert assert_reversible(model, (4, 4)) > 1e-2


@pytest.mark.parametrize("spec", ["quaternion", "spherical", "liere", "orthogonal", "learned", "valuerope(undo=False)"])
def test_schemes_that_are_not_relative_fail(spec):
    position = build(spec, LAYOUT)
    with pytest.raises(
        CertificateError, match=r"not relative: shifting all tokens by \(.*\) changes logits or outputs by"
    ):
        assert_relative(position)
    assert relativity_error(position) > 1e-2


@pytest.mark.parametrize(
    ("row", "column", "error"), [(math.pi / 6, math.pi / 6, 0.25), (0.3, -0.9, None), (1.2, 2, None)]
)
def test_the_quaternion_form_differs_by_a_product_of_sines(row, column, error):
    """e^(-xi) e^(yj) has a component sin x sin y along k, which e^(yj - xi) lacks: 1/4 at x = y =
    π/6.
    """
    generators = build("quaternion(base=1)", Layout(width=4, heads=1, grid=(2, 2))).generators(torch.zeros(1))
    coords = torch.tensor([[row, 0.0], [0.0, column], [-row, column]], dtype=torch.float64)
    first, second, difference = exponential(generators, coords)[0, 0, :, 0, 0]
    deviation = first.T @ second - difference
    assert deviation[3, 0].abs().item() == pytest.approx(abs(math.sin(row) * math.sin(column)), abs=1e-6)
    if error is not None:  # this is the largest entry
        assert deviation.abs().max().item() == pytest.approx(error, abs=1e-6)
    torch.testing.assert_close(first.T @ first, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)


def test_liere_is_not_relative_at_initialization():
    torch.manual_seed(0)
    position = build("liere", Layout(width=64, heads=1, grid=(14, 14), depth=1))
    matrices = position(torch.tensor([[3.0, 0.0], [0.0, 5.0], [-3.0, 5.0]], dtype=torch.float64)).q.basis[0][0, :, 0]
    assert 0.5 < (matrices[0] @ matrices[1].mT - matrices[2].mT).abs().max().item() < 1.5  # 0.86 when this was written


@pytest.mark.parametrize("spec", ["none", "sumcoords"])
def test_schemes_that_are_not_reversible_fail(spec):
    with pytest.raises(
        CertificateError, match=r"not reversible: positions \(.*\) and \(.*\) look the same to every query"
    ):
        assert_reversible(build(spec, LAYOUT), (6, 7))


def test_a_grid_longer_than_the_period_fails():
    period = Rotary(2 * math.pi / 8 * torch.eye(2)[None, None])
    layout = Layout(width=4, heads=1, grid=(8, 8))
    assert_reversible(period, (8, 8), layout)
    with pytest.raises(CertificateError, match="must not repeat within the grid"):
        assert_reversible(period, (9, 9), layout)


def test_large_grids_and_single_cells():
    layout = Layout(width=384, heads=6, grid=(40, 40), depth=12)
    assert assert_relative(build("axial", layout)) < 1e-9
    assert assert_reversible(build("axial", layout), (40, 40)) > 1e-2
    with pytest.raises(CertificateError, match="not reversible"):
        assert_reversible(build("sumcoords", layout), (40, 40))
    assert assert_reversible(build("axial", layout), (1, 1)) == math.inf


def test_a_certificate_is_an_assertion_error():
    assert issubclass(CertificateError, AssertionError)


def test_invalid_arguments():
    with pytest.raises(TypeError, match=r"expected a position scheme, or a model with one as \.position, got Linear"):
        assert_relative(torch.nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=re.escape("the layout of this Rotary is unknown; give layout=Layout(width, heads,")
    ):
        assert_reversible(Rotary(torch.ones(1, 1, 2, 4)), (3, 3))


# ---- published bugs ------------------------------------------------------------------------------


class TiledPairs(Position):
    """V-JEPA 2's rotation: pairs are neighbouring channels, but angles are tiled, so they differ in
    a pair.
    """

    def encode(self, coords, key_coords, grid):
        keys = coords if key_coords is None else key_coords
        return Encoding(*(Transform(basis=[self.matrices(c)]) for c in (coords, keys)))

    def matrices(self, coords):
        theta = (coords[:, :, None] * geometric(6, 10000.0)).flatten(1).tile(1, 2)  # (N, 24)
        cos, sin = theta.cos(), theta.sin()
        half = torch.zeros(24, 24, dtype=theta.dtype)  # x @ half = (-x1, x0, -x3, x2, …)
        even = torch.arange(0, 24, 2)
        half[even + 1, even], half[even, even + 1] = -1.0, 1.0
        return (torch.diag_embed(cos) + half * sin[:, None])[None, :, None]


def test_the_pairs_of_v_jepa_2_are_not_relative():
    with pytest.raises(CertificateError, match=r"not relative: .* rotate both channels of a pair by the same angle"):
        assert_relative(TiledPairs(), LAYOUT)


class IndependentGenerators(Position):
    """LieRE's rotation: exp(y A + x B) of random skew-symmetric blocks that do not commute."""

    def __init__(self):
        super().__init__()
        raw = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.generators = raw - raw.mT

    def encode(self, coords, key_coords, grid):
        keys = coords if key_coords is None else key_coords
        return Encoding(*(Transform(basis=[self.matrices(c)]) for c in (coords, keys)))

    def matrices(self, coords):
        blocks = torch.linalg.matrix_exp(torch.einsum("na,asij->nsij", coords.double() / 6, self.generators))
        return torch.stack([torch.block_diag(*each) for each in blocks])[None, :, None]


def test_the_generators_of_liere_are_not_relative():
    with pytest.raises(CertificateError, match=r"not relative: .* rotations must commute"):
        assert_relative(IndependentGenerators(), LAYOUT)


def test_the_equal_frequencies_of_rose_are_not_reversible():
    equal = Rotary(geometric(12, 10000.0).expand(1, 1, 2, 12))  # (f, f): rank 1
    assert_relative(equal, LAYOUT)
    assert not equal.reversible
    with pytest.raises(
        CertificateError, match=r"not reversible: positions \((\d), (\d)\) and \((\d), (\d)\)"
    ) as caught:
        assert_reversible(equal, (6, 7), LAYOUT)
    a, b, c, d = (int(n) for n in re.findall(r"\d+", str(caught.value))[:4])
    assert a + b == c + d


class RasterOrder(Position):
    """NaFlex's table: rows in raster order up to the largest coordinate, not by the coordinates of
    tokens.
    """

    def encode(self, coords, key_coords, grid):
        columns = int(coords[:, 1].max()) + 1
        number = torch.arange(len(coords))
        raster = torch.stack((number // columns, number % columns), dim=-1).to(coords.dtype)
        return Encoding(rotation_of(build("axial", LAYOUT).frequencies(coords), raster))


def test_a_table_in_raster_order_is_not_a_function_of_coordinates():
    with pytest.raises(CertificateError, match="not a function of coordinates: reordering tokens together with their"):
        assert_relative(RasterOrder(), LAYOUT)
