"""Transformer-XL and DeBERTa against loops and published implementations."""

import math

import pytest
import torch

from tests.positions.relative.helpers import CHANNELS, HEADS, SHAPES, assert_equals_loop, layout_of, qkv, scheme, split
from vit_rope.attention import attend
from vit_rope.positions.coords import grid


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
