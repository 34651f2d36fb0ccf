"""Where the cells of a U-Net's feature maps are, and the schemes that place them.

Every halving of an image makes a coarser map of the same image. A scheme may count the cells of each map, or place them
all in the image; either way it is built for one attention: its width, its heads and the map that it sees.
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
from ..positions import Layout, Position, build
from ..positions import coords as places


def map_attentions(unet: nn.Module) -> Iterator[tuple[str, Attention, Transformer2DModel | None]]:
    """Name, module and host of every self-attention over a map; the host, if any, flattens the map for it."""
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
    """Raise ValueError where no attention is `reached`, or not all that have keys from a map."""
    remedy = "choose block types that have it as AttnDownBlock2D and CrossAttnDownBlock2D do"
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and name not in reached:
            over_map = re.match(
                r"(down_blocks|mid_block|up_blocks)\.(?!.*(temp|motion|fuser))", name
            )  # not time, boxes
            joined = module.added_kv_proj_dim is not None and not module.only_cross_attention
            if over_map and (joined or not module.is_cross_attention):
                what = f"{name} of this {class_name(unet)}, which is self-attention of another kind"
                raise ValueError(f"positions do not reach {what}; {remedy}")
    if not reached:
        raise ValueError(
            f"this {class_name(unet)} has no self-attention over a feature map that positions reach, so "
            f"there is nothing to place; {remedy}"
        )


def halvings(unet: Any) -> list[bool]:
    return [getattr(block, "downsamplers", None) is not None for block in unet.down_blocks]


def level_of(unet: nn.Module, name: str) -> int:
    """How often the map that the module of this name sees has been halved."""
    halved = halvings(unet)
    part, index = name.split(".")[:2]
    if part == "down_blocks":
        return sum(halved[: int(index)])
    return sum(halved[: -1 - int(index)] if part == "up_blocks" else halved)


def class_name(thing: object) -> str:
    return type(thing).__name__


Origin = float | str | Sequence[float]
Kind = Literal["softmax", "linear"]
UNITS = ("index", "pixel", *places.UNITS[1:])


@dataclass(frozen=True)
class MapLayout(Layout):
    """The layout of one attention on a feature map; `head` channels a head, for heads need not share the width.

    Coordinates count `stride` for each cell: the pixels that it spans where the unit is pixels, else 1.
    """

    head: int = 0
    stride: int = 1

    def __post_init__(self) -> None:
        places.check_shape(self.grid)
        places.check_unit(self.unit)

    @property
    def head_dim(self) -> int:
        return self.head

    def coords(self, shape: Sequence[int] | None = None, device: torch.device | None = None) -> Tensor:
        coords = super().coords(shape, device)
        return coords if self.stride == 1 else coords * self.stride

    def cell(self, coords: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        return super().cell(coords / self.stride, grid)


def map_layout(
    width: int, heads: int, head: int, level: int, size: Sequence[int], unit: str, origin: Origin
) -> MapLayout:
    """The layout of attention over the map that an input of `size` pixels is after `level` halvings.

    Raises ValueError for an unknown unit, or an origin of another number of axes.
    """
    if unit not in UNITS:
        raise ValueError(f"unknown unit {unit!r}; expected one of {', '.join(UNITS)}")
    stride = 2**level if unit == "pixel" else 1
    place = origin if isinstance(origin, (int, float, str)) else tuple(origin)
    if unit == "pixel" and not isinstance(place, str):  # counted in cells, as cell i is at (i + 1/2) stride - 1/2
        values = place if isinstance(place, tuple) else (place,) * len(size)
        place = tuple((value + 0.5) / stride - 0.5 for value in values)
    grid = tuple(-(-n // 2**level) for n in size)
    layout = MapLayout(width, heads, grid, 1, "index" if unit == "pixel" else unit, place, head, stride)
    layout.coords()  # an origin that does not fit is found here
    return layout


def build_at(name: str, level: int, spec: str, layout: MapLayout, remedy: str, kind: Kind = "softmax") -> Position:
    """The scheme for the attention of this name and kind.

    Raises ValueError that says which attention cannot take it, with the remedy where its head size is to blame.
    """
    try:
        position = build(spec, layout)
        check_kind(kind, position, layout)
        return position
    except ValueError as error:
        hint = f"; {remedy}" if "head_dim" in str(error) else ""
        heads = f"{layout.width} channels, {layout.heads} heads of {layout.head}"
        raise ValueError(f"{name} (level {level}, {heads}): {error}{hint}") from error


def check_kind(kind: Kind, position: Position, layout: Layout) -> None:
    """Raise ValueError for an unknown kind of attention, and for one that cannot take a scheme."""
    if kind not in ("softmax", "linear"):
        raise ValueError(f"attention is 'softmax' or 'linear', got {kind!r}")
    if kind == "linear":
        check_linear(position(layout.coords()))


def reset_missing_parameters(model: nn.Module, missing: Sequence[str]) -> None:
    """Let the schemes begin anew whose parameters are `missing` in a folder; diffusers leaves them empty or on meta."""
    device = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), None)
    for name, module in model.named_modules():
        own = {f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)}
        if isinstance(module, Position) and not own.isdisjoint(missing):
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                module.to_empty(device=device or "cpu", recurse=False)
            module.reset_parameters()


def pixels(sample_size: int | Sequence[int]) -> tuple[int, ...]:
    """Height and width, of which one number means both. Raises ValueError for anything else."""
    size = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
    if len(size) != 2 or any(not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(f"sample_size is a number of pixels or (height, width), got {sample_size!r}")
    return size
