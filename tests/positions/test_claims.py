"""Each scheme's claims, held against what attention does with it: claims are data, and every one can be wrong."""

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import EVERY, make
from vit_rope.analysis.certify import nearest, relativity_error
from vit_rope.attention import attend, attend_qkv
from vit_rope.positions import Layout, Position, Rotary, Sum, build
from vit_rope.positions.encoding import Encoding


@pytest.mark.parametrize(("spec", "axes"), EVERY)
def test_relative(spec, axes):
    position, _ = make(spec, axes)
    assert (relativity_error(position) < 1e-5) == position.relative


@pytest.mark.parametrize(("spec", "axes"), EVERY)
def test_reversible(spec, axes):
    position, layout = make(spec, axes)
    assert (nearest(position, layout, layout.coords().double())[0] > 1e-4) == position.reversible


@pytest.mark.parametrize(("spec", "axes"), EVERY)
def test_keeps_flash(spec, axes, monkeypatch):
    position, layout = make(spec, axes)
    masks = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: masks.append(a[3]) or kernel(*a, **k))
    coords = layout.coords()
    qkv = torch.randn(1, 1 + len(coords), 3 * layout.width)
    q, k, v = qkv.unflatten(-1, (3, layout.heads, -1)).permute(2, 0, 3, 1, 4)
    for layer in range(layout.depth):
        encoding = position(coords, prefix=1)
        attend(q, k, v, encoding, layer)
        attend_qkv(qkv, layout.heads, encoding, layer)
    flash = len(masks) == 2 * layout.depth and all(mask is None for mask in masks)
    assert flash == position.keeps_flash


@pytest.mark.parametrize(("spec", "axes"), EVERY)
def test_learned(spec, axes):
    position, layout = make(spec, axes)
    coords = layout.coords()
    x = torch.randn(1, len(coords), layout.width)

    def outcome():
        encoding = position(coords)
        placed = x
        for layer in range(layout.depth if position.each_layer else 1):
            placed = position.embed(placed, coords, list(layout.grid), layer)
        flat = torch.utils._pytree.tree_leaves((encoding, placed))
        return [leaf.detach().clone() for leaf in flat if isinstance(leaf, torch.Tensor)]

    before = outcome()
    with torch.no_grad():
        for parameter in position.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    changed = any(not torch.equal(a, b) for a, b in zip(before, outcome(), strict=True))
    assert changed == position.learned


@pytest.mark.parametrize(("spec", "axes"), EVERY)
def test_unbounded(spec, axes):
    """Keys far outside the training grid look different, from each other and from one inside, as those inside do."""
    position, layout = make(spec, axes)
    inside = layout.coords().double()
    corner = 8 * torch.tensor(layout.grid, dtype=torch.float64)
    told = []
    for axis in range(axes):
        step = torch.zeros(axes, dtype=torch.float64)
        step[axis] = 1.0
        pairs = ((inside[0], inside[0] + step), (corner, corner + step), (inside[0], corner))
        near, *far = (looks(position, layout, inside, torch.stack(pair)) for pair in pairs)
        if near > 1e-9:
            told.append(min(far) > 1e-9)
    if isinstance(position, Sum) and not position.unbounded:
        return  # one part of a sum may make good what another lacks
    assert all(told) == position.unbounded


def looks(position: Position, layout: Layout, queries, keys) -> float:
    """How differently queries at (N, A) attend to two keys of one content at (2, A), over all heads and layers."""
    generator = torch.Generator().manual_seed(0)
    width = layout.width
    content, other = torch.randn(2, width, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, width, width, generator=generator, dtype=torch.float64) / 4
    q, k = (c.expand(1, len(at), -1) for c, at in ((other, queries), (content, keys)))
    for layer in range(layout.depth if position.each_layer else 1):
        q, k = position.embed(q, queries, None, layer), position.embed(k, keys, None, layer)
    q, k = q @ weights[0], k @ weights[1]
    q, k = (x.unflatten(-1, (layout.heads, -1)).transpose(1, 2) for x in (q, k))
    encoding = position(queries, key_coords=keys)
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).expand(1, layout.heads, -1, -1)
    clean = Encoding()
    encoding = encoding._replace(v=clean.v, out=clean.out)
    if encoding.term_lists:
        encoding = encoding._replace(
            term_lists=[[t for t in layer if t.acts_on != "v"] for layer in encoding.term_lists]
        )
    found = [attend(q, k, values, encoding, layer) for layer in range(layout.depth)]
    return max((w[..., 0] - w[..., 1]).abs().max().item() for w in found)


def test_rank_is_not_claimed_by_hand():
    assert not Rotary(torch.ones(1, 1, 2, 4)).reversible
    assert Rotary(torch.eye(2)[None, None]).reversible


def test_sums_claim_what_their_parts_do():
    layout = Layout(width=48, heads=2, grid=(4, 5), depth=2)
    both = build("sumcoords + mixed", layout)
    assert both.reversible
    assert both.relative
    assert not build("sumcoords + none", layout).reversible
    assert not build("liere + learned", layout).relative
