"""ALiBi and LookHere against loops, x-transformers and their bounds of precision."""

import math
import warnings

import pytest
import torch
from torch.nn import functional as F

from tests.positions.bias.helpers import NORMS, SHAPES, layout_of, logits, loop, same
from vit_rope.attention import attend
from vit_rope.positions import build
from vit_rope.positions.bias.fixed import slopes
from vit_rope.positions.coords import grid


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("distance", NORMS)
def test_alibi_is_a_slope_times_the_distance(shape, distance):
    position = build(f'alibi(distance="{distance}")', layout_of(shape))
    m = [2**-4, 2**-8, 2**-2]  # two heads, then the first of four
    same(logits(position, grid(shape).double()), loop(lambda h, delta: -m[h] * NORMS[distance](delta), shape))


def test_alibi_matches_x_transformers_along_each_axis():
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
def test_quadratic_alibi_equals_its_bias_without_a_mask(prefix, monkeypatch):
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


def test_quadratic_alibi_fits_float16():
    position = build('alibi(distance="quadratic")', layout_of((8000,), 8))
    coords = grid((8000,))[::7]
    encoding = position(coords)
    q, k = (part.extra[0].half() for part in (encoding.q, encoding.k))
    assert all(part.isfinite().all() for part in (q, k))
    near = build('alibi(distance="quadratic")', layout_of((300,), 8))
    exact = logits(near, grid((300,)).double())
    q, k = (part.extra[0][0].half().double() for part in near(grid((300,)))[:2])
    same(q @ k.transpose(-2, -1), exact.view_as(q @ k.transpose(-2, -1)), atol=1e-6)


@pytest.mark.parametrize("heads", [3, 6, 8, 12])
@pytest.mark.parametrize("size", [14, 48])
def test_quadratic_alibi_in_bfloat16(heads, size):
    position = build('alibi(distance="quadratic")', layout_of((size, 20), heads))
    coords = grid((size, 20)) + 300
    exact = logits(position, coords.double())
    encoding = position(coords)
    q, k = (part.extra[0][0].bfloat16().double() for part in (encoding.q, encoding.k))
    error = (q @ k.transpose(-2, -1) - exact).abs().amax(dim=(1, 2))
    if heads != 12:  # slopes that are powers of two
        assert error.max() < 1e-9
    else:
        assert error.max() > 1e-3
        assert (error <= 0.004 * 2 * torch.tensor(slopes(12)) * ((size / 2) ** 2 + 10**2)).all()


@pytest.mark.parametrize("fov", [180, 90, 45])
def test_lookhere_attends_within_a_cone(fov):
    shape, depth = (5, 6), 3
    position = build(f"lookhere(fov={fov}, slope=2.0, layer_slopes=(1.5, 0.5))", layout_of(shape, 12, depth))
    undirected = [0.25, 0.0625, 0.015625, 0.00390625]
    views = {180: [90, 270, 180, 0], 90: [90, 270, 180, 0], 45: [22.5 + 45 * i for i in range(8)]}[fov]  # y is down
    for layer, ratio in enumerate((1.5, 1.0, 0.5)):
        got = logits(position, grid(shape).double(), layer)
        for h in range(8, 12):
            steep = 2 * ratio * undirected[h - 8]
            same(got[[h]], loop(lambda _, delta, m=steep: -m * NORMS["euclidean"](delta), shape, 1))
        directions = set()
        for h in range(8):
            match, steep = [], 2 * ratio * 0.5 ** (1 + h // len(views))
            for view in views:

                def visible(_, delta, view=view, steep=steep):
                    off = math.degrees(math.atan2(-delta[0], delta[1])) - view
                    angle = abs((off + 180) % 360 - 180)
                    inside = delta == [0, 0] or angle <= fov / 2 + 1e-6
                    return -steep * NORMS["euclidean"](delta) if inside else -1e4

                want = loop(visible, shape, 1)[0]
                match += [view] if (got[h] - want).abs().max() < 1e-9 else []
            assert len(match) == 1, h
            directions.add((match[0], h // len(views)))
        assert len(directions) == 8


def test_lookhere_gives_no_nan_if_all_keys_are_hidden():
    position = build("lookhere", layout_of((4, 4), 6))
    q, k, v = torch.randn(3, 1, 6, 16, 8).half().unbind(0)
    encoding = position(grid((4, 4)), key_coords=grid((4, 4))[:1])
    assert attend(q, k[:, :, :1], v[:, :, :1], encoding).isfinite().all()
