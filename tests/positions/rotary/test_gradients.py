"""Gradients of coordinates and parameters: eager, by function transforms, by differences."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

from tests.helpers import EVERY, make
from vit_rope.attention import attend
from vit_rope.positions import Layout, Rotary, build
from vit_rope.positions.encoding import Encoding
from vit_rope.positions.transform import Transform

CONSTANT = ["ntk(mixed)"]  # ranks of frequencies are constants to autograd, but not to finite differences
ROTATING = [(s, a) for s, a in EVERY if a == 1 and s not in CONSTANT and isinstance(make(s, a)[0], Rotary)]
ROTATING += [("axial + mixed", 2)]


class Fading(Rotary):
    """Axial RoPE whose queries and keys fade with the distance from 0, at a learned rate."""

    def __init__(self):
        super().__init__(torch.tensor([[[[1.0, 0.3]]]]))
        self.rate = nn.Parameter(torch.zeros(()))  # every modulus is 1 at first

    def encode(self, coords, key_coords, grid):
        table = super().encode(coords, key_coords, grid).q.tables()[0]
        fade = (-self.rate.to(coords.dtype) * coords[None, :, None, :, None].square()).exp()
        return Encoding(Transform(rotation=[table * fade]))


def check(position, coords, head, heads, layer=0):
    """The three gradients of a random function of attention, of coordinates and all parameters."""
    position = position.double()
    q, k, v, weight = torch.randn(4, 1, heads, len(coords), head, dtype=torch.float64)
    named = {name: p.detach().clone() for name, p in position.named_parameters()} | {"coords": coords}

    def loss(values):
        values = dict(values)
        encoding = functional_call(position, values, (values.pop("coords"),))
        return (attend(q, k, v, encoding, layer) * weight).sum()

    leaves = {name: t.clone().requires_grad_() for name, t in named.items()}
    eager = dict(zip(leaves, torch.autograd.grad(loss(leaves), leaves.values(), allow_unused=True), strict=True))
    transformed = grad(loss)(named)
    for name, value in named.items():
        ours = torch.zeros_like(value) if eager[name] is None else eager[name]
        torch.testing.assert_close(ours, transformed[name], rtol=1e-6, atol=1e-8)
        along = torch.randn_like(value)
        sides = [loss(named | {name: value + step * along}) for step in (1e-5, -1e-5)]
        torch.testing.assert_close((ours * along).sum(), (sides[0] - sides[1]) / 2e-5, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("spec", "axes"), ROTATING)
def test_gradients_agree_for_every_rotation(spec, axes):
    position, layout = make(spec, axes)
    coords = layout.coords().double() + 0.3 * torch.rand(len(layout.coords()), axes, dtype=torch.float64)
    check(position, coords, layout.head_dim, layout.heads, layer=1)


def test_gradients_agree_for_a_modulus_that_is_learned():
    torch.manual_seed(0)
    check(Fading(), torch.randn(5, 1, dtype=torch.float64), 4, 2)


def test_xpos_has_the_gradient_of_its_decay():
    torch.manual_seed(0)
    position = build("xpos(scale=2)", Layout(width=8, heads=2, grid=(5,)))
    check(position, torch.randn(5, 1, dtype=torch.float64), 4, 2)


def test_pope_keeps_the_precision_of_its_queries():
    torch.manual_seed(0)
    encoding = build("pope", Layout(width=8, heads=2, grid=(3,)))(torch.arange(3.0, dtype=torch.float64)[:, None])
    q, k, v = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, encoding), (q, k, v))
