"""What the tests of absolute schemes share."""

import torch

from vit_rope.positions import Layout, build


def made(spec, shape, width=24, depth=3, seed=0, **options):
    torch.manual_seed(seed)
    return build(spec, Layout(width=width, heads=2, grid=shape, depth=depth, **options))


def vectors(position, coords, shape=None, layer=0, width=24, dtype=torch.float64):
    """The vectors (N, C) that a scheme adds to tokens at these coordinates."""
    tokens = torch.zeros(1, len(coords), width, dtype=dtype)
    return position.embed(tokens, coords.to(dtype), shape, layer)[0].detach()


def vectors32(position, coords, shape=None, width=24):
    """`vectors` in float32."""
    return vectors(position, coords, shape, width=width, dtype=torch.float32)
