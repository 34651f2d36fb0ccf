"""TODO training.data.augment from ['training.batches']."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Augment(nn.Module):
    """Random changes, drawn for each image of a batch (B, C, H, W) in [-1, 1]; what comes in from outside is black.

    Args:
        flip: mirror every second image
        shift: move by up to this share of a side, by whole pixels where nothing turns or scales
        turn: rotate by up to this many degrees
        scale: grow or shrink by up to this share
        contrast: brightness and contrast change by up to this share
        erase: this share of the images loses a rectangle of up to a third of each side
    """

    def __init__(
        self,
        flip: bool = False,
        shift: float = 0.0,
        turn: float = 0.0,
        scale: float = 0.0,
        contrast: float = 0.0,
        erase: float = 0.0,
    ):
        super().__init__()
        self.flip, self.shift, self.turn = flip, shift, turn
        self.scale, self.contrast, self.erase = scale, contrast, erase

    def forward(self, images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        if self.flip or self.shift or self.turn or self.scale:
            side = torch.tensor([width, height])
            move = self._within(count, 2, limit=self.shift) * 2  # affine_grid's sides are 2 long
            if not (self.turn or self.scale):
                move = (move * side / 2).round() * 2 / side
            angle = self._within(count, limit=math.radians(self.turn))
            size = (1 + self._within(count, limit=self.scale)).reciprocal()
            mirror = torch.where(torch.rand(count) < 0.5 * self.flip, -1.0, 1.0)
            cos, sin, aspect = angle.cos() * size, angle.sin() * size, height / width
            rows = (
                torch.stack((cos * mirror, -sin * aspect, move[:, 0]), dim=1),
                torch.stack((sin * mirror / aspect, cos, move[:, 1]), dim=1),
            )
            grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
            images = F.grid_sample(images + 1, grid, align_corners=False) - 1
        if self.contrast:
            gain = 1 + self._within(count, 1, 1, 1, limit=self.contrast)
            images = (images * gain + self._within(count, 1, 1, 1, limit=self.contrast)).clamp(-1, 1)
        if self.erase:
            hole = self._span(count, height)[:, :, None] & self._span(count, width)[:, None, :]
            hole &= torch.rand(count, 1, 1) < self.erase
            images = torch.where(hole[:, None], torch.rand_like(images) * 2 - 1, images)
        return images

    @staticmethod
    def _within(*shape: int, limit: float) -> Tensor:
        return (torch.rand(shape) * 2 - 1) * limit

    @staticmethod
    def _span(count: int, length: int) -> Tensor:
        """Masks (count, length) of one random run each, up to a third of the length."""
        run = torch.rand(count, 1) * length / 3
        start = torch.rand(count, 1) * (length - run)
        cell = torch.arange(length)
        return (cell >= start) & (cell < start + run)
