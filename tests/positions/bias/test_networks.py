"""LogCPB and FIRE against timm and their formula."""

import math

import pytest
import torch
from timm.layers.pos_embed_rel import RelPosMlp

from tests.positions.bias.helpers import NORMS, layout_of, logits, loop, same, scheme
from vit_rope.positions.coords import grid


@pytest.mark.parametrize("shape", [(4, 4), (3, 6)])
def test_logcpb_matches_timm_with_reversed_displacements(shape):
    position = scheme("logcpb(width=512)", layout_of(shape))
    network = position.network
    for layer in range(2):
        theirs = RelPosMlp(shape, num_heads=3, hidden_dim=512, mode="swin").eval()
        with torch.no_grad():
            theirs.mlp.fc1.weight.copy_(-network.inward[layer].T)
            theirs.mlp.fc1.bias.copy_(network.bias[layer, 0])
            theirs.mlp.fc2.weight.copy_(network.outward[layer].T / 16)  # otherwise the sigmoid saturates
            network.outward[layer] /= 16
        want = theirs.get_bias().detach().reshape(3, math.prod(shape), -1)
        same(logits(position, grid(shape), layer), want, atol=1e-4)
        assert want.std() > 1


@pytest.mark.parametrize("window", [(8, 8), (12, 10), (3, 5)])
def test_logcpb_on_other_windows_matches_swin_v2(window):
    position = scheme("logcpb(width=64)", layout_of((8, 8)))
    theirs = RelPosMlp(window, num_heads=3, hidden_dim=64, mode="swin", pretrained_window_size=(8, 8)).eval()
    with torch.no_grad():
        theirs.mlp.fc1.weight.copy_(-position.network.inward[1].T)
        theirs.mlp.fc1.bias.copy_(position.network.bias[1, 0])
        theirs.mlp.fc2.weight.copy_(position.network.outward[1].T / 8)
        position.network.outward /= 8
    want = theirs.get_bias().detach().reshape(3, math.prod(window), -1)
    for options in ({}, {"grid": list(window)}):
        same(logits(position, grid(window), 1, **options), want, atol=1e-4)
    assert want.std() > 1


@pytest.mark.parametrize(("shape", "bigger"), [((5,), (9,)), ((3, 4), (6, 5)), ((2, 3, 2), (1, 3, 2))])
def test_fire(shape, bigger):
    position = scheme("fire(width=4)", layout_of(shape))
    for sizes in (shape, bigger):
        max_distance = max(math.dist([1] * len(s), s) for s in (shape, sizes))
        for layer in range(2):
            inward, bias, outward = (t.detach()[layer].tolist() for t in position.network.parameters())
            c = abs(float(position.rates.detach()[layer]))

            def network(h, delta, max_distance=max_distance, inward=inward, bias=bias, outward=outward, c=c):
                x = math.log(1 + c * NORMS["euclidean"](delta)) / math.log(1 + c * max_distance)
                return sum(max(0, x * w + b) * out[h] for w, b, out in zip(inward[0], bias[0], outward, strict=True))

            want = loop(network, sizes)
            same(logits(position, grid(sizes).double(), layer, grid=list(sizes)), want, atol=1e-5)


@pytest.mark.parametrize("spec", ["logcpb", "fire"])
def test_networks_do_not_run_on_all_pairs_of_a_grid(spec, monkeypatch):
    layout = layout_of((6, 7))
    position, seen = scheme(spec, layout), []
    position.network.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    coords = layout.coords()
    position(coords, grid=[6, 7])
    position(coords.expand(4, -1, -1)[:, ::2], grid=[6, 7])  # dropped tokens
    assert seen == [11 * 13, 11 * 13]
    position(coords)
    assert seen[2] == 42**2
