"""Simple reference implementations in float64, with loops and matrix exponentials and no library
code.
"""

import math

import numpy as np
import torch


def rotation_matrix(point, freqs, half=False):
    """exp(sum_a point[a] B_a) of commuting generators; B_a rotates pair j by freqs[a][j] radians
    per unit.
    """
    axes, pairs = freqs.shape
    total = torch.zeros(2 * pairs, 2 * pairs, dtype=torch.float64)
    for a in range(axes):
        generator = torch.zeros(2 * pairs, 2 * pairs, dtype=torch.float64)
        for j in range(pairs):
            first, second = (j, j + pairs) if half else (2 * j, 2 * j + 1)
            generator[first, second] = -float(freqs[a, j])
            generator[second, first] = float(freqs[a, j])
        total += float(point[a]) * generator
    return torch.linalg.matrix_exp(total)


def rotate(x, coords, freqs, half=False):
    """Rotate x (N, D) token by token; the remaining channels do not change."""
    width = 2 * freqs.shape[1]
    out = x.double().clone()
    for n in range(len(x)):
        out[n, :width] = rotation_matrix(coords[n], freqs, half) @ x[n, :width].double()
    return out


def attention(q, k, v, bias=None, hidden=None):
    """Softmax attention for one sample and head, in numpy, one query at a time; keys `hidden` (N,
    M) are masked.
    """
    q, k, v = (np.asarray(t, dtype=np.float64) for t in (q, k, v))
    out = np.zeros((len(q), v.shape[1]))
    for i in range(len(q)):
        logits = np.array([np.dot(q[i], k[j]) / math.sqrt(q.shape[1]) for j in range(len(k))])
        if bias is not None:
            logits = logits + np.asarray(bias[i], dtype=np.float64)
        if hidden is not None:
            logits[np.asarray(hidden[i])] = -np.inf
        weights = np.exp(logits - logits.max())
        out[i] = (weights / weights.sum()) @ v
    return torch.from_numpy(out)


def axial_frequencies(channels, base, axes):
    """Frequencies (A, R) with channels[a] channels for axis a."""
    freqs = torch.zeros(axes, sum(channels) // 2, dtype=torch.float64)
    column = 0
    for a in range(axes):
        pairs = channels[a] // 2
        for j in range(pairs):
            freqs[a, column] = base ** (-j / pairs)
            column += 1
    return freqs


def grid(shape):
    """Integer cells of a grid in row-major order, by counting."""
    if not shape:
        return [[]]
    return [[i, *rest] for i in range(shape[0]) for rest in grid(shape[1:])]
