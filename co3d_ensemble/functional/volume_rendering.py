"""Volume rendering along rays, one function per step of the theory (Max 1995; Mildenhall et al. 2020, eq. 3 and 5).

Shapes: ``(..., n_samples)`` for per-sample scalars, ``(..., n_samples, c)`` for per-sample features. Lengths are
distances along unit directions in world units, densities are per world unit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def interval_lengths(lengths: Tensor) -> Tensor:
    """delta_i = t_{i+1} - t_i; the last interval is 0, so that the last sample carries no opacity.

    Implicitron's marcher lets the last sample reach to 1e10, which makes every ray opaque for a density that is never 0.
    """
    return torch.cat((lengths.diff(dim=-1), torch.zeros_like(lengths[..., :1])), dim=-1)


def opacity(density: Tensor, delta: Tensor) -> Tensor:
    """alpha_i = 1 - exp(-sigma_i delta_i), in [0, 1)."""
    return -torch.expm1(-density * delta)


def transmittance(density: Tensor, delta: Tensor) -> Tensor:
    """T_i = exp(-sum_{j < i} sigma_j delta_j): share of the light that reaches sample i from the camera, in (0, 1]."""
    optical_depth = density * delta
    return torch.exp(-(optical_depth.cumsum(dim=-1) - optical_depth))


def rendering_weights(density: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, per-sample opacities and the opacity of the ray.

    Args:
        density: sigma_i >= 0, shape (..., n_samples).
        delta: interval lengths, shape (..., n_samples).

    Returns:
        w_i = T_i alpha_i and alpha_i, both (..., n_samples); alpha = 1 - prod_i (1 - alpha_i), shape (...). The weights
        sum to alpha.
    """
    optical_depth = density * delta
    accumulated = optical_depth.cumsum(dim=-1)
    alpha = -torch.expm1(-optical_depth)
    return torch.exp(optical_depth - accumulated) * alpha, alpha, -torch.expm1(-accumulated[..., -1])


def composite(weights: Tensor, features: Tensor) -> Tensor:
    """sum_i w_i f_i: (..., n_samples) and (..., n_samples, c) to (..., c), premultiplied by the ray's opacity."""
    return (weights[..., None, :] @ features)[..., 0, :]


def expected_distance(weights: Tensor, lengths: Tensor) -> Tensor:
    """sum_i w_i t_i, Implicitron's (unnormalised) depth, shape (...)."""
    return (weights * lengths).sum(dim=-1)


def stratified_lengths(near: Tensor, far: Tensor, n_samples: int, *, perturb: bool) -> Tensor:
    """One sample in each of ``n_samples`` equal bins of [near, far].

    Args:
        near, far: shape (...).
        perturb: uniform in its bin (torch's default generator) instead of the bin's centre.

    Returns:
        Ascending lengths, shape (..., n_samples).
    """
    shape = (*near.shape, n_samples)
    offset = torch.rand(shape, dtype=near.dtype, device=near.device) if perturb else near.new_full(shape, 0.5)
    bins = torch.arange(n_samples, dtype=near.dtype, device=near.device)
    return near[..., None] + (far - near)[..., None] * (bins + offset) / n_samples


def importance_lengths(lengths: Tensor, weights: Tensor, n_samples: int, *, perturb: bool) -> Tensor:
    """Samples of the piecewise constant density that ``weights`` put around ``lengths`` (hierarchical sampling).

    Bin edges are the midpoints between neighbouring lengths, so the first and last weight do not count, as in NeRF. A
    ray whose weights are all 0 is sampled uniformly.

    Args:
        lengths: ascending, shape (..., n).
        weights: non-negative, shape (..., n); no gradient flows through them.
        n_samples: samples to draw.
        perturb: random (stratified in probability) instead of equally spaced quantiles.

    Returns:
        Ascending lengths, shape (..., n_samples).
    """
    with torch.no_grad():
        edges = 0.5 * (lengths[..., 1:] + lengths[..., :-1])
        mass = weights[..., 1:-1]
        total = mass.sum(dim=-1, keepdim=True)
        empty = total <= 0
        mass = torch.where(empty, torch.ones_like(mass), mass)
        cdf = mass.cumsum(dim=-1)
        cdf = cdf / cdf[..., -1:]
        shape = (*lengths.shape[:-1], n_samples)
        offset = torch.rand(shape, dtype=lengths.dtype, device=lengths.device) if perturb else lengths.new_full(shape, 0.5)
        u = (torch.arange(n_samples, dtype=lengths.dtype, device=lengths.device) + offset) / n_samples
        index = torch.searchsorted(cdf, u, right=True).clamp_(max=mass.shape[-1] - 1)
        upper = cdf.gather(-1, index)
        lower = torch.where(index > 0, cdf.gather(-1, (index - 1).clamp_min(0)), torch.zeros_like(u))
        share = ((u - lower) / (upper - lower).clamp_min(torch.finfo(u.dtype).tiny)).clamp(0, 1)
        start, end = edges.gather(-1, index), edges.gather(-1, index + 1)
        return start + share * (end - start)
