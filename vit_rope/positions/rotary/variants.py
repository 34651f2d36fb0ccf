"""Rotary schemes that change more than the angle of queries and keys: values too, moduli only, or
with a decay.

Shapes   B samples, N tokens, L layers and H heads (1 if shared), A axes, R channel pairs;
         coordinates (N, A) or (B, N, A)
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...ops.tables import angles
from ..base import Layout
from ..encoding import Encoding
from ..specs import register
from ..transform import Transform, rotation_of
from .axial import axial
from .base import Pairs, Rotary


@register
class ValueRoPE(Rotary):
    """Axial RoPE that also rotates values, and rotates each output back: o_i = sum_j a_ij R(j - i)
    v_j.

    Content is then carried in the frame of the token that reads it (GTA, arXiv:2310.10375). With
    undo=False outputs stay rotated, as in RoFormer's code (arXiv:2104.09864): they then reveal
    their position, so the scheme is not relative.
    """

    def __init__(self, layout: Layout, base: float = 100.0, undo: bool = True, pairs: Pairs = "interleaved") -> None:
        super().__init__(axial(layout, base, pairs=pairs).initial, pairs)
        self.undo = self.relative = undo

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        encoding = super().encode(coords, key_coords, grid)
        inverse = rotation_of(-self.frequencies(coords, grid), coords, grid) if self.undo else Transform()
        return encoding._replace(v=encoding.transform("k"), out=inverse)


@register
class PoPE(Rotary):
    """Polar positions: content gives each channel only a modulus, position only a phase
    (arXiv:2509.10534).

    The score is sum_c softplus(q_c) softplus(k_c) cos(theta_c · (p_k - p_q) + delta_c) / sqrt(D),
    with a frequency for each of the D channels of a head, shared out as in `axial`, and a phase
    delta that each layer and head learns, starting at 0.
    """

    def __init__(self, layout: Layout, base: float = 100.0) -> None:
        twice = Layout(2 * layout.heads * layout.head_dim, layout.heads, layout.grid)  # a channel becomes a pair
        super().__init__(axial(twice, base, share="rest").initial)
        self.delta = nn.Parameter(torch.zeros(layout.depth, 1, 1, layout.heads, self.initial.shape[-1]))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.delta)

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        encoding = super().encode(coords, key_coords, grid)
        theta = angles(self.frequencies(coords, grid), coords if key_coords is None else key_coords)
        theta = theta + self.delta.to(theta.dtype)
        keys = torch.stack((theta.cos(), theta.sin()), dim=-1)
        return encoding._replace(k=Transform(rotation=list(keys.unbind(0))), polar=True)


@register
class XPos(Rotary):
    """RoPE with a decay on one axis: queries are multiplied by zeta^(p / scale), keys by zeta^(-p /
    scale).

    For pair j of P, zeta = (j/P + gamma) / (1 + gamma). Logits decay as zeta^((p_q - p_k) / scale)
    for keys before their query, as intended (arXiv:2212.10554), and grow for keys after it. Raises
    ValueError on more axes: a decay in all directions is not a product of one factor per token, so
    rotations of the plane have none.
    """

    def __init__(self, layout: Layout, base: float = 10000.0, scale: float = 512.0, gamma: float = 0.4) -> None:
        if layout.axes != 1:
            raise ValueError(
                f"xpos has one axis, got {layout.axes}: a decay that queries and keys each multiply in, "
                f"zeta^(p_q - p_k), grows in the opposite direction, and an image has keys on all sides; "
                f"add a bias such as alibi to axial instead"
            )
        if min(base, scale, gamma) <= 0:
            raise ValueError(f"xpos needs a positive base, scale and gamma, got {base}, {scale} and {gamma}")
        super().__init__(axial(layout, base).initial)
        pairs = self.initial.shape[-1]
        self.log_zeta = ((torch.arange(pairs, device="cpu") / pairs + gamma) / (1 + gamma)).log() / scale

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        encoding = super().encode(coords, key_coords, grid)
        q = self._decayed(encoding.q, coords, 1)
        k = self._decayed(encoding.transform("k"), coords if key_coords is None else key_coords, -1)
        return encoding._replace(q=q, k=k)

    def _decayed(self, transform: Transform, coords: Tensor, sign: int) -> Transform:
        """Tables (B, N, 1, R, 2) multiplied by the decay at coordinates."""
        power = sign * coords.reshape(-1, *coords.shape[-2:])[..., None] * self.log_zeta.to(coords.device, coords.dtype)
        return Transform(rotation=[table * power.exp()[..., None] for table in transform.tables()])
