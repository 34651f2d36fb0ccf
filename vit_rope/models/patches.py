"""Images to patches: their embeddings and their coordinates.

Shapes   B samples, C channels, A axes, N patches, D channels of a patch embedding
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from einops import rearrange
from timm.layers import PatchEmbed
from torch import Tensor, nn

from ..positions import Layout
from ..positions.coords import augment_coords, check_coords, grid


class PatchEmbed2d(PatchEmbed):
    """timm's PatchEmbed with output (B, rows, columns, D), without its check of image sizes, which
    would compile a graph for every size."""

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to embeddings (B, rows, columns, D)."""
        if self.dynamic_img_pad:
            patch = cast(Any, self.patch_size)
            x = nn.functional.pad(x, (0, -x.shape[3] % patch[1], 0, -x.shape[2] % patch[0]))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchEmbedNd(nn.Module):
    """Patch embedding for any number of axes (signals, video, volumes), with the interface of
    timm's PatchEmbed: inputs (B, C, *sizes) to embeddings (B, *grid, D)."""

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
        axes = range(len(patch_size))  # for two axes: "b c (g0 p0) (g1 p1) -> b g0 g1 (c p0 p1)"
        cells, pixels = (" ".join(f"{name}{a}" for a in axes) for name in "gp")
        self.pattern = f"b c {' '.join(f'(g{a} p{a})' for a in axes)} -> b {cells} (c {pixels})"

    def set_input_size(self, img_size: Sequence[int] | None = None, patch_size: Sequence[int] | None = None) -> None:
        """Change the expected input size. Raises ValueError for another patch size, which needs
        other weights."""
        if patch_size is not None and tuple(patch_size) != self.patch_size:
            raise ValueError(f"patches of {self.patch_size} cannot be resized on {len(self.patch_size)} axes")
        if img_size is not None:
            self.img_size = tuple(img_size)
            self.grid_size = self.dynamic_feat_size(self.img_size)
            self.num_patches = math.prod(self.grid_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, ...]:
        """Input cells per output cell: the maximum over the axes, or one number for each axis."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: Sequence[int]) -> tuple[int, ...]:
        """The grid size for an input of this size."""
        up = self.patch_size if self.dynamic_img_pad else (1,) * len(self.patch_size)
        return tuple((n + u - 1) // p for n, p, u in zip(img_size, self.patch_size, up, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (B, C, *sizes) to embeddings (B, *grid, D)."""
        if self.dynamic_img_pad:
            pads = [-x.shape[2 + axis] % size for axis, size in enumerate(self.patch_size)]
            x = nn.functional.pad(x, [side for pad in reversed(pads) for side in (0, pad)])
        x = rearrange(x, self.pattern, **{f"p{a}": size for a, size in enumerate(self.patch_size)})
        return self.norm(self.proj(x))


class PatchCoordinates(nn.Module):
    """The coordinates of the patches of images (B, C, *sizes): checks the images, then makes
    coordinates or checks those that the caller gives.

    In training, coordinates that it makes are varied by `augment`, the options of
    `coords.augment_coords`. It is a module so that tracers treat it as a single step.
    """

    def __init__(
        self,
        layout: Layout,
        channels: int,
        image: tuple[int, ...] | None,
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
        self.image = image  # None accepts every size
        self.shift_grid: tuple[int, ...] | None = None

    def shift_in_cells_of(self, grid: Sequence[int] | None) -> None:
        """Count the shift of `augment` in cells of a grid that is stretched over each image; None
        counts in the unit of the coordinates. Raises ValueError for another number of axes."""
        if grid is not None and len(grid) != self.axes:
            raise ValueError(f"position_shift_grid {tuple(grid)} has {len(grid)} axes, the coordinates {self.axes}")
        self.shift_grid = None if grid is None else tuple(grid)

    def forward(self, x: Tensor, coords: Tensor | None = None) -> tuple[Tensor, list[int] | None]:
        """Coordinates (N, A) or (B, N, A) of all patches, and the size of their grid; None in place
        of a grid for coordinates that the caller gives. Raises ValueError where they do not fit."""
        self.check_image(x)
        up = self.patch if self.pad else (1,) * len(self.patch)
        size = [(n + u - 1) // p for n, p, u in zip(x.shape[2:], self.patch, up, strict=True)]
        if coords is None:
            coords = grid(size, self.unit, self.origin, x.device)
            return (self.varied(coords, size) if self.training else coords), size
        coords = check_coords(coords, self.axes, finite=not torch.compiler.is_compiling())
        tokens, batch = math.prod(size), x.shape[0]
        if coords.shape[-2] != tokens or (coords.ndim == 3 and coords.shape[0] not in (1, batch)):
            raise ValueError(
                f"coordinates of shape {tuple(coords.shape)} do not fit {batch} x {tokens} patches; "
                f"expected ({tokens}, {self.axes}) or ({batch}, {tokens}, {self.axes})"
            )
        return coords.to(x.device), None

    def varied(self, coords: Tensor, size: Sequence[int]) -> Tensor:
        """Coordinates (N, A) of a grid of this size, varied by `augment`."""
        if self.shift_grid is None:
            return augment_coords(coords, *self.augment)
        ratio = torch.stack([coords.new_ones(()) * m / n for m, n in zip(self.shift_grid, size, strict=True)])
        return augment_coords(coords * ratio, *self.augment) / ratio

    def check_image(self, x: Tensor) -> None:
        """Raise ValueError for a wrong number of axes or channels, or a size that does not fit, and
        TypeError for whole numbers."""
        if not x.is_floating_point():
            raise TypeError(
                f"images must be floating-point numbers, normalized as in training, got {x.dtype}; "
                f"convert them first, e.g. x.float() / 255"
            )
        if x.ndim != 2 + len(self.patch):
            raise ValueError(f"expected images (batch, channels, {len(self.patch)} sizes), got shape {tuple(x.shape)}")
        if x.shape[1] != self.channels:
            raise ValueError(f"the model takes images of {self.channels} channels, got shape {tuple(x.shape)}")
        size = tuple(x.shape[2:])
        if self.image is not None and size != self.image:
            raise ValueError(
                f"the model takes images of {format_size(self.image)}, got {format_size(size)}; "
                f"create it with dynamic_img_size=True or call model.set_input_size({size})"
            )
        if not self.pad and any(n % p for n, p in zip(size, self.patch, strict=True)):
            raise ValueError(
                f"images of {format_size(size)} do not divide into patches of {format_size(self.patch)}; "
                f"crop or resize them, or create the model with dynamic_img_pad=True"
            )


def format_size(size: Sequence[int]) -> str:
    """A size in a message, such as "224 x 224"."""
    return " x ".join(str(n) for n in size)
