"""RopeViT: the contracts of timm and of positions, and its error messages."""

import copy
import re
import warnings

import pytest
import timm
import torch
from timm.models import VisionTransformer
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from vit_rope.models.vit import RopeViT
from vit_rope.positions.coords import grid

NAME = "vit_rope_test_patch16_64"
SPECS = ["axial", "mixed", "learned", "none", "sincos + flat", "learned + mixed"]


def model(position="axial", seed=0, **kwargs):
    """A test model with random parameters, since positions hardly affect an untrained one."""
    torch.manual_seed(seed)
    made = timm.create_model(NAME, position=position, num_classes=kwargs.pop("num_classes", 5), **kwargs)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def images(*sizes, batch=2, channels=3):
    return torch.randn(batch, channels, *sizes, generator=torch.Generator().manual_seed(7))


def test_without_positions_it_equals_timm_bit_for_bit():
    ours = model("none", pos_embed="learn", qk_norm=True, init_values=0.3, reg_tokens=2)
    theirs = VisionTransformer(
        64, 16, num_classes=5, embed_dim=64, depth=4, num_heads=2, qk_norm=True, init_values=0.3, reg_tokens=2
    )
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(images(64, 64)), theirs.eval()(images(64, 64)))


@pytest.mark.parametrize("spec", SPECS)
def test_positions_matter_and_only_through_coordinates(spec):
    net, x = model(spec), images(64, 64)
    swapped = x.roll(16, dims=-1)  # moves complete patches
    changed = (net(swapped) - net(x)).abs().max()
    moved = net(swapped, coords=grid((4, 4)).view(4, 4, 2).roll(1, dims=1).reshape(16, 2))
    torch.testing.assert_close(moved, net(x), rtol=1e-4, atol=1e-5)
    assert changed < 1e-5 if spec == "none" else changed > 1e-3


@pytest.mark.parametrize("spec", SPECS)
def test_passing_the_coordinates_of_the_grid_changes_nothing(spec):
    net, x = model(spec), images(64, 64)
    torch.testing.assert_close(net(x, coords=grid((4, 4))), net(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net(x, coords=grid((4, 4)).expand(2, -1, -1)), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_dynamic_size_equals_set_input_size_and_a_reloaded_model(spec):
    net, x = model(spec, dynamic_img_size=True), images(96, 32)
    want = net(x)
    fixed = model(spec)
    fixed.load_state_dict(net.state_dict())
    fixed.set_input_size((96, 32))
    torch.testing.assert_close(fixed(x), want, rtol=1e-5, atol=1e-5)
    fresh = model(spec, img_size=(96, 32))
    fresh.load_state_dict(net.state_dict())
    torch.testing.assert_close(fresh(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", ["axial", "mixed", "learned", "none", "sincos"])
def test_padding_keeps_the_coordinates_of_the_image(spec):
    net = model(spec, dynamic_img_size=True, dynamic_img_pad=True)
    padded = nn.functional.pad(images(60, 50), (0, 14, 0, 4))
    torch.testing.assert_close(net(images(60, 50)), net(padded), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_patch_dropout_drops_the_coordinates_too(spec):
    net, x = model(spec, patch_drop_rate=0.5, reg_tokens=1).train(), images(64, 64)
    keep = torch.tensor([[5, 0, 7, 12, 15, 3, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8]])
    class_and_register = 2

    def forward(indices):
        net.patch_drop.forward = lambda tokens: (
            torch.cat((tokens[:, :2], tokens[:, 2:].gather(1, indices[..., None].expand(-1, -1, 64))), 1),
            indices,
        )
        return net(x)

    assert net.num_prefix_tokens == class_and_register
    torch.testing.assert_close(forward(keep), forward(keep.flip(1)), rtol=1e-4, atol=1e-5)
    everything = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(s)) for s in (0, 1)])
    torch.testing.assert_close(forward(everything), net.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_checkpointing_two_views_before_one_backward(spec):
    net, views = model(spec, dynamic_img_size=True).train(), (images(64, 64), images(32, 64))
    gradients = []
    for checkpointing in (False, True):
        net.set_grad_checkpointing(checkpointing)
        net.zero_grad()
        sum(net(view).square().sum() for view in views).backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_weights_go_through_timms_checkpoint_path(spec, tmp_path):
    from safetensors.torch import save_file

    net = model(spec)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    path = str(tmp_path / "model.safetensors")
    again = timm.create_model(NAME, position=spec, num_classes=5, checkpoint_path=path).eval()
    assert torch.equal(again(images(64, 64)), net(images(64, 64)))
    wider = timm.create_model(NAME, position=spec, num_classes=5, img_size=96, checkpoint_path=path).eval()
    net.set_input_size((96, 96))
    torch.testing.assert_close(wider(images(96, 96)), net(images(96, 96)), rtol=1e-5, atol=1e-5)


def test_blocks_cannot_run_without_positions():
    net = model()
    tokens = torch.randn(1, 17, 64)
    with pytest.raises(NotImplementedError):
        net.blocks(tokens)
    with pytest.raises(TypeError, match="encoding"):
        net.blocks[0](tokens)


def test_only_learned_tensors_are_stored():
    assert list(model("learned + mixed").buffers()) == []
    assert set(model("axial").state_dict()) == set(model("none").state_dict())
    assert set(model("mixed").state_dict()) - set(model("none").state_dict()) == {"position.freqs"}
    assert model("mixed").position.freqs.shape == (4, 2, 2, 16)


def test_position_parameters_learn_like_the_stem_and_do_not_decay():
    net = model("learned + mixed")
    positional = [p for n, p in net.named_parameters() if n.startswith("position.")]
    groups = param_groups_weight_decay(net, 0.05, no_weight_decay_list=net.no_weight_decay())
    undecayed = [id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]]
    assert all(id(p) in undecayed for p in positional)
    layers = param_groups_layer_decay(net, layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in layers for p in g["params"]}
    assert {scale[id(p)] for p in positional} == {scale[id(net.patch_embed.proj.weight)]}


def test_a_cast_model_computes_the_same_tables_and_returns_its_own_dtype():
    net, x = model("mixed + learned"), images(64, 64)
    cast = copy.deepcopy(net).bfloat16()
    assert cast.position.parts[0].freqs.dtype == torch.float32
    assert cast(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(cast.float()(x), net(x), rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net(x).float(), net(x.float()).float(), rtol=0, atol=0)


def test_a_model_from_the_meta_device_with_loaded_weights_is_the_same():
    net = model("mixed + learned")
    with torch.device("meta"):
        ghost = timm.create_model(NAME, position="mixed + learned", num_classes=5)
    ghost = ghost.to_empty(device="cpu").eval()
    ghost.load_state_dict(net.state_dict())
    assert torch.equal(ghost(images(64, 64)), net(images(64, 64)))
    ghost.to_empty(device="cpu").init_weights()
    assert all(p.isfinite().all() for p in ghost.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"global_pool": "avg", "class_token": False},
        {"global_pool": "map"},
        {"global_pool": "prr"},
        {"reg_tokens": 4, "no_embed_class": True, "pos_embed": "learn"},
        {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
        {"pre_norm": True, "final_norm": False},
        {"init_values": 0.1, "drop_path_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "pos_drop_rate": 0.1},
        {"dtype": torch.bfloat16},
        {"weight_init": "jax"},
        {"position_unit": "centered", "position_origin": "center"},
        {"position_origin": [1.5, 1.5]},
        {"features_only": True, "out_indices": [1, 3]},
    ],
)
def test_options_of_timm_work(options):
    torch.manual_seed(0)
    net = timm.create_model(NAME, position="mixed", num_classes=5, **options).train()
    x = images(64, 64).to(options.get("dtype", torch.float32))
    out = net(x)
    if "features_only" in options:
        assert [tuple(o.shape) for o in out] == [(2, 64, 4, 4)] * 2
    else:
        out.float().square().sum().backward()
        assert out.shape == (2, 5)
        assert all(p.grad is not None for p in net.parameters())


def test_masks_reach_every_block():
    net, x = model(), images(64, 64)
    mask = torch.ones(17, 17, dtype=torch.bool)
    torch.testing.assert_close(net(x, attn_mask=mask), net(x), rtol=1e-5, atol=1e-6)
    mask[:, 9:] = False
    half = x.clone()
    half[:, :, 32:] = 0
    assert (net(x, attn_mask=mask) - net(x)).abs().max() > 1e-3
    torch.testing.assert_close(
        net.forward_features(x, is_causal=True)[:, :9], net.forward_features(half, is_causal=True)[:, :9]
    )


@pytest.mark.parametrize("spec", SPECS)
def test_unfused_attention_is_the_same(spec):
    net, x = model(spec), images(64, 64)
    want = net(x)
    for block in net.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-5)


def test_intermediates_end_where_the_features_do():
    net, x = model("mixed", dynamic_img_size=True), images(64, 32)
    features, maps = net.forward_intermediates(x, indices=[0, 3], norm=True)
    torch.testing.assert_close(features, net.forward_features(x))
    assert [tuple(m.shape) for m in maps] == [(2, 64, 4, 2)] * 2
    torch.testing.assert_close(maps[1].flatten(2).transpose(1, 2), features[:, 1:])
    with pytest.raises(ValueError, match="output_fmt is NCHW or NLC, got 'CHW'"):
        net.forward_intermediates(x, output_fmt="CHW")
    dropping = model(patch_drop_rate=0.5).train()
    with pytest.raises(ValueError, match="dropped patches leave no map; use output_fmt='NLC'"):
        dropping.forward_intermediates(images(64, 64))


def test_video_signals_and_volumes_are_the_same_class():
    video = RopeViT((4, 32, 48), (2, 16, 16), position="axial(share='first')", embed_dim=48, depth=2, num_heads=3)
    x = images(4, 32, 48)
    assert video(x).shape == (2, 1000)
    conv = nn.Conv3d(3, 48, (2, 16, 16), stride=(2, 16, 16))
    with torch.no_grad():
        conv.weight.copy_(video.patch_embed.proj.weight.view_as(conv.weight))
        conv.bias.copy_(video.patch_embed.proj.bias)
    want = conv(x).movedim(1, -1)
    torch.testing.assert_close(video.patch_embed(x), want, rtol=1e-4, atol=1e-5)
    assert video.eval().forward_intermediates(x)[1][0].shape == (2, 48, 2, 2, 3)
    free = {"dynamic_img_size": True, "dynamic_img_pad": True}
    signal = timm.create_model(NAME, position="axial", img_size=(60,), patch_size=(4,), in_chans=2, **free).eval()
    assert signal(images(61, channels=2)).shape == (2, 1000)
    torch.testing.assert_close(
        signal(images(61, channels=2)), signal(nn.functional.pad(images(61, channels=2), (0, 3)))
    )
    volume = RopeViT((4, 4, 4, 4), (2, 2, 2, 2), 1, position="axial", embed_dim=32, depth=1, num_heads=2)
    assert volume(images(4, 4, 4, 4, channels=1)).shape == (2, 1000)
    with pytest.raises(ValueError, match=re.escape("patches of (2, 16, 16) cannot be resized on 3 axes")):
        video.set_input_size(patch_size=(1, 16, 16))


def test_traced_models_contain_no_complex_numbers():
    net, x = model("mixed"), images(64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates tracing, which also warns about constant sizes
        traced = torch.jit.trace(net, x, check_trace=False)
    assert "complex" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"position": "axail"}, ValueError, "no position scheme is called 'axail'; did you mean axial"),
        ({"position_unit": "px"}, ValueError, "unknown unit 'px'; expected one of index, centered"),
        ({"position_origin": (1, 2, 3)}, ValueError, "origin (1, 2, 3) gives 3 numbers for a grid (4, 4) of 2 axes"),
        ({"img_size": 65}, ValueError, "img_size 65 x 65 does not divide into patches of 16 x 16"),
        ({"img_size": (64, 0)}, ValueError, "img_size must be a positive whole number or 2 of them"),
        ({"patch_size": (16, 16.0)}, ValueError, "patch_size must be a positive whole number or 2 of them"),
        ({"embed_dim": 65}, ValueError, "width 65 does not divide by 2 heads"),
        ({"embed_dim": 10}, ValueError, "head_dim must be even, got 5"),
        ({"embed_dim": 12}, ValueError, "head_dim 6 does not divide into equal pairs for 2 axes"),
        ({"attn_layer": "diff"}, TypeError, "RopeViT chooses its own attn_layer; leave the option out"),
        ({"nonsense": 1}, TypeError, "nonsense"),
    ],
)
def test_invalid_options_are_refused(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        timm.create_model(NAME, **options)


@pytest.mark.parametrize(
    ("options", "x", "coords", "message"),
    [
        (
            {},
            images(64, 96),
            None,
            "the model takes images of 64 x 64, got 64 x 96; create it with dynamic_img_size=True",
        ),
        ({"dynamic_img_size": True}, images(64, 65), None, "images of 64 x 65 do not divide into patches of 16 x 16"),
        ({}, images(64, 64, channels=1), None, "the model takes images of 3 channels, got shape (2, 1, 64, 64)"),
        ({}, images(64), None, "expected images (batch, channels, 2 sizes), got shape (2, 3, 64)"),
        (
            {},
            images(64, 64),
            grid((3, 4)),
            "coordinates of shape (12, 2) do not fit 2 x 16 patches; expected (16, 2)",
        ),
        ({}, images(64, 64), grid((4, 4)).expand(3, -1, -1), "coordinates of shape (3, 16, 2) do not fit 2 x 16"),
        ({}, images(64, 64), grid((2, 2, 4)), "coordinates have 3 axes, but the positions were made for 2"),
        ({}, images(64, 64), grid((4, 4)) / 0, "coordinates of 16 tokens are NaN or infinite"),
    ],
)
def test_invalid_inputs_are_refused(options, x, coords, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model(**options)(x, coords=coords)


def test_a_hook_on_the_projection_may_keep_its_output():
    net, x = model("axial"), images(64, 64)
    plain, kept = net(x), []
    attention = net.blocks[1].attn
    with torch.no_grad():
        handles = [
            attention.qkv.register_forward_hook(lambda module, inputs, out: kept.append(out)),
            attention.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0])),
        ]
        torch.testing.assert_close(net(x), plain, rtol=0, atol=0)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(kept[1], attention.qkv(kept[0]), rtol=0, atol=0)  # not rotated
    outputs = []
    with (
        torch.no_grad(),
        torch.nn.modules.module.register_module_forward_hook(lambda m, i, out: outputs.append((m, out))),
    ):
        net(x)
    kept = next(out for module, out in outputs if module is attention.qkv)
    first = next(out for module, out in outputs if module is net.blocks[1].norm1)
    torch.testing.assert_close(kept, attention.qkv(first), rtol=0, atol=0)


class Recording(torch.nn.Linear):
    """A layer that keeps its output."""

    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


@pytest.mark.parametrize("wrap", [Recording, lambda *sizes: torch.nn.Sequential(Recording(*sizes)), torch.nn.Linear])
def test_outputs_that_a_projection_keeps_are_not_rotated(wrap):
    net, x = model("axial"), images(64, 64)
    attention = net.blocks[1].attn
    plain, inputs = attention.qkv, []
    attention.qkv = wrap(plain.in_features, plain.out_features)
    attention.qkv.load_state_dict(
        {key: plain.state_dict()[key.removeprefix("0.")] for key in attention.qkv.state_dict()}
    )
    want = net(x)
    attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        torch.testing.assert_close(net(x), want, rtol=0, atol=1e-6)
        for module in attention.qkv.modules():
            if isinstance(module, Recording):
                torch.testing.assert_close(module.kept, plain(inputs[0]), rtol=0, atol=1e-6)


def test_extracted_projections_are_not_rotated():
    from timm.models._features_fx import create_feature_extractor

    net, x = model("axial").eval(), images(64, 64)
    names = {"blocks.0.norm1": "before", "blocks.0.attn.qkv": "after", "head": "head"}
    with torch.no_grad():
        features = create_feature_extractor(net, names)(x)
        torch.testing.assert_close(features["after"], net.blocks[0].attn.qkv(features["before"]), rtol=0, atol=0)
        torch.testing.assert_close(features["head"], net(x), rtol=0, atol=1e-6)


def test_unknown_arguments_and_images_of_bytes_are_refused():
    with pytest.raises(TypeError, match="RopeViT has no argument 'positions'; did you mean position"):
        timm.create_model("vit_rope_test_patch16_64", positions="axial")
    with pytest.raises(TypeError, match="ConvertedViT has no argument 'qk_norms'; did you mean qk_norm"):
        timm.create_model("vit_rope_test_patch16_64", num_kv_heads=1, qk_norms=True)
    net = timm.create_model("vit_rope_test_patch16_64")
    with pytest.raises(TypeError, match=r"normalized as in training, got torch\.uint8"):
        net(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
