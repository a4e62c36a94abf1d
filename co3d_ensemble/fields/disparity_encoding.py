"""Positional encoding of a plane's disparity (Li et al., ICCV 2021, "positional encoding")."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FORMS = ("reference", "slides")


def disparity_encoding(disparity: Tensor, n_harmonics: int, form: str = "reference") -> Tensor:
    """Sine and cosine of the disparity at ``n_harmonics`` octaves.

    ``slides``: ``sin(2^k pi d), cos(2^k pi d)`` for k = 0 .. n_harmonics - 1, as the slides write it. ``reference``: ``d`` itself,
    then ``sin(2^k d), cos(2^k d)`` without pi, as the authors' code computes it and their weights expect it. The channels are
    in the order of these formulas.

    Args:
        disparity: 1 / depth, in 1 / world units, shape (...).

    Returns:
        Shape (..., :func:`disparity_encoding_width`).

    Raises:
        ValueError: unknown ``form``.
    """
    _check(form)
    octaves = 2.0 ** torch.arange(n_harmonics, dtype=disparity.dtype, device=disparity.device)
    angles = disparity[..., None] * (octaves * math.pi if form == "slides" else octaves)
    waves = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(start_dim=-2)
    return waves if form == "slides" else torch.cat((disparity[..., None], waves), dim=-1)


def disparity_encoding_width(n_harmonics: int, form: str = "reference") -> int:
    """Channels of :func:`disparity_encoding`: 21 for the reference's 10 octaves."""
    _check(form)
    return 2 * n_harmonics + (form == "reference")


def _check(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"encoding={form!r}: expected one of {', '.join(FORMS)}")
