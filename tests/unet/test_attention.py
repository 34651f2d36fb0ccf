"""The attention of U-Nets with positions: that of diffusers, with coordinates from the map."""

import copy

import pytest
import torch
from diffusers import (
    UNet3DConditionModel,
)
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from tests.unet.helpers import (
    SELF,
    SMALL,
    SPECS,
    call,
    gap,
    log,
    plain,
    rope,
    text,
    with_large_tables,
    without_rotation,
)
from vit_rope.positions import Layout, build
from vit_rope.unet import (
    RopeUNet2DModel,
    add_positions,
)
from vit_rope.unet.attention import PositionAttention, PositionProcessor
from vit_rope.unet.maps import build_at, map_layout


@pytest.mark.parametrize("make", [plain, text])
@pytest.mark.parametrize("size", [(16, 16), (8, 24), (20, 12)])
@torch.no_grad()
def test_none_is_bit_identical_to_stock_and_the_identity_rotation_close(make, size):
    model = make()
    stock = call(model, *size)
    assert torch.equal(call(add_positions(copy.deepcopy(model), "none"), *size), stock)
    for spec in ("axial", "mixed"):
        assert gap(call(without_rotation(add_positions(copy.deepcopy(model), spec)), *size), stock) <= 1e-6
        assert gap(call(add_positions(copy.deepcopy(model), spec), *size), stock) > 1e-3


@torch.no_grad()
def test_the_conditional_unet_keeps_its_odd_sizes():
    model = text()
    stock = call(model, 13, 9)
    assert torch.equal(call(add_positions(model, "none"), 13, 9), stock)


ATTENTION = {
    "bare": {},
    "group norm and residual": {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 1.4},
    "q/k norm": {"qk_norm": "rms_norm", "bias": True},
    "wide heads": {"heads": 3, "dim_head": 16},
    "spatial norm": {"spatial_norm_dim": 6, "norm_num_groups": 4},
}


def attention(spec="none", grid=(4, 6), unit="index", origin=0.0, level=0, **options):
    torch.manual_seed(0)
    module = Attention(32, **{"heads": 2, "dim_head": 8} | options)
    size = tuple(n * 2**level for n in grid)
    layout = map_layout(32, module.heads, module.inner_dim // module.heads, level, size, unit, origin)
    position = build_at("attention", level, spec, layout, "")
    module.__class__, module.layout, module.position = PositionAttention, layout, position
    module.set_processor(PositionProcessor())
    return module


@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
@torch.no_grad()
def test_every_option_of_attention_behaves_as_stock(options):
    positioned, x = attention(**options), torch.randn(2, 32, 4, 6)
    stock = Attention(32, **{"heads": 2, "dim_head": 8} | options)
    stock.load_state_dict(positioned.state_dict())
    assert type(stock.processor) is AttnProcessor2_0
    norm = {"temb": torch.randn(2, 6, 2, 3)} if "spatial_norm_dim" in options else {}
    assert torch.equal(positioned(x, **norm), stock(x, **norm))
    if not norm:
        tokens, mask = x.flatten(2).transpose(1, 2), torch.randn(2, 1, 24)
        wanted = stock(tokens, attention_mask=mask)
        if not options.get("residual_connection"):
            assert torch.equal(positioned(tokens, attention_mask=mask, grid=(4, 6)), wanted)


@torch.no_grad()
def test_axial_attention_by_hand_of_maps_and_of_their_tokens():
    module, x = attention("axial(base=10)"), torch.randn(1, 32, 4, 6)
    tokens = x[0].flatten(1).T
    q, k, v = (project(tokens).view(24, 2, 8).double() for project in (module.to_q, module.to_k, module.to_v))
    speeds = torch.tensor([1.0, 10**-0.5], dtype=torch.float64)
    cells = torch.tensor([(row, column) for row in range(4) for column in range(6)], dtype=torch.float64)
    theta = torch.cat((cells[:, :1] * speeds, cells[:, 1:] * speeds), dim=1)[:, None]
    rotation = torch.polar(torch.ones_like(theta), theta)
    q, k = (torch.view_as_complex(t.unflatten(-1, (4, 2))) * rotation for t in (q, k))
    weights = (torch.einsum("mhj,nhj->hmn", q, k.conj()).real / 8**0.5).softmax(-1)
    wanted = module.to_out[0](torch.einsum("hmn,nhd->mhd", weights, v).flatten(1).float())
    assert gap(module(x)[0].flatten(1).T, wanted) < 1e-6
    assert gap(module(tokens[None], grid=(4, 6))[0], wanted) < 1e-6


@torch.no_grad()
def test_transformers_pass_their_grid_to_self_attention_only(caplog):
    model, seen = add_positions(text(), "axial"), {}
    for name, module in model.named_modules():
        if isinstance(module, PositionAttention):
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: seen.update({name: kwargs}), with_kwargs=True
            )
    with log(caplog):
        call(model, 8, 24)
    grids = {name.split(".")[0]: tuple(kwargs["grid"]) for name, kwargs in seen.items()}
    assert grids == {"down_blocks": (8, 24), "mid_block": (4, 12), "up_blocks": (8, 24)}
    assert caplog.text == ""  # cross-attention would warn here of an unknown argument "grid"


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_shifting_all_coordinates_changes_nothing_if_a_scheme_is_relative(spec):
    x = torch.randn(2, 32, 4, 6)
    original, shifted = attention(spec), attention(spec, origin=(2.3, -1.7))
    shifted.load_state_dict(original.state_dict())
    moved = gap(original(x), shifted(x))
    if original.position.relative:
        assert moved < 1e-5
    elif "sincos" in spec:  # a learned table is indexed by cells, which do not move
        assert moved > 1e-3


@pytest.mark.parametrize("make", [plain, text])
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != "none"])
@torch.no_grad()
def test_every_scheme_changes_the_output_at_sizes_it_was_not_made_for(make, spec):
    model = make()
    positioned = with_large_tables(add_positions(copy.deepcopy(model), spec))
    for size in ((16, 16), (8, 24), (32, 16)):
        assert gap(call(positioned, *size), call(model, *size)) > 1e-4


def test_only_self_attention_over_maps_has_positions():
    model = add_positions(text(), "axial")
    positioned = {name for name, module in model.named_modules() if isinstance(module, PositionAttention)}
    assert positioned == {f"{block}{SELF}" for block in ("down_blocks.0", "mid_block", "up_blocks.1")} | {
        "up_blocks.1.attentions.1.transformer_blocks.0.attn1"
    }
    video = UNet3DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=12,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    names = [name for name, module in add_positions(video, "axial").named_modules() if hasattr(module, "layout")]
    assert len(names) == 4
    assert not any("temp_attentions" in name or "attn2" in name for name in names)


def test_all_added_parameters_belong_to_positions():
    keys = set(plain().state_dict())
    for spec in SPECS:
        more = set(add_positions(plain(), spec).state_dict()) - keys
        assert all(".position." in key for key in more)
        assert bool(more) == build(spec, Layout(width=16, heads=2, grid=(4, 4), depth=1)).learned


@pytest.mark.parametrize("make", [plain, text])
@pytest.mark.parametrize("spec", ["mixed", "learned"])
def test_every_parameter_of_a_scheme_gets_a_gradient(make, spec):
    model = add_positions(make(), spec)
    call(model).square().mean().backward()
    grads = [p.grad for name, p in model.named_parameters() if ".position." in name]
    assert grads
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_levels_share_one_coordinate_system():
    for unit in ("pixel", "centered", "centered_shorter", "centered_longer"):
        for origin in (0.0, "center", (3.0, -1.0)):
            fine = map_layout(8, 1, 8, 0, (8, 16), unit, origin).coords().view(4, 2, 8, 2, 2).mean((1, 3))
            coarse = map_layout(8, 1, 8, 1, (8, 16), unit, origin).coords().view(4, 8, 2)
            torch.testing.assert_close(coarse, fine, rtol=0, atol=1e-6)
    pixel = map_layout(8, 1, 8, 2, (16, 16), "pixel", 0.0)
    assert pixel.coords().view(4, 4, 2)[0, :, 1].tolist() == [1.5, 5.5, 9.5, 13.5]
    torch.testing.assert_close(pixel.cell(pixel.coords()), map_layout(8, 1, 8, 2, (16, 16), "index", 0.0).coords())
    index = map_layout(8, 1, 8, 2, (16, 16), "index", 0.0)
    assert index.coords().view(4, 4, 2)[0, :, 1].tolist() == [0, 1, 2, 3]


def test_each_attention_knows_the_grid_of_its_level():
    types = ("AttnDownBlock2D",) * 3, ("AttnUpBlock2D",) * 3
    for size, grids in ((16, [(16, 16), (8, 8), (4, 4)]), ([16, 24], [(16, 24), (8, 12), (4, 6)])):
        model = RopeUNet2DModel(
            **SMALL
            | {
                "sample_size": size,
                "block_out_channels": (16, 16, 32),
                "down_block_types": types[0],
                "up_block_types": types[1],
                "position": "learned",
            }
        )
        tables = {name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith("table")}
        for level, grid in enumerate(grids):
            width = (16, 16, 32)[level]
            assert tables[f"down_blocks.{level}.attentions.0.position.table"] == (*grid, width)
            assert tables[f"up_blocks.{2 - level}.attentions.1.position.table"] == (*grid, width)
        assert tables["mid_block.attentions.0.position.table"] == (*grids[2], 32)


@torch.no_grad()
def test_units_and_origins_reach_the_attention():
    outputs = []
    for unit, origin in (("index", 0.0), ("pixel", 0.0), ("centered", 0.0)):
        outputs.append(call(add_positions(plain(), "axial", unit, origin)))
        torch.manual_seed(0)
    assert gap(outputs[0], outputs[1]) > 1e-3
    assert gap(outputs[0], outputs[2]) > 1e-3
    torch.manual_seed(0)
    model = add_positions(plain(), "axial", origin="center")
    assert gap(call(model), outputs[0]) < 1e-6  # axial is relative


def test_replacing_the_processor_raises():
    model = add_positions(text(), "axial")
    before = call(model)
    drop = r"SlicedAttnProcessor would drop the positions of this attention: .* call remove_positions first"
    with pytest.raises(ValueError, match=drop):
        model.set_attention_slice(1)
    with pytest.raises(ValueError, match="AttnProcessor would drop the positions"):
        model.set_attn_processor(AttnProcessor())
    with pytest.raises(ValueError, match="PositionProcessor"):
        model.set_default_attn_processor()
    with pytest.raises(ValueError, match="cannot fuse its projections; call remove_positions first"):
        model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="would drop the positions"):
        model.disable_xformers_memory_efficient_attention()
    model.set_attn_processor(model.attn_processors)  # the same processors may be set again
    assert torch.equal(call(model), before)
    model = add_positions(plain(), "axial")
    model.mid_block.attentions[0].processor = AttnProcessor2_0()  # without set_processor
    with pytest.raises(ValueError, match="AttnProcessor2_0 would drop the positions"):
        call(model)


def test_attention_with_positions_needs_a_grid_and_no_other_keys():
    module, x = attention("axial"), torch.randn(2, 24, 32)
    with pytest.raises(ValueError, match=r"give it a map \(B, C, H, W\), or tokens and grid"):
        module(x)
    with pytest.raises(ValueError, match="keys from elsewhere"):
        module(x, encoder_hidden_states=x, grid=(4, 6))
    with pytest.raises(ValueError, match="is for 12 tokens, but there are 24"):
        module(x, grid=(4, 3))


@torch.no_grad()
def test_channels_last():
    model = with_large_tables(rope("mixed + learned"))
    before = call(model)
    assert gap(call(model.to(memory_format=torch.channels_last)), before) < 1e-5


@pytest.mark.parametrize("make", [plain, text])
def test_gradient_checkpointing_gives_the_same_gradients_even_if_shapes_alternate(make):
    model = add_positions(make(), "learned + mixed").train()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        first = call(model, 8, 16)
        second = call(model, 16, 8)  # as many tokens on a different grid, before the first is run again
        (first.square().sum() + second.square().sum()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.enable_gradient_checkpointing()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize(
    ("make", "backend"), [(plain, "eager"), (text, "eager"), pytest.param(plain, "aot_eager", marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_one_graph_serves_all_sizes(make, backend):
    torch._dynamo.reset()
    model = add_positions(make(), "learned + mixed")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((8, 24), (16, 16), (24, 8), (20, 12)):
            assert gap(call(compiled, *size), call(model, *size)) < 1e-5


@torch.no_grad()
def test_export_takes_all_sizes():
    model = rope("axial + learned")
    batch, high, wide = (torch.export.Dim(name, max=32) for name in ("batch", "high", "wide"))
    shapes = {"sample": {0: batch, 2: 2 * high, 3: 2 * wide}, "timestep": {0: batch}}
    program = torch.export.export(model, (torch.randn(2, 1, 16, 8), torch.tensor([3, 9])), dynamic_shapes=shapes)
    others = torch.randn(3, 1, 8, 24), torch.tensor([1, 2, 3])
    assert gap(program.module()(*others).sample, model(*others).sample) < 1e-5


@torch.no_grad()
def test_projections_with_hooks_or_their_own_forward_are_called():
    positioned = add_positions(plain(), "axial")
    attention = positioned.mid_block.attentions[0]
    want, seen = call(positioned, 16, 16), []
    handle = attention.to_k.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0], out)))
    assert gap(call(positioned, 16, 16), want) < 1e-5
    handle.remove()
    tokens, keys = seen[0]
    torch.testing.assert_close(keys, attention.to_k(tokens), rtol=0, atol=0)  # not rotated
    attention.to_k.forward = lambda tokens: keys * 0  # as tools that offload weights do
    assert gap(call(positioned, 16, 16), want) > 1e-6
