"""PEG against timm, against a loop over tokens at any coordinates, and what its zero padding
reveals.
"""

import re

import pytest
import torch
from timm.models.twins import PosConv

from tests import oracles
from vit_rope.models.vit import RopeViT
from vit_rope.positions import Layout, build
from vit_rope.positions.coords import grid


def made(spec="peg", shape=(4, 5), width=6, depth=3):
    torch.manual_seed(0)
    return build(spec, Layout(width=width, heads=2, grid=shape, depth=depth))


def reference(position, x, cells, sizes, circular):
    """x + sum over the kernel of the mean of the tokens in each neighbouring cell; one token (C) at
    a time.
    """
    weight, bias = (p.detach().double() for p in (position.scheme.weight[:, 0], position.scheme.bias))
    half = weight.shape[1] // 2
    out = []
    for n, cell in enumerate(cells):
        total = x[n] + bias
        for step in oracles.grid(weight.shape[1:]):
            neighbor = [c + s - half for c, s in zip(cell, step, strict=True)]
            if circular:
                neighbor = [t % size for t, size in zip(neighbor, sizes, strict=True)]
            tokens = [x[m] for m, other in enumerate(cells) if other == neighbor]
            if tokens:
                total = total + weight[(slice(None), *step)] * sum(tokens) / len(tokens)
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("shape", [(4, 5), (7, 3)])
def test_peg_matches_timm(shape):
    position, theirs = made(width=24), PosConv(24, 24)
    theirs.proj[0].load_state_dict(position.scheme.state_dict())
    x = torch.randn(2, shape[0] * shape[1], 24)
    torch.testing.assert_close(position.embed(x, grid(shape), list(shape), 1), theirs(x, shape))


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize(("shape", "kernel"), [((6,), 3), ((3, 4), 3), ((4, 5), 5), ((2, 3, 4), 3)])
def test_peg_matches_the_loop_for_tokens_anywhere(shape, kernel, circular):
    padding = "circular" if circular else "zeros"
    position = made(f'peg(kernel={kernel}, padding="{padding}")', shape)
    cells = oracles.grid(shape)
    x = torch.randn(2, len(cells), 6, dtype=torch.float64)
    full = position.embed(x, grid(shape).double(), list(shape), 1).detach()
    for got, tokens in zip(full, x, strict=True):
        torch.testing.assert_close(got, reference(position, tokens, cells, shape, circular), rtol=0, atol=1e-6)
    keep = torch.stack([torch.randperm(len(cells))[:5], torch.arange(5)])  # dropped tokens
    part = position.embed(x[:, :5], grid(shape).double()[keep], list(shape), 1).detach()
    for got, tokens, kept in zip(part, x, keep, strict=True):
        want = reference(position, tokens[:5], [cells[i] for i in kept], shape, circular)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_custom_coordinates_are_assigned_to_cells_and_clamped_to_the_border():
    position = made()
    coords = torch.tensor([[0.2, 0.4], [-0.3, -0.4], [1.6, 0.0], [9.0, -3.0], [3.0, 4.2]]).double()
    cells = [[0, 0], [0, 0], [2, 0], [3, 0], [3, 4]]
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    got = position.embed(x, coords, None, 1)[0].detach()
    torch.testing.assert_close(got, reference(position, x[0], cells, (4, 5), False), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("depth", "acting"), [(1, 0), (3, 1)])
def test_it_acts_after_the_first_layer_or_before_the_only_one(depth, acting):
    position, x = made(depth=depth), torch.randn(1, 20, 6)
    for layer in range(depth):
        changed = not torch.equal(position.embed(x, grid((4, 5)), None, layer), x)
        assert changed == (layer == acting)


@pytest.mark.parametrize(("padding", "leaks"), [("zeros", True), ("circular", False)])
def test_only_a_border_leaks_positions(padding, leaks):
    position = made(f'peg(padding="{padding}")', (5, 5))
    out = position.embed(torch.ones(1, 25, 6), grid((5, 5)), [5, 5], 1)[0].view(5, 5, 6)
    torch.testing.assert_close(out[1:4, 1:4], out[2, 2].expand(3, 3, 6))
    assert ((out - out[2, 2]).abs().max() > 1e-2) == leaks


def test_a_vit_gets_positions_from_peg_and_shuffled_patches_do_too():
    torch.manual_seed(0)
    net = RopeViT(24, 4, position="peg", embed_dim=24, depth=2, num_heads=2, num_classes=3, reg_tokens=1).eval()
    x = torch.randn(2, 3, 24, 24)
    order = torch.randperm(36)
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[:, :, order].unflatten(2, (6, 6))
    shuffled = patches.permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 24, 24)
    assert (net(shuffled) - net(x)).abs().max() > 1e-4
    torch.testing.assert_close(net(shuffled, coords=grid((6, 6))[order]), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("peg(kernel=4)", (4, 5), "peg needs a kernel of an odd size, which has a center, got 4"),
        ("peg", (2, 2, 2, 2), "peg convolves maps of 1, 2 or 3 axes, got 4"),
        ('peg(kernel=9, padding="circular")', (4, 3), "a circular kernel of 9 wraps around a grid of (4, 3) more than"),
    ],
)
def test_refusals(spec, shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        made(spec, shape)
