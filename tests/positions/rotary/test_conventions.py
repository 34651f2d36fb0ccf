"""Conventions of sources that are not test dependencies: their formulas in float64, and their code
where it is installed.
"""

import math

import pytest
import torch
from diffusers.models.transformers.transformer_ltx import LTXVideoRotaryPosEmbed

from vit_rope.attention import attend
from vit_rope.ops.rotate import rotate
from vit_rope.ops.tables import angles
from vit_rope.positions import Layout, build
from vit_rope.positions.presets import presets

SHAPE, HEADS, HEAD = (5, 7), 2, 64
F64 = torch.float64


def position(name, shape=SHAPE, train=None):
    preset = presets()[name]
    layout = Layout(HEADS * HEAD, HEADS, train or shape, depth=1, unit=preset.unit, origin=preset.origin)
    return build(preset.spec, layout), layout


def cells(shape=SHAPE):
    return torch.cartesian_prod(*(torch.arange(n, dtype=F64) for n in shape))


def ends(shape):
    """Cells from -1 to 1, both included."""
    return torch.cartesian_prod(*(torch.linspace(-1, 1, n, dtype=F64) for n in shape))


def box(shape):
    """Centres of square cells in a box whose longer side is [-1, 1]."""
    long = max(shape)
    return torch.cartesian_prod(*((2 * torch.arange(n, dtype=F64) + 1 - n) / long for n in shape))


def along(coords, *series):
    """Angles (N, H, R): the axes' blocks one after another, of series (R,) or (H, R)."""
    return torch.cat([coords[:, a, None, None] * s.view(-1, s.shape[-1]) for a, s in enumerate(series)], dim=-1)


def fall(count, base):
    return torch.tensor([base ** (-j / count) for j in range(count)], dtype=F64)


def climb(count, first, last):
    return torch.tensor([first * (last / first) ** (j / (count - 1)) for j in range(count)], dtype=F64)


def hdit(shape):
    steps = torch.tensor([math.pi * 10 ** (m / (HEADS * 8)) for m in range(HEADS * 8)], dtype=F64)
    freqs = torch.stack([steps[h::HEADS] for h in range(HEADS)])
    return along(box(shape), freqs, freqs)


def swin(shape):
    """Frequencies whose zeros are the cosine of half of float32's pi."""
    speeds, leak = fall(16, 50), float(torch.cos(torch.tensor(math.pi / 2)))
    y, x = cells(shape).unbind(-1)
    return torch.cat([x[:, None] * speeds, y[:, None] * speeds + x[:, None] * speeds * leak], dim=-1)[:, None]


def golden_gate(shape):
    golden = 2.0
    for _ in range(10):
        golden = (1 + golden) ** (1 / 3)
    rows = []
    for i in range(1, HEADS * 32 + 1):
        z = torch.tensor([2 * (i / golden**a % 1) - 1 for a in (1, 2)], dtype=F64).erfinv()
        rows.append(z / z.square().sum().sqrt())
    directions = torch.stack(rows).view(HEADS, 32, 2)
    return torch.einsum("na,hra->nhr", cells(shape), directions * climb(32, 1, 10000)[:, None])


ANGLES = {
    "rope_vit_swin": (swin, 1),
    "rotary_embedding_torch": (lambda shape: along(cells(shape), fall(8, 10000), fall(8, 10000)), 1),
    "rotary_embedding_torch_pixel": (
        lambda shape: along(ends(shape), *2 * [torch.linspace(1, 5, 8, dtype=F64) * math.pi]),
        1,
    ),
    "rvt": (lambda shape: along(ends(shape), *2 * [torch.linspace(1, 5, 16, dtype=F64) * math.pi]), 1),
    "vit_5": (lambda shape: along(cells(shape), fall(16, 100000), fall(16, 100000)), 1),
    "k_diffusion": (lambda shape: along(box(shape), *2 * [climb(16, math.pi, 5 * math.pi)]), 1),
    "hdit": (hdit, 16),
    "golden_gate": (golden_gate, 32),
    "liere_visionllama": (
        lambda shape: along((ends(shape) + 1) / 2, *2 * [torch.linspace(0, -4, 16, dtype=F64).exp()]),
        1,
    ),
}


@pytest.mark.parametrize("name", ANGLES)
@pytest.mark.parametrize("shape", [SHAPE, (7, 7), (12, 3)])
def test_tables_are_those_of_the_formula(name, shape):
    formula, stride = ANGLES[name]
    scheme, layout = position(name, shape)
    encoding = scheme(layout.coords(shape), grid=list(shape))
    want = formula(shape)
    table = encoding.q.tables()[0][0].detach().double()
    assert encoding.stride == stride
    assert table.shape[-2] == want.shape[-1]  # the rest of the head stays
    close = 1e-6 + float(want.abs().max()) * 2**-23  # an angle in float32 is known no better
    torch.testing.assert_close(table[..., 0], want.cos().expand(table.shape[:-1]), rtol=0, atol=close)
    torch.testing.assert_close(table[..., 1], want.sin().expand(table.shape[:-1]), rtol=0, atol=close)


def test_lieres_coordinates_grow_with_the_grid():
    scheme, layout = position("liere_visionllama", train=(5, 7))
    table = scheme(layout.coords((10, 7)), grid=[10, 7]).q.tables()[0][0, :, 0]
    points = torch.cartesian_prod(torch.linspace(0, 2, 10, dtype=F64), torch.linspace(0, 1, 7, dtype=F64))
    speeds = torch.linspace(0, -4, 16, dtype=F64).exp()
    want = along(points, speeds, speeds)[:, 0]
    torch.testing.assert_close(table[..., 0].double(), want.cos(), rtol=0, atol=1e-6)


def test_liere_is_exponentials_at_its_coordinates():
    scheme, layout = position("liere", train=(5, 7))
    upper = 2 * math.pi * torch.rand(2, HEADS, 8, 8, 8, dtype=F64)
    upper = upper.triu(1)
    row, column = torch.tril_indices(8, 8, -1)
    with torch.no_grad():
        scheme.scheme.entries.copy_(-upper.mT[..., row, column].transpose(0, 1)[None])
    q = torch.randn(1, HEADS, 70, HEAD, dtype=F64)
    points = torch.cartesian_prod(torch.linspace(0, 2, 10, dtype=F64), torch.linspace(0, 1, 7, dtype=F64))
    generators = torch.einsum("na,ahsij->nhsij", points, upper - upper.mT)
    want = torch.einsum("nhsij,bhnsj->bhnsi", torch.matrix_exp(generators), q.unflatten(-1, (8, 8))).flatten(-2)
    basis = scheme(layout.coords((10, 7)), grid=[10, 7]).q.basis[0].detach().double()
    got = torch.einsum("bnhsij,bhnsi->bhnsj", basis, q.unflatten(-1, (8, 8))).flatten(-2)
    torch.testing.assert_close(got, want, rtol=0, atol=5e-5)  # exponentials of matrices of norm 60, in float32
    assert not scheme.relative


def rotations(generators, points):
    """Orthogonal matrices (N, H, D, D) of generators (A, H, S, b, b)."""
    blocks = torch.matrix_exp(torch.einsum("na,ahsij->nhsij", points, generators))
    return torch.stack([torch.stack([torch.block_diag(*head) for head in token]) for token in blocks])


@pytest.mark.parametrize("name", ["comrope_ap", "comrope_ld"])
def test_comrope_with_a_class_token_that_rotates(name):
    """Its logits, with a class token at 0.5 and patches at (c + 0.5) / n, are ours in another basis
    for each head.
    """
    scheme, layout = position(name)
    p = torch.randn(HEADS, 8, 8, 8, dtype=F64)
    skew = p - p.mT
    if name == "comrope_ap":
        theta = torch.nn.functional.one_hot(torch.arange(8) % 2, 2).T.double()
    else:
        theta = torch.randn(2, 8, dtype=F64)
    values, vectors = torch.linalg.eigh(1j * skew)
    speeds, pairs = values[..., 4:], 2**0.5 * vectors[..., 4:]
    basis = torch.stack((pairs.real, pairs.imag), dim=-1).flatten(-2)
    basis = torch.stack([torch.block_diag(*head) for head in basis])
    with torch.no_grad():
        if name == "comrope_ap":
            scheme.speeds.copy_(speeds.flatten(-2) / 2)
        else:
            scheme.speeds.copy_(speeds / 2)
            scheme.theta.copy_(theta[None, None, ..., None])
    q, k, v = torch.randn(3, 1, HEADS, 36, HEAD, dtype=F64)
    points = torch.cat((torch.full((1, 2), 0.5, dtype=F64), (cells() + 0.5) / torch.tensor(SHAPE)))
    table = rotations(theta[:, None, :, None, None] * skew, points)
    rotated = [torch.einsum("nhij,bhnj->bhni", table, x) for x in (q, k)]
    want = torch.nn.functional.scaled_dot_product_attention(*rotated, v)
    q, k = (torch.einsum("hji,bhnj->bhni", basis, x) for x in (q, k))
    got = attend(q.float(), k.float(), v.float(), scheme(layout.coords(), prefix=1)).double().detach()
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


def test_ltx_rotates_the_width_of_all_heads():
    rope = LTXVideoRotaryPosEmbed(HEADS * HEAD)  # 128 channels: 21 frequencies on 3 axes, and two channels in front
    coords = cells((3, 4, 5)).float() * torch.tensor([3.0, 400.0, 300.0])
    cos, sin = (t[0, :, ::2] for t in rope(torch.zeros(1), video_coords=coords.T[None]))
    scheme, _ = position("ltx", (3, 4, 5))
    points = coords / torch.tensor([20.0, 2048.0, 2048.0]) * 2 - 1
    theta = angles(scheme.frequencies(points), points)[0, 0].flatten(-2)
    assert torch.equal(theta.cos(), cos)
    assert torch.equal(theta.sin(), sin)
    table = scheme(points).q.tables()[0][0].flatten(1, 2)
    torch.testing.assert_close(table[..., 0], cos, rtol=0, atol=2e-7)
    assert (table[:, 0] == torch.tensor([1.0, 0.0])).all()
    assert (table[:, HEAD // 2] != torch.tensor([1.0, 0.0])).any()


# ---- the code of sources that a reader may have ----------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rotary_embedding_torch", {"freqs_for": "lang"}),
        ("rotary_embedding_torch_pixel", {"freqs_for": "pixel", "max_freq": 10}),
    ],
)
def test_rotary_embedding_torch(name, options):
    theirs = pytest.importorskip("rotary_embedding_torch")
    freqs = theirs.RotaryEmbedding(dim=16, **options).get_axial_freqs(*SHAPE).detach()
    q = torch.randn(1, HEADS, 35, HEAD)
    want = theirs.apply_rotary_emb(freqs, q.unflatten(2, SHAPE)).flatten(2, 3)
    scheme, layout = position(name)
    encoding = scheme(layout.coords(), grid=list(SHAPE))
    torch.testing.assert_close(rotate(q, encoding.q.tables()[0], encoding.stride), want, rtol=0, atol=1e-5)
    if name == "rotary_embedding_torch":
        theta = angles(scheme.frequencies(layout.coords()), layout.coords())[0, 0, :, 0]
        assert torch.equal(theta, freqs.flatten(0, 1)[:, ::2])


def test_vit_pytorchs_axial_tables():
    rvt, vit_5 = (pytest.importorskip(f"vit_pytorch.{name}") for name in ("rvt", "vit_5"))
    sin, cos = rvt.AxialRotaryEmbedding(HEAD)(torch.zeros(1, 49, HEAD))
    for name, (want_cos, want_sin) in {
        "rvt": (cos[0], sin[0]),
        "vit_5": [t[0, 0, 4:] for t in vit_5.AxialRotaryEmbedding(HEAD)(torch.zeros(1, 53, HEAD))[::-1]],
    }.items():
        scheme, layout = position(name, (7, 7))
        table = scheme(layout.coords(), grid=[7, 7]).q.tables()[0][0, :, 0]
        torch.testing.assert_close(table[..., 0], want_cos[:, ::2], rtol=0, atol=2e-6)
        torch.testing.assert_close(table[..., 1], want_sin[:, ::2], rtol=0, atol=2e-6)


def test_vit_pytorchs_golden_gate():
    theirs = pytest.importorskip("vit_pytorch.vit_nd_rotary").GoldenGateRoPENd(2, HEADS, HEAD)
    scheme, layout = position("golden_gate")
    torch.testing.assert_close(scheme.frequencies(layout.coords())[0].mT, theirs.freqs, rtol=1e-6, atol=1e-6)
    q, points = torch.randn(1, HEADS, 35, HEAD), layout.coords() / 100  # otherwise angles would be 10^5
    encoding = scheme(points)
    rotated = rotate(q, encoding.q.tables()[0], encoding.stride)
    torch.testing.assert_close(rotated, theirs(q, points[None]), rtol=0, atol=5e-4)


def test_k_diffusions_learned_speeds():
    theirs = pytest.importorskip("k_diffusion.models.axial_rope")
    rope, (scheme, layout) = theirs.AxialRoPE(HEAD, HEADS), position("k_diffusion")
    with torch.no_grad():
        torch.testing.assert_close(scheme.speeds[0, :, :16], rope.freqs_h.exp(), rtol=1e-6, atol=0)
        rope.freqs_h.add_(torch.randn(HEADS, 16) / 5)
        scheme.speeds.copy_(torch.cat((rope.freqs_h, rope.freqs_w), dim=-1).exp())
        q, pos = torch.randn(1, HEADS, 35, HEAD), theirs.make_axial_pos(*SHAPE)
        torch.testing.assert_close(layout.coords(), pos, rtol=0, atol=1e-6)
        rotated = rotate(q, scheme(pos).q.tables()[0])
        torch.testing.assert_close(rotated, rope(q, pos), rtol=0, atol=1e-5)
