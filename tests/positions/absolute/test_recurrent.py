"""Recurrences and flows against their definitions."""

from itertools import pairwise

import numpy as np
import torch

from tests.positions.absolute.helpers import made, vectors
from vit_rope.positions import Layout
from vit_rope.positions.absolute.recurrent import Floater, runge_kutta
from vit_rope.positions.coords import grid


def test_recurrent_matches_the_recurrence_summed_over_axes():
    position = made("recurrent(extent=1.5)", (3, 4))
    start, weight, bias = (p.detach().double() for p in (position.start, position.weight, position.bias))
    sequences = []
    for axis in range(2):
        vector, sequence = start[axis, 0], []
        for _ in range(6):
            sequence.append(vector)
            vector = torch.tanh(vector @ weight[axis] + bias[axis, 0])
        sequences.append(sequence)
    got = vectors(position, grid((6, 6)), [6, 6]).view(6, 6, 24)
    for y in range(6):
        for x in range(6):
            torch.testing.assert_close(got[y, x], sequences[0][y] + sequences[1][x], rtol=0, atol=1e-6)
    beyond = vectors(position, torch.tensor([[9.0, 5.0], [1.5, 2.0]]))
    torch.testing.assert_close(beyond[0], got[5, 5], rtol=0, atol=1e-6)
    torch.testing.assert_close(beyond[1], (got[1, 2] + got[2, 2]) / 2, rtol=0, atol=1e-6)


class Sinusoidal(Floater):
    """A flow of linear, skew-symmetric velocity h(t, p) = B p; B rotates pair j by base^(-j/P) per
    cell.
    """

    def velocity(self, axis, time, vector):
        pairs = vector.unflatten(-1, (2, -1))  # sines, cosines
        speeds = 100.0 ** (-torch.arange(12, dtype=vector.dtype) / 12) * self.layout.grid[axis]
        return torch.stack((pairs[..., 1, :] * speeds, -pairs[..., 0, :] * speeds), dim=-2).flatten(-2)


def test_a_flow_of_skew_symmetric_velocity_is_the_sinusoid():
    position = Sinusoidal(Layout(width=24, heads=2, grid=(8,), depth=2), steps=128)
    with torch.no_grad():
        position.start[:] = torch.cat((torch.zeros(12), torch.ones(12)))
    coords = torch.tensor([[0.0], [1.0], [5.5], [7.0], [-2.0], [11.0]])
    want = vectors(made("sincos(base=100)", (8,)), coords)
    torch.testing.assert_close(vectors(position, coords), want, rtol=0, atol=1e-5)


def test_floater_on_two_axes_is_the_sum_of_the_solutions_along_each():
    position = made("floater(hidden=5, steps=8)", (3, 4))
    start, inner, bias, outer = (
        p.detach().double().numpy() for p in (position.start, position.inner, position.inner_bias, position.outer)
    )

    def solution(layer, axis, time, steps=2000):
        def velocity(t, p):
            return np.tanh(np.array([t, *p]) @ inner[axis] + bias[axis]) @ outer[axis]

        vector, step = start[layer, axis], time / steps
        for i in range(steps):  # the midpoint rule
            vector = vector + step * velocity((i + 0.5) * step, vector + step / 2 * velocity(i * step, vector))
        return torch.from_numpy(vector)

    for layer, (y, x) in ((0, (2.0, 3.0)), (2, (-1.0, 1.5)), (1, (0.0, 6.0))):
        got = vectors(position, torch.tensor([[y, x]]), layer=layer)[0]
        torch.testing.assert_close(got, solution(layer, 0, y / 3) + solution(layer, 1, x / 4), rtol=0, atol=1e-3)


def test_runge_kutta_is_of_fourth_order():
    time = torch.tensor([[2.0], [-1.0]], dtype=torch.float64)
    errors = []
    for steps in (8, 16, 32):
        vector = runge_kutta(lambda t, p: t.cos() * p, torch.ones(1, dtype=torch.float64), time, steps)
        errors.append((vector - time.sin().exp()).abs().max())  # p' = cos(t) p, so p = e^(sin t)
    for coarse, fine in pairwise(errors):
        assert 12 < float(coarse / fine) < 21


def test_every_layer_of_floater_has_its_own_start():
    position = made("floater", (4, 5))
    first, second = (vectors(position, grid((4, 5)), layer=layer) for layer in (0, 1))
    assert (first - second).abs().max() > 1e-2
