"""Properties of position schemes, the plot of the kernel, and the table of schemes."""

import inspect
import math

import pytest
import torch

from tests import oracles
from vit_rope import analysis
from vit_rope.__main__ import main
from vit_rope.analysis import kernel, reversibility_margin
from vit_rope.analysis.catalogue import CLAIMS, specs_for
from vit_rope.cli.schemes import scheme_table
from vit_rope.positions import Encoding, Layout, Position, Rotary, build, schemes
from vit_rope.positions.encoding import RelativeTerm
from vit_rope.positions.specs import factory
from vit_rope.positions.transform import Transform


@pytest.mark.parametrize(
    ("base", "values"),
    [
        (1, {1: 0.540, 7: 0.754, 13: 0.907, 31: 0.915, 63: 0.986}),
        (500, {1: 0.945, 7: 0.589, 13: 0.492, 31: 0.308, 63: 0.300}),
        (1e6, {1: 0.965, 7: 0.808, 13: 0.837, 31: 0.830, 63: 0.720}),
        (10, {1: 0.882, 7: -0.014, 13: -0.165, 31: 0.035, 63: -0.111}),
        (100, {1: 0.932, 7: 0.454, 13: 0.314, 31: 0.177, 63: -0.068}),
        (1e4, {1: 0.957, 7: 0.714, 13: 0.692, 31: 0.564, 63: 0.553}),
    ],
)
def test_decay_of_one_axis(base, values):
    position = build(f"axial(base={base})", Layout(width=32, heads=1, grid=(64,)))
    for distance, value in values.items():
        want = sum(math.cos(base ** (-j / 16) * distance) for j in range(16)) / 16
        assert kernel(position, torch.tensor([float(distance)])).item() == pytest.approx(want, abs=1e-6)
        assert value == pytest.approx(want, abs=6e-4)


def test_axial_decay_depends_on_direction():
    position = build("axial(base=100)", Layout(width=64, heads=1, grid=(14, 14)))
    along, across = kernel(position, torch.tensor([[7.0, 0.0], [5.0, 5.0]]))[0].tolist()
    assert along == pytest.approx(0.727, abs=1e-3)
    assert across == pytest.approx(0.469, abs=1e-3)


def test_kernels_of_separate_heads():
    position = build("mixed", Layout(width=64, heads=4, grid=(4, 4), depth=2))
    plane = torch.randn(3, 5, 2)
    assert kernel(position, plane, layer=1).shape == (4, 3, 5)
    torch.testing.assert_close(kernel(position, torch.zeros(1, 2)), torch.ones(4, 1))
    torch.testing.assert_close(kernel(position, plane), kernel(position, -plane))


@pytest.mark.parametrize(("base", "margin"), [(100, 0.034), (10, 0.059), (1e4, 0.021)])
def test_reversibility(base, margin):
    position = build(f"axial(base={base})", Layout(width=64, heads=1, grid=(14, 14)))
    assert reversibility_margin(position, (14, 14)) == pytest.approx(margin, abs=6e-4)


@pytest.mark.parametrize("seed", range(3))
def test_reversibility_of_learned_directions(seed):
    torch.manual_seed(seed)
    position = build("mixed", Layout(width=64, heads=1, grid=(14, 14), depth=1))
    assert reversibility_margin(position, (14, 14)) == pytest.approx(0.060, abs=1.5e-3)


def one_axis(base, pairs=16):
    return build(f"axial(base={base})", Layout(width=2 * pairs, heads=1, grid=(64,)))


@pytest.mark.parametrize(
    ("base", "near", "far"),
    [
        (1, 0.026, 0.006),
        (10, 0.060, 0.000),
        (100, 0.479, -0.091),
        (500, 0.607, 0.152),
        (1e4, 0.730, 0.425),
        (1e6, 0.808, 0.590),
    ],
)
def test_mean_decay(base, near, far):
    along = [torch.arange(a, b, dtype=torch.float64)[:, None] for a, b in ((1, 14), (64, 128))]
    assert kernel(one_axis(base), along[0]).mean().item() == pytest.approx(near, abs=6e-4)
    assert kernel(one_axis(base), along[1]).mean().item() == pytest.approx(far, abs=6e-4)


def test_squared_distance_of_rotations_is_the_kernel():
    freqs = torch.randn(2, 5, dtype=torch.float64)
    position = Rotary(freqs[None, None])
    coords = torch.randn(2, 2, dtype=torch.float64)
    first, second = (oracles.rotation_matrix(p, position.initial[0, 0]) for p in coords)
    want = float((first - second).square().sum())
    assert 20 * (1 - kernel(position, coords[:1] - coords[1:]).item()) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("displacement", [1.0, 7.0, 31.0])
def test_decay_bound_is_su_s_and_bounds_scores(displacement):
    position = one_axis(100)
    partial, want = 0j, 0.0
    for j in range(16):
        partial += complex(math.cos(100 ** (-j / 16) * displacement), math.sin(100 ** (-j / 16) * displacement))
        want += abs(partial) / 16
    bound = analysis.decay_bound(position, torch.tensor([displacement])).item()
    assert bound == pytest.approx(want, rel=1e-5)
    q, k = torch.randn(2, 16, dtype=torch.complex128)
    rotation = torch.polar(torch.ones(16), 100 ** (-torch.arange(16.0) / 16) * displacement)
    for content in (q * k.conj(), torch.ones(16)):  # the last has no steps but that from the last pair to 0
        score = (content * rotation).sum().abs().item()
        steps = torch.cat((content, torch.zeros(1))).diff().abs()
        assert score <= 16 * bound * steps.max().item() * (1 + 1e-6)


def test_a_base_of_one_never_decays():
    result = analysis.decay(1, 16, max_distance=63)
    assert result.length == 2
    assert result.ripple > 0.99
    assert result.horizon == pytest.approx(math.pi)


@pytest.mark.parametrize("base", [10, 100, 500, 1e4])
def test_decay_in_three_numbers(base):
    curve = [sum(math.cos(base ** (-j / 16) * d) for j in range(16)) / 16 for d in range(64)]
    result = analysis.decay(base, 16, max_distance=63)
    length = next(d for d in range(64) if curve[d] < 0.5)
    assert result.length == length
    assert result.ripple == pytest.approx(max(curve[length:]))
    assert result.horizon == pytest.approx(math.pi * base ** (15 / 16))
    assert analysis.decay(1e6, 16, max_distance=10).length == math.inf


@pytest.mark.parametrize(("grid", "head"), [((14, 14), 64), ((32, 32), 64), ((8, 24), 32)])
def test_the_recommended_base_is_the_smallest_without_negative_kernels(grid, head):
    base, pairs = analysis.recommended_base(grid, head), head // 4

    def lowest(value):
        return min(sum(math.cos(value ** (-j / pairs) * d) for j in range(pairs)) for d in range(max(grid)))

    assert lowest(base) >= 0
    assert all(lowest(base * factor) < 0 for factor in (0.5, 0.8, 0.95, 0.985))
    assert 10 < base < 150


def test_rank_counts_the_axes_that_a_scheme_distinguishes():
    layout = Layout(width=64, heads=2, grid=(14, 14), depth=2)
    ranks = {spec: analysis.frequency_rank(build(spec, layout)) for spec in ("axial", "mixed", "sumcoords", "flat")}
    assert ranks == {"axial": 2, "mixed": 2, "sumcoords": 1, "flat": 1}
    with pytest.raises(ValueError, match="only rotary schemes have frequencies, got Learned"):
        analysis.frequency_rank(build("learned", layout))


def test_aliases_of_a_flattened_image_are_the_wraps():
    layout = Layout(width=64, heads=1, grid=(14, 14))
    assert analysis.aliases(build("flat", layout), (14, 14)).tolist() == [[1, -13]]
    assert reversibility_margin(build("sumcoords", layout), (14, 14)) == pytest.approx(0, abs=1e-7)
    assert analysis.aliases(build("sumcoords", layout), (14, 14))[0].tolist() == [1, -1]
    for spec in ("axial", "mixed", "simplex", "goldengate"):
        assert len(analysis.aliases(build(spec, layout), (14, 14))) == 0


PLACEMENTS = [
    {"unit": unit, "origin": origin}
    for unit in ("index", "centered", "centered_shorter", "centered_longer")
    for origin in (0.0, 1.5, (0.25, -2.0), "center")
]


def by_hand(spec, options, cells):
    """The kernel (H, N) at displacements (N, A) in cells, from rotations of the whole grid."""
    layout = Layout(width=48, heads=2, grid=(5, 4), depth=1, **options)
    torch.manual_seed(0)
    position = build(spec, layout)
    table = torch.view_as_complex(position(layout.coords()).q.tables()[0].double().contiguous())[0]  # (N, H, R)
    first = 3 if min(cells[1]) < 0 else 0  # the end of the first row, from where columns can be counted back
    return position, (table[[first + r * 4 + c for r, c in cells]] * table[first].conj()).real.mean(dim=-1).T


@pytest.mark.parametrize("options", PLACEMENTS)
@pytest.mark.parametrize("spec", ["axial", "mixed", "flat", "normalize(axial)", "xy(axial)", "sumcoords"])
def test_displacements_are_cells_in_every_unit_and_origin(spec, options):
    for cells in ([(0, 0), (0, 1), (2, 3), (4, 0)], [(0, 0), (1, -3), (3, -1)]):
        position, want = by_hand(spec, options, cells)
        got = kernel(position, torch.tensor(cells, dtype=torch.float64)).detach().double()
        torch.testing.assert_close(got, want.expand_as(got), rtol=0, atol=2e-5)


@pytest.mark.parametrize("options", PLACEMENTS)
def test_numbers_of_a_grid_in_every_unit_and_origin(options):
    layout = Layout(width=64, heads=2, grid=(14, 14), depth=1, **options)
    assert analysis.aliases(build("flat", layout), (14, 14)).tolist() == [[1, -13]]
    for spec, count in (("swin", 729), ("t5(max_distance=14)", 729), ("alibi", 94), ("shaw(clip=4)", 81)):
        assert analysis.distinct_bias_rows(build(spec, layout), (14, 14)) == count
    for spec, flash in (("sandwich", "sandwich(flash=False)"), ('alibi(distance="quadratic")', "alibi")):
        counts = [analysis.distinct_bias_rows(build(each, layout), (14, 14)) for each in (spec, flash)]
        assert counts[0] == counts[1]


def test_the_margin_of_dinov3_is_that_of_its_own_coordinates():
    position = build("dinov3", Layout(width=64, heads=1, grid=(14, 14), depth=1, unit="centered"))
    assert reversibility_margin(position, (14, 14)) == pytest.approx(0.0276, abs=2e-4)


def test_flattening_distorts_distances():
    result = analysis.flattening((14, 14))
    assert result.anisotropy == 14
    assert result.wrap == pytest.approx(13.04, abs=5e-3)
    assert result.correlation == pytest.approx(0.687, abs=5e-4)
    assert analysis.flattening((9,)) == (1, 1.0, pytest.approx(1.0))
    with pytest.raises(ValueError, match=r"a correlation needs a grid of at least 3 cells, got \(1, 2\)"):
        analysis.flattening((1, 2))


class Distances(Position):
    """A bias that is a given function of the displacement."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def encode(self, coords, key_coords, grid):
        keys = coords if key_coords is None else key_coords
        return Encoding(biases=[self.function(keys[None] - coords[:, None])[None, None]])


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda d: -d.norm(dim=-1), 94),
        (lambda d: -d.abs().sum(dim=-1), 27),
        (lambda d: d[..., 0].abs() * 14 + d[..., 1].abs(), 196),
        (lambda d: (d[..., 0] + 13) * 27 + d[..., 1] + 13, 729),
        (lambda d: d[..., 0].clamp(-4, 4) * 9 + d[..., 1].clamp(-4, 4), 81),
    ],
)
def test_distinct_rows_of_a_bias_function(function, count):
    assert analysis.distinct_bias_rows(Distances(function), (14, 14)) == count


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ("swin", 729),
        ("t5(max_distance=14)", 729),
        ("t5(max_distance=128)", 361),
        ("alibi", 94),
        ("kerple", 94),
        ('alibi(distance="quadratic")', 94),
        ('alibi(distance="manhattan")', 27),
        ("shaw(clip=4)", 81),
    ],
)
def test_distinct_rows_of_registered_biases(spec, count):
    assert (
        analysis.distinct_bias_rows(build(spec, Layout(width=64, heads=2, grid=(14, 14), depth=1)), (14, 14)) == count
    )


class Tables(Position):
    """A table of vectors for displacements clipped at 4; many of its rows are equal."""

    def encode(self, coords, key_coords, grid):
        offset = (key_coords[None] - coords[:, None]).long() + 13
        index = offset[..., 0] * 27 + offset[..., 1]
        vectors = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0))
        clipped = (torch.arange(27) - 13).clamp(-4, 4) + 4
        table = (vectors[0, clipped][:, None] + vectors[1, clipped][None]).flatten(0, 1)[None]
        return Encoding(term_lists=[[RelativeTerm(table, index[None], "q")]])


def test_distinct_rows_of_tables():
    assert analysis.distinct_bias_rows(Tables(), (14, 14)) == 81


def test_distinct_rows_of_extra_channels():
    quadratic = Distances(lambda d: d)
    quadratic.encode = lambda coords, keys, grid: Encoding(
        Transform(extra=[torch.ones(1, 1, len(coords), 1)]),
        Transform(extra=[keys.square().sum(dim=-1)[None, None, :, None]]),
    )
    assert analysis.distinct_bias_rows(quadratic, (14, 14)) == 94


def test_a_rotation_adds_no_bias():
    with pytest.raises(ValueError, match="this scheme adds no bias and no relative term to logits"):
        analysis.distinct_bias_rows(build("axial", Layout(width=8, heads=1, grid=(2, 2))), (2, 2))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("shape", [(11,), (10, 13)])
def test_zero_padding_leaks_position_within_its_receptive_field(depth, shape):
    torch.manual_seed(0)
    kind = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d}[len(shape)]
    leaks = {}
    for padding in ("zeros", "circular"):
        layers = [kind(3, 3, 3, padding=1, padding_mode=padding).double() for _ in range(depth)]
        double = torch.nn.Sequential(*layers)
        leaks[padding] = analysis.padding_leak(lambda x, mix=double: mix(x.double()), shape, channels=3)
    assert (leaks["zeros"][:depth] > 1e-3).all()
    assert leaks["zeros"][depth:].abs().max() < 1e-12
    assert leaks["circular"].abs().max() < 1e-12
    assert len(leaks["zeros"]) == -(-min(shape) // 2)


@pytest.mark.parametrize(("padding", "deep"), [("zeros", 2), ("circular", 0)])
def test_peg_gets_position_from_padding_only(padding, deep):
    layout = Layout(width=4, heads=1, grid=(9, 12), depth=1)
    position = build(f'peg(kernel=5, padding="{padding}")', layout)

    def mixer(maps):
        tokens = position.embed(maps.flatten(2).transpose(1, 2), layout.coords(), list(layout.grid))
        return tokens.transpose(1, 2).unflatten(2, layout.grid)

    leak = analysis.padding_leak(mixer, layout.grid, channels=4)
    assert (leak[:deep] > 1e-3).all()
    assert leak[deep:].max() < 1e-5


def test_invalid_arguments():
    with pytest.raises(ValueError, match="decay needs a positive base and at least one pair, got base 0 and 16 pairs"):
        analysis.decay(0, 16)
    with pytest.raises(ValueError, match="head_dim 2 has less than one pair for each of 2 axes; use 4 or more"):
        analysis.recommended_base((4, 4), 2)
    with pytest.raises(
        ValueError, match=r"no base up to 10\^8 keeps K at or above 0 with 1 pairs per axis over 9 cells"
    ):
        analysis.recommended_base((9,), 2)


def test_a_kernel_needs_a_rotation():
    with pytest.raises(ValueError, match="a kernel needs a rotary scheme, such as axial or mixed"):
        kernel(build("learned", Layout(width=8, heads=1, grid=(2, 2))), torch.zeros(1, 2))


def test_plot_kernel(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "deep" / "kernel.png"
    main(["plot", "kernel", "axial", "mixed", "--out", str(out), "--grid", "7", "5"])
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert capsys.readouterr().out.strip() == str(out)
    with pytest.raises(SystemExit):
        main(["plot", "kernel", "none", "--out", str(tmp_path / "none.png")])
    assert "a kernel needs a rotary scheme" in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()
    with pytest.raises(ValueError, match="plot_kernel needs at least one position spec, got none"):
        pytest.importorskip("vit_rope.plots").plot_kernel([], str(tmp_path / "none.png"))


def rows_of(table):
    """The claims of each scheme, read from the first line of its entry."""
    return {line.split()[0]: line.split()[1:6] for line in table.splitlines()[1:] if not line.startswith(" ")}


def test_scheme_table_lists_every_scheme(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    main(["schemes"])
    table = capsys.readouterr().out.rstrip("\n")
    assert list(rows_of(table)) == schemes()
    assert scheme_table() == table
    assert table.splitlines()[0].split()[:6] == ["scheme", *CLAIMS]
    assert max(len(line) for line in table.splitlines()) <= 120
    assert rows_of(table)["axial"] == ["yes", "yes", "yes", "-", "yes"]
    assert rows_of(table)["none"] == ["yes", "-", "yes", "-", "-"]
    assert rows_of(table)["liere"] == ["-", "yes", "yes", "yes", "yes"]
    flat = " ".join(table.split())
    assert inspect.cleandoc(factory("axial").__doc__).splitlines()[0] in flat
    assert "pairs='interleaved', fastest=1.0, learned=False)" in flat


@pytest.mark.parametrize("column", CLAIMS)
def test_scheme_table_sorts_by_a_claim(column, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    main(["schemes", "--sort", column])
    marks = [claims[CLAIMS.index(column)] for claims in rows_of(capsys.readouterr().out).values()]
    assert set(marks) <= {"yes", "-"}
    assert marks == sorted(marks, reverse=True)
    with pytest.raises(SystemExit):
        main(["schemes", "--sort", "beauty"])
    assert "invalid choice: 'beauty'" in capsys.readouterr().err


def test_unknown_verbs(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["trian"])
    assert "no verb 'trian'" in capsys.readouterr().err
    main([])
    assert "vit-rope VERB" in capsys.readouterr().out


def test_specs_for_images_leave_out_schemes_for_signals_only():
    names = {spec.partition("(")[0] for spec in specs_for(Layout(48, 2, (4, 4), 2))}
    assert set(schemes()) - names == {"xpos"}
