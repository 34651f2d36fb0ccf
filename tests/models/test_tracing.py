"""torch.fx, torch.compile, torch.export and torch.jit.trace, for models on one to three axes."""

import warnings

import pytest
import torch
from timm.models._features_fx import create_feature_extractor
from torch import fx, nn

from vit_rope.models.tracing import embed_positions, is_traced
from vit_rope.models.vit import RopeViT
from vit_rope.positions import Layout, build
from vit_rope.positions.coords import grid

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3, "in_chans": 1}
SIZES = {1: ((12,), (4,)), 2: ((8, 12), (4, 4)), 3: ((4, 8, 8), (2, 4, 4))}


def model(axes, spec="axial", **options):
    torch.manual_seed(0)
    size, patch = SIZES[axes]
    net = RopeViT(size, patch, position=spec, **SMALL | options).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net, torch.randn(2, 1, *size)


@pytest.mark.parametrize("axes", SIZES)
@pytest.mark.parametrize("pad", [False, True])
def test_feature_extraction_on_every_number_of_axes(axes, pad):
    net, x = model(axes, dynamic_img_pad=pad)
    torch.testing.assert_close(create_feature_extractor(net, ["head"])(x)["head"], net(x))


@pytest.mark.parametrize("spec", ["learned", "learned + mixed", "peg", "recurrent"])
def test_feature_extraction_with_absolute_positions(spec):
    net, x = model(2, spec)
    graph = create_feature_extractor(net, ["blocks.0", "head"])
    features = graph(x)
    torch.testing.assert_close(features["head"], net(x))
    calls = [node for node in graph.graph.nodes if node.target is embed_positions]
    assert len(calls) == (2 if net.position.each_layer else 1)  # one node for each call


def test_a_traced_graph_keeps_its_learned_positions():
    net, x = model(2, "learned")
    graph = create_feature_extractor(net, ["head"])
    with torch.no_grad():
        net.position.table.mul_(3)  # the same parameter, not a copy
    torch.testing.assert_close(graph(x)["head"], net(x))


def test_a_proxy_is_recognized():
    class Recorder(nn.Module):
        def forward(self, x):
            seen.append(is_traced(x))
            return x + 1

    seen = []
    fx.symbolic_trace(Recorder())
    Recorder()(torch.zeros(1))
    assert seen == [True, False]


def test_the_function_is_the_method():
    position = build("learned", Layout(width=8, heads=2, grid=(2, 3)))
    x, coords = torch.randn(2, 6, 8), grid((2, 3))
    assert torch.equal(embed_positions(position, x, coords, [2, 3], 0), position.embed(x, coords, [2, 3], 0))


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("pad", [False, True])
def test_one_graph_for_every_size(axes, pad):
    net, _ = model(axes, dynamic_img_size=True, dynamic_img_pad=pad)
    size = SIZES[axes][0]
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True, dynamic=True)
    for factor in (1, 2, 3):
        x = torch.randn(2, 1, *(n * factor for n in size))
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes", [1, 3])
def test_exported_and_traced_models_compute_the_same(axes):
    net, x = model(axes, "mixed")
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    three = torch.cat((x, x[:1]))
    torch.testing.assert_close(exported(three), net(three), rtol=1e-5, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates tracing, which also warns about constant sizes
        traced = torch.jit.trace(net, x, check_trace=False)
    torch.testing.assert_close(traced(x), net(x), rtol=1e-5, atol=1e-5)
