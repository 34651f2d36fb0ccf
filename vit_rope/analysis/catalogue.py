"""Every position scheme and what it claims, as a table: `vit-rope schemes --sort reversible`."""

import inspect
from contextlib import suppress

from ..positions import Layout, build
from ..positions.specs import _SCHEMES, schemes

CLAIMS = ("relative", "reversible", "flash", "learned", "unbounded")


def _claims(name: str) -> tuple[bool, ...]:
    """What a scheme claims on an image, or on a signal where it has no form for images."""
    for grid in ((14, 14), (14,)):
        layout = Layout(width=48, heads=2, grid=grid, depth=2)
        if spec := example_spec(name, layout):
            scheme = build(spec, layout)
            return scheme.relative, scheme.reversible, scheme.keeps_flash, scheme.learned, scheme.unbounded
    raise ValueError(f"{name} takes neither axial nor learned inside it, on images or on signals")


def specs_for(layout: Layout) -> list[str]:
    """A spec of each registered scheme that a layout allows."""
    return [spec for name in schemes() if (spec := example_spec(name, layout))]


def example_spec(name: str, layout: Layout) -> str:
    """A spec of a scheme, of a modifier with axial or learned inside; empty where the layout allows neither."""
    parameters = list(inspect.signature(_SCHEMES[name]).parameters.values())[1:]
    parts = sum(p.default is p.empty and p.kind is not p.KEYWORD_ONLY for p in parameters)
    for inside in ("axial", "learned"):
        spec = f"{name}({', '.join([inside] * parts)})" if parts else name
        with suppress(ValueError):
            build(spec, layout)
            return spec
    return ""
