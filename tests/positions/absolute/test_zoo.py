"""All other absolute schemes, each against its formula in loops, an identity that it must satisfy,
or timm.
"""

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from timm.layers.pos_embed_sincos import build_fourier_pos_embed
from timm.models._features_fx import create_feature_extractor
from torch import nn

from tests import oracles
from vit_rope.models.vit import RopeViT
from vit_rope.positions import Layout, Position, build
from vit_rope.positions.absolute.recurrent import Floater, runge_kutta
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


def made(spec, shape, width=24, depth=3, seed=0, **options):
    torch.manual_seed(seed)
    return build(spec, Layout(width=width, heads=2, grid=shape, depth=depth, **options))


def vectors(position, coords, shape=None, layer=0, width=24):
    """The vectors (N, C) that a scheme adds to tokens at these coordinates, in float64."""
    tokens = torch.zeros(1, len(coords), width, dtype=torch.float64)
    return position.embed(tokens, coords.double(), shape, layer)[0].detach()


# ---- every scheme --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", ["hierarchical", 'hierarchical(tables="axes")', "recurrent", "floater", "complexorder"]
)
def test_a_full_grid_equals_its_cells_one_by_one(spec):
    position, coords, x = made(spec, (4, 5)), grid((6, 3)).double(), torch.randn(1, 18, 24, dtype=torch.float64)
    torch.testing.assert_close(position.embed(x, coords, [6, 3]), position.embed(x, coords), rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", ["fourier", 'fourier(bands="learned")'])
def test_features_stretch_to_other_grids(spec):
    position, x = made(spec, (4, 5)), torch.zeros(1, 18, 24)
    cells = (grid((6, 3)) + 0.5) / torch.tensor([6, 3]) * torch.tensor([4, 5]) - 0.5
    full = position.embed(x, grid((6, 3)), [6, 3])
    torch.testing.assert_close(full, position.embed(x, cells), rtol=0, atol=1e-5)


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


# ---- hierarchical --------------------------------------------------------------------------------


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


# ---- waves ---------------------------------------------------------------------------------------


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


# ---- recurrent and floater -----------------------------------------------------------------------


def test_recurrent_matches_the_recurrence_summed_over_axes():
    position = made("recurrent(extent=1.5)", (3, 4))
    start, weight, bias = (p.detach().double() for p in (position.start, position.weight, position.bias))
    sequences = []
    for axis in range(2):
        vector, sequence = start[axis, 0], []
        for _ in range(6):
            sequence.append(vector)
            vector = torch.tanh(vector @ weight[axis] + bias[axis, 0])
        sequences.append(sequence)
    got = vectors(position, grid((6, 6)), [6, 6]).view(6, 6, 24)
    for y in range(6):
        for x in range(6):
            torch.testing.assert_close(got[y, x], sequences[0][y] + sequences[1][x], rtol=0, atol=1e-6)
    beyond = vectors(position, torch.tensor([[9.0, 5.0], [1.5, 2.0]]))
    torch.testing.assert_close(beyond[0], got[5, 5], rtol=0, atol=1e-6)
    torch.testing.assert_close(beyond[1], (got[1, 2] + got[2, 2]) / 2, rtol=0, atol=1e-6)


class Sinusoidal(Floater):
    """A flow of linear, skew-symmetric velocity h(t, p) = B p; B rotates pair j by base^(-j/P) per
    cell.
    """

    def velocity(self, axis, time, vector):
        pairs = vector.unflatten(-1, (2, -1))  # sines, cosines
        speeds = 100.0 ** (-torch.arange(12, dtype=vector.dtype) / 12) * self.layout.grid[axis]
        return torch.stack((pairs[..., 1, :] * speeds, -pairs[..., 0, :] * speeds), dim=-2).flatten(-2)


def test_a_flow_of_skew_symmetric_velocity_is_the_sinusoid():
    position = Sinusoidal(Layout(width=24, heads=2, grid=(8,), depth=2), steps=128)
    with torch.no_grad():
        position.start[:] = torch.cat((torch.zeros(12), torch.ones(12)))
    coords = torch.tensor([[0.0], [1.0], [5.5], [7.0], [-2.0], [11.0]])
    want = vectors(made("sincos(base=100)", (8,)), coords)
    torch.testing.assert_close(vectors(position, coords), want, rtol=0, atol=1e-5)


def test_floater_on_two_axes_is_the_sum_of_the_solutions_along_each():
    position = made("floater(hidden=5, steps=8)", (3, 4))
    start, inner, bias, outer = (
        p.detach().double().numpy() for p in (position.start, position.inner, position.inner_bias, position.outer)
    )

    def solution(layer, axis, time, steps=2000):
        def velocity(t, p):
            return np.tanh(np.array([t, *p]) @ inner[axis] + bias[axis]) @ outer[axis]

        vector, step = start[layer, axis], time / steps
        for i in range(steps):  # the midpoint rule
            vector = vector + step * velocity((i + 0.5) * step, vector + step / 2 * velocity(i * step, vector))
        return torch.from_numpy(vector)

    for layer, (y, x) in ((0, (2.0, 3.0)), (2, (-1.0, 1.5)), (1, (0.0, 6.0))):
        got = vectors(position, torch.tensor([[y, x]]), layer=layer)[0]
        torch.testing.assert_close(got, solution(layer, 0, y / 3) + solution(layer, 1, x / 4), rtol=0, atol=1e-3)


def test_runge_kutta_is_of_fourth_order():
    time = torch.tensor([[2.0], [-1.0]], dtype=torch.float64)
    errors = []
    for steps in (8, 16, 32):
        vector = runge_kutta(lambda t, p: t.cos() * p, torch.ones(1, dtype=torch.float64), time, steps)
        errors.append((vector - time.sin().exp()).abs().max())  # p' = cos(t) p, so p = e^(sin t)
    for coarse, fine in pairwise(errors):
        assert 12 < float(coarse / fine) < 21


def test_every_layer_of_floater_has_its_own_start():
    position = made("floater", (4, 5))
    first, second = (vectors(position, grid((4, 5)), layer=layer) for layer in (0, 1))
    assert (first - second).abs().max() > 1e-2


# ---- other ways to join --------------------------------------------------------------------------


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


@pytest.mark.parametrize(("layers", "acting"), [((-2, -1), {2, 3}), ((0, 3), {0, 3}), ((1, -3), {1})])
@pytest.mark.parametrize("scheme", ["learned", "sincos", "floater", "multiplicative", "peg"])
def test_inject_acts_before_the_given_layers(layers, acting, scheme):
    injected, plain = made(f"inject({scheme}, layers={layers})", (4, 5), depth=4), made(scheme, (4, 5), depth=4)
    x, coords = torch.randn(1, 20, 24), grid((4, 5))
    for layer in range(4):
        inner = plain.scheme if scheme == "peg" else plain
        want = inner.add(x, coords, None, layer) if layer in acting else x
        torch.testing.assert_close(injected.embed(x, coords, None, layer), want)


def test_inject_changes_the_input_of_layers_in_a_model():
    torch.manual_seed(0)
    net = RopeViT(16, 4, position="inject(learned, layers=(1,)) + axial(share='rest')", embed_dim=24, depth=3,
                  num_heads=2, reg_tokens=1).eval()  # fmt: skip
    seen = []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    net(torch.randn(1, 3, 16, 16))
    table = net.position.parts[0].scheme.table.flatten(0, 1)
    torch.testing.assert_close(seen[2], torch.cat((seen[1][:, :2], seen[1][:, 2:] + table), dim=1))
    assert torch.equal(seen[4], seen[3])


def test_tables_of_wrapped_schemes_are_resampled_when_loaded():
    for spec in ("inject(learned)", "concat", "multiplicative"):
        small, large = made(spec, (4, 6)), made(spec, (9, 5))
        large.load_state_dict(small.state_dict())
        coords = grid((9, 5))
        x = torch.ones(1, 45, 24)
        layer = 2 if spec.startswith("inject") else 0
        torch.testing.assert_close(large.embed(x, coords, [9, 5], layer), small.embed(x, coords, [9, 5], layer))


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


def test_an_alpha_of_the_golden_ratio_is_refused_on_three_axes():
    golden = (math.sqrt(5) - 1) / 2  # alpha² = 1 - alpha, so time and columns would have the same weight
    with pytest.raises(ValueError, match="cannot distinguish digits"):
        made(f"hierarchical(alpha={golden!r})", (2, 3, 4))
    assert isinstance(made(f"hierarchical(alpha={golden!r})", (3, 4)), Position)
