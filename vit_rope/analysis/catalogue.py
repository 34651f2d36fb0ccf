"""What every registered position scheme claims, and an example spec of each."""

from contextlib import suppress

from ..positions import Layout, build
from ..positions.specs import schemes, signature

CLAIMS = ("relative", "reversible", "flash", "learned", "unbounded")


def claims_of(name: str) -> tuple[bool, ...]:
    """The values of CLAIMS of a scheme on images, or on signals if it does not support images.

    Raises ValueError for a modifier that accepts neither `axial` nor `learned`.
    """
    for grid in ((14, 14), (14,)):
        layout = Layout(width=48, heads=2, grid=grid, depth=2)
        if spec := example_spec(name, layout):
            scheme = build(spec, layout)
            return scheme.relative, scheme.reversible, scheme.keeps_flash, scheme.learned, scheme.unbounded
    raise ValueError(f"{name} can modify neither axial nor learned, on images or on signals")


def specs_for(layout: Layout) -> list[str]:
    """A spec of each registered scheme that supports the layout."""
    return [spec for name in schemes() if (spec := example_spec(name, layout))]


def example_spec(name: str, layout: Layout) -> str:
    """A spec of a scheme; a modifier gets `axial`, or else `learned`, to modify.

    Returns an empty string if the layout supports neither.
    """
    parameters = signature(name).parameters.values()
    modified = sum(p.default is p.empty and p.kind is not p.KEYWORD_ONLY for p in parameters)
    for inner in ("axial", "learned"):
        spec = f"{name}({', '.join([inner] * modified)})" if modified else name
        with suppress(ValueError):
            build(spec, layout)
            return spec
    return ""
