"""The spec language and its error messages."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import spec_of
from vit_rope.attention import attend
from vit_rope.positions import Layout, Position, Rotary, Sum, build, register, schemes, specs
from vit_rope.positions.rotary.base import geometric

LAYOUT = Layout(width=384, heads=6, grid=(14, 14), depth=12)


@pytest.fixture
def scheme():
    """Register a scheme for one test."""
    names = []

    def add(factory):
        names.append(factory.__name__.lower())
        return register(factory)

    yield add
    for name in names:
        specs._SCHEMES.pop(name, None)


def test_names_are_listed_in_alphabetical_order():
    assert {"axial", "flat", "learned", "mixed", "none", "sincos"} <= set(schemes())
    assert schemes() == sorted(schemes())


def test_sums_are_flat_and_keep_their_order():
    position = build(" learned + mixed(base=20) + none ", LAYOUT)
    assert isinstance(position, Sum)
    assert [type(part).__name__ for part in position.parts] == ["Learned", "RandomFrequencies", "Position"]
    assert not position.relative
    assert build("axial + mixed", LAYOUT).relative


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "axail",
            "no position scheme is called 'axail'; did you mean axial or axial64",
        ),
        ("zzz", "no position scheme is called 'zzz'; There are: alibi, alternate, axial"),
        ("axial(bse=3)", "axial has no option 'bse'; it takes base, share, pairs, fastest"),
        ("none(base=3)", "none has no option 'base'; it takes none"),
        ("axial(base='x')", "axial(base=…) takes a finite number or a tuple, each item a finite number, got 'x'"),
        ("axial(base=1e999)", "axial(base=…) takes a finite number"),
        ("axial(base=True)", "axial(base=…) takes a finite number"),
        ("axial(base=-1)", "axial needs a positive base and fastest, got base -1 and fastest 1.0"),
        ("axial(base=(1, 2, 3))", "3 bases for 2 axes; give one number, or one for each axis"),
        ("axial(pairs='thirds')", "axial(pairs=…) takes 'interleaved' or 'half' or 'axis', got 'thirds'"),
        ("axial(share=(16, 15))", "share (16, 15) must be even numbers of channels that sum to at most head_dim 64"),
        ("axial(share=(64, 64))", "share (64, 64) must be even numbers of channels that sum to at most head_dim 64"),
        ("axial(share=(8, 8, 8))", "share (8, 8, 8) names 3 axes, but the grid has 2"),
        ("axial(base=open('x'))", "axial(base=…) takes a number, a string or a tuple, not open('x')"),
        ("axial(**{'base': 1})", "axial takes options as name=value, not **{'base': 1}"),
        ("axial(100)", "expected name, name(option=value) or a sum of these, not '100'"),
        ("axial(mixed)", "axial modifies no other scheme, got 1; options are written name=value"),
        ("axial - mixed", "expected name, name(option=value) or a sum of these, not 'axial - mixed'"),
        ("os.system('x')", "expected name, name(option=value) or a sum of these, not \"os.system('x')\""),
        ("mixed(learned=1)", "mixed(learned=…) takes True or False, got 1"),
        ("sincos(axes=3)", "sincos(axes=…) must be 1 or the number of axes of the grid, 2, got 3"),
        ("learned(std=-1)", "learned needs a standard deviation of 0 or more, got -1"),
        ("flat(base=0)", "flat needs a positive base, got 0"),
        ("mixed(base=0)", "mixed needs a positive base and fastest, got base 0 and fastest 1.0"),
        ("axial(", "cannot read position spec 'axial('"),
        ("", "cannot read position spec ''"),
        ("a" * 1001, "a position spec has at most 1000 characters, got 1001"),
    ],
)
def test_invalid_specs_raise_clear_errors(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(spec, LAYOUT)


def test_a_spec_must_be_a_string():
    with pytest.raises(TypeError, match=r'a position spec is a string such as "axial\(base=100\)", or .*got dict'):
        build({"axial": 1}, LAYOUT)


@pytest.mark.parametrize(
    ("spec", "head", "axes", "message"),
    [
        ("axial", 5, 2, "head_dim must be even, got 5; use a width and a number of heads that give 4 or 6"),
        ("mixed", 5, 2, "head_dim must be even, got 5"),
        ("flat", 5, 2, "head_dim must be even, got 5"),
        ("axial", 2, 2, "head_dim 2 is too small for 2 axes: each axis needs at least one pair of channels"),
        ("mixed", 2, 3, "head_dim 2 is too small for 3 axes; use 6 or more"),
        ("axial", 64, 3, "head_dim 64 does not divide into equal pairs for 3 axes; use a head_dim of 60 or 66"),
        ("sincos", 1, 3, "width 2 is too small for sines and cosines of 3 axes"),
    ],
)
def test_head_sizes_that_do_not_fit(spec, head, axes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(spec, Layout(width=2 * head, heads=2, grid=(3,) * axes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 10, "heads": 3}, "width 10 does not divide by 3 heads"),
        ({"heads": 0}, "a layout needs a heads of at least 1, got 0"),
        ({"grid": ()}, "a grid needs at least one cell along each of its axes, got shape ()"),
        ({"grid": (3, 0)}, "a grid needs at least one cell along each of its axes, got shape (3, 0)"),
        ({"unit": "miles"}, "unknown unit 'miles'; expected one of index, centered, centered_shorter, centered_longer"),
    ],
)
def test_invalid_layouts(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Layout(**{"width": 12, "heads": 3, "grid": (3, 3)} | options)


def test_a_custom_scheme_takes_five_lines(scheme):
    @scheme
    def slow(layout: Layout, base: float = 7.0) -> Rotary:
        """Every axis rotates every pair."""
        return Rotary(geometric(layout.head_dim // 2, base).expand(1, 1, layout.axes, -1))

    assert "slow" in schemes()
    assert build("slow(base=9) + learned", LAYOUT).parts[0].initial.shape == (1, 1, 2, 32)
    with pytest.raises(
        ValueError, match=r"position scheme 'slow' is registered already, by tests\.positions\.test_specs"
    ):
        register(slow)


def test_a_modifier_takes_schemes_as_positional_arguments(scheme):
    @scheme
    def slower(layout: Layout, scheme: Position, factor: float = 2.0) -> Position:
        """Divide a scheme's frequencies."""
        return Rotary(scheme.initial / factor)

    assert build("slower(axial, factor=4)", LAYOUT).initial.max() == 0.25
    with pytest.raises(ValueError, match=re.escape("slower modifies 1 scheme(s) (scheme), got 0")):
        build("slower(factor=4)", LAYOUT)


def test_signatures_leave_out_the_layout():
    assert list(specs.signature("flat").parameters)[:1] == ["base"]
    assert list(specs.signature("xy").parameters) == ["scheme"]
    assert specs.factory("flat") is specs._SCHEMES["flat"]
    for lookup in (specs.factory, specs.signature):
        with pytest.raises(ValueError, match="no position scheme is called 'axail'; did you mean axial"):
            lookup("axail")


REMADE = "schemes that remake the channels of queries and keys cannot be summed with rotations or with each other"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ('axial + mixed(pairs="half")', "do not commute; give both the same `pairs`"),
        ("axial + axial(share=(16, 16))", "rotations of 32 and of 16 pairs cannot be summed; give both as many"),
        ("axial + learned + axial(share=(16, 16))", "rotations of 32 and of 16 pairs cannot be summed"),
        ("reference(axial + axial(share=(16, 16)))", "rotations of 32 and of 16 pairs cannot be summed"),
        ("string + axial", REMADE),
        ("axial + string", REMADE),
        ("vjepa2 + axial", REMADE),
        ("string + commuting", REMADE),
        ("pope + axial", REMADE),
        ("string + pope", REMADE),
        ("pope + pope", REMADE),
    ],
)
def test_sums_that_can_never_run_are_refused(spec, message):
    with pytest.raises(ValueError, match=f"cannot build position .*{re.escape(message)}"):
        build(spec, LAYOUT)


@pytest.mark.parametrize("other", ["axial", "string", "pope", "alibi", "learned", "vjepa2", "shaw", "tupe", "none"])
def test_sums_that_build_run(other):
    """Every scheme that accepts two axes, added to others of each kind."""
    layout = Layout(width=48, heads=2, grid=(3, 4), depth=1)
    coords, (q, k, v) = layout.coords(), torch.randn(3, 1, 2, 12, 24)
    count = 0
    for name in schemes():
        for spec in (f"{spec_of(name)} + {other}", f"{other} + {spec_of(name)}"):
            try:
                position = build(spec, layout)
            except ValueError:
                continue
            assert attend(q, k, v, position(coords), 0).shape == v.shape, spec
            count += 1
    assert count > 40


@pytest.mark.parametrize("other", ["learned", "none", "alibi", "shaw", "tupe", "learned + t5"])
def test_a_remade_scheme_and_others_that_leave_its_channels_alone(other):
    layout = Layout(width=48, heads=2, grid=(3, 4), depth=1)
    q, k, v = torch.randn(3, 1, 2, 12, 24)
    both, reverse, pope = (build(spec, layout) for spec in (f"pope + {other}", f"{other} + pope", "pope"))
    reverse.load_state_dict({  # the same parameters, in the other order
        name.replace(name.split(".")[1], str((int(name.split(".")[1]) - 1) % len(both.parts)), 1): value
        for name, value in both.state_dict().items()
    })  # fmt: skip
    got, mirrored, alone = (attend(q, k, v, each(layout.coords()), 0) for each in (both, reverse, pope))
    torch.testing.assert_close(got, mirrored)
    assert torch.equal(got, alone) == (other in ("learned", "none"))


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(max_size=40), st.from_regex(r"(axial|mixed|none)\([a-z]{0,6}=[-0-9a-z\"'(),.]{0,12}\)", fullmatch=True)
    )
)
def test_any_other_text_raises_a_clear_error(text):
    try:
        position = build(text, LAYOUT)
    except ValueError as error:
        assert "position" in str(error)  # noqa: PT017
    else:
        assert isinstance(position, Position)


@pytest.mark.parametrize("text", ["(" * 500 + "axial" + ")" * 499, "+".join(["none"] * 200), "-" * 999, "axial\0"])
def test_deep_or_broken_specs(text):
    try:
        build(text, LAYOUT)
    except ValueError as error:
        assert "position" in str(error)  # noqa: PT017


def test_common_words_are_understood():
    for name in ("rope", "rotary"):
        assert torch.equal(build(f"{name}(base=50)", LAYOUT).initial, build("axial(base=50)", LAYOUT).initial)
        assert name not in schemes()
    for name, meaning in {"absolute": "learned", "sinusoidal": "sincos", "relative": "shaw"}.items():
        with pytest.raises(ValueError, match=f"no position scheme is called '{name}'; did you mean {meaning}"):
            build(name, LAYOUT)
    with pytest.raises(TypeError, match='"none" for no positions, got NoneType'):
        build(None, LAYOUT)


def test_the_name_of_an_alias_is_taken():
    with pytest.raises(ValueError, match=r"'rope' is registered already, by .* for axial"):
        register("rope")(lambda layout: None)
