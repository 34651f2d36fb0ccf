"""Rotations against a matrix exponential and against published code."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    apply_rot_embed_cat,
)

from tests import oracles
from vit_rope.attention import attend, attend_qkv
from vit_rope.ops.rotate import rotate
from vit_rope.positions import Layout, Rotary, build, transform
from vit_rope.positions.coords import grid


def rotated(position, coords, x):
    """x (N, D) as attention rotates a query of layer 0, head 0."""
    encoding = position(coords)
    return rotate(x[None, None], encoding.q.rotation[0], encoding.stride)[0, 0]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("shape", "channels", "head"),
    [((9,), (16,), 16), ((3, 4), (8, 8), 16), ((3, 4), (4, 8), 16), ((2, 2, 3), (4, 6, 6), 16), ((2, 3), (0, 6), 10)],
)
def test_axial_is_the_matrix_exponential(shape, channels, head, half):
    layout = Layout(width=2 * head, heads=2, grid=shape)
    position = build(f'axial(base=50, share={channels}, pairs="{"half" if half else "interleaved"}")', layout)
    coords = torch.tensor(oracles.grid(shape), dtype=torch.float64)
    torch.testing.assert_close(layout.coords().double(), coords)
    x = torch.randn(len(coords), head, dtype=torch.float64)
    want = oracles.rotate(x, coords, oracles.axial_frequencies(channels, 50.0, len(shape)), half)
    torch.testing.assert_close(rotated(position, coords, x), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("axes", [1, 2, 3, 4])
def test_mixed_is_the_matrix_exponential_of_its_frequencies(axes):
    layout = Layout(width=48, heads=2, grid=(3,) * axes, depth=2)
    position = build("mixed", layout)
    coords = torch.randn(7, axes, dtype=torch.float64) * 4
    encoding = position(coords)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    for layer in range(2):
        out = rotate(x[None], encoding.q.rotation[layer])[0]
        for head in range(2):
            want = oracles.rotate(x[head], coords, position.freqs[layer, head].detach())
            torch.testing.assert_close(out[head].detach(), want, rtol=0, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    axes=st.integers(1, 4),
    pairs=st.integers(1, 8),
    half=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
    scale=st.floats(0.01, 100),
)
def test_scores_depend_only_on_displacements(axes, pairs, half, seed, scale):
    torch.manual_seed(seed)
    position = Rotary(torch.randn(1, 1, axes, pairs), "half" if half else "interleaved")
    at, to, shift = scale * torch.randn(3, axes, dtype=torch.float64)
    q, k = torch.randn(2, 2 * pairs, dtype=torch.float64)
    score = [
        rotated(position, (at + s)[None], q[None])[0] @ rotated(position, (to + s)[None], k[None])[0]
        for s in (torch.zeros_like(shift), shift)
    ]
    assert abs(score[0] - score[1]) < 1e-9 * (1 + q.norm() * k.norm()) * (1 + scale)


def test_half_pairs_are_a_permutation_of_interleaved_ones():
    layout, coords = Layout(width=32, heads=2, grid=(4, 4)), grid((4, 4))
    x = torch.randn(16, 16)
    order = torch.arange(16).view(2, 8).t().flatten()  # half's pair (j, j + 8) goes to (2j, 2j + 1)
    interleaved = rotated(build("axial", layout), coords, x[:, order])
    half = rotated(build('axial(pairs="half")', layout), coords, x)
    torch.testing.assert_close(half[:, order], interleaved, rtol=0, atol=1e-6)


def test_half_of_the_head_rotates_with_the_row_and_half_with_the_column():
    position = build("axial", Layout(width=32, heads=2, grid=(5, 5)))
    x = torch.randn(1, 16)
    by_row, by_column = (rotated(position, torch.tensor([place]), x) for place in ([3.0, 0.0], [0.0, 3.0]))
    torch.testing.assert_close(by_row[:, 8:], x[:, 8:], rtol=0, atol=0)
    torch.testing.assert_close(by_column[:, :8], x[:, :8], rtol=0, atol=0)
    assert (by_row[:, :8] - x[:, :8]).abs().max() > 0.1
    assert (by_column[:, 8:] - x[:, 8:]).abs().max() > 0.1
    both = torch.cat((by_row[:, :8], by_column[:, 8:]), dim=1)
    torch.testing.assert_close(rotated(position, torch.tensor([[3.0, 3.0]]), x), both, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(14, 14), (6, 9)])
def test_axial_rotates_as_timm_eva02(shape):
    q = torch.randn(2, 4, math.prod(shape), 32)
    table = RotaryEmbeddingCat(32, in_pixels=False, temperature=100.0).get_embed(list(shape))
    encoding = build("axial(base=100)", Layout(width=128, heads=4, grid=shape))(grid(shape))
    torch.testing.assert_close(rotate(q, encoding.q.rotation[0]), apply_rot_embed_cat(q, table), rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(4, 4), (6, 9)])
def test_mixed_rotates_as_timm_with_the_same_frequencies(shape):
    theirs = RotaryEmbeddingMixed(128, depth=3, num_heads=4, temperature=10.0)
    ours = build("mixed", Layout(width=128, heads=4, grid=shape, depth=3))
    with torch.no_grad():
        ours.freqs.copy_(theirs.freqs.flip(0).permute(1, 2, 0, 3))  # theirs are (x, y) first, then layers and heads
    table, encoding = theirs.get_embed(list(shape)), ours(grid(shape))
    q = torch.randn(2, 4, math.prod(shape), 32)
    for layer in range(3):
        want = apply_rot_embed_cat(q, table[layer])
        torch.testing.assert_close(rotate(q, encoding.q.rotation[layer]), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("unit", "name"), [("centered", "separate"), ("centered_shorter", "min"), ("centered_longer", "max")]
)
def test_centered_units_make_the_tables_of_dinov3(unit, name):
    shape = (6, 9)
    theirs = RotaryEmbeddingDinoV3(32, temperature=100.0, normalize_coords=name, rotate_half=True).get_embed(
        list(shape)
    )
    layout = Layout(width=128, heads=4, grid=shape, unit=unit)
    encoding = build(f'axial(base=100, pairs="half", fastest={2 * math.pi})', layout)(layout.coords())
    sin, cos = theirs.chunk(2, dim=-1)
    torch.testing.assert_close(encoding.q.rotation[0][0, :, 0, :, 0].repeat(1, 2), cos, rtol=0, atol=5e-6)
    torch.testing.assert_close(encoding.q.rotation[0][0, :, 0, :, 1].repeat(1, 2), sin, rtol=0, atol=5e-6)


@pytest.mark.parametrize("channels", [(16, 16), (8, 12, 12), (4, 4, 4, 20)])
def test_unequal_shares_rotate_as_flux(channels):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    flux = pytest.importorskip("diffusers.models.transformers.transformer_flux")
    coords = torch.randn(11, len(channels)) * 5
    q = torch.randn(2, 3, 11, 32)
    want = embeddings.apply_rotary_emb(q, flux.FluxPosEmbed(10000, list(channels))(coords))
    layout = Layout(width=96, heads=3, grid=(2,) * len(channels))
    encoding = build(f"axial(base=10000, share={channels})", layout)(coords)
    torch.testing.assert_close(rotate(q, encoding.q.rotation[0]), want, rtol=0, atol=5e-6)


@pytest.mark.parametrize("shape", [(9,), (4, 6), (2, 3, 4)])
def test_axial_rotates_as_rotary_embedding_torch(shape):
    package = pytest.importorskip("rotary_embedding_torch")
    table = package.RotaryEmbedding(8, theta=100).get_axial_freqs(*shape)  # 8 channels for each axis, the rest stays
    q = torch.randn(2, 3, math.prod(shape), 32)
    want = package.apply_rotary_emb(table.flatten(0, -2), q)
    layout = Layout(width=96, heads=3, grid=shape)
    encoding = build(f"axial(base=100, share={(8,) * len(shape)})", layout)(grid(shape))
    torch.testing.assert_close(rotate(q, encoding.q.rotation[0]), want, rtol=0, atol=2e-6)


def test_one_axis_rotates_as_gpt_j_and_gpt_neox():
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    neox = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    q, layout = torch.randn(2, 3, 9, 16), Layout(width=48, heads=3, grid=(9,))
    sin, cos = gptj.create_sinusoidal_positions(9, 16).chunk(2, dim=-1)
    wanted = {"interleaved": gptj.apply_rotary_pos_emb(q.transpose(1, 2), sin[None], cos[None]).transpose(1, 2)}
    sin, cos = (table.repeat(1, 2)[None] for table in (sin, cos))
    wanted["half"] = neox.apply_rotary_pos_emb(q, q, cos, sin)[0]
    for pairs, want in wanted.items():
        encoding = build(f'axial(base=10000, pairs="{pairs}")', layout)(grid((9,)))
        torch.testing.assert_close(rotate(q, encoding.q.rotation[0], encoding.stride), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [512, 4096])
def test_flat_is_exact_on_large_grids(size):
    position = build("flat", Layout(width=16, heads=1, grid=(size, size), depth=1))
    coords = torch.tensor([[0.0, 1.0], [size / 2, 3.0], [size - 1.0, size - 1.0]])
    numbers = coords.double() @ torch.tensor([size, 1.0], dtype=torch.float64)
    theta = numbers[:, None] * position.initial[0, 0].double()
    encodings = position(coords), position(coords[:1], key_coords=coords)
    for table in (encodings[0].q.tables()[0], encodings[1].transform("k").tables()[0]):
        assert table.dtype == torch.float32
        want = torch.stack((theta.cos(), theta.sin()), dim=-1)[None, :, None]
        torch.testing.assert_close(table.double(), want, rtol=0, atol=1e-6)


def test_flat_counts_cells_of_the_grid_the_tokens_come_from():
    position = build("flat(base=10)", Layout(width=16, heads=2, grid=(3, 4)))
    one = build("axial(base=10)", Layout(width=16, heads=2, grid=(20,)))
    for shape in ((3, 4), (2, 7)):
        torch.testing.assert_close(
            position(grid(shape), grid=list(shape)).q.rotation[0],
            one(grid((math.prod(shape),))).q.rotation[0],
            rtol=0,
            atol=1e-6,
        )
    wrap = position(torch.tensor([[0.0, 3.0], [1.0, 0.0]])).q.rotation[0]  # the pair that only looks adjacent
    near = position(torch.tensor([[0.0, 0.0], [0.0, 1.0]])).q.rotation[0]
    cosine = [(table[:, 0] * table[:, 1]).sum(-1) for table in (wrap, near)]
    torch.testing.assert_close(cosine[0], cosine[1], rtol=0, atol=1e-5)


def test_mixed_is_initialised_like_rope_vit():
    layout = Layout(width=64 * 50, heads=50, grid=(14, 14), depth=8)
    freqs = build("mixed(base=10)", layout).freqs.detach()
    assert freqs.shape == (8, 50, 2, 32)
    want = 10 ** (-torch.arange(16) / 16)
    torch.testing.assert_close(freqs.norm(dim=2), want.repeat(2).expand(8, 50, 32), rtol=1e-5, atol=1e-6)
    first, second = freqs[..., 0], freqs[..., 16]
    torch.testing.assert_close((first * second).sum(-1), torch.zeros(8, 50), rtol=0, atol=1e-6)  # at a right angle
    torch.testing.assert_close(first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0], torch.ones(8, 50))
    directions = torch.atan2(first[..., 0], first[..., 1]).flatten() / math.pi
    assert directions.mean().abs() < 0.1  # uniform on (-1, 1): standard error 0.029
    assert (directions.std() - 3**-0.5).abs() < 0.05


def test_fixed_mixed_frequencies_are_the_same_in_every_process():
    layout = Layout(width=64, heads=2, grid=(4, 4), depth=2)
    first = build("mixed(learned=False)", layout)
    torch.manual_seed(123)
    second = build("mixed(learned=False)", layout)
    assert torch.equal(first.initial, second.initial)
    assert not list(first.parameters())


@pytest.mark.parametrize(
    ("share", "counts"), [("rest", (5, 5, 5)), ("first", (6, 5, 5)), ("last", (5, 5, 6)), ((8, 12, 10), (4, 6, 5))]
)
def test_share_assigns_the_channels_that_do_not_divide(share, counts):
    layout = Layout(width=64, heads=2, grid=(2, 2, 2))
    freqs = build(f"axial(share={share!r})", layout).initial
    assert tuple((freqs[0, 0, axis] != 0).sum().item() for axis in range(3)) == counts


def test_axes_may_have_different_bases():
    freqs = build("axial(base=(100, 10000))", Layout(width=64, heads=2, grid=(4, 4))).initial[0, 0]
    torch.testing.assert_close(freqs[0, :8], oracles.axial_frequencies((16,), 100.0, 1)[0].float())
    torch.testing.assert_close(freqs[1, 8:], oracles.axial_frequencies((16,), 10000.0, 1)[0].float())


def test_half_precision_only_rounds_the_result():
    layout = Layout(width=64, heads=1, grid=(2048,))
    position, coords = build("axial(base=10000)", layout), grid((2048,))
    x = torch.randn(1, 1, 2048, 64)
    want = rotate(x.bfloat16().double(), position(coords.double()).q.rotation[0])
    got = rotate(x.bfloat16(), position.bfloat16()(coords).q.rotation[0])
    error = (got.double() - want).abs().max()
    assert error <= want.abs().max() * 2**-8


def test_strided_and_offset_queries_rotate_like_contiguous_ones():
    encoding = build("axial", Layout(width=32, heads=2, grid=(3, 3)))(grid((3, 3)))
    wide = torch.randn(2, 9, 2, 21)
    for x in (wide[..., 1:17].transpose(1, 2), wide[..., ::1][..., 5:21].transpose(1, 2)):
        torch.testing.assert_close(
            rotate(x, encoding.q.rotation[0]), rotate(x.contiguous(), encoding.q.rotation[0]), rtol=0, atol=0
        )


def test_rotations_of_a_sum_compose():
    layout, coords = Layout(width=32, heads=2, grid=(3, 3)), grid((3, 3))
    x = torch.randn(9, 16)
    one, two = build("axial(base=10)", layout), build("axial(base=100)", layout)
    both = build("axial(base=10) + axial(base=100)", layout)
    torch.testing.assert_close(
        rotated(both, coords, x), rotated(one, coords, rotated(two, coords, x)), rtol=0, atol=1e-6
    )


def test_two_learned_steps_need_no_retained_graph():
    position, coords = build("mixed", Layout(width=32, heads=2, grid=(3, 3), depth=1)), grid((3, 3))
    optimizer = torch.optim.SGD(position.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        position(coords).q.rotation[0].square().sum().add(position(coords).q.rotation[0].sum()).backward()
        optimizer.step()


@pytest.mark.parametrize("spec", ["mixed", "mixed + axial", "learned + mixed", "yarn(mixed)"])
def test_tables_that_are_too_large_together_are_made_layer_by_layer(spec, monkeypatch):
    torch.manual_seed(0)
    layout = Layout(width=32, heads=2, grid=(3, 4), depth=3)
    position, coords = build(spec, layout), layout.coords()
    q, k, v = torch.randn(3, 2, 2, 13, 16)
    found = []
    for room in (transform.TABLES, 0):
        monkeypatch.setattr(transform, "TABLES", room)
        encoding = position(coords, prefix=1, grid=[3, 4])
        if "axial" not in spec:  # a sum of rotations needs both tables
            assert (encoding.q.deferred is None) == (room > 0)
        position.zero_grad()
        out = [attend(q, k, v, encoding, layer) for layer in range(3)]
        packed = [attend_qkv(torch.stack((q, k, v), 3).permute(0, 2, 3, 1, 4).flatten(2), 2, encoding, 1)]
        elsewhere = position(coords, prefix=1, key_coords=coords[:4], grid=[3, 4])
        part = [attend(q, k[:, :, :5], v[:, :, :5], elsewhere, 2)]
        sum(o.square().sum() for o in [*out, *packed, *part]).backward()
        grads = [p.grad for p in position.parameters() if p.grad is not None]
        assert grads
        found.append([*out, *packed, *part, *grads])
    for at_once, one_by_one in zip(*found, strict=True):
        torch.testing.assert_close(one_by_one, at_once, rtol=1e-5, atol=1e-5)


def test_repr_shows_periods():
    assert "32 interleaved pairs on 2 axes" in repr(build("axial", Layout(width=64, heads=1, grid=(14, 14))))
    assert "learned from periods 6.28 to" in repr(build("mixed", Layout(width=64, heads=1, grid=(14, 14))))


@pytest.mark.parametrize(
    ("freqs", "message"),
    [
        (torch.ones(2, 4), r"frequencies must be \(layers, heads, axes, pairs\), got shape \(2, 4\)"),
        (torch.full((1, 1, 2, 4), float("nan")), "frequencies must be finite"),
    ],
)
def test_bad_frequencies(freqs, message):
    with pytest.raises(ValueError, match=message):
        Rotary(freqs)


def test_a_table_that_is_too_wide_for_the_head_is_refused():
    encoding = build("axial", Layout(width=32, heads=1, grid=(3, 3)))(grid((3, 3)))
    with pytest.raises(ValueError, match="a rotation of 16 pairs needs heads of 32 channels or more, got 8"):
        rotate(torch.randn(1, 1, 9, 8), encoding.q.rotation[0])
