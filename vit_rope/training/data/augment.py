"""Random changes of training images, a batch at a time: geometry, contrast and erased rectangles.

Shapes   B images, C channels, H x W pixels; values in [-1, 1]
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Augment(nn.Module):
    """Random changes, drawn independently for each image of a batch; new areas are black.

    torchvision's v2 transforms draw once per batch, so all images of a batch would change alike,
    and calling them image by image is several times slower on images this small.

    Args:
        flip: mirror half of the images, on average
        shift: largest shift as a share of each side; by full pixels without `rotate` and `scale`
        rotate: largest rotation in degrees
        scale: largest relative change of size
        contrast: largest relative change of contrast, and largest change of brightness
        erase: share of the images that lose a rectangle of up to a third of each side
    """

    def __init__(
        self,
        flip: bool = False,
        shift: float = 0.0,
        rotate: float = 0.0,
        scale: float = 0.0,
        contrast: float = 0.0,
        erase: float = 0.0,
    ):
        super().__init__()
        self.flip, self.shift, self.rotate = flip, shift, rotate
        self.scale, self.contrast, self.erase = scale, contrast, erase

    def forward(self, images: Tensor) -> Tensor:
        """Changed images (B, C, H, W) of the same shape."""
        count, _, height, width = images.shape
        if self.flip or self.shift or self.rotate or self.scale:
            images = self._warp(images)
        if self.contrast:
            gain = 1 + _uniform(count, 1, 1, 1, limit=self.contrast)
            images = (images * gain + _uniform(count, 1, 1, 1, limit=self.contrast)).clamp(-1, 1)
        if self.erase:
            hole = _random_runs(count, height)[:, :, None] & _random_runs(count, width)[:, None, :]
            hole &= torch.rand(count, 1, 1) < self.erase
            images = torch.where(hole[:, None], torch.rand_like(images) * 2 - 1, images)
        return images

    def _warp(self, images: Tensor) -> Tensor:
        """Flip, shift, rotate and scale by one affine map for each image."""
        count, _, height, width = images.shape
        size = torch.tensor([width, height])
        shift = _uniform(count, 2, limit=self.shift) * 2  # affine_grid's sides have length 2
        if not (self.rotate or self.scale):
            shift = (shift * size / 2).round() * 2 / size
        angle = _uniform(count, limit=math.radians(self.rotate))
        scale = (1 + _uniform(count, limit=self.scale)).reciprocal()
        mirror = torch.where(torch.rand(count) < 0.5 * self.flip, -1.0, 1.0)
        cos, sin, aspect = angle.cos() * scale, angle.sin() * scale, height / width
        rows = (
            torch.stack((cos * mirror, -sin * aspect, shift[:, 0]), dim=1),
            torch.stack((sin * mirror / aspect, cos, shift[:, 1]), dim=1),
        )
        grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
        return F.grid_sample(images + 1, grid, align_corners=False) - 1


def _uniform(*shape: int, limit: float) -> Tensor:
    """Random numbers in [-limit, limit]."""
    return (torch.rand(shape) * 2 - 1) * limit


def _random_runs(count: int, length: int) -> Tensor:
    """Masks (count, length), each with one random run of ones, up to a third of the length."""
    run = torch.rand(count, 1) * length / 3
    start = torch.rand(count, 1) * (length - run)
    cell = torch.arange(length)
    return (cell >= start) & (cell < start + run)
