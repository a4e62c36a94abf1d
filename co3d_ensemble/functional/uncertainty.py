"""The members' disagreement as an uncertainty map, and how well such a map tells where the errors are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from co3d_ensemble.functional.fusion import has_surface, stacked
from co3d_ensemble.functional.metrics import DEPTH_CROP, FOREGROUND, optimal_l1_scale
from co3d_ensemble.functional.types import Frame, RenderedView


def color_disagreement(views: Sequence[RenderedView]) -> Tensor:
    """Standard deviation over the members (population), root mean square over the colours; shape (1, H, W).

    0 for one member, and where all agree. Errors as ``fuse_views``.
    """
    rgb, _, _ = stacked(views)
    return rgb.var(dim=0, correction=0).mean(dim=0, keepdim=True).sqrt()


def depth_disagreement(views: Sequence[RenderedView]) -> tuple[Tensor, Tensor]:
    """Standard deviation of z over the members that have a surface, in units of depth.

    Returns:
        The deviation, shape (1, H, W), 0 where fewer than two members have a surface, and how many have one, int64 alike.
    """
    _, depth, mask = stacked(views)
    surface = has_surface(depth, mask)
    count = surface.sum(dim=0)
    divisor = count.clamp_min(1)
    # relative to the farthest surface, so that equal depths deviate by exactly 0
    offset = torch.where(surface, depth - torch.where(surface, depth, 0.0).amax(dim=0), 0.0)
    mean = offset.sum(dim=0) / divisor
    variance = torch.where(surface, (offset - mean).square(), 0.0).sum(dim=0) / divisor
    return torch.where(count > 1, variance.sqrt(), 0.0), count


def score_uncertainty(views: Sequence[RenderedView], fused: RenderedView, frame: Frame) -> dict[str, dict[str, float | None]]:
    """How well the members' disagreement tells the fused view's true errors, in one frame.

    Colour: mean absolute error against the photograph on black, over the pixels of the true or the fused mask. Depth: the error
    of ``depth_abs_fg`` (at the frame's best scale) over its pixels, as far as two members have a surface there.

    Returns:
        ``{"rgb" | "depth": {"spearman": value, "ause": value}}``; None where there is no ground truth or no order.
    """
    rgb, foreground = frame.rgb.float() / 255, frame.mask > 255 * FOREGROUND
    counted = foreground | (fused.mask >= FOREGROUND)
    error = (fused.rgb - rgb * foreground).abs().mean(dim=0, keepdim=True)
    scores = {"rgb": _scores(color_disagreement(views)[counted], error[counted])}
    if frame.depth is None:
        return {**scores, "depth": {"spearman": None, "ause": None}}
    deviation, count = depth_disagreement(views)
    known = torch.isfinite(frame.depth) & (frame.depth > 0) & foreground
    if frame.depth_mask is not None:
        known &= frame.depth_mask > 0
    inner = torch.zeros_like(known)
    inner[:, DEPTH_CROP:-DEPTH_CROP, DEPTH_CROP:-DEPTH_CROP] = True
    known &= inner
    scale = optimal_l1_scale(fused.depth[known].double(), frame.depth[known].double())
    known &= count > 1
    error = (frame.depth[known].double() - scale * fused.depth[known].double()).abs()
    return {**scores, "depth": _scores(deviation[known], error)}


def _scores(uncertainty: Tensor, error: Tensor) -> dict[str, float | None]:
    values = {"spearman": rank_correlation(uncertainty, error).item(), "ause": sparsification_error(uncertainty, error).item()}
    return {name: None if value != value else value for name, value in values.items()}


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rho: the correlation of the ranks; equal values share the mean of their ranks.

    Args:
        first, second: finite, shape (n,).

    Returns:
        float64 scalar in [-1, 1]; nan where either is constant or there are fewer than two values.

    Raises:
        ValueError: shapes that differ, or non-finite values.
    """
    _check_pair(first, second)
    ranks = [_mean_ranks(values) for values in (first, second)]
    if len(first) == 0:
        return first.new_tensor(torch.nan, dtype=torch.float64)
    x, y = (rank - rank.mean() for rank in ranks)
    return (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()  # 0 / 0 where constant


def sparsification_error(uncertainty: Tensor, error: Tensor) -> Tensor:
    """AUSE: area between the sparsification curves of the uncertainty and of the error itself (Ilg et al., ECCV 2018, sec. 4).

    The curve: the mean error of the pixels left after the k most uncertain of n were removed, over the mean error of all, at
    the removed shares k / n, k = 0 ... n - 1; its area is the mean of these n values. Pixels of equal uncertainty are removed
    in random order, in expectation: each counts with their mean error. 0: the uncertainty orders the pixels as the errors do;
    a constant uncertainty has 1 minus the oracle's area.

    Args:
        uncertainty: finite, shape (n,).
        error: finite, not negative, shape (n,).

    Returns:
        float64 scalar >= 0; 0 where there is no error, nan where there is no pixel.

    Raises:
        ValueError: shapes that differ, non-finite values or a negative error.
    """
    _check_pair(uncertainty, error)
    if (error < 0).any():
        raise ValueError(f"an error cannot be negative, the least is {error.min()}")
    if len(error) == 0:
        return error.new_tensor(torch.nan, dtype=torch.float64)
    total = error.double().mean()
    if total == 0:
        return total
    return (_left_after_removal(uncertainty, error) - _left_after_removal(error, error)).mean() / total


def _left_after_removal(order: Tensor, error: Tensor) -> Tensor:
    """Mean error of the n - k values lowest in ``order``, k = n - 1 ... 0, ties as their mean; shape (n,)."""
    _, inverse, counts = torch.unique(order, return_inverse=True, return_counts=True)  # ascending
    sums = torch.zeros(len(counts), dtype=torch.float64, device=error.device).index_add_(0, inverse, error.double())
    ascending = torch.repeat_interleave(sums / counts, counts)
    return ascending.cumsum(0) / torch.arange(1, len(error) + 1, device=error.device)


def _mean_ranks(values: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def _check_pair(first: Tensor, second: Tensor) -> None:
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"expected two vectors of one length, got shapes {tuple(first.shape)} and {tuple(second.shape)}")
    if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
        raise ValueError("non-finite values among the uncertainties or errors")
