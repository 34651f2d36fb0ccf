"""Shaw, NEZHA, decomposed terms and iRPE against loops and published implementations."""

import math

import pytest
import torch
from timm.layers.bottleneck_attn import PosEmbedRel
from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias

from tests.positions.relative.helpers import CHANNELS, SHAPES, assert_equals_loop, layout_of, qkv, scheme, split
from vit_rope.attention import attend
from vit_rope.positions import build
from vit_rope.positions.coords import grid


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
