"""Each scheme's claims, compared with measurements of attention; each claim can turn out wrong."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers import EVERY, make
from vit_rope.analysis.certify import nearest, relativity_error
from vit_rope.attention import attend, attend_qkv
from vit_rope.positions import Layout, Position, Rotary, build
from vit_rope.positions.encoding import Encoding

PI, TWO_PI, FOUR_PI = "3.141592653589793", "6.283185307179586", "12.566370614359172"
SAME_TO_SOME = [  # sums, options and wrappers for which some places look the same, on grids of several axes
    "axial + xy(axial)",
    "xy(mixed) + mixed",
    "learned + axial + xy(axial)",
    "normalize(axial + xy(axial))",
    f"axial(fastest={PI}, base=1)",
    f"normalize(axial(fastest={PI}, base=1), low=0, high=2)",
    f"reference(axial(fastest={PI}, base=1), grid=(8, 10))",
    f'spectrum(axial(share=(4, 4)), first={TWO_PI}, last={FOUR_PI}, spacing="linear")',
    f"interpolate(axial(fastest={TWO_PI}, base=1), factor=2)",
    "axial(share=(24, 0))",
    "gate(learned, start=0)",
    "gate(axial, start=0)",
    "gate(axial + learned, start=0)",
    "gate(tupe, start=0)",
    "axial + none",
    "none + none",
    "sumcoords + none",
    "sumcoords + flat",
    "flat + flat",
    "flat + axial",
    "reference(flat)",
    "reference(flat, grid=(8, 10))",
    "normalize(flat)",
    "xy(sincos(axes=1) + axial)",
    "alibi + flat",
    "learned + learned",
    "peg + axial",
]
CLAIMED = EVERY + [(spec, 2) for spec in SAME_TO_SOME]


@pytest.mark.parametrize(("spec", "axes"), CLAIMED)
def test_relative(spec, axes):
    position, layout = make(spec, axes)
    if spec.startswith("gate(") and "start=0" in spec:
        return  # a closed gate may open, so the claim is about what it can become
    assert (max(relativity_error(position), change_between_cells(position, layout)) < 1e-5) == position.relative


def change_between_cells(position: Position, layout: Layout) -> float:
    """The largest change of an output where tokens between the cells all move by the same steps."""
    generator = torch.Generator().manual_seed(0)
    cells = layout.coords().double()
    coords = cells + torch.rand(cells.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(1, len(cells), layout.width, generator=generator, dtype=torch.float64)
    weights = torch.randn(3, layout.width, layout.width, generator=generator, dtype=torch.float64) / 4

    def outputs(at):
        tokens = x
        for layer in range(layout.depth if position.each_layer else 1):
            tokens = position.embed(tokens, at, None, layer)
        q, k, v = ((tokens @ w).unflatten(-1, (layout.heads, -1)).transpose(1, 2) for w in weights)
        return torch.cat([attend(q, k, v, position(at), layer) for layer in range(layout.depth)])

    before = outputs(coords)
    steps = [torch.tensor([step, -step, 2 * step][: layout.axes], dtype=torch.float64) for step in (0.4, 1.0, 2.3)]
    return max((outputs(coords + step) - before).abs().max().item() for step in steps)


@pytest.mark.parametrize(("spec", "axes"), CLAIMED)
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
        embedded = x
        for layer in range(layout.depth if position.each_layer else 1):
            embedded = position.embed(embedded, coords, list(layout.grid), layer)
        flat = torch.utils._pytree.tree_leaves((encoding, embedded))
        return [leaf.detach().clone() for leaf in flat if isinstance(leaf, torch.Tensor)]

    before = outcome()
    with torch.no_grad():
        for parameter in position.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    changed = any(not torch.equal(a, b) for a, b in zip(before, outcome(), strict=True))
    assert changed == position.learned


@pytest.mark.parametrize(("spec", "axes"), CLAIMED)
def test_unbounded(spec, axes):
    """Keys far outside the training grid differ from each other and from those inside it."""
    position, layout = make(spec, axes)
    inside = layout.coords().double()
    pairs = pairs_beyond(layout)
    if "manhattan" not in spec:  # distances along the axes add up for all who look from the same side
        pairs += [pairs[0][1] + torch.eye(axes, dtype=torch.float64)[[a, a - 1]] for a in range(1, axes)]
    nearest_pair = min(key_difference(position, layout, inside, pair) for pair in pairs)
    assert (nearest_pair > 1e-6) == position.unbounded


def pairs_beyond(layout: Layout) -> list[Tensor]:
    """Pairs of places (2, A) that some schemes confuse: neighbors and next ones, here and far away;
    equal numbers or sums of cells, or of coordinates that are normalized."""
    one = torch.eye(layout.axes, dtype=torch.float64)
    sizes = torch.tensor(layout.grid, dtype=torch.float64)
    here, corner = torch.zeros(layout.axes, dtype=torch.float64), 8 * sizes
    pairs = [(here, corner)]
    last = (sizes - 1)[:, None] * one  # the other end of each axis
    for axis in range(layout.axes):
        pairs += [(start, start + one[axis]) for start in (here, corner)]
        pairs += [(start, start + 2 * one[axis]) for start in (here, corner)]
        pairs += [(here, last[axis])]
        if axis:
            pairs += [(sizes[axis] * each[axis], each[axis - 1]) for each in (one, last)]
            pairs += [(each[axis], each[axis - 1]) for each in (one, last)]
    return [torch.stack(pair) for pair in pairs]


def key_difference(position: Position, layout: Layout, queries, keys) -> float:
    """The largest difference between attention to two keys of equal content at `keys` (2, A).

    The maximum is over queries at `queries` (N, A), heads and layers.
    """
    generator = torch.Generator().manual_seed(0)
    width = layout.width
    key_content, query_content = torch.randn(2, width, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, width, width, generator=generator, dtype=torch.float64) / 4
    q, k = (c.expand(1, len(at), -1) for c, at in ((query_content, queries), (key_content, keys)))
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
    outputs = [attend(q, k, values, encoding, layer) for layer in range(layout.depth)]
    return max((w[..., 0] - w[..., 1]).abs().max().item() for w in outputs)


def test_reversibility_follows_from_the_rank_of_frequencies():
    assert not Rotary(torch.ones(1, 1, 2, 4)).reversible
    assert Rotary(torch.eye(2)[None, None]).reversible


def test_claims_of_sums_follow_from_their_parts():
    layout = Layout(width=48, heads=2, grid=(4, 5), depth=2)
    both = build("sumcoords + mixed", layout)
    assert both.reversible
    assert both.relative
    assert not build("sumcoords + none", layout).reversible
    assert not build("liere + learned", layout).relative


@pytest.mark.parametrize(
    ("spec", "reversible", "unbounded"),
    [
        ("learned", True, False),
        ("learned + mixed", True, True),
        ("learned + sumcoords", True, False),
        ("none", False, False),
        ("flat", True, False),
        ("sumcoords", False, False),
        ("sincos", True, True),
        ("sincos(axes=1)", True, False),
        ("axial", True, True),
        ("axial + xy(axial)", False, False),
        ("axial + xy(axial) + mixed", True, True),
        ("interpolate(axial + xy(axial), factor=(2, 3))", False, False),
        (f"axial(fastest={PI}, base=1)", False, False),
        (f"axial(fastest={PI}, base=2)", True, True),
        (f"spectrum(axial, first={PI}, last={PI})", False, False),
        ("gate(learned)", True, False),
        ("gate(learned, start=0)", False, False),
        ("gate(learned, start=0) + axial", True, True),
        ("reference(flat)", True, False),
    ],
)
@pytest.mark.parametrize("unit", ["index", "centered", "centered_longer"])
def test_places_that_look_the_same(spec, reversible, unbounded, unit):
    """In other units a cell is another step, so that the speeds of the specs are scaled to it."""
    layout = Layout(width=48, heads=2, grid=(14, 14), depth=2, unit=unit)
    pitch = 1.0 if unit == "index" else 2 / 14
    position = build(spec.replace(f"={PI}", f"={float(PI) / pitch}"), layout)
    assert (position.reversible, position.unbounded) == (reversible, unbounded)


def test_claims_on_one_axis_and_on_large_grids():
    line = Layout(width=48, heads=2, grid=(300,), depth=2)
    assert all(build(spec, line).unbounded for spec in ("flat", "sincos(axes=1)", "sumcoords", "axial"))
    volume = Layout(width=48, heads=2, grid=(16, 40, 40), depth=2)
    assert build("axial", volume).reversible
    assert build("axial", volume).unbounded
