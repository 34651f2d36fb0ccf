"""Every option and method of timm's VisionTransformer works on RopeViT and means the same."""

import inspect
import json

import pytest
import timm
import torch
from timm.layers import GluMlp, Mlp, RmsNorm, SwiGLUPacked
from timm.layers.pos_embed_sincos import _apply_coord_augs
from timm.models import VisionTransformer
from timm.models._hub import save_for_hf
from timm.optim import param_groups_layer_decay
from torch import nn

from tests.helpers import images, randomised
from vit_rope.models.converted import ConvertedViT
from vit_rope.models.vit import RopeViT
from vit_rope.positions.coords import grid

NAME = "vit_rope_test_patch16_64"
SMALL = {"img_size": 64, "embed_dim": 64, "depth": 4, "num_heads": 2, "num_classes": 5}
OPTIONS = {  # for every argument of timm's class, a value other than the default
    "img_size": {"img_size": (32, 64)},
    "patch_size": {"patch_size": (8, 16)},
    "in_chans": {"in_chans": 1},
    "num_classes": {"num_classes": 0},
    "global_pool": {"global_pool": "avg"},
    "embed_dim": {"embed_dim": 96},
    "depth": {"depth": 3},
    "num_heads": {"num_heads": 4},
    "mlp_ratio": {"mlp_ratio": 2.5},
    "qkv_bias": {"qkv_bias": False},
    "qk_norm": {"qk_norm": True},
    "scale_attn_norm": {"scale_attn_norm": True},
    "scale_mlp_norm": {"scale_mlp_norm": True},
    "proj_bias": {"proj_bias": False},
    "init_values": {"init_values": 0.5},
    "class_token": {"class_token": False, "global_pool": "avg"},
    "pos_embed": {"pos_embed": "learn"},
    "no_embed_class": {"no_embed_class": True, "pos_embed": "learn"},
    "reg_tokens": {"reg_tokens": 3},
    "pre_norm": {"pre_norm": True},
    "final_norm": {"final_norm": False},
    "fc_norm": {"fc_norm": True},
    "pool_include_prefix": {"pool_include_prefix": True, "global_pool": "avg"},
    "dynamic_img_size": {"dynamic_img_size": True},
    "dynamic_img_pad": {"dynamic_img_pad": True},
    "drop_rate": {"drop_rate": 0.1},
    "pos_drop_rate": {"pos_drop_rate": 0.1},
    "patch_drop_rate": {"patch_drop_rate": 0.25},
    "proj_drop_rate": {"proj_drop_rate": 0.1},
    "attn_drop_rate": {"attn_drop_rate": 0.1},
    "drop_path_rate": {"drop_path_rate": 0.2},
    "weight_init": {"weight_init": "moco"},
    "fix_init": {"fix_init": True},
    "embed_norm_layer": {"embed_norm_layer": "layernorm"},
    "norm_layer": {"norm_layer": "rmsnorm"},
    "act_layer": {"act_layer": "silu"},
    "mlp_layer": {"mlp_layer": SwiGLUPacked, "act_layer": "silu"},
    "device": {"device": "cpu"},
    "dtype": {"dtype": torch.float64},
}
POOLS = ["", "avg", "avgmax", "max", "token", "map", "prr"]
OURS_TO_CHOOSE = {"self", "attn_layer", "block_fn", "embed_layer"}


def test_every_argument_of_timm_is_tested():
    assert set(OPTIONS) | OURS_TO_CHOOSE == set(inspect.signature(VisionTransformer.__init__).parameters)


def both(seed=0, **options):
    """RopeViT without positions and timm's VisionTransformer, with the same random weights."""
    options = SMALL | {"pos_embed": "none"} | options
    theirs = VisionTransformer(**options)
    if options.get("dtype") is None:
        randomised(theirs, seed)
    ours = RopeViT(position="none", **options)
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_has_the_same_effect_as_in_timm(name):
    options = OPTIONS[name]
    ours, theirs = both(**options)
    size = options.get("img_size", (64, 64))
    x = images(size)[:, : options.get("in_chans", 3)].to(options.get("dtype", torch.float32))
    if name == "dtype":  # float64 has no fused kernel, and the scale is applied elsewhere
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(ours(x), theirs(x))
    assert str(ours.blocks[-1].mlp) == str(theirs.blocks[-1].mlp)
    assert [m.p for m in ours.modules() if isinstance(m, nn.Dropout)] == [
        m.p for m in theirs.modules() if isinstance(m, nn.Dropout)
    ]


@pytest.mark.parametrize("pool", POOLS)
def test_every_pool_equals_timms(pool):
    ours, theirs = both(global_pool=pool, reg_tokens=2)
    assert torch.equal(ours(images((64, 64))), theirs(images((64, 64))))
    assert torch.equal(ours.forward_head(ours.forward_features(images((64, 64))), pre_logits=True),
                       theirs.forward_head(theirs.forward_features(images((64, 64))), pre_logits=True))  # fmt: skip


@pytest.mark.parametrize("mode", ["", "jax", "jax_nlhb", "moco", "reset"])
def test_initial_weights_equal_timms(mode):
    torch.manual_seed(0)
    theirs = VisionTransformer(**SMALL, pos_embed="none", weight_init=mode)
    torch.manual_seed(0)
    ours = RopeViT(**SMALL, weight_init=mode)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("options", "kind"), [("mlp", Mlp), ("swiglu_packed", GluMlp), ("swiglu", timm.layers.SwiGLU), (Mlp, Mlp)]
)
def test_mlps_by_name(options, kind):
    net = timm.create_model(NAME, mlp_layer=options, act_layer="silu", norm_layer="rmsnorm", norm_eps=1e-4)
    assert type(net.blocks[0].mlp) is kind
    assert isinstance(net.norm, RmsNorm)
    assert net.norm.eps == 1e-4
    with pytest.raises(ValueError, match="mlp_layer is a class or one of mlp, swiglu, swiglu_packed, got 'glu'"):
        timm.create_model(NAME, mlp_layer="glu")


@pytest.mark.parametrize("spec", ["axial", "mixed"])
def test_fewer_heads_of_keys_equal_repeated_heads(spec):
    few = randomised(ConvertedViT(**SMALL | {"num_heads": 4}, num_kv_heads=[4, 2, 1, 2], qk_norm=True, position=spec))
    many = RopeViT(**SMALL | {"num_heads": 4}, qk_norm=True, position=spec).eval()
    state = dict(few.state_dict())
    for i, heads in enumerate([4, 2, 1, 2]):
        for part in ("weight", "bias"):
            q, k, v = state[f"blocks.{i}.attn.qkv.{part}"].split([64, 16 * heads, 16 * heads])
            wide = [t.unflatten(0, (heads, 16)).repeat_interleave(4 // heads, dim=0).flatten(0, 1) for t in (k, v)]
            state[f"blocks.{i}.attn.qkv.{part}"] = torch.cat((q, *wide))
    many.load_state_dict(state)
    x = images((64, 64))
    torch.testing.assert_close(few(x), many(x), rtol=1e-5, atol=1e-5)
    for block in few.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(few(x), many(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="2 heads do not divide into 3 groups; change num_kv_heads"):
        ConvertedViT(**SMALL, num_kv_heads=3)
    with pytest.raises(ValueError, match="num_kv_heads names 2 layers of 4; give one number, or one for each layer"):
        ConvertedViT(**SMALL, num_kv_heads=(1, 1))


def test_the_size_of_the_attention_pool():
    net = ConvertedViT(**SMALL, global_pool="map", attn_pool_num_heads=8, attn_pool_mlp_ratio=2.0)
    assert net.attn_pool.num_heads == 8
    assert net.attn_pool.mlp.fc1.out_features == 128
    assert net(images((64, 64))).shape == (2, 5)
    with pytest.raises(ValueError, match='need global_pool="map"'):
        ConvertedViT(**SMALL, attn_pool_num_heads=8)


@pytest.mark.parametrize("spec", ["none", "mixed + gate(learned)", "reference(xy(axial), grid=(8, 8))"])
@pytest.mark.parametrize("fmt", ["NCHW", "NLC"])
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("as_dict", [False, True])
def test_intermediates_in_every_form(spec, fmt, prefix, only, as_dict):
    net = randomised(RopeViT(**SMALL, position=spec, reg_tokens=1, dynamic_img_size=True))
    plain = VisionTransformer(**SMALL, pos_embed="none", reg_tokens=1, dynamic_img_size=True).eval()
    form = {"output_fmt": fmt, "return_prefix_tokens": prefix, "intermediates_only": only, "output_dict": as_dict}
    x, taken = images((64, 32)), {}
    for i, block in enumerate(net.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: taken.update({i: out}))
    got = net.forward_intermediates(x, indices=[1, 3], norm=True, **form)
    if spec == "none":
        plain.load_state_dict(net.state_dict())
    like = plain.forward_intermediates(x, indices=[1, 3], norm=True, **form)
    flat, flat_like = (torch.utils._pytree.tree_flatten(tree) for tree in (got, like))
    assert flat[1] == flat_like[1]
    assert [t.shape for t in flat[0]] == [t.shape for t in flat_like[0]]
    if spec == "none":
        assert all(torch.equal(a, b) for a, b in zip(flat[0], flat_like[0], strict=True))
    maps = got["image_intermediates"] if as_dict else got if only else got[1]
    first = maps[0][0] if prefix and not as_dict else maps[0]
    tokens = first.flatten(2).transpose(1, 2) if fmt == "NCHW" else first
    torch.testing.assert_close(tokens, net.norm(taken[1])[:, 2:])


def test_pruning_and_get_intermediate_layers():
    net, x = randomised(RopeViT(**SMALL, position="mixed", reg_tokens=1)), images((64, 64))
    layers = net.get_intermediate_layers(x, n=2, reshape=True, return_prefix_tokens=True, norm=True)
    assert [[tuple(t.shape) for t in layer] for layer in layers] == [[(2, 64, 4, 4), (2, 2, 64)]] * 2
    want = net.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    assert net.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert len(net.blocks) == 2
    assert torch.equal(net.forward_intermediates(x, indices=[1], intermediates_only=True)[0], want)


@pytest.mark.parametrize("spec", ["mixed", "gate(learned) + axial", "dinov3"])
def test_hub_folders_keep_the_position_options(spec, tmp_path):
    unit = {"position_unit": "centered"} if spec == "dinov3" else {"position_origin": [1.5, 0.5]}
    net = randomised(timm.create_model(NAME, position=spec, num_classes=3, num_kv_heads=1, **unit))
    net.set_input_size((96, 64))
    net.reset_classifier(4, "avg")
    save_for_hf(net, tmp_path, safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["position"] == spec
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images((96, 64))), net.eval()(images((96, 64))))
    smaller = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=48, num_classes=2).eval()
    assert smaller(images((48, 48))).shape == (2, 2)


@pytest.mark.parametrize("unit", ["index", "centered"])
def test_training_varies_coordinates_as_timm_does(unit):
    options = {"position_shift": 0.5, "position_jitter": 1.5, "position_rescale": 2.0}
    net = RopeViT(**SMALL, position="axial", position_unit=unit, **options)
    torch.manual_seed(0)
    coords = net.train().patch_coords(images((64, 64)))[0]
    torch.manual_seed(0)
    want = _apply_coord_augs(grid((4, 4), unit), 0.5, 1.5, 2.0)
    torch.testing.assert_close(coords, want, rtol=1e-5, atol=1e-6)
    assert not torch.equal(net.patch_coords(images((64, 64)))[0], coords)
    assert torch.equal(net.eval().patch_coords(images((64, 64)))[0], grid((4, 4), unit))
    assert torch.equal(
        net.train().patch_coords(images((64, 64)), grid((4, 4)))[0], grid((4, 4))
    )  # coordinates of the caller stay
    with pytest.raises(ValueError, match="stretched by a factor of 1 or more, got position_shift 0"):
        RopeViT(**SMALL, position_rescale=0.5)


def test_layer_decay_treats_positions_like_the_stem():
    net = timm.create_model(NAME, position="mixed + gate(learned)")
    scale = {
        id(p): group["lr_scale"] for group in param_groups_layer_decay(net, layer_decay=0.5) for p in group["params"]
    }
    rates = {name: scale[id(p)] for name, p in net.named_parameters()}
    assert {rate for name, rate in rates.items() if name.startswith("position.")} == {rates["patch_embed.proj.weight"]}
    assert rates["blocks.0.attn.qkv.weight"] < rates["blocks.3.attn.qkv.weight"] < rates["head.weight"]


def test_frozen_weights_stay_frozen_at_another_size():
    net = timm.create_model(NAME, position="learned", pos_embed="learn")
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    net.set_input_size((96, 96))
    assert not any(p.requires_grad for p in net.parameters())


def test_two_crops_before_one_backward_with_checkpointing_and_every_option():
    net = randomised(
        ConvertedViT(
            **SMALL, position="mixed + learned", dynamic_img_size=True, num_kv_heads=1, qk_norm=True, reg_tokens=2
        )
    ).train()
    gradients = []
    for on in (False, True):
        net.set_grad_checkpointing(on)
        net.zero_grad()
        sum(net(images(size)).square().sum() for size in ((64, 64), (32, 48))).backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["axial", "mixed", "dinov3", "reference(xy(axial), grid=(4, 4))", "learned"])
def test_onnx_runs_at_other_sizes(spec, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    net = randomised(RopeViT(**SMALL, position=spec, dynamic_img_size=True, reg_tokens=1))
    shapes = ({0: "batch", 2: "height", 3: "width"},)
    cells = {2: 16 * torch.export.Dim("rows", min=2, max=16), 3: 16 * torch.export.Dim("columns", min=2, max=16)}
    program = torch.export.export(net, (images((64, 96)),), dynamic_shapes=({0: torch.export.Dim("batch")} | cells,))
    torch.onnx.export(program, dynamo=True, f=tmp_path / "net.onnx", dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    for size in ((64, 96), (32, 32), (96, 48)):
        x = images(size)[:1]
        got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(got), net(x).detach(), rtol=1e-4, atol=1e-5)
