"""Modifiers of rotary schemes against transformers' formulas, plain loops and their claims."""

import math

import pytest
import torch

from vit_rope.attention import attend
from vit_rope.positions import Layout, build
from vit_rope.positions.rotary.scaling import ranks
from vit_rope.unet.maps import map_layout

LAYOUT = Layout(width=128, heads=2, grid=(14, 10), depth=2)
LINE = Layout(width=64, heads=1, grid=(2048,))


def freqs(spec, layout=LAYOUT, grid=None, seed=0):
    """Frequencies (L, H, A, R) in float64, of a scheme or of the rotary part of a sum."""
    torch.manual_seed(seed)
    position = build(spec, layout)
    position = getattr(position, "parts", [position])[-1]
    return position.frequencies(layout.coords(grid).double(), grid).detach()


def theirs(kind, base=1e4, length=2048, **options):
    """Frequencies and logit scale of transformers, for heads of 64 channels."""
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    parameters = {"rope_type": kind, "rope_theta": base, "original_max_position_embeddings": length, **options}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=1, max_position_embeddings=length, rope_parameters=parameters
    )
    return lambda seq_len=None: rope.ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=seq_len)


def test_interpolation_is_that_of_transformers():
    want, _ = theirs("linear", factor=3.0)()
    torch.testing.assert_close(freqs("interpolate(axial(base=10000), factor=3)", LINE)[0, 0, 0].float(), want)


@pytest.mark.parametrize("factor", [1.0, 2.5])
@pytest.mark.parametrize("length", [100, 2048, 3000, 8192])
def test_dynamic_is_that_of_transformers(factor, length):
    want, _ = theirs("dynamic", factor=factor)(length)
    got = freqs(f"dynamic(axial(base=10000), factor={factor})", LINE, grid=[length])
    torch.testing.assert_close(got[0, 0, 0].float(), want, rtol=2e-5, atol=0)


def test_yarn_is_that_of_transformers_except_for_the_ramp():
    want, table_factor = theirs("yarn", factor=4.0, beta_fast=32, beta_slow=1, truncate=False)()
    spec = "yarn(axial(base=10000), factor=4, slow=1, fast=32)"
    got = freqs(spec, LINE)[0, 0, 0].float()
    revolutions = 2048 * 1e4 ** (-torch.arange(32) / 32) / (2 * math.pi)
    outside = (revolutions < 1) | (
        revolutions > 32
    )  # theirs has a ramp in the number of the pair, the paper in that of revolutions
    assert 10 < outside.sum() < 25
    torch.testing.assert_close(got[outside], want[outside], rtol=2e-5, atol=0)
    assert build(spec, LINE)(LINE.coords([4])).scale == pytest.approx(table_factor**2)


def test_ntk_is_that_of_rotary_embedding_torch():
    package = pytest.importorskip("rotary_embedding_torch")
    want = package.RotaryEmbedding(64, theta_rescale_factor=3.0).freqs.detach()
    torch.testing.assert_close(freqs("ntk(axial(base=10000), factor=3)", LINE)[0, 0, 0].float(), want)


def test_ntk_is_a_larger_base_on_each_axis():
    got = freqs("ntk(axial(base=(100, 50)), factor=(2, 3))")[0, 0]
    for a, (base, factor) in enumerate(((100, 2), (50, 3))):
        want = [(base * factor ** (16 / 15)) ** (-j / 16) for j in range(16)]
        torch.testing.assert_close(got[a, 16 * a : 16 * a + 16], torch.tensor(want).double(), rtol=1e-6, atol=0)
        assert (got[a, : 16 * a] == 0).all()


def test_yarn_counts_revolutions_over_the_training_grid():
    plain, got = freqs("axial(base=20)")[0, 0], freqs("yarn(axial(base=20), factor=(2, 4), slow=0.3, fast=1.2)")[0, 0]
    ramped = 0
    for a, (cells, factor) in enumerate(((14, 2), (10, 4))):
        for j in range(16 * a, 16 * a + 16):
            revolutions = float(plain[a, j]) * cells / (2 * math.pi)
            kept = min(max((revolutions - 0.3) / (1.2 - 0.3), 0), 1)
            ramped += 0 < kept < 1
            assert float(got[a, j]) == pytest.approx(float(plain[a, j]) * (kept + (1 - kept) / factor), rel=1e-6)
    assert ramped > 4
    assert build("yarn(axial, factor=(2, 4))", LAYOUT)(LAYOUT.coords()).scale == pytest.approx(
        (0.1 * math.log(math.sqrt(2 * 4)) + 1) ** 2
    )
    assert build("yarn(axial, temperature=0)", LAYOUT)(LAYOUT.coords()).scale == 1
    for factor in ("0.25", "1e-5", "(0.5, 1)", "(0.5, 2)", "1"):  # as in transformers
        assert build(f"yarn(axial, factor={factor})", LAYOUT)(LAYOUT.coords()).scale == 1


@pytest.mark.parametrize("unit", ["index", "pixel", "centered"])
def test_revolutions_are_the_same_at_every_level_in_every_unit(unit):
    # one revolution over the whole map, which is 32 pixels, 8 cells or two units of its size wide
    reach = {"index": 8, "pixel": 32, "centered": 2}[unit]
    layout = map_layout(8, 1, 8, 2, (32, 32), unit, 0.0)
    spec = f"axial(base=4, fastest={2 * math.pi / reach})"
    plain, got = freqs(spec, layout), freqs(f"yarn({spec}, factor=2, slow=0.25, fast=0.75)", layout)
    torch.testing.assert_close((got / plain).nan_to_num()[0, 0, 0, :2], torch.tensor([1.0, 0.75]).double())


@pytest.mark.parametrize("name", ["ntk", "interpolate", "yarn"])
def test_mixed_keeps_its_directions(name):
    plain, got = freqs("mixed(base=100)"), freqs(f"{name}(mixed(base=100), factor=2)")
    ratio = got / plain
    torch.testing.assert_close(ratio[..., :1, :], ratio[..., 1:, :], rtol=1e-5, atol=0)
    assert ratio.amin().item() == pytest.approx(0.5)
    assert ratio.amax().item() == pytest.approx(0.5 if name == "interpolate" else 1.0)
    axial = freqs(f"{name}(axial(base=100), factor=2)") / freqs("axial(base=100)")
    if name == "ntk":  # pairs as fast as those of axial are slowed down as much
        torch.testing.assert_close(ratio[0, 0, 0, :16], axial[0, 0, 0, :16], rtol=1e-5, atol=0)


def test_interpolation_is_a_smaller_grid():
    coords = LAYOUT.coords([28, 30]).double()
    torch.manual_seed(0)
    there = build("interpolate(mixed, factor=(2, 3))", LAYOUT)(coords)
    torch.manual_seed(0)
    here = build("mixed", LAYOUT)(coords / torch.tensor([2.0, 3.0]))
    for ours, theirs in zip(there.q.rotation, here.q.rotation, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_single_and_absent_pairs_have_a_rank():
    one = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.5]])[None, None]
    assert ranks(one)[0, 0].tolist()[0][0] == 1  # a single frequency counts as the slowest
    assert ranks(one)[0, 0].tolist()[1][1:] == [0, 1]
    two = torch.tensor([[4.0, 2.0, 0.0, 0.0], [0.0, 0.0, 8.0, 1.0]])[None, None]
    assert ranks(two)[0, 0, 0, :2].tolist() == ranks(two)[0, 0, 1, 2:].tolist() == [0, 1]  # each axis separately
    got = freqs("ntk(axial(share=(32, 0)), factor=2)", Layout(width=32, heads=1, grid=(4, 4)))
    assert got.isfinite().all()


def test_dynamic_scales_each_axis_by_the_grid():
    plain = freqs("axial")
    for grid in (None, [14, 10], [7, 9]):
        torch.testing.assert_close(freqs("dynamic(axial)", grid=grid), plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(freqs("dynamic(axial)", grid=[28, 10]), freqs("ntk(axial, factor=(2, 1))"))
    torch.testing.assert_close(freqs("dynamic(axial, factor=3)", grid=[28, 5]), freqs("ntk(axial, factor=(4, 1))"))


def test_dynamic_does_not_change_axes_that_do_not_grow():
    for unit, factor in (("centered", (1, 1)), ("centered_shorter", (1, 2)), ("centered_longer", (1, 1))):
        layout = Layout(width=64, heads=1, grid=(10, 10), unit=unit)
        wide = freqs("dynamic(axial)", layout, grid=[20, 40])
        torch.testing.assert_close(wide, freqs(f"ntk(axial, factor={factor})", layout), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["interpolate", "ntk", "yarn", "dynamic"])
def test_trained_weights_load_under_the_same_names_and_get_gradients(name):
    trained, scaled = build("learned + mixed", LAYOUT), build(f"{name}(learned + mixed)", LAYOUT)
    trained.parts[1].freqs.data.mul_(1.5)
    scaled.load_state_dict(trained.state_dict())
    coords = LAYOUT.coords([20, 12])
    ratio = scaled.parts[1].frequencies(coords, [20, 12]) / trained.parts[1].freqs
    assert 0.4 < ratio.min() < 0.95
    scaled(coords, grid=[20, 12]).q.rotation[1].sum().backward()
    assert scaled.parts[1].freqs.grad[1].abs().min() > 0


def test_sums_keep_their_other_parts():
    both, one = build("yarn(sincos + flat + axial)", LAYOUT), build("sincos + flat + yarn(axial)", LAYOUT)
    assert [type(part).__name__ for part in both.parts] == ["SinCos", "Flat", "Rotary"]
    assert [len(getattr(part, "changes", ())) for part in both.parts] == [0, 0, 1]
    x = torch.randn(1, 140, 128)
    torch.testing.assert_close(both.embed(x, LAYOUT.coords()), one.embed(x, LAYOUT.coords()))
    torch.testing.assert_close(both(LAYOUT.coords()).q.rotation, one(LAYOUT.coords()).q.rotation)


@pytest.mark.parametrize("name", ["interpolate", "ntk", "yarn"])
@pytest.mark.parametrize("scheme", ["reference({}, grid=(7, 5))", "xy({})", "alternate({})", "normalize({}, high=9)"])
def test_modifiers_apply_inside_other_modifiers(name, scheme):
    """The order does not matter, except that yarn counts revolutions over the extent the scheme
    sees: here half the grid.
    """
    inner = "axial(base=10000)"
    outside = build(f"{name}({scheme.format(inner)}, factor=3)", LAYOUT)
    inside = build(scheme.format(f"{name}({inner}, factor=3)"), LAYOUT)
    coords = LAYOUT.coords([20, 12])
    got, want = (getattr(p, "scheme", p).frequencies(coords) for p in (outside, inside))
    if name == "yarn" and hasattr(outside, "scheme"):
        half = Layout(width=128, heads=2, grid=(7, 5))
        extent = [14 * 10 / 13, 10 * 10 / 9] if "normalize" in scheme else half.grid
        assert outside.scheme.changes[-1].extent == pytest.approx(extent)
        if "reference" in scheme:
            want = build(f"yarn({inner}, factor=3)", half).frequencies(coords)
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    rotated = outside(coords, grid=[20, 12])
    assert rotated.scale == inside(coords, grid=[20, 12]).scale


def test_ntk_over_a_reference_is_a_larger_base():
    table = build("ntk(reference(xy(axial(base=100)), grid=(16, 16)), factor=2)", LAYOUT)
    base = 100 * 2 ** (16 / 15)
    want = build(f"reference(xy(axial(base={base})), grid=(16, 16))", LAYOUT)
    got, want = (scheme(LAYOUT.coords([9, 5]), grid=[9, 5]).q.rotation[0] for scheme in (table, want))
    torch.testing.assert_close(got, want, rtol=0, atol=5e-6)


@pytest.mark.parametrize("scheme", ["dinov3", "axial64", "xy(dinov3)"])
def test_exact_schemes_scale_like_their_frequencies(scheme):
    layout = Layout(128, 2, (14, 10), unit="centered")
    plain, scaled = build(scheme, layout), build(f"ntk({scheme}, factor=4)", layout)
    ratio = (scaled.frequencies(layout.coords()) / plain.frequencies(layout.coords()))[0, 0]
    assert ratio[0, ratio[0].isfinite()].aminmax() == (pytest.approx(0.25), pytest.approx(1))
    same = build(f"interpolate({scheme}, factor=1)", layout)(layout.coords()).q.rotation[0]
    torch.testing.assert_close(same, plain(layout.coords()).q.rotation[0], rtol=0, atol=2e-6)


def test_reference_keeps_the_names_of_parameters():
    trained, scaled = build("reference(mixed)", LAYOUT), build("yarn(reference(mixed) + learned)", LAYOUT)
    assert {f"parts.0.{key}" for key in trained.state_dict()} <= set(scaled.state_dict())


# every rotary scheme whose frequencies are learned, or which does more than rotate queries and keys
INSIDE = ["axial(learned=True)", "string", "comrope_ap(block=4)", "comrope_ld(block=4)", "valuerope", "pope", "mixed"]
INSIDE += ["axial", "splitaxial", "sumcoords", "dinov3", 'axial(pairs="half")']


def made(spec):
    """A scheme with parameters from one seed, and its attention as a function of coordinates."""
    torch.manual_seed(0)
    layout = Layout(width=64, heads=2, grid=(6, 5), depth=2)
    scheme = build(spec, layout)
    torch.manual_seed(1)
    for parameter in scheme.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    q, k, v = torch.randn(3, 1, 2, 30, 32, dtype=torch.float64)
    return scheme, lambda coords, grid=None: attend(q, k, v, scheme(coords.double(), grid=grid), 1)


@pytest.mark.parametrize("inner", INSIDE)
def test_modifiers_change_coordinates_or_speeds_of_every_rotary_scheme(inner):
    coords = Layout(width=64, heads=2, grid=(6, 5)).coords() * torch.tensor([1.0, 1.7]) - 2
    plain = made(inner)[1]
    factor = torch.tensor([2.0, 3.0])
    for spec, want in {
        f"interpolate({inner}, factor=(2, 3))": plain(coords / factor),
        f"interpolate(interpolate({inner}, factor=(1, 3)), factor=(2, 1))": plain(coords / factor),
        f"ntk({inner}, factor=1)": plain(coords),
        f"yarn({inner}, factor=1)": plain(coords),
        f"dynamic({inner})": plain(coords),
        f"xy({inner})": plain(coords.flip(-1)),
        f"xy(interpolate({inner}, factor=(2, 3)))": plain((coords / factor).flip(-1)),
        f"interpolate(xy({inner}), factor=(2, 3))": plain((coords / factor).flip(-1)),
    }.items():
        torch.testing.assert_close(
            made(spec)[1](coords), want, rtol=0, atol=2e-5, msg=lambda text, s=spec: f"{s}: {text}"
        )
    assert (plain(coords / factor) - plain(coords)).abs().max() > 1e-3


@pytest.mark.parametrize("inner", INSIDE)
@pytest.mark.parametrize("name", ["interpolate", "ntk", "yarn", "dynamic", "xy", "spectrum"])
def test_modified_schemes_learn_the_same_parameters_and_stay_relative(name, inner):
    if (name, inner) == ("spectrum", "dinov3"):
        pytest.skip("dinov3 computes its own speeds")
    scheme, run = made(f"{name}({inner})")
    plain = made(inner)[0]
    assert {key: value.shape for key, value in scheme.state_dict().items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }
    coords = Layout(width=64, heads=2, grid=(12, 10)).coords()[:30]
    near, far = (run(coords + shift, [12, 10] if name == "dynamic" else None) for shift in (0.0, 1.5))
    torch.testing.assert_close(near, far, rtol=0, atol=5e-4)
    run(coords.requires_grad_()).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in scheme.parameters())
    assert repr(scheme)


@pytest.mark.parametrize("inner", ["axial(learned=True)", "string", "valuerope", "pope", "axial", "dinov3"])
def test_axes_alternate_in_every_scheme_that_has_a_block_of_pairs_for_each(inner):
    scheme, plain = made(f"alternate({inner})")[0], made(inner)[0]
    got, want = (each.frequencies(torch.zeros(1, 2)).detach() for each in (scheme, plain))
    half = want.shape[-1] // 2
    assert torch.equal(got[..., 0::2], want[..., :half])
    assert torch.equal(got[..., 1::2], want[..., half:])


def test_the_temperature_of_yarn_is_applied_once_to_a_sum():
    one, both = (build(f"yarn({inner}, factor=4)", LAYOUT) for inner in ("axial", "axial + mixed"))
    coords = LAYOUT.coords()
    assert both(coords).scale == one(coords).scale == pytest.approx((0.1 * math.log(4) + 1) ** 2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "dynamic(reference(axial))",
            "dynamic depends on how far a grid extends, but reference makes all grids extend equally",
        ),
        (
            "reference(dynamic(axial))",
            "dynamic depends on how far a grid extends, but reference makes all grids extend equally",
        ),
        (
            "ntk(reference(learned))",
            "ntk modifies rotary schemes with frequencies for each axis, such as ntk.axial., not Learned",
        ),
        (
            "yarn(learned)",
            "yarn modifies rotary schemes with frequencies for each axis, such as yarn.axial., not Learned",
        ),
        ("ntk(flat + sincos)", "such as ntk.axial., not Flat . SinCos"),
        ("ntk", r"ntk modifies 1 scheme\(s\) \(scheme\), got 0"),
        ("interpolate(axial, factor=0)", "factor is a positive number, or one for each of 2 axes, got 0"),
        ("dynamic(axial, factor=(1, 2, 3))", r"one for each of 2 axes, got \(1, 2, 3\)"),
        ("yarn(axial, slow=3)", "yarn needs 0 <= slow < fast and temperature >= 0, got 3, 2.0 and 0.1"),
        ("yarn(axial, temperature=-1)", "got 0.5, 2.0 and -1"),
    ],
)
def test_refusals(spec, message):
    with pytest.raises(ValueError, match=message):
        build(spec, LAYOUT)
