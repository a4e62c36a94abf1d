"""Where the planes of a multiplane image stand: disparities of MINE (Li et al., ICCV 2021), nearest first.

Disparity is 1 / z of the source camera's fronto-parallel planes, in 1 / world units. All results are (batch, planes) and
descend, so that plane 0 is the nearest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def stratified_disparities(
    n_planes: int,
    near: float,
    far: float,
    *,
    batch: int,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """One plane uniform in each of ``n_planes`` equal intervals of disparity, independent per batch entry.

    The slides' ``d_i ~ U[d_n + i/N (d_f - d_n), d_n + (i-1)/N (d_f - d_n)]``, i = 1..N: with d_n > d_f its bounds are in
    the usual order, and the intervals descend. The network sees every disparity in training, which is why the same
    weights serve any number of planes.

    Args:
        near, far: disparities of the nearest and the farthest possible plane, near > far > 0.
        generator: where the draws come from; None is torch's default generator of the device.

    Returns:
        Shape (batch, n_planes).

    Raises:
        ValueError: no plane, or not near > far > 0.
    """
    _check_range(n_planes, near, far)
    share = torch.rand(batch, n_planes, generator=generator, device=device, dtype=dtype)
    return _within_intervals(share, near, far)


def fixed_disparities(
    n_planes: int, near: float, far: float, *, batch: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """The centres of the intervals of :func:`stratified_disparities`: no randomness, for reproducible evaluation.

    The reference's fixed planes are ``linspace(near, far, N)``, ends included; centres are the mean of what training draws.
    """
    _check_range(n_planes, near, far)
    return _within_intervals(torch.full((batch, n_planes), 0.5, device=device, dtype=dtype), near, far)


def explicit_disparities(
    values: Sequence[float], *, batch: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Disparities from a list: shape (batch, len(values)).

    Raises:
        ValueError: an empty list, or one that does not descend or holds a value that is not above 0 and finite.
    """
    if not values:
        raise ValueError("disparities: expected at least one plane, got an empty list")
    for first, second in zip(values, values[1:]):
        if not first > second:
            raise ValueError(f"disparities must descend (nearest plane first), got {first} before {second}")
    if not (values[-1] > 0 and math.isfinite(values[0])):
        raise ValueError(f"disparities must be above 0 and finite, got {values[-1]} to {values[0]}")
    return torch.tensor(list(values), device=device, dtype=dtype).expand(batch, -1).clone()


@torch.no_grad()
def fine_disparities(
    disparity: Tensor, weights: Tensor, n_fine: int, *, perturb: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Coarse to fine: ``n_fine`` more planes where the coarse ones carry weight, merged with them.

    The density is piecewise constant: plane i's weight is spread between the midpoints to its neighbours (the first and
    the last plane themselves end their intervals), as in the reference. Its draws are independent; ours are stratified in
    probability, which has the same density and less variance.

    Args:
        disparity: of the coarse planes, descending, shape (B, N), N >= 2.
        weights: their rendering weights averaged over the pixels, >= 0, shape (B, N); an entry whose weights are all 0
            is sampled as if they were equal.
        perturb: random instead of equally spaced quantiles.
        generator: where the draws come from; None is torch's default generator.

    Returns:
        Descending, shape (B, N + n_fine), without gradient.

    Raises:
        ValueError: shapes that differ, or fewer than two planes.
    """
    if disparity.shape != weights.shape or disparity.dim() != 2 or disparity.shape[1] < 2:
        raise ValueError(
            f"disparity and weights: expected the same shape (B, N) with N >= 2, got {tuple(disparity.shape)} and {tuple(weights.shape)}"
        )
    batch, n_planes = disparity.shape
    edges = torch.cat((disparity[:, :1], 0.5 * (disparity[:, 1:] + disparity[:, :-1]), disparity[:, -1:]), dim=1)
    weights = weights.to(disparity.dtype)
    empty = weights.sum(dim=1, keepdim=True) <= 0
    upper = torch.where(empty, torch.ones_like(weights), weights).cumsum(dim=1)
    upper = upper / upper[:, -1:]
    shape = (batch, n_fine)
    if perturb:
        offset = torch.rand(shape, generator=generator, device=disparity.device, dtype=disparity.dtype)
    else:
        offset = disparity.new_full(shape, 0.5)
    u = (torch.arange(n_fine, device=disparity.device, dtype=disparity.dtype) + offset) / n_fine
    index = torch.searchsorted(upper, u, right=True).clamp_(max=n_planes - 1)
    end = upper.gather(1, index)
    start = torch.where(index > 0, upper.gather(1, (index - 1).clamp_min(0)), torch.zeros_like(u))
    # an interval that is drawn has weight; only rounding of the last quantile can reach one that has none
    share = ((u - start) / (end - start).clamp_min(torch.finfo(u.dtype).tiny)).clamp(0, 1)
    fine = torch.lerp(edges.gather(1, index), edges.gather(1, index + 1), share)
    return torch.cat((disparity, fine), dim=1).sort(dim=1, descending=True).values


def _within_intervals(share: Tensor, near: float, far: float) -> Tensor:
    n_planes = share.shape[1]
    interval = torch.arange(n_planes, device=share.device, dtype=share.dtype)
    return near + (far - near) / n_planes * (interval + share)


def _check_range(n_planes: int, near: float, far: float) -> None:
    if n_planes < 1:
        raise ValueError(f"n_planes={n_planes}: expected at least 1")
    if not math.inf > near > far > 0:
        raise ValueError(f"near={near}, far={far}: expected disparities with near > far > 0")
