"""All bias schemes: full grids, gradients of layers, memory, error messages."""

import re

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.positions.bias.helpers import layout_of, logits, same, scheme
from vit_rope.attention import attend, attend_qkv
from vit_rope.models.vit import RopeViT
from vit_rope.positions import Layout, build
from vit_rope.positions.coords import grid

BIASES = [
    "alibi",
    "lookhere",
    "t5",
    "swin",
    "kerple",
    'kerple(kind="power")',
    "logcpb",
    "fire",
    "sandwich(flash=False)",
]


@pytest.mark.parametrize("spec", BIASES)
@pytest.mark.parametrize("unit", ["index", "centered", "centered_shorter"])
@pytest.mark.parametrize("shape", [(3, 4), (5, 6), (2, 2)])
def test_a_full_grid_looks_up_the_values_of_pairs(spec, unit, shape):
    layout = layout_of((3, 4), unit=unit, origin="center")
    position, coords = scheme(spec, layout), layout.coords(shape).double()
    for layer in range(2):
        full = logits(position, coords, layer, grid=list(shape))
        if spec != "fire" or shape != (5, 6):  # fire depends on the size of the grid
            same(full, logits(position, coords, layer), atol=2e-4)
        dropped = logits(position, coords[[0, 2, 3]], layer, grid=list(shape))
        same(full[:, [0, 2, 3]][:, :, [0, 2, 3]], dropped, atol=2e-4)


@pytest.mark.parametrize(
    "spec", [s for s in BIASES if s.split("(")[0] in ("swin", "kerple", "logcpb", "fire")] + ["positiononly"]
)
@pytest.mark.parametrize("full_grid", [True, False])
def test_attention_in_a_layer_has_gradients_for_that_layer_only(spec, full_grid):
    layout = layout_of((3, 4), depth=3)
    position = scheme(spec, layout)
    q, k, v = torch.randn(3, 2, 3, 12, 8, generator=torch.Generator().manual_seed(2))
    attend(q, k, v, position(grid((3, 4)), grid=[3, 4] if full_grid else None), 1).square().sum().backward()
    for name, parameter in position.named_parameters():
        if name == "table" and spec == "positiononly":
            continue  # shared by all layers
        axis = 1 if name in ("rates", "projections") and spec != "fire" else 0
        touched = parameter.grad.movedim(axis, 0).reshape(3, -1).abs().amax(dim=1) > 0
        assert touched.tolist() == [False, True, False], name


@pytest.mark.parametrize("spec", ["t5", "swin", "kerple", "logcpb", "fire"])
def test_gradients_of_looked_up_biases_equal_those_of_pairs(spec):
    layout, grads = layout_of((3, 4)), []
    weights = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for sizes in ([3, 4], None):
        position = scheme(spec, layout)
        encoding = position(grid((3, 4)).double(), grid=sizes)
        layers = range(layout.depth if spec != "t5" else 1)
        sum((encoding.bias(layer) * weights[layer]).sum() for layer in layers).backward()
        grads.append([p.grad for p in position.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", ["swin", "kerple", "logcpb", "fire", "lookhere", "swin + axial"])
def test_layers_that_differ_look_up_their_biases_one_at_a_time(spec):
    layout = Layout(width=24, heads=3, grid=(9, 9), depth=12)
    held = {leaf.data_ptr(): leaf.numel() for leaf in tree_leaves(build(spec, layout)(layout.coords(), grid=[9, 9]))
            if isinstance(leaf, torch.Tensor)}  # fmt: skip
    pairs, displacements, cos_sin = 81**2, 17**2, 81 * 2 * 4
    assert sum(held.values()) <= pairs + 12 * 3 * displacements + cos_sin


def test_a_bias_with_a_rotation_keeps_the_fast_path():
    layout = Layout(width=24, heads=3, grid=(3, 4), depth=2)
    encoding = scheme("swin + axial(share='rest')", layout)(layout.coords(), prefix=1, grid=[3, 4])
    assert encoding.rotates_only()
    qkv = torch.randn(2, 13, 72, generator=torch.Generator().manual_seed(1))
    q, k, v = qkv.view(2, 13, 3, 3, 8).permute(2, 0, 3, 1, 4)
    for layer in range(2):
        want = attend(q, k, v, encoding, layer)
        torch.testing.assert_close(attend_qkv(qkv.clone(), 3, encoding, layer, overwrite=True), want)


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("lookhere(fov=45)", (5,), "needs two axes or more, because one axis has only two directions; use fov=180"),
        ("lookhere(layer_slopes=(1.0,))", (3, 4), "two layer_slopes, of the first and the last layer, got (1.0,)"),
        ("t5(buckets=30)", (3, 4), "t5 needs a number of buckets divisible by 4, got 30"),
        ("t5(max_distance=8)", (3, 4), "each of the first 8 cells, so max_distance must be above that, got 8"),
        ("logcpb(width=0)", (3, 4), "a network of positions needs a width of at least 1, got 0"),
        ("sandwich(channels=3)", (3, 4), "sandwich needs a pair of channels for each of 2 axes, got 3; use 4 or more"),
        ("sandwich(base=0)", (3, 4), "sandwich needs a positive base, got 0"),
    ],
)
def test_refusals(spec, shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(spec, layout_of(shape))


def test_a_rotation_with_extra_channels_trains_in_a_vit():
    model = RopeViT(32, 8, embed_dim=48, depth=2, num_heads=2, position='axial + alibi(distance="quadratic")')
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
