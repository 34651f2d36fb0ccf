"""Relative schemes against loops in float64 and published implementations."""

import math
import re

import pytest
import torch
from timm.layers.bottleneck_attn import PosEmbedRel
from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias

from tests import oracles
from vit_rope.attention import attend
from vit_rope.positions import Layout, build
from vit_rope.positions.coords import grid

SHAPES = [(5,), (3, 4), (2, 3, 2)]
HEADS, CHANNELS = 3, 8


def layout_of(shape, depth=2):
    return Layout(width=HEADS * CHANNELS, heads=HEADS, grid=shape, depth=depth)


def scheme(spec, layout):
    """A scheme with random parameters."""
    position = build(spec, layout)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in position.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return position


def qkv(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 1, HEADS, count, CHANNELS, generator=generator, dtype=torch.float64).unbind(0)


def loop(q, k, v, shape, logit, value=None):
    """Attention (H, N, D) with logits logit(h, q_i, k_j, Δ) and values v_j + value(Δ)."""
    points = oracles.grid(shape)
    out = torch.zeros_like(q[0])
    for h in range(HEADS):
        for i, query in enumerate(points):
            deltas = [[b - a for a, b in zip(query, key, strict=True)] for key in points]
            weights = torch.stack([logit(h, q[0, h, i], k[0, h, j], d) for j, d in enumerate(deltas)]).softmax(0)
            for j, delta in enumerate(deltas):
                out[h, i] += weights[j] * (v[0, h, j] + (0 if value is None else value(delta)))
    return out


def assert_equals_loop(position, shape, logit, value=None, layer=1):
    """Coordinates without a grid, with their grid, and shifted: all equal the loop."""
    q, k, v = qkv(math.prod(shape))
    want, coords = loop(q, k, v, shape, logit, value), grid(shape).double()
    for points, options in ((coords, {}), (coords, {"grid": list(shape)}), (coords + 7.3, {})):
        got = attend(q, k, v, position(points, **options), layer)[0].detach()
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def split(table, sizes):
    """Split a table into one for each axis, in float64."""
    return [part.double() for part in table.detach().split(sizes)]


# ---- shaw, nezha, decomposed ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("clip", [None, 1, 2])
@pytest.mark.parametrize("values", [False, True])
def test_shaw(shape, clip, values):
    position = scheme(f"shaw(clip={clip}, values={values})", layout_of(shape))
    limits = [n - 1 if clip is None else clip for n in shape]
    keys = split(position.keys[1, 0], [2 * n + 1 for n in limits])
    values_added = split(position.values[1, 0], [2 * n + 1 for n in limits]) if values else None

    def vector(tables, delta):
        rows = zip(tables, limits, delta, strict=True)
        return sum(table[max(-n, min(n, d)) + n] for table, n, d in rows)

    assert_equals_loop(
        position,
        shape,
        lambda h, q, k, delta: q @ (k + vector(keys, delta)) / math.sqrt(CHANNELS),
        (lambda delta: vector(values_added, delta)) if values else None,
    )


def test_shaw_matches_wav2vec2_bert_on_one_axis():
    module = pytest.importorskip("transformers.models.wav2vec2_bert.modeling_wav2vec2_bert")
    config = module.Wav2Vec2BertConfig(
        hidden_size=24,
        num_attention_heads=3,
        position_embeddings_type="relative_key",
        left_max_position_embeddings=3,
        right_max_position_embeddings=3,
    )
    position, (q, k, v) = scheme("shaw(clip=3)", layout_of((9,))), qkv(9)
    theirs = module.Wav2Vec2BertSelfAttention(config).double()
    with torch.no_grad():
        theirs.distance_embedding.weight.copy_(position.keys[0, 0])
    _, bias = module._apply_relative_key_position_encoding(theirs, q, k)
    want = (q @ k.transpose(-2, -1) / math.sqrt(8) + bias).softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v, position(grid((9,)))), want)


def test_shaw_on_keys_and_values_matches_the_vits_model():
    module = pytest.importorskip("transformers.models.vits.modeling_vits")
    config = module.VitsConfig(hidden_size=24, num_attention_heads=3, window_size=6, attention_dropout=0.0)
    position = scheme("shaw(values=True)", layout_of((7,)))
    theirs = module.VitsAttention(config).double().eval()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    with torch.no_grad():
        theirs.emb_rel_k.copy_(position.keys[1])
        theirs.emb_rel_v.copy_(position.values[1])
        want, _ = theirs(x)
        projections = (theirs.q_proj, theirs.k_proj, theirs.v_proj)
        q, k, v = (p(x).unflatten(-1, (3, 8)).transpose(1, 2) for p in projections)
        got = theirs.out_proj(attend(q, k, v, position(grid((7,))), 1).transpose(1, 2).flatten(2))
    torch.testing.assert_close(got, want)


def test_shaw_matches_botnet_on_an_image():
    position, (q, k, v) = scheme("shaw", layout_of((3, 4))), qkv(12)
    theirs = PosEmbedRel((3, 4), dim_head=8, scale=1.0).double()
    with torch.no_grad():
        for ours, parameter in zip(
            position.keys[1, 0].split([5, 7]), (theirs.height_rel, theirs.width_rel), strict=True
        ):
            parameter.copy_(ours)
    logits = (q @ k.transpose(-2, -1) + theirs(q[0])[None]) / math.sqrt(8)
    torch.testing.assert_close(attend(q, k, v, position(grid((3, 4))), 1), logits.softmax(-1) @ v)


@pytest.mark.parametrize("shape", SHAPES)
def test_nezha(shape):
    pairs = CHANNELS // (2 * len(shape))

    def vector(delta):
        waves = [f(d * 1e4 ** (-j / pairs)) for d in delta for j in range(pairs) for f in (math.sin, math.cos)]
        return torch.tensor(waves + [0.0] * (CHANNELS - len(waves)), dtype=torch.float64)

    def logit(h, q, k, delta):
        return q @ (k + vector(delta)) / math.sqrt(CHANNELS)

    assert_equals_loop(build("nezha", layout_of(shape)), shape, logit, vector)


def test_decomposed_matches_sam_with_reversed_displacements():
    position, (q, k, v) = scheme("decomposed", layout_of((3, 4))), qkv(12)
    rows, columns = split(position.table[1], [5, 7])
    bias = get_decomposed_rel_pos_bias(q[0], rows.flip(0), columns.flip(0), (3, 4), (3, 4))
    want = (q @ k.transpose(-2, -1) / math.sqrt(8) + bias).softmax(-1) @ v
    for options in ({}, {"grid": [3, 4]}):
        got = attend(q, k, v, position(grid((3, 4)), **options), 1).detach()
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_decomposed_on_any_number_of_axes(shape):
    position = scheme("decomposed", layout_of(shape))
    tables = split(position.table[1], [2 * n - 1 for n in shape])

    def logit(h, q, k, delta):
        vector = sum(table[d + n - 1] for table, n, d in zip(tables, shape, delta, strict=True))
        return q @ k / math.sqrt(CHANNELS) + q @ vector

    assert_equals_loop(position, shape, logit)


# ---- transformerxl, deberta ----------------------------------------------------------------------


def waves(delta, pairs):
    return [f(delta * 1e4 ** (-j / pairs)) for j in range(pairs) for f in (math.sin, math.cos)]


@pytest.mark.parametrize("shape", SHAPES)
def test_transformerxl(shape):
    position, pairs = scheme("transformerxl", layout_of(shape)), HEADS * CHANNELS // (2 * len(shape))
    weight, u, v = (t.detach()[1].double() for t in (position.weight, position.u, position.v))

    def logit(h, q, k, delta):
        vector = sum(torch.tensor(waves(d, pairs)).double() @ weight[a] for a, d in enumerate(delta))
        return ((q + u[h]) @ k + (q + v[h]) @ vector.view(HEADS, CHANNELS)[h]) / math.sqrt(CHANNELS)

    assert_equals_loop(position, shape, logit)


def test_transformerxl_matches_wav2vec2_bert_with_reversed_displacements():
    module = pytest.importorskip("transformers.models.wav2vec2_bert.modeling_wav2vec2_bert")
    config = module.Wav2Vec2BertConfig(hidden_size=24, num_attention_heads=3, position_embeddings_type="relative")
    position, (q, k, v) = scheme("transformerxl", layout_of((9,))), qkv(9)
    theirs = module.Wav2Vec2BertSelfAttention(config).double()
    reverse = torch.tensor([-1.0, 1.0]).repeat(12)  # signs of sines and cosines
    with torch.no_grad():
        theirs.linear_pos.weight.copy_((reverse[:, None] * position.weight[1, 0]).T)
        theirs.pos_bias_u.copy_(position.u[1])
        theirs.pos_bias_v.copy_(position.v[1])
        offsets = module.Wav2Vec2BertRelPositionalEmbedding(config)(torch.zeros(1, 9, 24)).double()
        query, bias = module._apply_relative_position_encoding(theirs, q, k, offsets)
        want = (query @ k.transpose(-2, -1) / math.sqrt(8) + bias).softmax(-1) @ v
        got = attend(q, k, v, position(grid((9,)).double()), 1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_transformerxl_matches_xlnet_with_reversed_displacements():
    module = pytest.importorskip("transformers.models.xlnet.modeling_xlnet")
    config = module.XLNetConfig(d_model=24, n_head=3, d_head=8, n_layer=1, d_inner=8, vocab_size=2, dropout=0.0)
    position, (q, k, v) = scheme("transformerxl", layout_of((9,))), qkv(9)
    theirs = module.XLNetRelativeAttention(config).double().eval()
    weight = position.weight.detach()[1, 0].view(12, 2, 3, 8).double()  # pairs of sine and cosine
    with torch.no_grad():
        theirs.r_w_bias.copy_(position.u[1])
        theirs.r_r_bias.copy_(position.v[1])
        vectors = module.XLNetModel(config).double().relative_positional_encoding(9, 9, 1).double()
        vectors = torch.einsum("ibh,hnd->ibnd", vectors, torch.cat((-weight[:, 0], weight[:, 1])))
        want = theirs.rel_attn_core(*(x.permute(2, 0, 1, 3) for x in (q, k, v)), vectors).permute(1, 2, 0, 3)
        got = attend(q, k, v, position(grid((9,)).double()), 1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("clip", [None, 1])
def test_deberta(shape, clip):
    position = scheme(f"deberta(clip={clip})", layout_of(shape))
    limits = [n - 1 if clip is None else clip for n in shape]
    tables = split(position.vectors, [2 * n + 1 for n in limits])
    to_keys, to_queries = position.projections.detach()[:, 1].double()

    def logit(h, q, k, delta):
        total = q @ k
        for table, n, d in zip(tables, limits, delta, strict=True):
            forward, backward = (table[max(-n, min(n, x)) + n] for x in (d, -d))
            total = total + q @ (forward @ to_keys).view(HEADS, CHANNELS)[h]
            total = total + k @ (backward @ to_queries).view(HEADS, CHANNELS)[h]
        return total / math.sqrt((1 + 2 * len(shape)) * CHANNELS)

    assert_equals_loop(position, shape, logit)


def test_deberta_matches_transformers_within_the_clip():
    module = pytest.importorskip("transformers.models.deberta.modeling_deberta")
    options = {"relative_attention": True, "max_relative_positions": 8, "pos_att_type": ["c2p", "p2c"]}
    config = module.DebertaConfig(hidden_size=24, num_attention_heads=3, **options)
    theirs = module.DisentangledSelfAttention(config).double().eval()
    position, (q, k, v) = scheme("deberta", layout_of((8,))), qkv(8)
    embeddings = torch.zeros(16, 24, dtype=torch.float64)  # row 8 + query - key
    with torch.no_grad():
        for delta in range(-7, 8):
            embeddings[8 - delta] = position.vectors[delta + 7]
        theirs.pos_proj.weight.copy_(position.projections[0, 1].T)
        theirs.pos_q_proj.weight.copy_(position.projections[1, 1].T)
        theirs.pos_q_proj.bias.zero_()
        relative = module.build_relative_position(q, k)
        theirs.pos_att_type = ["c2p"]
        bias = theirs.disentangled_att_bias(q / math.sqrt(24), k, relative, embeddings, 3)
        theirs.pos_att_type = ["p2c"]  # the published code uses query - key here, the paper key - query
        bias = bias + theirs.disentangled_att_bias(q, k, relative, embeddings.flip(0).roll(1, 0), 3)
        want = (q @ k.transpose(-2, -1) / math.sqrt(24) + bias).softmax(-1) @ v
        got = attend(q, k, v, position(grid((8,)).double()), 1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


# ---- irpe ----------------------------------------------------------------------------------------

PIECEWISE = [
    0,
    1,
    2,
    2,
    3,
    3,
    3,
    3,
    3,
    3,
    3,
    3,
    3,
    3,
    3,
]  # |Δ| = 0 … 14 with the α, β, γ = 1.9 · (1, 2, 8) of the paper


def piecewise(x, ratio):
    """Equation 18 of the paper, limited to β and rounded to integers as in its code."""
    if abs(x) <= ratio:
        return round(x)
    y = min(2 * ratio, round(ratio + math.log(abs(x) / ratio) / math.log(8) * ratio))
    return int(math.copysign(y, x))


@pytest.mark.parametrize("ratio", [1.0, 1.9, 2.5])
def test_irpe_buckets_match_the_paper(ratio):
    position = build(f"irpe(ratio={ratio})", layout_of((14, 14)))
    got = position.bucket(torch.arange(-40.0, 41))
    assert got.tolist() == [piecewise(x, ratio) for x in range(-40, 41)]
    if ratio == 1.9:
        assert got[40:55].tolist() == PIECEWISE
        assert position.table.shape[-2] == 49


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["product", "cross", "euclidean", "quant"])
@pytest.mark.parametrize("on", ["k", "qk", "qkv"])
def test_irpe(shape, method, on):
    position = scheme(f'irpe(method="{method}", on="{on}", ratio=1.5)', layout_of(shape))
    tables = position.table.detach()[:, 1, 0].double()

    def vector(table, delta):
        buckets = [piecewise(d, 1.5) + 3 for d in delta]
        if method == "euclidean":
            return table[piecewise(round(math.sqrt(sum(d * d for d in delta))), 1.5)]
        if method == "quant":
            return table[piecewise(sum(d * d for d in delta), 1.5)]
        if method == "cross":
            return sum(table[7 * a + b] for a, b in enumerate(buckets))
        return table[sum(b * 7 ** (len(shape) - 1 - a) for a, b in enumerate(buckets))]

    def logit(h, q, k, delta):
        total = q @ k + q @ vector(tables[0], delta)
        return (total if on == "k" else total + k @ vector(tables[1], delta)) / math.sqrt(CHANNELS)

    assert_equals_loop(position, shape, logit, (lambda delta: vector(tables[2], delta)) if on == "qkv" else None)


# ---- layers, borders, refusals -------------------------------------------------------------------

SPECS = ["shaw", "shaw(values=True)", "decomposed", "transformerxl", "deberta", 'irpe(on="qkv")']


@pytest.mark.parametrize("spec", SPECS)
def test_attention_in_a_layer_has_gradients_for_that_layer_only(spec):
    position, (q, k, v) = scheme(spec, layout_of((3, 4), depth=3)), qkv(12)
    attend(q, k, v, position(grid((3, 4)).double(), grid=[3, 4]), 1).square().sum().backward()
    for name, parameter in position.named_parameters():
        if name == "vectors":
            continue  # shared by all layers
        axis = 1 if name == "projections" or spec.startswith("irpe") else 0
        touched = parameter.grad.movedim(axis, 0).reshape(3, -1).abs().amax(dim=1) > 0
        assert touched.tolist() == [False, True, False], name


@pytest.mark.parametrize("spec", [*SPECS, "nezha"])
def test_terms_do_not_change_when_tokens_are_dropped(spec):
    layout = Layout(width=24, heads=3, grid=(3, 4), depth=2, unit="centered")
    position, coords, keep = scheme(spec, layout), layout.coords((5, 4)).double(), [0, 3, 7, 18]
    q, k, v = qkv(20)
    mask = torch.zeros(20, dtype=torch.bool)
    mask[keep] = True
    full = attend(q, k, v, position(coords, grid=[5, 4]), 1, mask=mask[None])[:, :, keep]
    part = attend(*(t[:, :, keep] for t in (q, k, v)), position(coords[keep], grid=[5, 4]), 1)
    torch.testing.assert_close(part, full, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("shaw(clip=0)", (3, 4), "shaw needs a clip of at least 1 cell, got 0"),
        ("deberta(clip=0)", (3, 4), "deberta needs a clip of at least 1 cell, got 0"),
        ("irpe(ratio=0.5)", (3, 4), "irpe needs a ratio of at least 1, got 0.5"),
        ("nezha", (2, 2, 2, 2, 2), "nezha needs a pair of channels for each of 5 axes, got 8; use 10 or more"),
        ("nezha(base=-1)", (3, 4), "nezha needs a positive base, got -1"),
        ("transformerxl(base=0)", (3, 4), "transformerxl needs a positive base, got 0"),
    ],
)
def test_refusals(spec, shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(spec, layout_of(shape))
