"""Rotary positions that act on more than the angle of queries and keys: on values too, on moduli, with a decay."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...ops.tables import angles
from ..base import Layout
from ..encoding import Encoding, Transform
from ..specs import register
from .axial import axial
from .base import Pairs, Rotary, rotation_of


@register
class ValueRoPE(Rotary):
    """Axial RoPE that turns the values too, and turns each output back by its own place: o_i = sum_j a_ij R(j - i) v_j.

    Content is then carried in the frame of the token that reads it (GTA, arXiv:2310.10375). With undo=False outputs
    stay turned, as in RoFormer's code (arXiv:2104.09864): they then tell where they are, so this is not relative.
    """

    def __init__(self, layout: Layout, base: float = 100.0, undo: bool = True, pairs: Pairs = "interleaved") -> None:
        super().__init__(axial(layout, base, pairs=pairs).initial, pairs)
        self.undo = self.relative = undo

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        encoding = super().encode(coords, key_coords, grid)
        back = rotation_of(-self.frequencies(coords, grid), coords, grid) if self.undo else Transform()
        return encoding._replace(v=encoding.q if encoding.k is None else encoding.k, out=back)


@register
class PoPE(Rotary):
    """Polar positions: content gives each channel a modulus alone, place a phase alone (arXiv:2509.10534).

    The score is sum_c softplus(q_c) softplus(k_c) cos(theta_c · (p_k - p_q) + delta_c) / sqrt(D), with a frequency for
    each of the D channels of a head, dealt out as by `axial`, and delta learned for each layer and head, from 0 on.
    """

    def __init__(self, layout: Layout, base: float = 100.0) -> None:
        twice = Layout(2 * layout.heads * layout.head_dim, layout.heads, layout.grid)  # a channel becomes a pair
        super().__init__(axial(twice, base, share="rest").initial)
        self.delta = nn.Parameter(torch.zeros(layout.depth, 1, 1, layout.heads, self.initial.shape[-1]))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.delta)

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        encoding = super().encode(coords, key_coords, grid)
        theta = angles(self.frequencies(coords), coords if key_coords is None else key_coords)
        theta = theta + self.delta.to(theta.dtype)
        keys = torch.stack((theta.cos(), theta.sin()), dim=-1)
        return encoding._replace(k=Transform(turn=list(keys.unbind(0))), polar=True)


@register
class XPos(Rotary):
    """RoPE with a decay on one axis: queries are multiplied by zeta^(p / scale), keys by zeta^(-p / scale).

    Of pair j of P, zeta = (j/P + gamma) / (1 + gamma), so that logits decay as zeta^((p_q - p_k) / scale), as meant for
    keys before their query (arXiv:2212.10554), and grow for keys after it. Raises ValueError on more axes: a decay in
    both directions is no product of what each place gives, so rotations of the plane have none.
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
        keys = encoding.q if encoding.k is None else encoding.k
        where = coords if key_coords is None else key_coords
        return encoding._replace(q=self._decay(encoding.q, coords, 1), k=self._decay(keys, where, -1))

    def _decay(self, side: Transform, coords: Tensor, sign: int) -> Transform:
        """Turns (B, N, 1, R, 2) of another length than 1."""
        power = sign * coords.reshape(-1, *coords.shape[-2:])[..., None] * self.log_zeta.to(coords.device, coords.dtype)
        return Transform(turn=[turn * power.exp()[..., None] for turn in side.turn or ()])
