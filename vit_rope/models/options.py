"""Options of the models: sizes, layout, and checks of what can be combined."""

import inspect
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from timm.layers import to_ntuple

from ..attention import check_linear
from ..positions import Layout, Position
from .patches import format_size


def sizes_per_axis(
    img_size: int | Sequence[int], patch_size: int | Sequence[int], pad: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes of images and of patches, with one number for each axis, two axes by default.

    Raises ValueError for other sizes, and for images that do not divide into patches without `pad`.
    """
    axes = 2 if isinstance(patch_size, int) else len(patch_size)
    patch = _per_axis("patch_size", patch_size, axes)
    image = _per_axis("img_size", img_size, axes)
    if not pad and any(n % p for n, p in zip(image, patch, strict=True)):
        raise ValueError(
            f"img_size {format_size(image)} does not divide into patches of {format_size(patch)}; "
            f"change one of them or give dynamic_img_pad=True"
        )
    return image, patch


def _per_axis(name: str, value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    size = to_ntuple(axes)(value)
    if len(size) != axes or any(not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(f"{name} must be a positive whole number or {axes} of them (one for each axis), got {value!r}")
    return size


def patch_layout(
    width: int,
    heads: int,
    grid: Sequence[int],
    depth: int,
    unit: str = "index",
    origin: float | str | Sequence[float] = 0.0,
) -> Layout:
    """The layout of a model's patches. Raises ValueError for a unit or origin that does not fit."""
    origin = origin if isinstance(origin, (int, float, str)) else tuple(origin)
    layout = Layout(width, heads, tuple(grid), depth, unit, origin)
    layout.coords()  # raises for an origin that does not fit
    return layout


def check_names(cls: type, kwargs: dict[str, Any]) -> None:
    """Raise TypeError for an argument that neither a model class nor timm's class has."""
    known = {name for base in cls.__mro__[:-1] for name in inspect.signature(base.__init__).parameters}
    for name in kwargs:
        if name not in known:
            near = " or ".join(get_close_matches(name, known, n=3)) or "one of the arguments in its documentation"
            raise TypeError(f"{cls.__name__} has no argument {name!r}; did you mean {near}?")


def check_options(memory_tokens: int, attention: str, scheme: Position, layout: Layout, kwargs: dict[str, Any]) -> None:
    """Raise TypeError or ValueError for options that the model does not have or cannot combine."""
    for name in ("attn_layer", "embed_layer"):
        if name in kwargs:
            raise TypeError(f"RopeViT chooses its own {name}; leave the option out")
    if memory_tokens < 0:
        raise ValueError(f"memory_tokens is a number of tokens, 0 or more, got {memory_tokens}")
    if attention not in ("softmax", "linear"):
        raise ValueError(f"attention is 'softmax' or 'linear', got {attention!r}")
    if attention == "linear":
        check_linear(scheme(layout.coords()))
        if kwargs.get("attn_drop_rate", 0.0) > 0:
            raise ValueError("linear attention has no weights to drop; leave attn_drop_rate out")
