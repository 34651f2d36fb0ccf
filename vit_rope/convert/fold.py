"""Learned bases become part of the projections: the same function for the price of a plain rotation."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..models.vit import RopeViT
from ..positions import Position, Sum


def fold(model: RopeViT) -> RopeViT:
    """A copy of a model without the bases that its positions learned (`string`, `commuting`), with equal logits.

    (U^T q) · R (U^T k) needs no U where the projections give U^T q and U^T k, so the weights of queries and keys are
    multiplied by it, and the copy's position is the plain rotation: its state dict loads into a model of `axial` with
    the same base, or of `mixed`. Raises ValueError where positions have no basis, and where there is no such weight: if
    queries and keys are normalised between their projection and their positions, or several heads share their keys.
    """
    model = copy.deepcopy(model)
    position = cast(Position, model.position)
    parts = [cast(Any, part) for part in (position.parts if isinstance(position, Sum) else [position])]
    found = [i for i, part in enumerate(parts) if hasattr(part, "folded")]
    if not found:
        raise ValueError("positions have no learned basis to fold; only string and commuting do")
    blocks = [cast(Any, block) for block in model.blocks]
    for attention in (block.attn for block in blocks):
        if not isinstance(attention.q_norm, nn.Identity) or not isinstance(attention.k_norm, nn.Identity):
            raise ValueError("queries and keys are normalised after their projection, so no weight can hold the basis")
        if attention.num_kv_heads != attention.num_heads:
            raise ValueError("heads that share keys have bases of their own, so no weight of the keys can hold them")
    basis, parts[found[0]] = parts[found[0]].folded()  # attention refuses a second
    for layer, block in enumerate(blocks):
        _multiply(block.attn.qkv, basis[layer % len(basis)])
    folded = Sum(*parts) if isinstance(position, Sum) else parts[0]
    folded.axes, folded.made_for = position.axes, position.made_for
    model.position = folded
    return model


@torch.no_grad()
def _multiply(projection: nn.Linear, basis: Tensor) -> None:
    """Multiply the queries and keys that a projection gives for each head by its basis (H, D, D)."""
    basis = basis.to(projection.weight.device)
    for tensor in (projection.weight, projection.bias):
        if tensor is not None:
            rows = tensor.double().view(3, len(basis), basis.shape[-1], -1)
            rows = torch.cat((basis.mT.double() @ rows[:2], rows[2:]))
            tensor.copy_(rows.view(tensor.shape))
