"""Weights of late fusion fitted on frames with ground truth, and the choice between fusions that few frames can support."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_CHANGES = 64  # of the active set, per member: far more than it takes; rounding must not make it endless
RIDGE = 1e-6  # share of the mean error: decides only between members that are equally good, for equal weights


def error_products(predictions: Tensor, truth: Tensor, zones: Tensor | None = None, n_zones: int = 1) -> Tensor:
    """Sums over pixels and channels of the products of two members' errors.

    With weights w that sum to 1 the fused error is the weighted error, so its squared sum is ``w^T E w``: E is all that a fit
    needs to know of a frame.

    Args:
        predictions: shape (n_members, C, H, W).
        truth: shape (C, H, W).
        zones: zone of each pixel, int64 in [0, n_zones), shape (H, W); None: all in one.

    Returns:
        float64, symmetric, shape (n_zones, n_members, n_members).
    """
    errors = (predictions.double() - truth.double()).flatten(2)  # (n_members, C, H W)
    chosen = torch.zeros(errors.shape[-1], dtype=torch.long, device=errors.device) if zones is None else zones.flatten()
    parts = [errors[..., chosen == zone].flatten(1) for zone in range(n_zones)]
    return torch.stack([part @ part.T for part in parts])


def simplex_weights(products: Tensor) -> Tensor:
    """The weights, none negative and of sum 1, with the least squared error ``w^T E w``.

    Active-set method for a convex quadratic programme (Nocedal and Wright, Numerical Optimization, algorithm 16.3): exact
    after finitely many steps. ``RIDGE`` makes the answer unique.

    Args:
        products: E as from :func:`error_products`, shape (n_members, n_members).

    Returns:
        float64, shape (n_members,); equal weights where E is 0 or says nothing.

    Raises:
        ValueError: E is not finite.
    """
    if not torch.isfinite(products).all():
        raise ValueError("cannot fit fusion weights: the products of the members' errors are not finite")
    count = len(products)
    weights = products.new_full((count,), 1 / count, dtype=torch.float64)
    level = products.diagonal().double().mean()
    if level <= 0:
        return weights
    quadratic = products.double() / level + RIDGE * torch.eye(count, dtype=torch.float64, device=products.device)
    free = torch.ones(count, dtype=torch.bool, device=products.device)
    for _ in range(MAX_CHANGES * count):
        target = torch.zeros_like(weights)
        target[free] = _least_at_sum_one(quadratic[free][:, free])
        if (target >= 0).all():
            weights = target
            slope = quadratic @ weights
            gain = slope[free].mean() - slope  # all free slopes are equal at the optimum of the free weights
            gain[free] = 0
            if gain.max() <= 1e-12 * slope.abs().max():
                break
            free[gain.argmax()] = True
        else:
            shrinking = free & (target < 0)
            ratios = torch.where(shrinking, weights / (weights - target).clamp_min(torch.finfo(torch.float64).tiny), math.inf)
            weights = weights + ratios.min() * (target - weights)
            free[ratios.argmin()] = False
            weights[~free] = 0
    return weights.clamp_min(0) / weights.clamp_min(0).sum()


def _least_at_sum_one(quadratic: Tensor) -> Tensor:
    """argmin of ``w^T Q w`` with sum 1, whatever the signs: ``Q^-1 1 / (1^T Q^-1 1)``."""
    solution = torch.linalg.solve(quadratic, torch.ones(len(quadratic), dtype=quadratic.dtype, device=quadratic.device))
    return solution / solution.sum()


@dataclass(frozen=True)
class Guard:
    """What a fusion must be better by than the plain average, on the same frames, before it is preferred.

    Attributes:
        min_gain: in the metric's unit, of the mean over frames.
        min_standard_errors: of the paired difference per frame; with fewer than two frames nothing is preferred.
    """

    min_gain: float
    min_standard_errors: float


def paired_choice(scores: Mapping[str, Sequence[float]], baseline: str, guard: Guard) -> tuple[str, dict[str, dict[str, Any]]]:
    """The best-scoring candidate among those that beat ``baseline`` as the guard asks, else ``baseline``.

    Args:
        scores: per candidate one value per frame, higher is better, frames in one order.

    Returns:
        The winner's name, and per candidate its ``mean``, ``gain`` over the baseline, that gain's ``standard_error`` (None with
        one frame) and whether it ``passes`` the guard.
    """
    told: dict[str, dict[str, Any]] = {}
    for name, values in scores.items():
        gains = [value - base for value, base in zip(values, scores[baseline], strict=True)]
        gain, count = sum(gains) / len(gains), len(gains)
        error = math.sqrt(sum((value - gain) ** 2 for value in gains) / (count - 1) / count) if count > 1 else None
        passes = error is not None and gain >= guard.min_gain and gain >= guard.min_standard_errors * error
        told[name] = {"mean": sum(values) / count, "gain": gain, "standard_error": error, "passes": passes and name != baseline}
    passing = [name for name, entry in told.items() if entry["passes"]]
    return max(passing, key=lambda name: told[name]["mean"], default=baseline), told
