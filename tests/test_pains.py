"""Problems that users reported with other rotary models, one test for each.

The comment behind a test's name says where it was reported; numbers are those of our list. The
problem of ranks with different tables (09) is tested with the other tests of several processes,
that of results without a recipe (42) with the README.
"""

import copy
import re
from pathlib import Path

import pytest
import timm
import torch
from timm.models._hub import save_for_hf
from timm.optim import param_groups_weight_decay
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from tests import oracles
from tests.helpers import images, randomised
from vit_rope.ops.rotate import rotate
from vit_rope.positions import Layout, build
from vit_rope.positions.coords import grid

NAME = "vit_rope_test_patch16_64"
LAYOUT = Layout(16, 2, (2, 3))
ROTARY = ["axial", "mixed", "dinov3", "reference(xy(axial), grid=(4, 4))"]


def model(position="axial", **options):
    torch.manual_seed(0)
    return randomised(timm.create_model(NAME, position=position, num_classes=5, dynamic_img_size=True, **options))


def rotation_table(net, shape=(4, 4)):
    return net.position(grid(shape), grid=list(shape)).q.tables()[0].detach()


@pytest.mark.parametrize("spec", ROTARY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pain_01_half_precision_tables(spec, dtype):  # gpt-neox #1003
    net = model(spec)
    assert torch.equal(rotation_table(copy.deepcopy(net).to(dtype), (128, 16)), rotation_table(net, (128, 16)))


@pytest.mark.parametrize("spec", ROTARY)
def test_pain_02_a_round_trip_through_bfloat16_rounds_no_frequency(spec):  # transformers #25681, Megatron-LM #744
    net = model(spec)
    assert torch.equal(rotation_table(copy.deepcopy(net).bfloat16().float()), rotation_table(net))


def test_pain_03_far_positions_in_bfloat16():  # x-transformers #210
    q, coords = torch.randn(1, 1, 1, 32), torch.tensor([[2048.0, 1023.0]])
    table = build("axial", Layout(64, 2, (4, 4)))(coords).q.tables()[0]
    want = rotate(q.bfloat16().float(), table)
    torch.testing.assert_close(rotate(q.bfloat16(), table).float(), want, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("spec", ROTARY)
def test_pain_04_autocast_does_not_round_angles(spec):  # transformers #29285, diffusers #13920
    net = model(spec)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rotation_table(net), rotation_table(net.float()))


def test_pain_05_coordinates_in_half_precision_raise_an_error():  # diffusers Flux
    with pytest.raises(TypeError, match="cannot tell neighbours apart beyond 256; make them float32"):
        model()(images((64, 64)), coords=grid((4, 4)).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pain_06_output_dtype_is_input_dtype(dtype):  # xformers #325, transformers #24261
    for spec in ROTARY:
        assert model(spec).to(dtype)(images((64, 64)).to(dtype)).dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "ulp"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_pain_07_inductor_matches_eager(dtype, ulp):  # torchtitan PR #2575
    x = torch.randn(2, 2, 6, 16, dtype=dtype)
    table = build("axial", Layout(32, 2, (2, 3)))(100 * grid((2, 3))).q.tables()[0]
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(rotate)(x, table), rotate(x, table), rtol=ulp, atol=1e-5)


@pytest.mark.parametrize("spec", ROTARY)
def test_pain_08_meta_to_empty(spec):  # transformers #45902
    net = model(spec)
    empty = timm.create_model(NAME, position=spec, num_classes=5, dynamic_img_size=True, device="meta")
    empty = empty.to_empty(device="cpu").eval()
    empty.load_state_dict(net.state_dict())
    assert torch.equal(empty(images((64, 64))), net(images((64, 64))))


def test_pain_10_keys_of_the_state_dict():  # gpt-fast #42, llama2.c #266, transformers #35255
    plain = set(model("none").state_dict())
    for spec in ("axial", "dinov3", "reference(axial)", "flat"):
        assert set(model(spec).state_dict()) == plain
    assert set(model("mixed").state_dict()) - plain == {"position.freqs"}


@pytest.mark.parametrize("size", [(384, 384), (160, 256)])
def test_pain_11_weights_of_224_load_strictly_at_other_sizes(size):  # rope-vit #31, #10
    for spec in ("mixed", "axial + learned"):
        net = model(spec, img_size=224)
        other = timm.create_model(NAME, position=spec, num_classes=5, img_size=size).eval()
        other.load_state_dict(net.state_dict(), strict=True)
        torch.testing.assert_close(other(images(size)), net(images(size)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 14), (14, 6)])
def test_pain_12_images_that_are_not_square(shape):  # EVA #93, dinov2 #506
    net = model("axial")
    swapped = copy.deepcopy(net)
    swapped.position = build("xy(axial)", Layout(64, 2, (4, 4)))
    x = images([16 * n for n in shape])
    with torch.no_grad():
        swapped.patch_embed.proj.weight.copy_(net.patch_embed.proj.weight.transpose(2, 3))
    torch.testing.assert_close(swapped(x.transpose(2, 3)), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", ["axial", "xy(axial)"])
def test_pain_13_golden_values_of_a_grid_that_is_not_square(spec):  # timm PR #2541
    scheme = build(spec.replace("axial", "axial(base=10)"), LAYOUT)
    table = scheme(grid((2, 3))).q.tables()[0][0, :, 0]
    for token, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]):
        first, last = (row, column) if spec == "axial" else (column, row)
        angles = torch.tensor([first * 1.0, first * 10**-0.5, last * 1.0, last * 10**-0.5])
        torch.testing.assert_close(table[token, :, 0], angles.cos())
        torch.testing.assert_close(table[token, :, 1], angles.sin())


@pytest.mark.parametrize("pairs", ["half", "axis"])
def test_pain_14_pairs_in_the_order_of_other_weights(pairs):  # timm PR #2692, transformers #25199
    layout, coords = Layout(32, 2, (3, 4)), grid((3, 4))
    interleaved, other = build("axial", layout), build(f'axial(pairs="{pairs}")', layout)
    order = torch.arange(16).view(*((2, 8) if pairs == "half" else (2, 2, 4))).transpose(-1, -2).flatten()
    q, k = torch.randn(2, 1, 2, 12, 16)
    scores = []
    for scheme, (a, b) in ((other, (q, k)), (interleaved, (q[..., order], k[..., order]))):
        encoding = scheme(coords)
        a, b = (rotate(t, encoding.q.tables()[0], encoding.stride) for t in (a, b))
        scores.append(a @ b.transpose(-1, -2))
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-5)


def test_pain_15_patch_dropout():  # timm #2549
    for spec in ROTARY:
        net = model(spec, patch_drop_rate=0.5).train()
        net(images((64, 96))).sum().backward()
        assert all(p.grad is not None for p in net.parameters())


def test_pain_16_a_subset_of_tokens():  # stable-pretraining PR #393
    position, coords = build("mixed", Layout(64, 2, (4, 4))), grid((4, 4))
    kept = torch.tensor([[3, 7, 1], [15, 0, 8]])
    full, subset = (position(each).q.tables()[0] for each in (coords, coords[kept]))
    torch.testing.assert_close(subset, torch.stack([full[0][rows] for rows in kept]))


@pytest.mark.parametrize("registers", [0, 4])
def test_pain_17_class_and_register_tokens_stay_unrotated(registers):  # x-transformers #249, rope-vit #6
    encoding = build("axial", LAYOUT)(grid((2, 3)), prefix=1 + registers)
    assert encoding.prefix == (1 + registers, 1 + registers)
    net, kept = model("axial", reg_tokens=registers), {}
    net.blocks[0].attn.register_forward_pre_hook(lambda _, args: kept.update(encoding=args[1]))
    net(images((64, 64)))
    assert kept["encoding"].prefix[0] == 1 + registers
    assert kept["encoding"].q.tables()[0].shape[1] == 16


def test_pain_18_learned_frequencies_three_steps():  # rotary-embedding-torch #18
    net = model("mixed").train()
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    before = net.position.freqs.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        net(images((64, 64))).square().sum().backward()
        optimizer.step()
    assert (net.position.freqs - before).abs().amax(dim=(1, 2, 3)).min() > 0  # in every layer


@pytest.mark.parametrize("spec", ["axial", "mixed", "learned + mixed", "gate(learned)"])
def test_pain_19_every_parameter_gets_a_gradient(spec):  # rotary-embedding-torch #37, transformers #21118
    net = model(spec).train()
    net(images((64, 64))).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("spec", [*ROTARY, "learned"])
def test_pain_20_another_device_after_a_call(spec):  # rotary-embedding-torch PR #48, transformers #33391
    net = model(spec).eval()
    net(images((64, 64)))
    moved = copy.deepcopy(net).to("meta")
    assert moved(images((64, 64)).to("meta")).device.type == "meta"
    assert all(p.device.type == "meta" for p in moved.parameters())
    with torch.no_grad():
        assert torch.equal(net(images((64, 64))), net(images((64, 64))))


def test_pain_21_training_after_inference_mode():  # flash-attention PR #299
    net = model("mixed")
    with torch.inference_mode():
        net(images((64, 64)))
    net.train()(images((64, 64))).sum().backward()


def test_pain_22_deepcopy_after_a_training_step():  # FasterViT #24, ultralytics #19992
    net = model("mixed").train()
    net(images((64, 64))).sum().backward()
    assert torch.equal(copy.deepcopy(net).eval()(images((64, 64))), net.eval()(images((64, 64))))


def test_pain_23_results_never_depend_on_earlier_calls():  # rotary-embedding-torch 0.9.1, owl-wms #50 (41)
    net = model("mixed + learned")
    want = {size: net(images(size)) for size in ((64, 64), (32, 96), (96, 32))}
    net(images((128, 64)), coords=grid((8, 4)) * 3)
    for size, out in reversed(want.items()):
        assert torch.equal(net(images(size)), out)
    assert not list(net.buffers())


@pytest.mark.parametrize("spec", ROTARY)
def test_pain_24_autocast_of_the_current_device(spec):  # rotary-embedding-torch #46
    scheme = build(spec, Layout(64, 2, (4, 4)))
    coords = grid((4, 4)) + 500
    want = scheme(coords).q.tables()[0].detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scheme(coords).q.tables()[0].detach(), want)


def test_pain_25_six_sizes_in_two_graphs():  # pytorch #150702, quack #150
    torch._dynamo.reset()
    counter = CompileCounter()
    net = torch.compile(model("axial", depth=1).eval(), backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in ((64, 64), (96, 64), (64, 128), (80, 80), (112, 96), (48, 64)):
            net(images(size))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("spec", ROTARY)
def test_pain_26_a_compiled_model_gives_the_same_output(spec):  # flash-attention #1680, eole #16
    torch._dynamo.reset()
    net = model(spec, depth=2).eval()
    with torch.no_grad():
        want = net(images((64, 96)))
        torch.testing.assert_close(torch.compile(net, backend="aot_eager")(images((64, 96))), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("spec", ROTARY)
def test_pain_27_28_a_dynamic_export_without_complex_numbers(spec):  # sam2 #186, onnx #6480; timm's DINOv3
    net = model(spec).eval()
    height, width = (16 * torch.export.Dim(name, min=2, max=32) for name in ("height", "width"))
    shapes = {"x": {2: height, 3: width}}
    exported = torch.export.export(net, (images((64, 96)),), dynamic_shapes=shapes)
    values = [node.meta["val"] for node in exported.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert values
    assert not any(value.is_complex() for value in values)
    for size in ((64, 64), (96, 48), (128, 160)):
        got, want = exported.module()(images(size)).detach(), net(images(size)).detach()
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_pain_29_no_float64_reaches_a_device():  # diffusers #9047
    class RefuseFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            assert not (isinstance(out, torch.Tensor) and out.dtype == torch.float64), function
            return out

    for spec in ROTARY:
        net, x = model(spec), images((64, 64))
        with RefuseFloat64():
            net(x)


@pytest.mark.parametrize("depth", [2, 8])
def test_pain_30_31_one_table_per_forward_pass(depth):  # rope-vit #8, torchtune PR #1973
    net = timm.create_model(NAME, position="axial", depth=depth).eval()
    encodings = []
    net.position.register_forward_hook(lambda module, arguments, encoding: encodings.append(encoding))
    with torch.no_grad():
        net(images((64, 64)))
    (table,) = encodings[0].q.rotation
    assert len(encodings) == 1
    assert table.shape == (1, 16, 1, 16, 2)  # for all samples, heads and layers


@pytest.mark.parametrize(("axes", "share"), [(1, (16,)), (2, (4, 10)), (3, (16, 24, 24)), (4, (2, 4, 6, 8))])
def test_pain_32_any_number_of_axes_any_split(axes, share):  # rope-vit #12, CogVideo #359
    layout = Layout(128, 2, (2,) * axes)
    scheme = build(f"axial(share={share})", layout)
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64)
    query_coords, key_coords, shift = torch.randn(3, 1, axes, dtype=torch.float64)

    def rotated(x, coords):
        return rotate(x, scheme(coords).q.tables()[0])

    scores = [
        float(rotated(q, query_coords + s).flatten() @ rotated(k, key_coords + s).flatten()) for s in (0 * shift, shift)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert torch.equal(rotated(q, query_coords)[..., sum(share) :], q[..., sum(share) :])


def test_pain_33_a_partial_rotation_against_the_matrix_exponential():  # rotary-embedding-torch #4, LTX-Video #224
    layout, coords = Layout(40, 2, (3, 4)), grid((3, 4)).double()
    x = torch.randn(12, 20, dtype=torch.float64)
    want = oracles.rotate(x, coords, oracles.axial_frequencies((4, 8), 100.0, 2), False)
    table = build("axial(share=(4, 8))", layout)(coords).q.tables()[0]
    torch.testing.assert_close(rotate(x[None, None], table)[0, 0], want, rtol=0, atol=2e-6)


def test_pain_34_frequencies_of_each_head():  # flash-attention #578, rope-vit #11
    net = model("mixed").train()
    net(images((64, 64))).square().sum().backward()
    assert net.position.freqs.shape == (4, 2, 2, 16)  # layers, heads, axes, pairs
    assert (net.position.freqs.grad.abs().amax(dim=(2, 3)) > 0).all()


def test_pain_35_a_larger_grid_after_loading(tmp_path):  # RandAR #2, CineScale #7, LEDiT #2, EVA #52
    net = model("mixed").eval()
    learned = net.position.freqs.clone()
    with torch.no_grad():
        small = rotation_table(net)
        net.set_input_size((112, 64))  # 7 x 4 cells: from the first row to the last, twice as far
        net.set_position("interpolate(mixed, factor=(2, 1))")
        large = rotation_table(net, (7, 4))
        want = net(images((112, 64)))
    torch.testing.assert_close(large.unflatten(1, (7, 4))[:, ::2].flatten(1, 2), small, rtol=0, atol=1e-6)
    assert torch.equal(net.position.freqs, learned)
    save_for_hf(net, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images((112, 64))), want)
    for spec, message in (
        ("axial", "learns nothing, but the model's positions learned"),
        ("ntk(mixd)", "did you mean"),
    ):
        with pytest.raises(ValueError, match=message):
            net.set_position(spec)
        assert torch.equal(net(images((112, 64))).detach(), want)


def test_pain_36_the_unit_of_coordinates_is_explicit():  # vggt-omega #35, dinov3
    net = timm.create_model(NAME, position="dinov3", position_unit="centered")
    assert "periods" in repr(net.position)
    assert net.patch_coords(images((64, 64)))[0].abs().max() == 0.75
    with pytest.raises(ValueError, match="unknown unit 'pixels'; expected one of index, centered"):
        timm.create_model(NAME, position_unit="pixels")


@pytest.mark.parametrize(
    "change",
    [
        {"position": "axial(base=10)"}, {"position": 'axial(pairs="half")'}, {"position": "axial(fastest=2)"},
        {"position": "axial(share=(8, 24))"}, {"position": "xy(axial)"}, {"position_unit": "centered"},
        {"position": "alternate(axial)"}, {"position": "reference(axial, grid=(9, 9))"},
    ],
)  # fmt: skip
def test_pain_37_each_option_changes_something(change):  # dinov3 #243
    net = model()
    other = model(**change)
    other.load_state_dict(net.state_dict())
    assert (other(images((64, 64))) - net(images((64, 64)))).abs().max() > 1e-4


def test_pain_38_custom_coordinates():  # x-transformers #299
    net, x = model("mixed"), images((64, 64))
    coords = grid((4, 4)).expand(2, -1, -1) + torch.tensor([0.0, 0.5])[:, None, None]
    torch.testing.assert_close(net(x, coords=coords)[:1], net(x[:1]), rtol=1e-4, atol=1e-4)
    assert (net(x, coords=coords * 2) - net(x)).abs().max() > 1e-4


@pytest.mark.parametrize("spec", ["commuting", "liere"])
def test_pain_39_exponentials_of_generators(spec):  # rotary-embedding-torch #26
    scheme = build(spec, Layout(64, 2, (4, 4)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        matrices = scheme(torch.cat((torch.zeros(1, 2), torch.rand(15, 2)))).q.basis[0].detach()
    one = torch.eye(matrices.shape[-1]).expand_as(matrices)
    torch.testing.assert_close(matrices @ matrices.mT, one, rtol=0, atol=1e-5)
    torch.testing.assert_close(matrices[:, 0], one[:, 0], rtol=0, atol=1e-6)
    assert scheme.relative == (spec == "commuting")  # only where generators commute


@pytest.mark.parametrize("spec", ["mixed", "learned", "gate(learned) + mixed"])
def test_pain_40_position_parameters_get_no_weight_decay(spec):  # timm, ConvNets
    net = model(spec)
    groups = param_groups_weight_decay(net, 0.05, no_weight_decay_list=net.no_weight_decay())
    without_decay = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert all(id(p) in without_decay for name, p in net.named_parameters() if name.startswith("position."))


def test_pain_41_any_size_at_any_time():  # owl-wms #50
    net = model("mixed + learned").eval()
    before = {name for name, _ in net.named_buffers()}, len(list(net.modules())), sorted(vars(net.position))
    with torch.no_grad():
        first = net(images((64, 64)))
        for size in ((256, 64), (64, 160), (32, 32)):
            assert net(images(size)).isfinite().all()
        assert torch.equal(net(images((64, 64))), first)
    assert before == ({name for name, _ in net.named_buffers()}, len(list(net.modules())), sorted(vars(net.position)))


def test_every_test_says_where_its_problem_was_reported():
    text = Path(__file__).read_text()
    numbers = re.findall(r"def test_pain_(\d\d)_\w+\([^)]*\):  # \w", text)
    assert len(numbers) == len(re.findall(r"\ndef test_pain_", text)) > 35
    assert numbers == sorted(numbers)
