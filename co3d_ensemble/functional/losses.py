"""The recipe's losses as pure functions; unweighted scalars (weights are configuration).

``counted``, bool with a value per ray, limits the mean to some of the rays: those of a step that had no room for all. None: all.
"""

from __future__ import annotations

import torch
from torch import Tensor

OPACITY_FLOOR = 1e-10  # d(-p log p)/dp is infinite at p = 0; the floor adds < 3e-9 to the loss
ALPHA_FLOOR = 1e-6  # keeps log(alpha) and log(1 - alpha) finite in float32; see alpha_bce_loss for its gradient


def roi_rgb_loss(rgb: Tensor, target: Tensor, mask: Tensor, *, counted: Tensor | None = None) -> Tensor:
    """``1 / sum M(r) * sum_r M(r) ||C(r) - C*(r)||^2`` (CO3D many-view solution, "Objectives", eq. 1-2; one pass).

    The squared norm sums over the channels. Rays outside the region of interest contribute nothing, so the colour
    branch never sees background.

    Args:
        rgb: rendered colour, shape (..., c).
        target: photographed colour, shape (..., c).
        mask: 1 inside the region of interest, else 0, shape (...).

    Returns:
        Scalar >= 0; exactly 0, with zero gradient, when no ray lies in the region.
    """
    error = (rgb - target).square().sum(dim=-1)
    mask = mask if counted is None else mask * counted
    return (error * mask).sum() / mask.sum().clamp_min(1)


def full_rgb_loss(rgb: Tensor, target: Tensor, mask: Tensor, *, counted: Tensor | None = None) -> Tensor:
    """Mean over all rays of ``||C(r) - M(r) C*(r)||^2``: against the photograph masked on black, background included.

    What :func:`roi_rgb_loss` replaces; the ablation compares the two. Here a background ray pulls colour and opacity to
    black, so the colour branch and the shape are trained by one term.

    Args:
        rgb: rendered colour on black, shape (..., c).
        target: photographed colour, shape (..., c).
        mask: 1 inside the foreground mask, else 0, shape (...).
    """
    return _mean((rgb - target * mask[..., None]).square().sum(dim=-1), counted)


def alpha_bce_loss(
    alpha: Tensor, mask: Tensor, optical_depth: Tensor | None = None, *, counted: Tensor | None = None
) -> Tensor:
    """``BCE(alpha(r), M(r))``, mean over all rays (same source, eq. 3-4).

    With the rays' optical depth, ``log(1 - alpha) = -sum sigma delta`` exactly: a background ray has the gradient of its
    optical depth however opaque it is (in float32 1 - alpha is 0 from an optical depth of 17 on, and a run that starts
    opaque would never clear).

    alpha is clamped to [1e-6, 1 - 1e-6] inside each logarithm on the side where that logarithm diverges only:
    background rays keep their full gradient for any haze, however thin (d/d alpha = 1 / (1 - alpha) at alpha = 0; a
    two-sided clamp, as Implicitron's 0.01, would leave haze below it for ever), and foreground rays theirs up to
    opacity 1. What is clamped away has no gradient: a foreground ray with alpha < 1e-6 (nothing there to raise) and,
    without ``optical_depth``, a background ray with alpha > 1 - 1e-6.

    Args:
        alpha: opacity of the rays in [0, 1], shape (...).
        mask: targets in [0, 1], shape (...).
        optical_depth: sum of sigma delta along the rays, >= 0, shape (...), or None.
    """
    inside = alpha.clamp_min(ALPHA_FLOOR).log()
    outside = torch.log1p(-alpha.clamp_max(1 - ALPHA_FLOOR)) if optical_depth is None else -optical_depth
    return -_mean(mask * inside + (1 - mask) * outside, counted)


def sample_entropy_loss(opacities: Tensor, *, counted: Tensor | None = None) -> Tensor:
    """Mean of ``-p log p`` over all samples of all rays (same source, "Regularization", eq. 1-3).

    This is not the binary entropy: below 1/e descent empties a sample, above it fills it weakly. Samples skipped as
    empty count as opacity 0, so that the mean does not depend on skipping.

    Args:
        opacities: p = 1 - exp(-sigma delta) in [0, 1], shape (..., n_samples).

    Returns:
        Scalar in [0, 1/e]; 0 (below 3e-9) when every sample is empty or opaque.
    """
    entropy = torch.special.entr(opacities.clamp_min(OPACITY_FLOOR))
    return entropy.mean() if counted is None else _mean(entropy.mean(dim=-1), counted)


def _mean(values: Tensor, counted: Tensor | None) -> Tensor:
    """Of the counted rays (...), 0 where none is."""
    return values.mean() if counted is None else (values * counted).sum() / counted.sum().clamp_min(1)
