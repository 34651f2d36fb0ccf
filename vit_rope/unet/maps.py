"""The feature maps of a U-Net: which attentions see one, its level, and the layout of its cells.

Every halving of an image makes a coarser map of the same image. A scheme may count the cells of
each map or locate them all in the image. Either way it is built for one attention: for its width,
its heads and the map that it sees.

Shapes   N cells of a map (row-major), A axes of a map (2: height, width)
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from ..attention import check_linear
from ..positions import Layout, Position, build, coords
from ..positions.specs import rebuild

Origin = float | str | Sequence[float]
AttentionKind = Literal["softmax", "linear"]
UNITS = ("index", "pixel", *coords.UNITS[1:])


# ---- which attentions are over maps --------------------------------------------------------------
def map_attentions(unet: nn.Module) -> Iterator[tuple[str, Attention, Transformer2DModel | None]]:
    """Yield name, module and host of every self-attention over a map.

    The host is the transformer that flattens the map for the attention, or None.
    """
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and re.search(r"(^|\.)attentions\.\d+$", name):
            if not module.is_cross_attention:
                yield name, module, None
        elif isinstance(module, Transformer2DModel) and module.is_input_continuous:
            for i, block in enumerate(module.transformer_blocks):
                for part in ("attn1", "attn2"):
                    attention = getattr(block, part)
                    if attention is not None and not attention.is_cross_attention:
                        yield f"{name}.transformer_blocks.{i}.{part}", attention, module


def check_reached(unet: nn.Module, reached: set[str]) -> None:
    """Check that `reached` has the names of all attentions whose keys come from a map.

    Raises ValueError if one is missing, or if `reached` is empty.
    """
    remedy = "choose block types whose attention is that of AttnDownBlock2D or CrossAttnDownBlock2D"
    over_map = re.compile(r"(down_blocks|mid_block|up_blocks)\.(?!.*(temp|motion|fuser))")  # not time, not boxes
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and name not in reached:
            joined = module.added_kv_proj_dim is not None and not module.only_cross_attention
            if over_map.match(name) and (joined or not module.is_cross_attention):
                what = f"{name} of this {class_name(unet)}, which is self-attention of an unsupported kind"
                raise ValueError(f"positions do not reach {what}; {remedy}")
    if not reached:
        raise ValueError(
            f"this {class_name(unet)} has no self-attention over a feature map that can have positions; {remedy}"
        )


# ---- levels --------------------------------------------------------------------------------------
def halvings(unet: Any) -> list[bool]:
    """Whether each down block of a diffusers U-Net halves its map."""
    return [getattr(block, "downsamplers", None) is not None for block in unet.down_blocks]


def level_of(unet: nn.Module, name: str) -> int:
    """How many times the map seen by the module of this name has been halved."""
    halved = halvings(unet)
    part, index = name.split(".")[:2]
    if part == "down_blocks":
        return sum(halved[: int(index)])
    return sum(halved[: -1 - int(index)] if part == "up_blocks" else halved)


def pixels(sample_size: int | Sequence[int]) -> tuple[int, ...]:
    """Height and width of an image; one number gives both. Raises ValueError for anything else."""
    size = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
    if len(size) != 2 or any(not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(f"sample_size is a number of pixels or (height, width), got {sample_size!r}")
    return size


# ---- layouts and schemes -------------------------------------------------------------------------
@dataclass(frozen=True)
class MapLayout(Layout):
    """The layout of one attention on a feature map.

    `head` is the number of channels of a head, as in a U-Net heads need not share out the width.
    `stride` is the distance of neighbouring cells: 2 to the power of the level where coordinates
    are in pixels, else 1.
    """

    head: int = 0
    stride: int = 1

    def __post_init__(self) -> None:
        coords.check_shape(self.grid)
        coords.check_unit(self.unit)

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.head

    def coords(self, shape: Sequence[int] | None = None, device: torch.device | None = None) -> Tensor:
        """Coordinates (N, A) of a map of this shape, or of the map in training."""
        cells = super().coords(shape, device)
        return cells if self.stride == 1 else cells * self.stride

    def cell(self, coords: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Cell indices (…, A) of coordinates (…, A) on this map or on that in training."""
        return super().cell(coords / self.stride, grid)


def map_layout(
    width: int, heads: int, head: int, level: int, size: Sequence[int], unit: str, origin: Origin
) -> MapLayout:
    """The layout of attention over the map of an input of `size` pixels after `level` halvings.

    Raises ValueError for an unknown unit, and for an origin with a different number of axes.
    """
    if unit not in UNITS:
        raise ValueError(f"unknown unit {unit!r}; expected one of {', '.join(UNITS)}")
    stride = 2**level if unit == "pixel" else 1
    start = origin if isinstance(origin, (int, float, str)) else tuple(origin)
    if unit == "pixel" and not isinstance(start, str):  # in cells, as cell i is at pixel (i + 1/2) stride - 1/2
        values = start if isinstance(start, tuple) else (start,) * len(size)
        start = tuple((value + 0.5) / stride - 0.5 for value in values)
    grid = tuple(-(-n // 2**level) for n in size)
    layout = MapLayout(width, heads, grid, 1, "index" if unit == "pixel" else unit, start, head, stride)
    layout.coords()  # raises the ValueError for an origin that does not fit
    return layout


def build_at(
    name: str,
    level: int,
    spec: str,
    layout: MapLayout,
    remedy: str,
    attention: AttentionKind = "softmax",
    trained: Position | None = None,
) -> Position:
    """Build the scheme of the attention `name`, with the parameters of a `trained` one if given.

    Raises ValueError that names the attention if it cannot take the scheme, and gives `remedy` if
    its head size is the reason.
    """
    try:
        position = build(spec, layout) if trained is None else rebuild(trained, spec)
        check_attention(attention, position, layout)
        return position
    except ValueError as error:
        hint = f"; {remedy}" if "head_dim" in str(error) else ""
        heads = f"{layout.width} channels, {layout.heads} heads of {layout.head}"
        raise ValueError(f"{name} (level {level}, {heads}): {error}{hint}") from error


def check_attention(attention: AttentionKind, position: Position, layout: Layout) -> None:
    """Raise ValueError for an unknown kind of attention, and for one that cannot take a scheme."""
    if attention not in ("softmax", "linear"):
        raise ValueError(f"attention is 'softmax' or 'linear', got {attention!r}")
    if attention == "linear":
        check_linear(position(layout.coords()))


def class_name(thing: object) -> str:
    """The name of an object's class, for messages."""
    return type(thing).__name__
