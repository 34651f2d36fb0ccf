"""Memory that a model carries from one segment of a long sequence to the next (RMT,
arXiv:2207.06881).

The tiles of a large image, or the clips of a video, are too many tokens for one call. Read one
after another, they share a few memory tokens: registers without a position, which attention reads
and writes like any other token. Each segment starts with the memory that the previous one left.

Shapes   S segments, B samples, N tokens, P prefix tokens, M memory tokens, C channels
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn


def insert_memory(x: Tensor, memory: Tensor | None, prefix: int, count: int) -> Tensor:
    """Tokens x (B, N, C), with the last `count` of their `prefix` tokens replaced by `memory`
    (B, count, C) where it is given.

    Raises ValueError for a memory of another shape, or for a model without memory.
    """
    if memory is None:
        return x
    expected = (x.shape[0], count, x.shape[2])
    if count == 0 or tuple(memory.shape) != expected:
        problem = "this model has none; create it with memory_tokens=…" if count == 0 else f"expected {expected}"
        raise ValueError(f"memory of shape {tuple(memory.shape)} was given, but {problem}")
    return torch.cat((x[:, : prefix - count], memory.to(x.dtype), x[:, prefix:]), dim=1)


class Reader(nn.Module):
    """Reads segments one after another with a RopeViT that has `memory_tokens`.

    Gradients flow back through memory into at most `horizon` segments; None means all of them. The
    memory is detached after every `horizon` segments, counted back from the last one: the gradient
    of the last segment reaches `horizon` segments, itself included, and that of any other segment
    reaches the segments before it in its group.

    Raises ValueError for a model without memory or a horizon below 1.
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
        """Logits (S, B, classes) of S segments (B, C, *sizes), and the memory (B, M, C) after the
        last one.

        Args:
            segments: the images of each segment
            memory: the memory that an earlier call returned; None at the start of a sequence
            coords: for each segment, the coordinates of its patches in the complete sequence

        Raises ValueError for no segments, or a different number of segments and coordinates.
        """
        if len(segments) == 0 or (coords is not None and len(coords) != len(segments)):
            given = "" if coords is None else f" and coordinates of {len(coords)}"
            raise ValueError(
                f"expected one or more segments, and coordinates of the same number of them, got {len(segments)}{given}"
            )
        logits = []
        for i, segment in enumerate(segments):
            if memory is not None and self.horizon is not None and (i == 0 or (len(segments) - i) % self.horizon == 0):
                memory = memory.detach()
            segment_coords = None if coords is None else coords[i]
            tokens = self.model.forward_features(segment, coords=segment_coords, memory=memory)
            memory = self.read_memory(tokens)
            logits.append(self.model.forward_head(tokens))
        return torch.stack(logits), cast(Tensor, memory)

    def read_memory(self, tokens: Tensor) -> Tensor:
        """The memory (B, M, C) among the tokens (B, N, C) of a segment, normalized exactly once
        (by `norm` or `fc_norm`, whichever the model has) so that it does not grow."""
        end = self.model.num_prefix_tokens
        return self.model.fc_norm(tokens[:, end - self.model.memory_tokens : end])
