"""Multiply learned bases into the projections: the same function at the cost of a plain rotation.

Shapes   H heads, D channels of a head
"""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..models.vit import RopeViT
from ..positions import Position, Sum


def fold(model: RopeViT) -> RopeViT:
    """A copy of a model with equal logits, without the bases that its positions (`string`,
    `commuting`) have learned.

    (U^T q) · R (U^T k) needs no U if the projections yield U^T q and U^T k. The weights of queries
    and keys are therefore multiplied by U^T, and the position of the copy is the plain rotation:
    its state dict loads into a model of `axial` with the same base, or of `mixed`.

    Raises ValueError for positions without a basis, and where no weight can hold it: if something
    happens to queries and keys between projection and rotation (a norm, the features of linear
    attention), or if several heads share their keys.
    """
    model = copy.deepcopy(model)
    position = cast(Position, model.position)
    parts = [cast(Any, part) for part in (position.parts if isinstance(position, Sum) else [position])]
    with_basis = [i for i, part in enumerate(parts) if hasattr(part, "folded")]
    if not with_basis:
        raise ValueError("positions have no learned basis to fold; only string and commuting do")
    blocks = [cast(Any, block) for block in model.blocks]
    for attention in (block.attn for block in blocks):
        if not isinstance(attention.q_norm, nn.Identity) or not isinstance(attention.k_norm, nn.Identity):
            raise ValueError("queries and keys are normalized after their projection, so no weight can hold the basis")
        if attention.linear:
            raise ValueError(
                "linear attention applies a function to queries and keys after their projection, so no weight can "
                "hold the basis; keep the model as it is"
            )
        if attention.num_kv_heads != attention.num_heads:
            raise ValueError("heads that share keys have different bases, so no weight of the keys can hold them")
    basis, parts[with_basis[0]] = parts[with_basis[0]].folded()  # attention allows only one basis
    for layer, block in enumerate(blocks):
        _multiply(block.attn.qkv, basis[layer % len(basis)])
    folded = Sum(*parts) if isinstance(position, Sum) else parts[0]
    folded.axes, folded.made_for = position.axes, position.made_for
    model.position = folded
    return model


@torch.no_grad()
def _multiply(projection: nn.Linear, basis: Tensor) -> None:
    """Change a projection in place, so that the queries and keys of each head are multiplied by the
    transposed basis of the head, of shape (H, D, D) for all heads."""
    basis = basis.to(projection.weight.device)
    for tensor in (projection.weight, projection.bias):
        if tensor is not None:
            rows = tensor.double().view(3, len(basis), basis.shape[-1], -1)
            rows = torch.cat((basis.mT.double() @ rows[:2], rows[2:]))
            tensor.copy_(rows.view(tensor.shape))
