"""All relative schemes: gradients of layers, dropped tokens, error messages."""

import re

import pytest
import torch

from tests.positions.relative.helpers import layout_of, qkv, scheme
from vit_rope.attention import attend
from vit_rope.positions import Layout, build
from vit_rope.positions.coords import grid

SPECS = ["shaw", "shaw(values=True)", "decomposed", "transformerxl", "deberta", 'irpe(on="qkv")']


@pytest.mark.parametrize("spec", SPECS)
def test_attention_in_a_layer_has_gradients_for_that_layer_only(spec):
    position, (q, k, v) = scheme(spec, layout_of((3, 4), depth=3)), qkv(12)
    attend(q, k, v, position(grid((3, 4)).double(), grid=[3, 4]), 1).square().sum().backward()
    for name, parameter in position.named_parameters():
        if name == "vectors":
            continue  # shared by all layers
        axis = 1 if name == "projections" or spec.startswith("irpe") else 0
        touched = parameter.grad.movedim(axis, 0).reshape(3, -1).abs().amax(dim=1) > 0
        assert touched.tolist() == [False, True, False], name


@pytest.mark.parametrize("spec", [*SPECS, "nezha"])
def test_terms_do_not_change_when_tokens_are_dropped(spec):
    layout = Layout(width=24, heads=3, grid=(3, 4), depth=2, unit="centered")
    position, coords, keep = scheme(spec, layout), layout.coords((5, 4)).double(), [0, 3, 7, 18]
    q, k, v = qkv(20)
    mask = torch.zeros(20, dtype=torch.bool)
    mask[keep] = True
    full = attend(q, k, v, position(coords, grid=[5, 4]), 1, mask=mask[None])[:, :, keep]
    part = attend(*(t[:, :, keep] for t in (q, k, v)), position(coords[keep], grid=[5, 4]), 1)
    torch.testing.assert_close(part, full, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("shaw(clip=0)", (3, 4), "shaw needs a clip of at least 1 cell, got 0"),
        ("deberta(clip=0)", (3, 4), "deberta needs a clip of at least 1 cell, got 0"),
        ("irpe(ratio=0.5)", (3, 4), "irpe needs a ratio of at least 1, got 0.5"),
        ("nezha", (2, 2, 2, 2, 2), "nezha needs a pair of channels for each of 5 axes, got 8; use 10 or more"),
        ("nezha(base=-1)", (3, 4), "nezha needs a positive base, got -1"),
        ("transformerxl(base=0)", (3, 4), "transformerxl needs a positive base, got 0"),
    ],
)
def test_refusals(spec, shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(spec, layout_of(shape))
