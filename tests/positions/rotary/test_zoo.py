"""Rotary schemes against published code, and against products of their matrices in float64."""

import itertools
import math
import re
import warnings

import numpy as np
import pytest
import sympy
import torch
from timm.layers import apply_rot_embed_cat
from timm.layers.pos_embed_sincos import RotaryEmbeddingMRope

from tests import oracles
from vit_rope.attention import attend
from vit_rope.convert.fold import fold
from vit_rope.models.converted import ConvertedViT
from vit_rope.models.vit import RopeViT
from vit_rope.ops.rotate import rotate
from vit_rope.positions import Layout, build
from vit_rope.positions.coords import grid
from vit_rope.positions.rotary.directions import regular_simplex
from vit_rope.positions.rotary.generators import block_diagonal, cayley, diagonalize, exponential, simplest, skew
from vit_rope.positions.transform import Transform
from vit_rope.unet.maps import map_layout

SHAPES = [(5,), (3, 4), (2, 3, 2)]


def layout_of(shape=(3, 4), head=12, heads=2, depth=2):
    return Layout(width=head * heads, heads=heads, grid=shape, depth=depth)


def coordinates(shape):
    return torch.tensor(oracles.grid(shape), dtype=torch.float64)


def logits(position, coords, q, k, layer=0):
    """q_i · k_j (N, M) of one head's queries and keys (N, D), as attention computes them."""
    encoding = position(coords)
    return [_placed(x, side, encoding, layer) for x, side in ((q, encoding.q), (k, encoding.k or encoding.q))]


def _placed(x, side, encoding, layer):
    x = x[None, None].expand(1, 2, -1, -1)
    if side.basis:
        basis = side.basis[layer % len(side.basis)].double()
        basis = block_diagonal(basis) if basis.ndim == 6 else basis
        x = torch.einsum("bhnd,bnhde->bhne", x, basis.expand(1, len(x[0, 0]), 2, -1, -1))
    return (
        rotate(x, side.rotation[layer % len(side.rotation)].expand(1, -1, 2, -1, -1), encoding.stride)[0]
        if side.rotation
        else x[0]
    )


def score(position, coords, q, k, layer=0, head=0):
    """q_i · k_j (N, N) of one head's queries and keys (N, D)."""
    left, right = logits(position, coords, q, k, layer)
    return (left[head] @ right[head].T).detach()


def random_pair(count, head, seed=0):
    return torch.randn(2, count, head, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).unbind(0)


def score_of(matrices, q, k):
    """(R_i q_i) · (R_j k_j) of matrices (N, D, D) that act on columns."""
    left, right = (torch.stack([r @ x for r, x in zip(matrices, t, strict=True)]) for t in (q, k))
    return left @ right.T


# ---- directions ----------------------------


def test_splitaxial_rotates_as_interleaved_mrope():
    theirs = RotaryEmbeddingMRope(36, mrope_section=(6, 6, 6), temperature=10000.0)
    q = torch.randn(2, 3, 20, 36)
    coords = torch.cat((torch.zeros(20, 1), grid((4, 5))), dim=1)  # an image at time 0
    encoding = build('splitaxial(pairs="half")', layout_of((1, 4, 5), 36))(coords)
    want = apply_rot_embed_cat(q, theirs.get_embed([4, 5]), half=True)
    torch.testing.assert_close(rotate(q, encoding.q.rotation[0], encoding.stride), want, rtol=0, atol=2e-6)


def test_splitaxial_scores_as_pixtral():
    pixtral = pytest.importorskip("transformers.models.pixtral.modeling_pixtral")
    options = {"rope_type": "axial", "rope_theta": 10000.0}
    config = pixtral.PixtralVisionConfig(hidden_size=64, num_attention_heads=2, head_dim=32, rope_parameters=options)
    coords = grid((4, 5))
    cos, sin = pixtral.PixtralVisionRotaryEmbedding(config)(torch.zeros(1), coords.long())
    q, k = random_pair(20, 32)
    order = torch.arange(16).view(8, 2).t().flatten()  # theirs has the rows' pairs first
    order = torch.cat((order, order + 16))
    theirs = pixtral.apply_rotary_pos_emb(q[None, :, order], k[None, :, order], cos.double(), sin.double(), 0)
    got = score(build('splitaxial(pairs="half")', layout_of((4, 5), 32)), coords, q, k)
    torch.testing.assert_close(got, (theirs[0] @ theirs[1].mT)[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_golden_directions_are_the_published_sequence_and_evenly_spread(axes):
    layout = Layout(width=64 * 8, heads=8, grid=(4,) * axes)
    freqs = build("goldengate(base=10, fastest=2)", layout).initial[0].double()
    root = float(sympy.nsolve(sympy.Symbol("g") ** (axes + 1) - sympy.Symbol("g") - 1, 1.3))
    for head, pair in itertools.product((0, 3, 7), (0, 1, 31)):
        number = head * 32 + pair + 1
        normal = [
            math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * ((number / root**a) % 1) - 1, dtype=torch.float64)))
            for a in range(1, axes + 1)
        ]
        want = [2 * 10 ** (-pair / 32) * x / math.sqrt(sum(y * y for y in normal)) for x in normal]
        assert freqs[head, :, pair].tolist() == pytest.approx(want, rel=1e-5)
    units = (freqs / freqs.norm(dim=1, keepdim=True)).transpose(0, 1).flatten(1)  # (A, 256)
    assert units.mean(dim=1).abs().max() < 0.02  # independent directions would reach 0.06
    torch.testing.assert_close(units @ units.T / 256, torch.eye(axes, dtype=torch.float64) / axes, rtol=0, atol=0.02)


@pytest.mark.parametrize("axes", [1, 2, 3, 5])
def test_a_simplex_has_corners_at_equal_angles(axes):
    corners = regular_simplex(axes)
    want = torch.full((axes + 1, axes + 1), -1 / axes, dtype=torch.float64).fill_diagonal_(1.0)
    torch.testing.assert_close(corners.T @ corners, want, rtol=0, atol=1e-12)
    freqs = build("simplex(base=10)", Layout(width=24 * axes * (axes + 1), heads=2, grid=(2,) * axes)).initial[0, 0]
    lattices = freqs.double().unflatten(1, (-1, axes + 1))
    for i in range(lattices.shape[1]):
        want = 10 ** (-i / lattices.shape[1]) * corners
        torch.testing.assert_close(lattices[:, i], want, rtol=0, atol=1e-6)


def test_simplex_has_six_fold_symmetry():
    position = build("simplex", layout_of((8, 8), 48))
    angle = torch.arange(6) * math.pi / 3 + 0.2
    cosines = position(3 * torch.stack((angle.cos(), angle.sin()), dim=-1)).q.rotation[0][0, :, 0, :, 0].mean(dim=-1)
    torch.testing.assert_close(cosines, cosines[:1].expand(6))


@pytest.mark.parametrize("shape", SHAPES)
def test_learned_axial_frequencies_stay_on_their_axis(shape):
    layout = layout_of(shape)
    position, coords = build("axial(learned=True, base=50)", layout), coordinates(shape)
    q, k = random_pair(len(coords), 12)
    fixed = build("axial(base=50)", layout)
    torch.testing.assert_close(score(position, coords, q, k), score(fixed, coords, q, k))
    with torch.no_grad():
        position.speeds.normal_()
    assert position.speeds.shape == (2, 2, 6)
    for layer, head in itertools.product(range(2), range(2)):
        freqs = torch.zeros(len(shape), 6, dtype=torch.float64)
        for pair in range(6):
            freqs[pair * len(shape) // 6, pair] = position.speeds[layer, head, pair].item()
        matrices = [oracles.rotation_matrix(place, freqs) for place in coords]
        torch.testing.assert_close(
            score(position, coords, q, k, layer, head), score_of(matrices, q, k), rtol=0, atol=1e-5
        )


# ---- generators ----------------------------


def test_two_by_two_rotations_encode_one_number():
    a, b, c, d = sympy.symbols("a b c d", real=True)
    one, two = sympy.Matrix([[0, -a], [a, 0]]), sympy.Matrix([[0, -b], [b, 0]])
    assert one * two == two * one
    x, y = sympy.symbols("x y", real=True)
    table = (x * one + y * two).applyfunc(sympy.expand)
    assert table.subs({x: c * b, y: d - c * a}).equals(
        table.subs({x: 0, y: d})
    )  # along a line all positions look the same


def test_three_by_three_commutes_only_about_one_axis():
    u, v = sympy.symbols("u0:3", real=True), sympy.symbols("v0:3", real=True)

    def cross(w):
        return sympy.Matrix([[0, -w[2], w[1]], [w[2], 0, -w[0]], [-w[1], w[0], 0]])

    commutator = cross(u) * cross(v) - cross(v) * cross(u)
    assert (commutator - cross(sympy.Matrix(u).cross(sympy.Matrix(v)))).expand() == sympy.zeros(3)
    with pytest.raises(ValueError, match="commute in at most 1 independent directions"):
        simplest(3)


def test_four_by_four_needs_two_relations_and_has_planes():
    a, b, c, d, e, f = sympy.symbols("a b c d e f", real=True)

    def matrix(p, q, r, s, t, u):
        return sympy.Matrix([[0, p, q, r], [-p, 0, s, t], [-q, -s, 0, u], [-r, -t, -u, 0]])

    rows, columns = matrix(a, 0, 0, 0, 0, b), matrix(c, d, e, f, -d, sympy.Symbol("g", real=True))
    columns = columns.subs({d: 0, e: 0, f: 0})
    assert (rows * columns - columns * rows).expand() == sympy.zeros(4)
    general = matrix(c, d, e, sympy.Symbol("h"), sympy.Symbol("i"), f)
    forced = sympy.solve(
        list((rows * general - general * rows).subs({a: 1, b: 3}).expand()),
        [d, e, sympy.Symbol("h"), sympy.Symbol("i")],
    )
    assert all(value == 0 for value in forced.values())  # a matrix that commutes with two planes rotates those planes
    freqs = diagonalize(simplest(4))[0]
    assert sorted(freqs.abs().flatten().tolist()) == [0, 0, 1, 1]
    assert torch.linalg.matrix_rank(freqs) == 2


@pytest.mark.parametrize("size", [4, 5, 6, 8])
def test_no_more_generators_commute_than_there_are_planes(size):
    torch.manual_seed(size)
    one = torch.randn(size, size, dtype=torch.float64)
    one = one - one.T
    pairs = list(itertools.combinations(range(size), 2))
    columns = []
    for i, j in pairs:
        unit = torch.zeros(size, size, dtype=torch.float64)
        unit[i, j], unit[j, i] = 1.0, -1.0
        columns.append((one @ unit - unit @ one).flatten())
    kernel = len(pairs) - int(torch.linalg.matrix_rank(torch.stack(columns)))
    assert kernel == size // 2
    simplest(size, size // 2)
    with pytest.raises(ValueError, match=f"commute in at most {size // 2} independent directions"):
        simplest(size, size // 2 + 1)


def test_the_simplest_solution_is_axial():
    coords, (q, k) = coordinates((3, 4)), random_pair(12, 4)
    matrices = exponential(simplest(4)[None, None, :, None], coords)[0, 0, :, 0, 0]
    want = score(build("axial", layout_of(head=4)), coords, q, k)
    torch.testing.assert_close(score_of(matrices, q, k), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [2, 4, 6])
def test_commuting_is_the_exponential_of_matrices_that_commute(shape, block):
    position, coords = build(f"commuting(block={block})", layout_of(shape)), coordinates(shape)
    generators = block_diagonal(position.generators(coords)).detach().double()  # (L, H, A, D, D)
    q, k = random_pair(len(coords), 12)
    for layer, head in itertools.product(range(2), range(2)):
        b = generators[layer, head]
        for one, two in itertools.combinations(b, 2):
            torch.testing.assert_close(one @ two, two @ one, rtol=0, atol=1e-12)
        matrices = [
            torch.linalg.matrix_exp(sum(float(p) * g for p, g in zip(place, b, strict=True))) for place in coords
        ]
        torch.testing.assert_close(
            score(position, coords, q, k, layer, head), score_of(matrices, q, k), rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_commuting_generators_are_rotary_in_a_basis(shape):
    position, coords = build("commuting", layout_of(shape)), coordinates(shape)
    q, k = random_pair(len(coords), 12)
    basis, rotary = position.folded()
    for layer, head in itertools.product(range(2), range(2)):
        want = score(position, coords, q, k, layer, head)
        u = basis[layer, head]
        torch.testing.assert_close(u.T @ u, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-9)
        torch.testing.assert_close(score(rotary, coords, q @ u, k @ u, layer, head), want, rtol=0, atol=1e-5)


def random_generators(block, scales):
    """theta_a (P - P^T) for every axis, and their common basis and frequencies by numpy."""
    p = np.random.default_rng(0).normal(size=(block, block))
    values, vectors = np.linalg.eigh(1j * (p - p.T))
    vectors = math.sqrt(2) * vectors[:, values > 0]
    basis = np.stack((vectors.real, vectors.imag), axis=-1).reshape(block, block)
    return [torch.tensor(s * (p - p.T)) for s in scales], torch.tensor(basis), torch.tensor(values[values > 0])


def test_comrope_ld_is_the_exponential_in_another_basis():
    scales = ((0.3, -0.7), (0.2, 0.5))
    generators, basis, speeds = random_generators(6, (1.0,))
    position, coords = build("comrope_ld(block=6)", layout_of((3, 4), 12)), coordinates((3, 4))
    with torch.no_grad():
        position.theta.copy_(torch.tensor(scales).T[..., None])
        position.speeds.copy_(speeds)
    q, k = random_pair(12, 12)
    matrices = [
        torch.block_diag(*(torch.linalg.matrix_exp((y * a + x * b) * generators[0]) for a, b in scales))
        for y, x in coords
    ]
    both = torch.block_diag(basis, basis)
    torch.testing.assert_close(score(position, coords, q @ both, k @ both), score_of(matrices, q, k), rtol=0, atol=1e-5)


def test_comrope_ap_is_the_exponential_in_another_basis():
    generators, basis, speeds = random_generators(6, (0.3,))
    position, coords = build("comrope_ap(block=6)", layout_of((3, 4), 12)), coordinates((3, 4))
    with torch.no_grad():
        position.speeds.copy_(0.3 * torch.cat((speeds, speeds)))
    q, k = random_pair(12, 12)
    matrices = [torch.block_diag(*(torch.linalg.matrix_exp(p * generators[0]) for p in place)) for place in coords]
    both = torch.block_diag(basis, basis)
    torch.testing.assert_close(score(position, coords, q @ both, k @ both), score_of(matrices, q, k), rtol=0, atol=1e-5)


def test_comrope_is_initialised_like_random_generators():
    layout = Layout(width=64 * 16, heads=16, grid=(4, 4), depth=8)
    for spec in ("comrope_ap(std=0.2)", "comrope_ld(std=0.2)"):
        speeds = build(spec, layout).speeds.detach().reshape(-1, 4)
        # sum of squares of a skew matrix's entries is twice that of its frequencies: E = 2 std^2 b
        # (b - 1) / 2
        assert float(speeds.square().sum(dim=1).mean()) == pytest.approx(0.04 * 8 * 7, rel=0.05)


def test_string_is_axial_in_a_learned_orthogonal_basis():
    shape = (3, 4)
    position, coords = build("string(std=0.3, base=20)", layout_of(shape)), coordinates(shape)
    q, k = random_pair(12, 12)
    freqs = oracles.axial_frequencies((6, 6), 20.0, 2)
    for layer, head in itertools.product(range(2), range(2)):
        s = np.zeros((12, 12))
        s[np.tril_indices(12, -1)] = position.entries[layer, head].detach().numpy()
        s = s - s.T
        p = torch.tensor((np.eye(12) - s) @ np.linalg.inv(np.eye(12) + s))
        torch.testing.assert_close(p @ p.T, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-12)
        assert (p - torch.eye(12)).abs().max() > 0.1
        matrices = [p @ oracles.rotation_matrix(place, freqs) @ p.T for place in coords]
        torch.testing.assert_close(
            score(position, coords, q, k, layer, head), score_of(matrices, q, k), rtol=0, atol=2e-5
        )


@pytest.mark.parametrize("spec", ["string(std=0.3)", "learned + string(std=0.3)", "commuting(block=6)"])
def test_a_folded_model_is_the_same_function(spec):
    torch.manual_seed(0)
    size = {"embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 5, "reg_tokens": 2}
    model = RopeViT((48, 32), 16, position=spec, **size).double().eval()
    with torch.no_grad():
        for parameter in (*model.blocks.parameters(), model.head.weight):
            parameter.normal_(std=0.3)
    images = torch.randn(2, 3, 48, 32, dtype=torch.float64)
    want, folded = model(images), fold(model)
    torch.testing.assert_close(folded(images), want, rtol=0, atol=1e-5)
    assert not [name for name in folded.state_dict() if "entries" in name]
    assert torch.equal(model(images), want)  # unchanged
    plain = {"string(std=0.3)": "axial", "learned + string(std=0.3)": "learned + axial"}.get(spec, "mixed")
    loaded = RopeViT((48, 32), 16, position=plain, **size).double().eval()
    loaded.load_state_dict(folded.state_dict())
    torch.testing.assert_close(loaded(images), want, rtol=0, atol=1e-5)
    unplaced = fold(model)
    unplaced.position = model.position  # the basis twice
    assert (unplaced(images) - want).abs().max() > 1e-3


def test_schemes_that_cannot_be_folded_are_refused():
    size = {"embed_dim": 48, "depth": 1, "num_heads": 2}
    with pytest.raises(ValueError, match="positions have no learned basis to fold; only string and commuting do"):
        fold(RopeViT(32, 16, position="axial", **size))
    with pytest.raises(ValueError, match="queries and keys are normalized after their projection"):
        fold(RopeViT(32, 16, position="string", qk_norm=True, **size))
    for spec in ("string", "commuting", "learned + string"):
        with pytest.raises(ValueError, match="linear attention applies a function to queries and keys after"):
            fold(RopeViT(32, 16, position=spec, attention="linear", **size))
    with pytest.raises(ValueError, match="heads that share keys have different bases"):
        fold(ConvertedViT(32, 16, position="string", num_kv_heads=1, **size))


def test_liere_is_the_exponential_and_not_relative():
    shape = (3, 4)
    position, coords = build("liere(block=4)", layout_of(shape)), coordinates(shape)
    q, k = random_pair(12, 12)
    entries = position.entries.detach().double()
    assert 0 <= entries.min() < 0.1
    assert 2 < entries.max() <= 2 * math.pi / 3  # the longest side has 3 cells
    for layer, head in itertools.product(range(2), range(2)):
        generators = []
        for a in range(2):
            blocks = []
            for values in entries[layer, head, a]:
                block = torch.zeros(4, 4, dtype=torch.float64)
                for value, (i, j) in zip(values, ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)), strict=True):
                    block[i, j], block[j, i] = value, -value
                blocks.append(block)
            generators.append(torch.block_diag(*blocks))
        matrices = [torch.linalg.matrix_exp(y * generators[0] + x * generators[1]) for y, x in coords]
        torch.testing.assert_close(
            score(position, coords, q, k, layer, head), score_of(matrices, q, k), rtol=0, atol=1e-5
        )
        shifted = [torch.linalg.matrix_exp((y + 1) * generators[0] + x * generators[1]) for y, x in coords]
        assert (
            max(
                (a.T @ b - c.T @ d).abs().max()
                for (a, b), (c, d) in zip(itertools.pairwise(matrices), itertools.pairwise(shifted), strict=True)
            )
            > 0.3
        )
        along = [torch.linalg.matrix_exp(s * (2 * generators[0] - generators[1])) for s in (0.3, 1.0, 0.7)]
        torch.testing.assert_close(along[0].T @ along[1], along[2])  # on a line through the origin it is relative
    assert build("liere(block=2)", layout_of(shape)).relative
    with pytest.raises(ValueError, match="generators do not commute: entries of B_a B_b - B_b B_a reach"):
        diagonalize(torch.stack(generators))


def test_skew_and_cayley():
    entries = torch.arange(1.0, 7.0, dtype=torch.float64)
    matrix = skew(entries, 4)
    assert matrix[[1, 2, 2, 3, 3, 3], [0, 0, 1, 0, 1, 2]].tolist() == entries.tolist()
    torch.testing.assert_close(matrix.T, -matrix)
    torch.testing.assert_close(cayley(matrix) @ cayley(matrix).T, torch.eye(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="generators must be skew-symmetric matrices of even size"):
        diagonalize(torch.eye(4)[None])


# ---- controls ----------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_sumcoords_is_rope_at_the_sum(shape):
    coords, (q, k) = coordinates(shape), random_pair(math.prod(shape), 12)
    total = coords.sum(dim=1, keepdim=True)
    want = score(build("axial(base=100)", layout_of((9,))), total, q, k)
    torch.testing.assert_close(score(build("sumcoords", layout_of(shape)), coords, q, k), want, rtol=0, atol=1e-5)


def hamilton(a, b):
    """The product of two quaternions."""
    (a0, a1, a2, a3), (b0, b1, b2, b3) = a, b
    return [
        a0 * b0 - a1 * b1 - a2 * b2 - a3 * b3,
        a0 * b1 + a1 * b0 + a2 * b3 - a3 * b2,
        a0 * b2 - a1 * b3 + a2 * b0 + a3 * b1,
        a0 * b3 + a1 * b2 - a2 * b1 + a3 * b0,
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_quaternions_multiply_as_hamilton_does(shape):
    coords, (q, k) = coordinates(shape), random_pair(math.prod(shape), 12)
    position = build("quaternion(base=10)", layout_of(shape))

    def rotated(x, place):
        out = []
        for f in range(3):
            angle = [float(p) * 10 ** (-f / 3) for p in place] + [0.0] * (3 - len(place))
            norm = math.hypot(*angle)
            unit = [math.cos(norm), *(math.sin(norm) / norm * a if norm else 0.0 for a in angle)]
            out += hamilton([float(v) for v in x[4 * f : 4 * f + 4]], unit)
        return torch.tensor(out, dtype=torch.float64)

    left, right = ([rotated(x, place) for x, place in zip(t, coords, strict=True)] for t in (q, k))
    want = torch.stack(left) @ torch.stack(right).T
    torch.testing.assert_close(score(position, coords, q, k), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_spherical_rotates_about_one_axis_after_another(shape):
    coords, (q, k) = coordinates(shape), random_pair(math.prod(shape), 14)
    position = build("spherical(base=10)", layout_of(shape, 14))

    def about(axis, angle):
        c, s = math.cos(angle), math.sin(angle)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        matrix = np.eye(3)
        matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
        return matrix

    matrices = []
    for place in coords:
        blocks = []
        for f in range(4):
            table = np.eye(3)
            for a, p in enumerate(place):
                table = table @ about(a, float(p) * 10 ** (-f / 4))
            blocks.append(torch.tensor(table))
        matrices.append(torch.block_diag(*blocks, torch.eye(2, dtype=torch.float64)))  # two channels are left
    torch.testing.assert_close(score(position, coords, q, k), score_of(matrices, q, k), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_powers_are_powers_on_whole_numbers(shape):
    coords, (q, k) = coordinates(shape), random_pair(math.prod(shape), 12)
    freqs = oracles.axial_frequencies([12 // len(shape)] * len(shape), 100.0, len(shape))
    powers = []
    for axis in range(len(shape)):
        matrix = oracles.rotation_matrix([float(a == axis) for a in range(len(shape))], freqs).numpy()
        matrix[10:, 10:] = [[1, 0], [0, -1]]
        assert np.linalg.det(matrix) == pytest.approx(-1)
        powers.append(matrix)
    matrices = []
    for place in coords:
        total = np.eye(12)
        for p, matrix in zip(place, powers, strict=True):
            total = total @ np.linalg.matrix_power(matrix, int(p))
        matrices.append(torch.tensor(total))
    position = build("orthogonal", layout_of(shape))
    torch.testing.assert_close(score(position, coords, q, k), score_of(matrices, q, k), rtol=0, atol=1e-5)
    torch.testing.assert_close(score(position, coords + 2, q, k), score(position, coords, q, k), rtol=0, atol=1e-5)
    halfway = position(torch.full((1, len(shape)), 0.5 / len(shape))).q.basis[0]
    halfway = (block_diagonal(halfway) if halfway.ndim == 6 else halfway)[0, 0, 0]
    torch.testing.assert_close(halfway[-1, -1], torch.tensor(0.0), rtol=0, atol=1e-6)  # no rotation between cells


def test_orthogonal_powers_of_determinant_one_are_rope():
    coords, (q, k) = coordinates((3, 4)), random_pair(12, 12)
    position = build("orthogonal(determinant=1)", layout_of())
    assert position.relative
    torch.testing.assert_close(score(position, coords, q, k), score(build("axial", layout_of()), coords, q, k))


# ---- values, moduli, decay ----------------------------


def test_values_rotate_as_in_roformer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        roformer = pytest.importorskip("transformers.models.roformer.modeling_roformer")
    q, k, v = torch.randn(3, 1, 2, 9, 16)
    angle = torch.arange(9.0)[:, None] * 1e4 ** (-torch.arange(8) / 8)
    table = torch.cat((angle.sin(), angle.cos()), dim=-1)[None, None]
    theirs = roformer.RoFormerSelfAttention.apply_rotary_position_embeddings(table, q, k, v)
    encoding = build("valuerope(base=10000, undo=False)", layout_of((9,), 16))(grid((9,)))
    want = torch.nn.functional.scaled_dot_product_attention(*theirs)
    torch.testing.assert_close(attend(q, k, v, encoding), want, rtol=0, atol=1e-5)


def test_outputs_are_rotated_back_by_their_own_position():
    coords = coordinates((3, 4))
    freqs = oracles.axial_frequencies((6, 6), 100.0, 2)
    q, k, v = torch.randn(3, 1, 1, 12, 12, dtype=torch.float64)
    cos_sin = [oracles.rotation_matrix(place, freqs) for place in coords]
    left, right, values = (torch.stack([r @ x for r, x in zip(cos_sin, t[0, 0], strict=True)]) for t in (q, k, v))
    out = oracles.attention(left, right, values)
    want = torch.stack([r.T @ x for r, x in zip(cos_sin, out, strict=True)])
    got = attend(q, k, v, build("valuerope", layout_of())(coords))[0, 0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_scores_are_cosines_of_moduli(shape):
    coords, (q, k) = coordinates(shape), random_pair(math.prod(shape), 13)
    position = build("pope(base=20)", layout_of(shape, 13))
    with torch.no_grad():
        position.delta.normal_()
    each = 13 // len(shape)
    encoding = position(coords)
    values = torch.eye(len(coords), dtype=torch.float64)[None, None].expand(1, 2, -1, -1)
    got = attend(q.expand(1, 2, -1, -1), k.expand(1, 2, -1, -1), values, encoding, 1)[0, 1].detach()
    want = torch.zeros(len(coords), len(coords), dtype=torch.float64)
    for i, j in itertools.product(range(len(coords)), repeat=2):
        for c in range(13):
            modulus = softplus(float(q[i, c])) * softplus(float(k[j, c]))
            phase = 0.0
            if c < each * len(shape):
                speed, axis = 20 ** (-(c % each) / each), c // each
                phase = speed * float(coords[j, axis] - coords[i, axis]) + position.delta[1, 0, 0, 1, c].item()
            want[i, j] += modulus * math.cos(phase) / math.sqrt(13)
    torch.testing.assert_close(got, want.softmax(dim=-1), rtol=0, atol=1e-6)


def x_transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("x_transformers.x_transformers")


def test_polar_scores_are_those_of_x_transformers():
    theirs = x_transformers()
    polar = theirs.PolarEmbedding(16, 2)
    with torch.no_grad():
        polar.learned_bias.uniform_(-2 * math.pi, 0)
    table, bias = polar(torch.arange(9.0))
    position = build("pope(base=10000)", layout_of((9,), 16))
    with torch.no_grad():
        position.delta[0, 0, 0] = bias[:, 0]
    q, k = torch.randn(2, 1, 2, 9, 16)
    left, right = theirs.apply_polar_pos_emb(q, table[:, None]), theirs.apply_polar_pos_emb(k, table[:, None] + bias)
    values = torch.eye(9).expand(1, 2, -1, -1)
    want = (left @ right.mT / 4).softmax(dim=-1)
    torch.testing.assert_close(attend(q, k, values, position(grid((9,)))).detach(), want, rtol=0, atol=2e-5)


def test_xpos_scores_are_those_of_x_transformers():
    theirs = x_transformers()
    freqs, scale = theirs.RotaryEmbedding(16, use_xpos=True)(torch.arange(9.0))
    q, k = torch.randn(2, 1, 2, 9, 16)
    left, right = theirs.apply_rotary_pos_emb(q, freqs, scale), theirs.apply_rotary_pos_emb(k, freqs, scale**-1)
    encoding = build("xpos", layout_of((9,), 16))(grid((9,)))
    values = torch.eye(9).expand(1, 2, -1, -1)
    want = (left @ right.mT / 4).softmax(dim=-1)
    torch.testing.assert_close(attend(q, k, values, encoding), want, rtol=0, atol=2e-5)


def test_xpos_decays_towards_the_past_and_grows_towards_the_future():
    position = build("xpos(scale=1, gamma=1)", layout_of((9,), 12))
    coords = torch.tensor([[0.0], [3.0]], dtype=torch.float64)
    (a, b), (c, d) = (side.rotation[0][0, :, 0].norm(dim=-1) for side in position(coords)[:2])
    zeta = (torch.arange(6, dtype=torch.float64) / 6 + 1) / 2
    torch.testing.assert_close(b * c, zeta**3, rtol=0, atol=1e-6)
    torch.testing.assert_close(a * d, zeta**-3, rtol=0, atol=1e-4)
    here, later = (
        side.rotation[0][0, :, 0].norm(dim=-1) for side in build("xpos", layout_of((9,)))(512.0 * coords / 3)[:2]
    )
    assert float(here[0, 0] * later[1, 0]) == pytest.approx(3.5, abs=1e-3)  # as published, over one scale


@pytest.mark.parametrize("spec", ["xpos + mixed", "mixed + xpos", "pope", "valuerope + mixed"])
def test_gradients_of_learned_rotations_match_finite_differences(spec):
    layout = layout_of((5,), 4, 1, 1)
    position, coords = build(spec, layout), coordinates((5,))
    q, k, v = torch.randn(3, 1, 1, 5, 4, dtype=torch.float64)
    weight = torch.randn(1, 1, 5, 4, dtype=torch.float64)

    def loss():
        return (attend(q, k, v, position.double()(coords)) * weight).sum()

    loss().backward()
    for parameter in position.parameters():
        for index in range(parameter.numel()):
            value = parameter.data.flatten()[index].item()
            sides = []
            for step in (1e-5, -1e-5):
                parameter.data.view(-1)[index] = value + step
                sides.append(loss().item())
            parameter.data.view(-1)[index] = value
            assert parameter.grad.view(-1)[index].item() == pytest.approx(
                (sides[0] - sides[1]) / 2e-5, rel=1e-4, abs=1e-7
            )


# ---- refusals ----------------------------


@pytest.mark.parametrize(
    ("spec", "head", "axes", "message"),
    [
        (
            "xpos",
            12,
            2,
            "xpos has one axis, got 2: a decay that queries and keys each multiply in, zeta^(p_q - p_k), grows",
        ),
        ("xpos(scale=0)", 12, 1, "xpos needs a positive base, scale and gamma, got 10000.0, 0 and 0.4"),
        ("quaternion", 12, 4, "quaternion has units for up to 3 axes and groups of four channels, got 4 axes"),
        ("quaternion", 14, 2, "got 2 axes and head_dim 14"),
        ("quaternion(base=0)", 12, 2, "quaternion needs a positive base, got 0"),
        ("spherical", 12, 4, "spherical rotates about up to 3 axes of space, in groups of three channels, got 4 axes"),
        ("spherical(base=-1)", 12, 2, "spherical needs a positive base, got -1"),
        ("orthogonal(determinant=2)", 12, 2, "orthogonal(determinant=…) takes -1 or 1, got 2"),
        (
            "splitaxial",
            5,
            2,
            "splitaxial rotates pairs of channels on 2 axes, so head_dim must be even and at least 4, got 5; use 6",
        ),
        ("simplex", 2, 2, "head_dim must be even and at least 4, got 2; use 4"),
        ("goldengate(base=0)", 12, 2, "goldengate needs a positive base and fastest, got base 0 and fastest 1.0"),
        (
            "commuting(block=3)",
            12,
            2,
            "commuting needs an even block and a head_dim of at least 4 for 2 axes, got block 3",
        ),
        ("commuting(block=5)", 12, 2, "commuting needs blocks of 2 channels or more that divide head_dim 12, got 5"),
        ("commuting(base=0)", 12, 2, "commuting needs a positive base, got 0"),
        ("liere(block=7)", 12, 2, "liere needs blocks of 2 channels or more that divide head_dim 12, got 7"),
        (
            "comrope_ap(block=12)",
            12,
            2,
            "comrope_ap needs an even block, and a block for each of 2 axes, got 1 blocks of 12",
        ),
        ("comrope_ld(block=4, std=0)", 12, 2, "comrope_ld needs a positive standard deviation, got 0"),
        ("string(std=-1)", 12, 2, "string needs a standard deviation of 0 or more, got -1"),
        ("valuerope", 2, 2, "head_dim 2 is too small for 2 axes"),
        (
            'axial(share=(4, 8), pairs="axis")',
            12,
            2,
            'pairs="axis" needs as many channels for each axis, got (4, 8); use pairs="half"',
        ),
        ('axial(share="first", pairs="axis")', 14, 2, "got (8, 6)"),
    ],
)
def test_refusals(spec, head, axes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(spec, Layout(width=2 * head, heads=2, grid=(3,) * axes))


def test_a_basis_and_a_table_can_be_summed():
    assert build("string + learned", layout_of())(grid((3, 4))).v == Transform()


@pytest.mark.parametrize("spec", ["sumcoords", "pope"])
def test_heads_that_do_not_fill_the_width_rotate_as_usual(spec):
    """A U-Net's attention may have fewer channels in its heads than in its map."""
    narrow = map_layout(32, 2, 8, 0, (6, 6), "index", 0.0)
    plain = Layout(width=16, heads=2, grid=(6, 6), depth=1)
    ours, theirs = (build(spec, layout)(plain.coords()).q.rotation for layout in (narrow, plain))
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)
