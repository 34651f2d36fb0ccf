"""What torch.fx needs to trace a RopeViT, all in this file.

timm's `create_feature_extractor` traces a model with torch.fx: it runs `forward` on proxies, which
have neither values nor shapes. Code that checks shapes or branches on values must therefore become
a single node of the graph. This file registers that code with timm's tracer and wraps the one
method that the tracer cannot treat as a node. torch.compile, torch.export and torch.jit.trace need
none of this.

Shapes   B samples, N patch tokens, C channels, A axes
"""

import torch.fx
from einops import rearrange
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor

from ..attention import attend, attend_linear, attend_qkv
from ..positions import Position
from ..positions.coords import take_coords
from .memory import insert_memory
from .patches import PatchCoordinates

register_notrace_module(Position)
register_notrace_module(PatchCoordinates)
for function in (attend, attend_linear, attend_qkv, insert_memory, rearrange, take_coords):
    register_notrace_function(function)


@register_notrace_function
def embed_positions(position: Position, x: Tensor, coords: Tensor, grid: list[int] | None, layer: int) -> Tensor:
    """`position.embed` as a function, since tracers make nodes of functions and modules, not of
    methods: patch tokens x (B, N, C) at coordinates (N, A) or (B, N, A), before a layer."""
    return position.embed(x, coords, grid, layer)


def is_traced(x: object) -> bool:
    """Whether x is a proxy of torch.fx. A traced graph may return any intermediate tensor to its
    user, so no operation in it may overwrite its input."""
    return isinstance(x, torch.fx.Proxy)
