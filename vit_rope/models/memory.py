"""Memory that a model carries from one segment of a long sequence to the next (RMT, arXiv:2207.06881).

Tiles of a large image, or clips of a video, are too many tokens for one call. Read one after another, they share a few
memory tokens: registers without a place, which attention writes to and reads from like any other token, and which begin
each segment as the segment before left them.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.fx
from torch import Tensor, nn


@torch.fx.wrap
def insert_memory(x: Tensor, memory: Tensor | None, prefix: int, count: int) -> Tensor:
    """Tokens x (B, N, C), the last `count` of their `prefix` replaced by `memory` (B, count, C) if there is any.

    Raises ValueError for a memory of another shape, or for a model that has none.
    """
    if memory is None:
        return x
    want = (x.shape[0], count, x.shape[2])
    if count == 0 or tuple(memory.shape) != want:
        what = "this model has none; create it with memory_tokens=…" if count == 0 else f"expected {want}"
        raise ValueError(f"memory of shape {tuple(memory.shape)} was given, but {what}")
    return torch.cat((x[:, : prefix - count], memory.to(x.dtype), x[:, prefix:]), dim=1)


class Reader(nn.Module):
    """Reads segments one after another with a RopeViT that has `memory_tokens`.

    A gradient flows back through memory into at most `horizon` segments, or into all where that is None: memory is cut
    loose at such places that the last segment reaches just as many, itself among them, and each of the others those of
    its group. Raises ValueError for a model without memory or a horizon below 1.
    """

    def __init__(self, model: Any, horizon: int | None = None) -> None:
        super().__init__()
        if getattr(model, "memory_tokens", 0) == 0:
            raise ValueError(f"this {type(model).__name__} has no memory; create it with memory_tokens=…")
        if horizon is not None and horizon < 1:
            raise ValueError(f"horizon is a number of segments, 1 or more, got {horizon}")
        self.model, self.horizon = model, horizon

    def forward(
        self,
        segments: Sequence[Tensor] | Tensor,
        memory: Tensor | None = None,
        coords: Sequence[Tensor] | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits (S, B, classes) of S segments (B, C, *sizes), and the memory (B, M, C) that the last one leaves.

        `memory` is what earlier segments left, None at the beginning. `coords`, an entry for each segment, place the
        tokens in the whole. Raises ValueError where there are no segments, or coordinates of another number of them.
        """
        if len(segments) == 0 or (coords is not None and len(coords) != len(segments)):
            placed = "" if coords is None else f" and coordinates of {len(coords)}"
            raise ValueError(f"expected one segment or more, with coordinates of as many, got {len(segments)}{placed}")
        logits = []
        for i, segment in enumerate(segments):
            if memory is not None and self.horizon is not None and (i == 0 or (len(segments) - i) % self.horizon == 0):
                memory = memory.detach()
            where = None if coords is None else coords[i]
            tokens = self.model.forward_features(segment, coords=where, memory=memory)
            memory = self.carried(tokens)
            logits.append(self.model.forward_head(tokens))
        return torch.stack(logits), cast(Tensor, memory)

    def carried(self, tokens: Tensor) -> Tensor:
        """The memory (B, M, C) among a segment's tokens, under one norm, wherever the model has it, lest it grow."""
        end = self.model.num_prefix_tokens
        return self.model.fc_norm(tokens[:, end - self.model.memory_tokens : end])
