"""From images to patches: their vectors, and where they are. One class each for images and for everything else."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.layers import PatchEmbed
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..positions import Layout
from ..positions import coords as places


class PatchEmbed2d(PatchEmbed):
    """timm's PatchEmbed to (B, rows, columns, D), without its check of sizes, which makes a graph for each."""

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to vectors (B, rows, columns, D)."""
        if self.dynamic_img_pad:
            patch = cast(Any, self.patch_size)
            x = nn.functional.pad(x, (0, -x.shape[3] % patch[1], 0, -x.shape[2] % patch[0]))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchEmbedNd(nn.Module):
    """Patches of a signal, video or volume (B, C, *sizes) to vectors (B, *grid, D), with the interface of timm's."""

    def __init__(
        self,
        img_size: tuple[int, ...],
        patch_size: tuple[int, ...],
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        norm_layer: type[nn.Module] | None = None,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        output_fmt: str = "NHWC",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch_size, self.strict_img_size, self.dynamic_img_pad = patch_size, strict_img_size, dynamic_img_pad
        self.set_input_size(img_size)
        self.proj = nn.Linear(in_chans * math.prod(patch_size), embed_dim, bias=bias, device=device, dtype=dtype)
        self.norm = norm_layer(embed_dim, device=device, dtype=dtype) if norm_layer else nn.Identity()

    def set_input_size(self, img_size: Sequence[int] | None = None, patch_size: Sequence[int] | None = None) -> None:
        """Expect another size; patches of another size are learned anew, so asking for them is a ValueError."""
        if patch_size is not None and tuple(patch_size) != self.patch_size:
            raise ValueError(f"patches of {self.patch_size} cannot be resized on {len(self.patch_size)} axes")
        if img_size is not None:
            self.img_size = tuple(img_size)
            self.grid_size = self.dynamic_feat_size(self.img_size)
            self.num_patches = math.prod(self.grid_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, ...]:
        """How many input cells one output cell covers: the most along any axis, or each."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: Sequence[int]) -> tuple[int, ...]:
        """The grid of an input of this size."""
        up = self.patch_size if self.dynamic_img_pad else (1,) * len(self.patch_size)
        return tuple((n + u - 1) // p for n, p, u in zip(img_size, self.patch_size, up, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        if self.dynamic_img_pad:
            pads = [(-n) % p for n, p in zip(x.shape[2:], self.patch_size, strict=True)]
            x = nn.functional.pad(x, [side for pad in reversed(pads) for side in (0, pad)])
        for axis, size in enumerate(self.patch_size):  # (B, C, a, b) to (B, C, a/p, p, b/q, q)
            x = x.unflatten(2 + 2 * axis, (-1, size))
        count = len(self.patch_size)
        x = x.permute(0, *range(2, 2 + 2 * count, 2), 1, *range(3, 3 + 2 * count, 2)).flatten(1 + count)
        return self.norm(self.proj(x))


class PatchCoordinates(nn.Module):
    """Where the patches of images (B, C, *sizes) are: checks the images and makes, or checks, coordinates.

    In training `augment` varies them, the options of `augment_coords`. A module of its own so that tracers take
    it as one step and nothing in it becomes part of their graph.
    """

    def __init__(
        self,
        layout: Layout,
        channels: int,
        image: tuple[int, ...],
        patch: tuple[int, ...],
        pad: bool,
        augment: tuple[float, float, float] = (0.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        shift, jitter, rescale = self.augment = augment
        if shift < 0 or min(jitter, rescale) < 1:
            raise ValueError(
                f"coordinates are shifted by 0 or more and stretched by a factor of 1 or more, got position_shift "
                f"{shift}, position_jitter {jitter} and position_rescale {rescale}"
            )
        self.axes, self.unit, self.origin = layout.axes, layout.unit, layout.origin
        self.channels, self.patch, self.pad = channels, patch, pad
        self.image: tuple[int, ...] | None = image  # None takes every size

    def forward(self, x: Tensor, coords: Tensor | None = None) -> tuple[Tensor, list[int] | None]:
        """Coordinates of all patches, and the grid they come from; the caller's own `coords` come from none."""
        self.check_image(x)
        up = self.patch if self.pad else (1,) * len(self.patch)
        grid = [(n + u - 1) // p for n, p, u in zip(x.shape[2:], self.patch, up, strict=True)]
        if coords is None:
            coords = places.grid(grid, self.unit, self.origin, x.device)
            return (places.augment_coords(coords, *self.augment) if self.training else coords), grid
        coords = places.check_coords(coords, self.axes, finite=not torch.compiler.is_compiling())
        tokens, batch = math.prod(grid), x.shape[0]
        if coords.shape[-2] != tokens or (coords.ndim == 3 and coords.shape[0] not in (1, batch)):
            raise ValueError(
                f"coordinates of shape {tuple(coords.shape)} do not place {batch} x {tokens} patches; "
                f"expected ({tokens}, {self.axes}) or ({batch}, {tokens}, {self.axes})"
            )
        return coords.to(x.device), None

    def check_image(self, x: Tensor) -> None:
        """Raise ValueError for another number of axes or channels, or a size that the model does not take."""
        if x.ndim != 2 + len(self.patch):
            raise ValueError(f"expected images (batch, channels, {len(self.patch)} sizes), got shape {tuple(x.shape)}")
        if x.shape[1] != self.channels:
            raise ValueError(f"the model takes images of {self.channels} channels, got shape {tuple(x.shape)}")
        sizes = tuple(x.shape[2:])
        if self.image is not None and sizes != self.image:
            raise ValueError(
                f"the model takes images of {format_size(self.image)}, got {format_size(sizes)}; "
                f"create it with dynamic_img_size=True or call model.set_input_size({sizes})"
            )
        if not self.pad and any(n % p for n, p in zip(sizes, self.patch, strict=True)):
            raise ValueError(
                f"images of {format_size(sizes)} do not divide into patches of {format_size(self.patch)}; "
                f"crop or resize them, or create the model with dynamic_img_pad=True"
            )


register_notrace_module(PatchCoordinates)


class Place(nn.Module):
    """`position.embed` of a model as a module, which tracers take as one step, whatever `add` does with arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.owner = (model,)  # in a tuple, or it would become a part of its own part

    def forward(self, x: Tensor, coords: Tensor, grid: list[int] | None, layer: int) -> Tensor:
        model: Any = self.owner[0]
        return model.position.embed(x, coords, grid, layer)


register_notrace_module(Place)


def format_size(sizes: Sequence[int]) -> str:
    """Sizes as a person writes them: 224 x 224."""
    return " x ".join(str(n) for n in sizes)


def sizes(name: str, value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """One size for each axis, from one for all or one each; ValueError, with the option's name, for anything else."""
    each = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(each) != axes or any(not isinstance(n, int) or n < 1 for n in each):
        raise ValueError(f"{name} must be a positive whole number or {axes} of them (one for each axis), got {value!r}")
    return each
