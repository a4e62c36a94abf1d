"""MINE's losses as pure functions (Li et al., ICCV 2021, "Loss function"); unweighted scalars, weights are configuration.

Pictures are (B, 3, H, W) in [0, 1], disparities (B, 1, H, W) > 0. Where the slides and the mathematics differ, the function
says what it does and why.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from co3d_ensemble.functional.metrics import SSIM_K1, SSIM_K2, SSIM_SIGMA, SSIM_WINDOW

# The gradient-threshold smoothness as the reference configures it for RealEstate10K, the only data set that it has a weight for.
EDGE_RATIO = 0.1
MIN_GRADIENT = 2.0
INSTANCE_NORM_FLOOR = 1e-5  # the reference's; part of the loss's definition: below it flat disparity is not normalised


def l1_loss(rgb: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """``1 / (3 H W) sum |I - I*|``, mean over the batch.

    Args:
        mask: pixels that count, shape (B, 1, H, W), bool or float (the target view's ``valid``). The others have error 0 and
            stay in the denominator, as in the reference: a picture counts as much as it overlaps the source.
    """
    error = (rgb - target).abs()
    return (error if mask is None else error * mask).mean()


def ssim_loss(rgb: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """``1 - SSIM`` with the Gaussian window of 11 x 11 pixels, sigma 1.5 (Wang et al. 2004); differentiable.

    Windows are cut at the picture's border and renormalised, so every size works down to one pixel (scale 1/8 of a small
    picture is smaller than the window) and the border is not compared with black beyond it, as zero padding would have it.
    Away from the border this is ``metrics.ssim``, which counts whole windows only.

    Args:
        mask: as in :func:`l1_loss`; elsewhere the target stands in for the prediction, so that windows across the mask's edge
            compare what they can.
    """
    if mask is not None:
        rgb = torch.where(mask > 0, rgb, target)
    rgb, target = (picture.to(torch.promote_types(picture.dtype, torch.float32)) for picture in (rgb, target))
    share = _blurred(torch.ones_like(rgb[:1, :1]))

    def mean(x: Tensor) -> Tensor:
        return _blurred(x) / share

    mean_x, mean_y = mean(rgb), mean(target)
    var_x = mean(rgb * rgb) - mean_x.square()
    var_y = mean(target * target) - mean_y.square()
    cov = mean(rgb * target) - mean_x * mean_y
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))
    return 1 - similarity.mean()


def edge_aware_smoothness(disparity: Tensor, image: Tensor) -> Tensor:
    """Mean of ``|d_x D*| exp(-|d_x I|)`` plus mean of ``|d_y D*| exp(-|d_y I|)``, ``D* = D / mean D`` per picture.

    The slides' L_smooth, the reference's second form (its ``smoothness_lambda_v2``). What the slide leaves open is as in the
    reference: D* (the mean takes the unit out), derivatives as differences of neighbouring pixels, ``|d I|`` as the mean over the
    channels, means over the pixels of each axis, and one loss of the source view and one of the target's.

    Args:
        disparity: >= 0, shape (B, 1, H, W).
        image: the picture whose edges excuse edges of the disparity, shape (B, 3, H, W).
    """
    normalised = disparity / disparity.mean(dim=(2, 3), keepdim=True).clamp_min(torch.finfo(disparity.dtype).tiny)
    total = disparity.new_zeros(())
    for dim in (2, 3):
        if disparity.shape[dim] > 1:
            edge = image.diff(dim=dim).abs().mean(dim=1, keepdim=True)
            total = total + (normalised.diff(dim=dim).abs() * torch.exp(-edge)).mean()
    return total


def edge_threshold_smoothness(
    disparity: Tensor, image: Tensor, *, edge_ratio: float = EDGE_RATIO, min_gradient: float = MIN_GRADIENT
) -> Tensor:
    """The reference's first form (its ``smoothness_lambda_v1``), which is not on the slides.

    Sobel gradients (edge pixels repeated) of the picture, summed over the channels, relative to ``edge_ratio`` of the largest in
    the picture and cut at 1, say how much of an edge there is. Sobel gradients of the disparity, normalised to mean 0 and
    standard deviation 1 over the picture, cost what they exceed ``min_gradient`` by, times 1 - edge. Both axes are added.
    In a picture without any gradient nothing is an edge (the reference divides 0 by 0).

    Args:
        disparity: shape (B, 1, H, W).
        image: shape (B, 3, H, W).
        edge_ratio: share of the largest gradient from which on a pixel is an edge.
        min_gradient: normalised gradient that costs nothing.
    """
    loss = disparity.new_zeros(())
    for edges, gradient in zip(_sobel(image), _sobel(disparity)):
        strength = edges.abs().sum(dim=1, keepdim=True)
        threshold = edge_ratio * strength.amax(dim=(2, 3), keepdim=True)
        edge = torch.where(threshold > 0, strength / torch.where(threshold > 0, threshold, 1.0), 0.0).clamp_max(1)
        size = gradient.abs()
        variance, mean = torch.var_mean(size, dim=(2, 3), keepdim=True, correction=0)
        normalised = (size - mean) * torch.rsqrt(variance + INSTANCE_NORM_FLOOR)
        loss = loss + (F.relu(normalised - min_gradient) * (1 - edge)).mean()
    return loss


def values_at_points(values: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """A picture's values at the pixels that hold the points.

    The pixel itself, as in the reference: between two surfaces an interpolated disparity is that of neither.

    Args:
        values: shape (B, 1, H, W).
        points: (x, y, z), pixel position and z in this picture's camera; z <= 0 marks a point that there is not; shape (B, P, 3).

    Returns:
        Values (B, P), differentiable, and whether there is such a point inside the picture (B, P).
    """
    height, width = values.shape[-2:]
    x, y, z = points.unbind(dim=-1)
    there = (z > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    column = torch.where(there, x, torch.zeros_like(x)).long()
    row = torch.where(there, y, torch.zeros_like(y)).long()
    return values.flatten(1).gather(1, row * width + column), there


def disparity_scale(disparity: Tensor, points: Tensor) -> Tensor:
    """``s = exp(mean(ln D - ln(1 / z)))`` over the sparse points of each picture; 1 where there is none.

    Scenes reconstructed from pictures have no unit: s says by how much the predicted disparities exceed the points', so depths
    and baselines of the prediction are s times smaller, and camera translations are divided by s before the target view is
    rendered. The slide's formula averages ln Z - ln z, depth against depth, but then divides the *disparity* by s, which is off
    by s^2; with disparities on both sides D / s has the points' scale.

    Args:
        disparity: of the source view, shape (B, 1, H, W).
        points: as in :func:`values_at_points`. Points on pixels without disparity (0) do not count.

    Returns:
        Shape (B,). Differentiable; the reference detaches it for the translation.
    """
    error, there = _log_errors(disparity, points)
    return torch.exp(_mean_of(error, there))


def log_disparity_loss(disparity: Tensor, points: Tensor, scale: Tensor) -> Tensor:
    """``1 / |P| sum |ln(D / s) - ln(1 / z)|``, mean over the pictures that have points; 0, with gradient 0, without any.

    The slide forgets the absolute value: as written the source's sum is 0 by the choice of s. The slide's L_d is half of the
    source's and half of the target's; here they are two losses with a weight each, and 1 and 1 are the slide's ``lambda_d = 2``.

    Args:
        disparity: shape (B, 1, H, W).
        points: as in :func:`values_at_points`, of this view.
        scale: s of :func:`disparity_scale` on the source view, for both views, shape (B,).
    """
    error, there = _log_errors(disparity, points)
    mean = _mean_of((error - scale.log()[:, None]).abs(), there)
    return mean.sum() / there.any(dim=1).sum().clamp_min(1)


def _log_errors(disparity: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """ln D - ln(1 / z) at the points that count (else 0), and which do: both (B, P)."""
    value, there = values_at_points(disparity, points)
    there = there & (value > 0)
    one = torch.ones_like(value)
    z = points[..., 2].to(value.dtype)
    return torch.where(there, value, one).log() + torch.where(there, z, one).log(), there


def _mean_of(values: Tensor, there: Tensor) -> Tensor:
    return torch.where(there, values, torch.zeros_like(values)).sum(dim=1) / there.sum(dim=1).clamp_min(1)


def _blurred(x: Tensor) -> Tensor:
    """Gaussian of 11 x 11, zeros beyond the border: (B, C, H, W)."""
    offset = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    kernel = torch.exp(-offset.square() / (2 * SSIM_SIGMA**2))
    kernel = kernel / kernel.sum()
    flat = x.reshape(-1, 1, *x.shape[-2:])
    half = SSIM_WINDOW // 2
    with torch.autocast(x.device.type, enabled=False):  # variances are small differences of squares: not in bf16
        flat = F.conv2d(flat, kernel.view(1, 1, -1, 1), padding=(half, 0))
        return F.conv2d(flat, kernel.view(1, 1, 1, -1), padding=(0, half)).reshape(x.shape)


def _sobel(x: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical 3 x 3 Sobel responses (weights 1, 2, 1), edge pixels repeated: two of (B, C, H, W)."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    across = padded[..., :, 2:] - padded[..., :, :-2]
    down = padded[..., 2:, :] - padded[..., :-2, :]
    horizontal = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    return horizontal, down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
