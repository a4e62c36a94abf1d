"""Harmonic (positional) encoding of coordinates."""

from __future__ import annotations

import torch
from torch import Tensor


def harmonic_encoding(x: Tensor, n_harmonics: int) -> Tensor:
    """``[sin(2^k x), cos(2^k x), x]`` for k = 0 .. n_harmonics - 1 (Mildenhall et al. 2020, eq. 4).

    Without the factor pi of the paper's text, as in Implicitron's ``HarmonicEmbedding``: inputs are box coordinates in
    [-1, 1], so the lowest octave spans 2 radians.

    Args:
        x: shape (..., d).

    Returns:
        Shape (..., d * (2 * n_harmonics + 1)); all sines, then all cosines, then x.
    """
    octaves = 2.0 ** torch.arange(n_harmonics, dtype=x.dtype, device=x.device)
    angles = (x[..., None] * octaves).flatten(start_dim=-2)
    return torch.cat((angles.sin(), angles.cos(), x), dim=-1)


def encoding_width(dimensions: int, n_harmonics: int) -> int:
    """Width of :func:`harmonic_encoding`'s result."""
    return dimensions * (2 * n_harmonics + 1)
