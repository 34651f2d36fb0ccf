"""Linear attention with positions: the formula in loops, its memory, and the models that use it."""

import math
import re

import pytest
import torch
from diffusers import UNet2DModel
from timm.models._features_fx import create_feature_extractor

from tests import oracles
from vit_rope.attention import attend_linear
from vit_rope.models.dit import RopeDiT
from vit_rope.models.vit import RopeViT
from vit_rope.positions import Encoding, Layout, build
from vit_rope.positions.coords import grid
from vit_rope.unet import RopeUNet2DModel, add_positions, remove_positions

SHAPE, PREFIX = (2, 3), 1
FREQS = oracles.axial_frequencies([4, 4], 100, 2)


def feature(t):
    return t + 1 if t > 0 else math.exp(t)  # elu + 1


def loop(q, k, v, points, seen=None, rotate_denominator=False):
    """Equation 19 of RoFormer for one head, a query and a key at a time; None is a token without a
    position.
    """
    seen = range(len(k)) if seen is None else seen
    q, k = ([torch.tensor([feature(float(c)) for c in row], dtype=torch.float64) for row in x] for x in (q, k))
    cos_sin = [torch.eye(8, dtype=torch.float64) if p is None else oracles.rotation_matrix(p, FREQS) for p in points]
    out = []
    for i in range(len(q)):
        above, below = 0, 0
        for j in seen:
            rotated = float((cos_sin[i] @ q[i]) @ (cos_sin[j] @ k[j]))
            above, below = (
                above + rotated * v[j].double(),
                below + (rotated if rotate_denominator else float(q[i] @ k[j])),
            )
        out.append(above / below)
    return torch.stack(out)


def qkv(dtype=torch.float64, heads=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, heads, 7, 8, generator=generator, dtype=torch.float64).to(dtype).unbind(0)


def encoding(spec="axial"):
    torch.manual_seed(0)
    return build(spec, Layout(width=16, heads=2, grid=SHAPE, depth=2))(grid(SHAPE).double(), prefix=PREFIX)


POINTS = [None] * PREFIX + oracles.grid(SHAPE)


@pytest.mark.parametrize("seen", [None, [0, 2, 3, 6]])
def test_linear_attention_is_the_loop(seen):
    q, k, v = qkv()
    mask = None if seen is None else torch.tensor([j in seen for j in range(7)])[None]
    out = attend_linear(q, k, v, encoding(), mask=mask)
    for b in range(2):
        for h in range(2):
            want = loop(q[b, h], k[b, h], v[b, h], POINTS, seen)
            torch.testing.assert_close(out[b, h], want, rtol=0, atol=1e-6)
            wrong = loop(q[b, h], k[b, h], v[b, h], POINTS, seen, rotate_denominator=True)
            assert (out[b, h] - wrong).abs().max() > 1e-3


def test_weights_sum_to_one_without_positions_and_to_less_with_them():
    q, k, _ = qkv()
    one_hot = torch.eye(7, dtype=torch.float64).expand(2, 2, -1, -1)
    sums = {spec: attend_linear(q, k, one_hot, encoding(spec)).sum(dim=-1) for spec in ("none", "axial")}
    torch.testing.assert_close(sums["none"], torch.ones(2, 2, 7, dtype=torch.float64))
    assert sums["axial"].max() < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_keys_do_not_overflow_16_bits(dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 4096, 32).unbind(0)
    want = attend_linear(q, k + 3, v, Encoding())
    got = attend_linear(q.to(dtype), (k + 3).to(dtype), v.to(dtype), Encoding())
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=0, atol=0.02 * float(want.abs().max()))


def test_keys_of_fewer_heads_serve_several():
    q, k, v = qkv(heads=4)
    few = attend_linear(q, k[:, :2], v[:, :2], Encoding())
    every = attend_linear(q, k[:, :2].repeat_interleave(2, 1), v[:, :2].repeat_interleave(2, 1), Encoding())
    assert torch.equal(few, every)


def vit(spec="mixed", **options):
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3, "dynamic_img_size": True} | options
    return RopeViT(12, 4, position=spec, **sizes).eval()


def test_the_vit_attends_linearly_in_every_layer():
    net, x = vit(attention="linear", qk_norm=True), torch.randn(2, 3, 12, 12)
    seen = []
    block = net.blocks[1]
    block.attn.register_forward_hook(lambda module, args, out: seen.append((*args, out)))
    out = net(x)
    tokens, encoding, *_, got = seen[0]
    heads = block.attn.qkv(tokens).view(2, 10, 3, 2, 8).permute(2, 0, 3, 1, 4)
    q, k, v = block.attn.q_norm(heads[0]), block.attn.k_norm(heads[1]), heads[2]
    want = attend_linear(q, k, v, encoding, 1).transpose(1, 2).flatten(2)
    torch.testing.assert_close(got, block.attn.proj(want))
    softmax = vit(qk_norm=True)
    softmax.load_state_dict(net.state_dict())
    assert (softmax(x) - out).abs().max() > 1e-4


def test_compilers_and_tracers_support_the_linear_vit():
    net, x = vit(attention="linear"), torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(create_feature_extractor(net, ["head"])(x)["head"], net(x))
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True, dynamic=True)
    for size in ((12, 12), (16, 8)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-5)


def test_the_vit_supports_masks_of_keys_only():
    net, x = vit(attention="linear"), torch.randn(2, 3, 12, 12)
    hidden = torch.arange(10) < 7
    changed = x.clone()
    changed[:, :, 8:] = 0  # the last three patches
    ours, theirs = (net.forward_features(t, attn_mask=hidden[None, None, None])[:, :7] for t in (x, changed))
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="its mask can only hide keys"):
        net(x, attn_mask=torch.ones(10, 10, dtype=torch.bool))


UNET = {
    "sample_size": 8, "block_out_channels": (16, 16), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


@torch.no_grad()
def test_the_unet_attends_linearly_also_after_loading(tmp_path):
    torch.manual_seed(0)
    net = RopeUNet2DModel(**UNET, attention_head_dim=8, position="axial", attention="linear").eval()
    x, seen = torch.randn(2, 3, 8, 8), []
    module = net.mid_block.attentions[0]
    module.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    out = net(x, 3).sample
    maps, got = seen[0]
    tokens = module.group_norm(maps.flatten(2)).transpose(1, 2)
    q, k, v = (to(tokens).view(2, 16, 2, 8).transpose(1, 2) for to in (module.to_q, module.to_k, module.to_v))
    want = attend_linear(q, k, v, module.position(module.layout.coords()))
    want = module.to_out[0](want.transpose(1, 2).flatten(2)).transpose(1, 2).view_as(maps) + maps
    torch.testing.assert_close(got, want / module.rescale_output_factor)
    net.save_pretrained(tmp_path)
    again = RopeUNet2DModel.from_pretrained(tmp_path)
    assert again.config.attention == "linear"
    assert torch.equal(again(x, 3).sample, out)


def dit(**options):
    torch.manual_seed(0)
    sizes = {"sample_size": (4, 6), "in_channels": 1, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return RopeDiT(**sizes | options).eval()


@torch.no_grad()
def test_the_dit_attends_linearly_also_after_loading(tmp_path):
    net, x, seen = dit(attention="linear"), torch.randn(1, 1, 4, 6), []
    for parameter in net.parameters():
        parameter.normal_(std=0.3)  # untrained models predict zeros
    attention = net.blocks[1].attn
    attention.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    out = net(x, 3).sample
    tokens, got = seen[0]
    q, k, v = attention.qkv(tokens).view(6, 3, 2, 8).permute(1, 2, 0, 3).double()
    want = torch.stack([loop(q[h], k[h], v[h], oracles.grid(SHAPE)) for h in range(2)], dim=1)
    torch.testing.assert_close(got[0], attention.proj(want.flatten(1).float()), rtol=1e-4, atol=1e-5)
    softmax = dit()
    softmax.load_state_dict(net.state_dict())
    assert (softmax(x, 3).sample - out).abs().max() > 1e-3
    net.save_pretrained(tmp_path)
    again = RopeDiT.from_pretrained(tmp_path)
    assert again.config.attention == "linear"
    torch.testing.assert_close(again(x, 3).sample, out)


@torch.no_grad()
def test_linear_attention_is_added_and_removed_in_place():
    torch.manual_seed(0)
    net, x = UNet2DModel(**UNET, attention_head_dim=8).eval(), torch.randn(1, 3, 8, 8)
    stock = net(x, 3).sample
    assert (add_positions(net, "none", attention="linear")(x, 3).sample - stock).abs().max() > 1e-5
    assert torch.equal(remove_positions(net)(x, 3).sample, stock)


BIASED = Encoding(biases=[torch.zeros(1, 1, 7, 7)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attend_linear(*qkv(), BIASED), "linear attention has no logits, so a scheme that adds a bias to them"),
        (lambda: attend_linear(*qkv(), Encoding(polar=True)), "linear attention has its own features, so a scheme"),
        (lambda: attend_linear(*qkv(), Encoding(), causal=True), "sums the keys once for all queries, so it cannot be"),
        (
            lambda: attend_linear(*qkv(), Encoding(), mask=torch.zeros(1, 7)),
            "its mask can only hide keys",
        ),
        (lambda: vit(attention="cosine"), "attention is 'softmax' or 'linear', got 'cosine'"),
        (lambda: vit(attention="linear", attn_drop_rate=0.1), "linear attention has no weights to drop; leave attn_d"),
        (lambda: RopeUNet2DModel(**UNET, attention="cosine"), "attention is 'softmax' or 'linear', got 'cosine'"),
        (lambda: dit(attention="cosine"), "attention is 'softmax' or 'linear', got 'cosine'"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("spec", "what"),
    [("alibi", "logits"), ('alibi(distance="quadratic")', "logits"), ("shaw", "logits"), ("pope", "features")],
)
def test_an_incompatible_scheme_is_refused_before_any_weight_is_created(spec, what):
    net = UNet2DModel(**UNET, attention_head_dim=8)
    for make in (
        lambda: vit(spec, attention="linear"),
        lambda: add_positions(net, spec, attention="linear"),
        lambda: dit(position=spec, attention="linear"),
    ):
        with pytest.raises(ValueError, match=f"linear attention has (no|its own) {what}"):
            make()
    assert type(net) is UNet2DModel
