"""Metrics of depth estimation as MINE's tables have them (slides, "Experiments on Depth Estimation"; Eigen et al. 2014)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DEPTH_METRIC_NAMES = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "delta_1", "delta_2", "delta_3")
ALIGNMENTS = ("none", "median", "scale")
ACCURACY_BASE = 1.25


def alignment_scale(predicted: Tensor, truth: Tensor, align: str) -> Tensor:
    """The factor for predicted depths that know no unit.

    "median" is ``median(d*) / median(d)`` (Zhou et al. 2017), "scale" the least-squares ``sum d d* / sum d^2``, "none" is 1.

    Args:
        predicted, truth: depths > 0, shape (n,), n >= 1.

    Raises:
        ValueError: an unknown alignment.
    """
    if align == "none":
        return truth.new_ones(())
    if align == "median":
        return _median(truth) / _median(predicted)
    if align == "scale":
        return (predicted * truth).sum() / predicted.square().sum()
    raise ValueError(f"align={align!r}: expected one of {', '.join(ALIGNMENTS)}")


def depth_metrics(
    predicted: Tensor,
    truth: Tensor,
    mask: Tensor | None = None,
    *,
    align: str = "median",
    min_depth: float = 0.0,
    max_depth: float = math.inf,
) -> dict[str, float]:
    """All depth metrics of one picture, in float64.

    RMSE is sqrt(mean (d - d*)^2), RMSE log the same of natural logarithms, Abs Rel mean |d - d*| / d*, Sq Rel mean (d - d*)^2 / d*,
    log10 mean |log10 d - log10 d*|, delta_k the share of pixels with max(d / d*, d* / d) < 1.25^k. The slides' tables call the last
    sigma_k and give no base of the logarithm, no thresholds (1.25^k are Eigen's) and no formula of log10 (the field's usual one).

    Args:
        predicted: z > 0, any unit unless ``align`` is "none", shape (..., H, W).
        truth: z, 0 or not finite where unknown, same shape.
        mask: pixels that count, same shape; None is all with known truth.
        align: see :func:`alignment_scale`; the factor is of this picture's counted pixels.
        min_depth, max_depth: only truth strictly between them counts, and aligned predictions are clamped to them.

    Returns:
        A float per name of ``DEPTH_METRIC_NAMES``, and the factor under ``scale``.

    Raises:
        ValueError: shapes that differ, no pixel that counts, or a counted prediction that is not finite or not above 0.
    """
    if predicted.shape != truth.shape or (mask is not None and mask.shape != truth.shape):
        shapes = [tuple(value.shape) for value in (predicted, truth, mask) if value is not None]
        raise ValueError(f"depths and mask: expected one shape, got {shapes}")
    counted = torch.isfinite(truth) & (truth > max(min_depth, 0.0)) & (truth < max_depth)
    if mask is not None:
        counted = counted & (mask > 0)
    predicted, truth = predicted[counted].double(), truth[counted].double()
    if truth.numel() == 0:
        raise ValueError("no pixel with known depth counts")
    bad = ~(torch.isfinite(predicted) & (predicted > 0))
    if bad.any():
        raise ValueError(f"{int(bad.sum())} predicted depths are not finite or not above 0, e.g. {predicted[bad][0].item()}")
    scale = alignment_scale(predicted, truth, align)
    predicted = (predicted * scale).clamp(min_depth, max_depth)
    error, log_ratio = predicted - truth, predicted.log() - truth.log()
    ratio = torch.maximum(predicted / truth, truth / predicted)
    values = {
        "abs_rel": (error.abs() / truth).mean(),
        "sq_rel": (error.square() / truth).mean(),
        "rmse": error.square().mean().sqrt(),
        "rmse_log": log_ratio.square().mean().sqrt(),
        "log10": log_ratio.abs().mean() / math.log(10),
        **{f"delta_{k}": (ratio < ACCURACY_BASE**k).double().mean() for k in (1, 2, 3)},
        "scale": scale,
    }
    return {name: value.item() for name, value in values.items()}


def _median(values: Tensor) -> Tensor:
    """Mean of the two middle values where their number is even (torch.median takes the lower one)."""
    ordered = values.sort().values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
