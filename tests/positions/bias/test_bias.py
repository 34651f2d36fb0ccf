"""Content-free logits against loops in float64, published implementations and the identities of each scheme."""

import math
import re
import warnings

import pytest
import torch
from timm.layers.pos_embed_rel import RelPosBias, RelPosBiasTf, RelPosMlp
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from tests import oracles
from vit_rope.attention import attend, attend_qkv
from vit_rope.models.vit import RopeViT
from vit_rope.positions import Layout, build
from vit_rope.positions.bias.fixed import slopes
from vit_rope.positions.coords import grid

SHAPES = [(5,), (3, 4), (2, 3, 2)]


def layout_of(shape, heads=3, depth=2, **options):
    return Layout(width=8 * heads, heads=heads, grid=shape, depth=depth, **options)


def scheme(spec, layout, seed=0):
    """A scheme whose parameters are all random."""
    position = build(spec, layout)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in position.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return position


def logits(position, coords, layer=0, **options):
    """What a scheme adds to the logits of patches (H, N, M), whichever way."""
    encoding = position(coords, **options)
    bias = encoding.bias(layer)
    total = 0 if bias is None else bias[0]
    if encoding.q.extra:
        q, k = (side.extra[layer % len(side.extra)][0] for side in (encoding.q, encoding.k))
        total = total + q @ k.transpose(-2, -1)
    return total.detach()


def loop(function, shape, heads=3):
    """function(h, Δ) for all pairs of a grid (H, N, N), in float64."""
    places = oracles.grid(shape)
    rows = [
        [[function(h, [b - a for a, b in zip(p, q, strict=True)]) for q in places] for p in places]
        for h in range(heads)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def same(got, want, atol=1e-9):
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=atol)


# ---- alibi ----------------------------------------------------------------------------------------------------------

NORMS = {
    "euclidean": lambda delta: math.sqrt(sum(d * d for d in delta)),
    "manhattan": lambda delta: sum(abs(d) for d in delta),
    "quadratic": lambda delta: sum(d * d for d in delta),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("distance", NORMS)
def test_alibi_is_a_slope_times_the_distance(shape, distance):
    position = build(f'alibi(distance="{distance}")', layout_of(shape))
    m = [2**-4, 2**-8, 2**-2]  # two heads, then the first of four
    same(logits(position, grid(shape).double()), loop(lambda h, delta: -m[h] * NORMS[distance](delta), shape))


def test_alibi_is_x_transformers_along_each_axis():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        published = pytest.importorskip("x_transformers.x_transformers").AlibiPositionalBias
    for heads in (1, 2, 3, 4, 6, 8, 12, 16):
        theirs = published(heads)
        same(torch.tensor(slopes(heads)), theirs.slopes.flatten(), atol=1e-6)
        position = build('alibi(distance="manhattan")', layout_of((3, 4), heads))
        want = sum(theirs.forward_custom_pos(grid((3, 4))[None, :, a]) for a in range(2))
        same(logits(position, grid((3, 4))), want[0] if want.ndim == 4 else want, atol=1e-6)


@pytest.mark.parametrize("prefix", [0, 2])
def test_quadratic_alibi_is_its_own_mask_without_one(prefix, monkeypatch):
    position = build('alibi(distance="quadratic") + axial', layout_of((3, 4)))
    coords = grid((3, 4)).double() + 100.5
    q, k, v = torch.randn(3, 2, 3, prefix + 12, 8, dtype=torch.float64)
    encoding = position(coords, prefix)
    bias = F.pad(loop(lambda h, d: -[2**-4, 2**-8, 2**-2][h] * NORMS["quadratic"](d), (3, 4)), (prefix, 0, prefix, 0))
    want = attend(q, k, v, build("axial", layout_of((3, 4)))(coords, prefix)._replace(biases=[bias[None]]))
    seen, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: seen.append(a[3]) or kernel(*a, **k))
    same(attend(q, k, v, encoding), want)
    assert seen == [None]


@pytest.mark.parametrize("heads", [3, 6, 8, 12])
@pytest.mark.parametrize("size", [14, 48])
def test_quadratic_alibi_in_bfloat16(heads, size):
    position = build('alibi(distance="quadratic")', layout_of((size, 20), heads))
    coords = grid((size, 20)) + 300
    exact = logits(position, coords.double())
    encoding = position(coords)
    q, k = (side.extra[0][0].bfloat16().double() for side in (encoding.q, encoding.k))
    error = (q @ k.transpose(-2, -1) - exact).abs().amax(dim=(1, 2))
    if heads != 12:  # slopes that are powers of two
        assert error.max() < 1e-9
    else:
        assert error.max() > 1e-3
        assert (error <= 0.004 * 2 * torch.tensor(slopes(12)) * ((size / 2) ** 2 + 10**2)).all()


# ---- lookhere -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fov", [180, 90, 45])
def test_lookhere_sees_a_cone(fov):
    shape, depth = (5, 6), 3
    position = build(f"lookhere(fov={fov}, slope=2.0, layer_slopes=(1.5, 0.5))", layout_of(shape, 12, depth))
    around = [0.25, 0.0625, 0.015625, 0.00390625]
    ways = {180: [90, 270, 180, 0], 90: [90, 270, 180, 0], 45: [22.5 + 45 * i for i in range(8)]}[fov]  # y is down
    for layer, ratio in enumerate((1.5, 1.0, 0.5)):
        got = logits(position, grid(shape).double(), layer)
        for h in range(8, 12):
            steep = 2 * ratio * around[h - 8]
            same(got[[h]], loop(lambda _, delta, m=steep: -m * NORMS["euclidean"](delta), shape, 1))
        found = set()
        for h in range(8):
            match, steep = [], 2 * ratio * 0.5 ** (1 + h // len(ways))
            for way in ways:

                def seen(_, delta, way=way, steep=steep):
                    off = math.degrees(math.atan2(-delta[0], delta[1])) - way
                    turned = abs((off + 180) % 360 - 180)
                    inside = delta == [0, 0] or turned <= fov / 2 + 1e-6
                    return -steep * NORMS["euclidean"](delta) if inside else -1e4

                want = loop(seen, shape, 1)[0]
                match += [way] if (got[h] - want).abs().max() < 1e-9 else []
            assert len(match) == 1, h
            found.add((match[0], h // len(ways)))
        assert len(found) == 8


def test_lookhere_leaves_no_nan_where_all_keys_are_hidden():
    position = build("lookhere", layout_of((4, 4), 6))
    q, k, v = torch.randn(3, 1, 6, 16, 8).half().unbind(0)
    encoding = position(grid((4, 4)), key_coords=grid((4, 4))[:1])
    assert attend(q, k[:, :, :1], v[:, :, :1], encoding).isfinite().all()


# ---- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (32, 14), (32, 9), (16, 20), (8, 64), (4, 50)])
def test_t5_buckets_are_t5s(buckets, most):
    published = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention._relative_position_bucket
    position = build(f"t5(buckets={buckets}, max_distance={most})", layout_of((14,)))
    delta = torch.arange(-300, 301)
    want = published(delta, True, buckets, most)
    assert torch.equal(position.bucket(delta[:, None].double())[:, 0], want)
    assert torch.equal(position.bucket(delta[:, None] + 0.3)[:, 0], want)  # whole cells


def test_t5_is_udops_on_images():
    udop = pytest.importorskip("transformers.models.udop.modeling_udop")
    both = [udop.RelativePositionBiasVertical, udop.RelativePositionBiasHorizontal]
    both = [kind(num_heads=3, scaling_factor=100, max_distance=100) for kind in both]
    position = scheme("t5(max_distance=100)", layout_of((3, 5)))
    with torch.no_grad():
        for axis, published in enumerate(both):
            published.relative_attention_bias.weight.copy_(position.table[axis])
    places = (grid((3, 5)).flip(-1) + 0.01) / 100  # its cells are cut, not rounded
    box = torch.cat((places, places), dim=-1)[None]
    want = udop.RelativePositionBiasAggregated(both)(torch.ones(1, 15), box)[0]
    same(logits(position, grid((3, 5))), want.detach(), atol=1e-6)


@pytest.mark.parametrize(("spec", "rows"), [("t5", 729), ("t5(max_distance=128)", 361), ("swin", 729), ("alibi", 94)])
def test_how_many_displacements_a_scheme_tells_apart(spec, rows):
    layout = layout_of((14, 14))
    position = scheme(spec, layout)
    found = logits(position, torch.tensor([[13.0, 13.0]]), key_coords=grid((27, 27)))[:, 0]
    assert len(found.round(decimals=4).unique(dim=1).T) == rows


def test_swin_is_timms_with_displacements_turned():
    layout = layout_of((3, 5), depth=3)
    position = scheme("swin", layout)
    for kind, flipped in ((RelPosBias, True), (RelPosBiasTf, False)):
        for layer in range(3):
            theirs = kind((3, 5), num_heads=3)
            table = position.table.detach()[layer]
            with torch.no_grad():
                if flipped:
                    theirs.relative_position_bias_table.copy_(table.flip(0, 1).flatten(0, 1))
                else:
                    theirs.relative_position_bias_table.copy_(table.movedim(-1, 0))
            want = theirs.get_bias().detach().reshape(3, 15, 15)
            same(logits(position, grid((3, 5)), layer), want, atol=1e-6)


def test_swin_is_linear_between_cells_and_goes_on_as_at_the_border():
    position = scheme("swin", layout_of((3, 4)))
    origin = torch.zeros(1, 2, dtype=torch.float64)
    table = position.table.detach()[1].double()  # (5, 7, H), Δ = 0 at (2, 3)
    keys = torch.tensor([[0.25, -1.5], [9.0, -9.0]], dtype=torch.float64)
    near, far = logits(position, origin, 1, key_coords=keys)[:, 0].unbind(-1)
    same(near, 0.75 * (table[2, 1] + table[2, 2]) / 2 + 0.25 * (table[3, 1] + table[3, 2]) / 2)
    same(far, table[4, 0])


def test_a_centered_unit_resamples_swins_table():
    layout = layout_of((4,), heads=1, unit="centered")
    position = scheme("swin", layout)
    finer = logits(position, layout.coords((8,)), grid=[8])[0]
    table = position.table.detach()[0, :, 0]
    same(finer[2, 6], table[3 + 2], atol=1e-5)  # four fine cells are two coarse ones
    same(finer[2, 5], (table[3 + 1] + table[3 + 2]) / 2, atol=1e-5)


# ---- kernels and networks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["log", "power"])
@pytest.mark.parametrize("distance", ["euclidean", "manhattan"])
def test_kerple(shape, kind, distance):
    position = scheme(f'kerple(kind="{kind}", distance="{distance}")', layout_of(shape))
    for layer in range(2):
        first, second = position.rates.detach().double()[:, layer].tolist()

        def kernel(h, delta, first=first, second=second):
            far, r1 = NORMS[distance](delta), math.log1p(math.exp(first[h]))
            if kind == "log":
                return -r1 * math.log(1 + math.log1p(math.exp(second[h])) * far)
            return -r1 * far ** ({"euclidean": 2, "manhattan": 1}[distance] / (1 + math.exp(-second[h])))

        bias = logits(position, grid(shape).double(), layer)
        same(bias, loop(kernel, shape), atol=1e-6)
        middle = torch.eye(bias.shape[-1]).double() - 1 / bias.shape[-1]
        assert torch.linalg.eigvalsh(middle @ bias.double() @ middle).min() > -1e-9  # conditionally positive definite


@pytest.mark.parametrize("distance", ["euclidean", "manhattan"])
def test_kerples_exponents_end_where_powers_are_no_kernel_any_more(distance):
    most = build(f'kerple(kind="power", distance="{distance}")', layout_of((6, 6))).most
    middle = torch.eye(36).double() - 1 / 36
    for factor, definite in ((0.99, True), (1.0, True), (1.1, False)):
        bias = loop(lambda h, delta, power=factor * most: -(NORMS[distance](delta) ** power), (6, 6), 1)[0]
        assert (torch.linalg.eigvalsh(middle @ bias @ middle).min() > -1e-9) == definite


@pytest.mark.parametrize("kind", ["log", "power"])
def test_kerple_begins_as_published(kind):
    position = build(f'kerple(kind="{kind}")', layout_of((4, 4), heads=16, depth=64))
    first = F.softplus(position.rates[0])
    second = F.softplus(position.rates[1]) if kind == "log" else 2 * position.rates[1].sigmoid()
    for rate, high in zip((first, second), (2, 1) if kind == "log" else (1, 2), strict=True):
        assert 0 < rate.min() < 0.05 * high
        assert 0.95 * high < rate.max() < high


@pytest.mark.parametrize("shape", [(4, 4), (3, 6)])
def test_logcpb_is_timms_with_displacements_turned(shape):
    position = scheme("logcpb(width=512)", layout_of(shape))
    network = position.network
    for layer in range(2):
        theirs = RelPosMlp(shape, num_heads=3, hidden_dim=512, mode="swin").eval()
        with torch.no_grad():
            theirs.mlp.fc1.weight.copy_(-network.inward[layer].T)
            theirs.mlp.fc1.bias.copy_(network.bias[layer, 0])
            theirs.mlp.fc2.weight.copy_(network.outward[layer].T / 16)  # or the sigmoid is full
            network.outward[layer] /= 16
        want = theirs.get_bias().detach().reshape(3, math.prod(shape), -1)
        same(logits(position, grid(shape), layer), want, atol=1e-4)
        assert want.std() > 1


@pytest.mark.parametrize("window", [(8, 8), (12, 10), (3, 5)])
def test_logcpb_meets_other_windows_as_swin_v2_does(window):
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
        reach = max(math.dist([1] * len(s), s) for s in (shape, sizes))
        for layer in range(2):
            inward, bias, outward = (t.detach()[layer].tolist() for t in position.network.parameters())
            c = abs(float(position.rates.detach()[layer]))

            def network(h, delta, reach=reach, inward=inward, bias=bias, outward=outward, c=c):
                x = math.log(1 + c * NORMS["euclidean"](delta)) / math.log(1 + c * reach)
                return sum(max(0, x * w + b) * out[h] for w, b, out in zip(inward[0], bias[0], outward, strict=True))

            want = loop(network, sizes)
            same(logits(position, grid(sizes).double(), layer, grid=list(sizes)), want, atol=1e-5)


# ---- products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("flash", [True, False])
def test_sandwich_is_the_product_of_sinusoids(shape, flash):
    position = build(f"sandwich(channels=24, base=50, flash={flash})", layout_of(shape))
    pairs = 12 // len(shape)
    speeds = [50 ** (-j / pairs) for j in range(pairs)]

    def product(h, delta):
        return (sum(math.cos(t * d) for t in speeds for d in delta) - 12) * 3 / (8 * (h + 1))

    same(logits(position, grid(shape).double() + 40.25), loop(product, shape))
    encoding = position(grid(shape))
    assert (encoding.biases is None, encoding.q.extra is None) == (flash, not flash)


def test_sandwich_of_one_axis_is_the_papers():
    position = build("sandwich", layout_of((6,)))  # 128 channels, θ_j = 10000^(-2j / 128)
    want = loop(
        lambda h, d: (sum(math.cos(1e4 ** (-2 * j / 128) * d[0]) for j in range(64)) - 64) / (8 * (h + 1) / 3), (6,)
    )
    same(logits(position, grid((6,)).double()), want)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["tupe", "positiononly"])
def test_content_and_place_are_untied(shape, name):
    layout = layout_of(shape)
    position, count = scheme(name, layout), math.prod(shape)
    q, k = torch.randn(2, 1, 3, count, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = torch.eye(count).double().expand(1, 3, -1, -1)
    vectors = position.table.detach().double().flatten(0, -2)
    vectors = (vectors - vectors.mean(1, keepdim=True)) / (vectors.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    for layer in range(2):
        ours = position.projections.detach().double()[:, layer % position.projections.shape[1]]
        places = [(vectors @ weight).view(count, 3, 8) for weight in ours]
        got = attend(q, k, values, position(grid(shape).double(), grid=list(shape)), layer)[0]
        for h in range(3):
            want = torch.zeros(count, count, dtype=torch.float64)
            for i in range(count):
                for j in range(count):
                    content, place = float(q[0, h, i] @ k[0, h, j]), float(places[0][i, h] @ places[1][j, h])
                    want[i, j] = (content + place) / math.sqrt(16) if name == "tupe" else place / math.sqrt(8)
            same(got[h], want.softmax(-1), atol=1e-4)


def test_tupe_r_is_a_sum():
    layout = layout_of((3, 4))
    both = scheme("tupe + t5", layout)
    encoding = both(grid((3, 4)))
    assert encoding.scale == 2**-0.5
    assert encoding.biases is not None
    assert encoding.q.extra is not None


# ---- cost, layers, refusals -----------------------------------------------------------------------------------------

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
def test_a_whole_grid_looks_up_what_pairs_compute(spec, unit, shape):
    layout = layout_of((3, 4), unit=unit, origin="center")
    position, coords = scheme(spec, layout), layout.coords(shape).double()
    for layer in range(2):
        whole = logits(position, coords, layer, grid=list(shape))
        if spec != "fire" or shape != (5, 6):  # which measures distance by its grid
            same(whole, logits(position, coords, layer), atol=2e-4)
        dropped = logits(position, coords[[0, 2, 3]], layer, grid=list(shape))
        same(whole[:, [0, 2, 3]][:, :, [0, 2, 3]], dropped, atol=2e-4)


@pytest.mark.parametrize("spec", ["logcpb", "fire"])
def test_networks_never_run_on_the_pairs_of_a_grid(spec, monkeypatch):
    layout = layout_of((6, 7))
    position, seen = scheme(spec, layout), []
    position.network.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    coords = layout.coords()
    position(coords, grid=[6, 7])
    position(coords.expand(4, -1, -1)[:, ::2], grid=[6, 7])  # dropped tokens
    assert seen == [11 * 13, 11 * 13]
    position(coords)
    assert seen[2] == 42**2


@pytest.mark.parametrize(
    "spec", [s for s in BIASES if s.split("(")[0] in ("swin", "kerple", "logcpb", "fire")] + ["positiononly"]
)
@pytest.mark.parametrize("whole", [True, False])
def test_a_layers_gradient_is_its_own(spec, whole):
    layout = layout_of((3, 4), depth=3)
    position = scheme(spec, layout)
    q, k, v = torch.randn(3, 2, 3, 12, 8, generator=torch.Generator().manual_seed(2))
    attend(q, k, v, position(grid((3, 4)), grid=[3, 4] if whole else None), 1).square().sum().backward()
    for name, parameter in position.named_parameters():
        if name == "table" and spec == "positiononly":
            continue  # shared by all layers
        axis = 1 if name in ("rates", "projections") and spec != "fire" else 0
        touched = parameter.grad.movedim(axis, 0).reshape(3, -1).abs().amax(dim=1) > 0
        assert touched.tolist() == [False, True, False], name


@pytest.mark.parametrize("spec", ["t5", "swin", "kerple", "logcpb", "fire"])
def test_gradients_of_looked_up_biases_are_those_of_pairs(spec):
    layout, found = layout_of((3, 4)), []
    weights = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for sizes in ([3, 4], None):
        position = scheme(spec, layout)
        encoding = position(grid((3, 4)).double(), grid=sizes)
        layers = range(layout.depth if spec != "t5" else 1)
        sum((encoding.bias(layer) * weights[layer]).sum() for layer in layers).backward()
        found.append([p.grad for p in position.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", ["swin", "kerple", "logcpb", "fire", "lookhere", "swin + axial"])
def test_layers_that_differ_look_their_biases_up_one_at_a_time(spec):
    layout = Layout(width=24, heads=3, grid=(9, 9), depth=12)
    held = {leaf.data_ptr(): leaf.numel() for leaf in tree_leaves(build(spec, layout)(layout.coords(), grid=[9, 9]))
            if isinstance(leaf, torch.Tensor)}  # fmt: skip
    pairs, displacements, cos_sin = 81**2, 17**2, 81 * 2 * 4
    assert sum(held.values()) <= pairs + 12 * 3 * displacements + cos_sin


def test_a_bias_beside_a_rotation_leaves_the_fast_path_open():
    layout = Layout(width=24, heads=3, grid=(3, 4), depth=2)
    encoding = scheme("swin + axial(share='rest')", layout)(layout.coords(), prefix=1, grid=[3, 4])
    assert encoding.rotates_only()
    packed = torch.randn(2, 13, 72, generator=torch.Generator().manual_seed(1))
    q, k, v = packed.view(2, 13, 3, 3, 8).permute(2, 0, 3, 1, 4)
    for layer in range(2):
        want = attend(q, k, v, encoding, layer)
        torch.testing.assert_close(attend_qkv(packed.clone(), 3, encoding, layer, overwrite=True), want)


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("lookhere(fov=45)", (5,), "needs two axes or more, for along one there are two ways; use fov=180"),
        ("lookhere(layer_slopes=(1.0,))", (3, 4), "two layer_slopes, of the first and the last layer, got (1.0,)"),
        ("t5(buckets=30)", (3, 4), "t5 needs a number of buckets that divides by 4, got 30"),
        ("t5(max_distance=8)", (3, 4), "each of the first 8 cells, so max_distance must be above that, got 8"),
        ("logcpb(width=0)", (3, 4), "a network of positions needs a width of at least 1, got 0"),
        ("sandwich(channels=3)", (3, 4), "sandwich needs a pair of channels for each of 2 axes, got 3; use 4 or more"),
        ("sandwich(base=0)", (3, 4), "sandwich needs a positive base, got 0"),
    ],
)
def test_refusals(spec, shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(spec, layout_of(shape))


def test_a_rotation_beside_channels_of_its_own_trains_in_a_vit():
    model = RopeViT(32, 8, embed_dim=48, depth=2, num_heads=2, position='axial + alibi(distance="quadratic")')
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
