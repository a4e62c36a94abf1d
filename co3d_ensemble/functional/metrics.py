"""The metrics of the CO3D challenge (Reizenstein et al., ICCV 2021; CO3Dv2 challenge, EvalAI 1819) and SSIM, on torch tensors.

Every function takes one frame, accumulates in float64 whatever the input's dtype, and returns a float64 scalar on the
input's device. Predictions must be finite, else ``ValueError``. Ground-truth masks are foreground probabilities and count
as foreground where they exceed 1/2. All values equal the challenge's own evaluation to 1e-6.
"""

from __future__ import annotations

import torch
from torch import Tensor

METRIC_NAMES = ("psnr_masked", "psnr_fg", "psnr_full_image", "depth_abs_fg", "iou")

# The challenge's own constants; any other value is another metric.
MSE_FLOOR = 1e-10  # a perfect picture scores 100 dB
MIN_FOREGROUND_VALUES = 1e-5  # psnr_fg of an empty mask is that of a perfect picture
FOREGROUND = 0.5
UNION_OFFSET = 1e-4
DEPTH_CROP = 5  # pixels cut from each border before depth is compared
MIN_DEPTH_PIXELS = 1e-4
MIN_PREDICTED_DEPTH = 1e-10
MAX_DEPTH_SCALE = 1e4

# SSIM as published (Wang et al., IEEE TIP 2004).
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03


def psnr_masked(rgb: Tensor, gt_rgb: Tensor, gt_mask: Tensor) -> Tensor:
    """PSNR in dB of the whole picture against the ground truth on black.

    Args:
        rgb: prediction on black in [0, 1], shape (3, H, W).
        gt_rgb: unmasked photograph in [0, 1], shape (3, H, W).
        gt_mask: foreground probability in [0, 1], shape (1, H, W).

    Returns:
        Scalar, at most 100.

    Raises:
        ValueError: for a non-finite prediction or shapes that differ.
    """
    _check_prediction("rgb", rgb, gt_rgb, channels=3)
    _check_ground_truth("gt_mask", gt_mask, rgb)
    return _psnr((rgb.double() - gt_rgb.double() * _foreground(gt_mask)).square().mean())


def psnr_fg(rgb: Tensor, gt_rgb: Tensor, gt_mask: Tensor) -> Tensor:
    """PSNR in dB over the values inside the ground-truth mask; 100 where the mask is empty.

    Args, Raises: as ``psnr_masked``.
    """
    _check_prediction("rgb", rgb, gt_rgb, channels=3)
    _check_ground_truth("gt_mask", gt_mask, rgb)
    inside = _foreground(gt_mask).expand(rgb.shape)
    squared = (rgb.double() - gt_rgb.double()).square() * inside
    return _psnr(squared.sum() / inside.sum().clamp_min(MIN_FOREGROUND_VALUES))


def psnr_full_image(rgb: Tensor, gt_rgb: Tensor) -> Tensor:
    """PSNR in dB of the whole picture against the unmasked photograph; shapes and errors as ``psnr_masked``."""
    _check_prediction("rgb", rgb, gt_rgb, channels=3)
    return _psnr((rgb.double() - gt_rgb.double()).square().mean())


def iou(mask: Tensor, gt_mask: Tensor) -> Tensor:
    """Intersection over (union + 1e-4) of the predicted mask (>= 1/2) and the ground truth (> 1/2); 0 when both are empty.

    Args:
        mask: predicted opacity in [0, 1], shape (1, H, W).
        gt_mask: foreground probability in [0, 1], shape (1, H, W).

    Returns:
        Scalar in [0, 1).
    """
    _check_prediction("mask", mask, gt_mask, channels=1)
    predicted, truth = mask >= FOREGROUND, gt_mask > FOREGROUND
    return (predicted & truth).sum().double() / ((predicted | truth).sum().double() + UNION_OFFSET)


def depth_abs_fg(depth: Tensor, gt_depth: Tensor, gt_mask: Tensor, gt_depth_mask: Tensor | None = None) -> Tensor:
    """Mean ``|gt - s depth|`` over the foreground, with the scale s per frame that minimises it.

    Counted are the pixels at least 5 from the border with ground-truth depth above 0 (non-finite counts as unknown)
    inside the mask and the depth mask; 0 when there is none. The predicted mask plays no part.

    Args:
        depth: predicted z, any unit, shape (1, H, W).
        gt_depth: z in the unit of the result, 0 = unknown, shape (1, H, W).
        gt_mask: foreground probability in [0, 1], shape (1, H, W).
        gt_depth_mask: 0/1 validity of ``gt_depth``, shape (1, H, W).

    Returns:
        Scalar >= 0 in the unit of ``gt_depth``.
    """
    _check_prediction("depth", depth, gt_depth, channels=1)
    _check_ground_truth("gt_mask", gt_mask, depth)
    truth = torch.where(torch.isfinite(gt_depth), gt_depth, 0.0).double()
    if gt_depth_mask is not None:
        _check_ground_truth("gt_depth_mask", gt_depth_mask, depth)
        truth = truth * gt_depth_mask.double()
    inner = (slice(None), slice(DEPTH_CROP, -DEPTH_CROP), slice(DEPTH_CROP, -DEPTH_CROP))
    truth, predicted = (truth * _foreground(gt_mask))[inner], depth.double()[inner]
    counted = truth > 0
    truth, predicted = truth[counted], predicted[counted]
    error = (truth - optimal_l1_scale(predicted, truth) * predicted).abs().sum()
    return error / max(truth.numel(), MIN_DEPTH_PIXELS)


def optimal_l1_scale(predicted: Tensor, truth: Tensor) -> Tensor:
    """The s that minimises ``sum |truth - s predicted|``: the median of ``truth / predicted`` weighted by ``|predicted|``.

    As in the challenge, predictions below 1e-10 (so all negative ones) are raised to it in the ratios only, s is clipped
    to +-1e4, and s = 1 where every prediction is 0 or there is none.

    Args:
        predicted, truth: shape (n,), of counted pixels only. (The challenge sorts all pixels; the others have weight 0,
            so they cannot hold the median.)

    Returns:
        Scalar of the inputs' dtype.
    """
    ratios, order = torch.sort(truth / predicted.clamp_min(MIN_PREDICTED_DEPTH))
    weights = predicted.abs()[order]
    beyond_half = 2 * weights.cumsum(0) - weights.sum() > 0
    if not beyond_half.any():
        return truth.new_ones(())
    return ratios[beyond_half.byte().argmax()].clamp(-MAX_DEPTH_SCALE, MAX_DEPTH_SCALE)


def ssim(rgb: Tensor, gt_rgb: Tensor) -> Tensor:
    """Structural similarity: Gaussian window of 11 x 11 pixels with sigma 1.5, values in [0, 1] (Wang et al. 2004, eq. 13).

    Only windows that lie inside the picture count (no padding); the mean is over those and the channels.

    Args:
        rgb, gt_rgb: shape (C, H, W), both sides at least 11.

    Returns:
        Scalar in [-1, 1].
    """
    _check_prediction("rgb", rgb, gt_rgb, channels=rgb.shape[0])
    if min(rgb.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"ssim needs at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got shape {tuple(rgb.shape)}")
    x, y = rgb.double(), gt_rgb.double()
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    var_x = _window_mean(x * x) - mean_x.square()
    var_y = _window_mean(y * y) - mean_y.square()
    cov = _window_mean(x * y) - mean_x * mean_y
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))
    return similarity.mean()


def challenge_metrics(
    rgb: Tensor,
    mask: Tensor,
    depth: Tensor,
    gt_rgb: Tensor,
    gt_mask: Tensor,
    gt_depth: Tensor | None,
    gt_depth_mask: Tensor | None = None,
) -> dict[str, float | None]:
    """All metrics of the challenge for one frame.

    Args:
        rgb, mask, depth: as in ``RenderedView``.
        gt_rgb: unmasked photograph in [0, 1], shape (3, H, W).
        gt_mask: foreground probability in [0, 1], shape (1, H, W).
        gt_depth: z, 0 = unknown, shape (1, H, W); None = no ground truth.
        gt_depth_mask: 0/1 validity of ``gt_depth``, shape (1, H, W); None = valid wherever it is above 0.

    Returns:
        A float per name of ``METRIC_NAMES``; ``depth_abs_fg`` is None without ``gt_depth``.

    Raises:
        ValueError: for a non-finite prediction (the depth too, even without ground truth) or shapes that differ.
    """
    _check_prediction("depth", depth, gt_mask, channels=1)
    return {
        "psnr_masked": psnr_masked(rgb, gt_rgb, gt_mask).item(),
        "psnr_fg": psnr_fg(rgb, gt_rgb, gt_mask).item(),
        "psnr_full_image": psnr_full_image(rgb, gt_rgb).item(),
        "depth_abs_fg": None if gt_depth is None else depth_abs_fg(depth, gt_depth, gt_mask, gt_depth_mask).item(),
        "iou": iou(mask, gt_mask).item(),
    }


def _psnr(mse: Tensor) -> Tensor:
    return -10.0 * torch.log10(mse.clamp_min(MSE_FLOOR))


def _foreground(gt_mask: Tensor) -> Tensor:
    return (gt_mask > FOREGROUND).double()


def _window_mean(x: Tensor) -> Tensor:
    """Gaussian mean of every full window of x, shape (C, H, W)."""
    offset = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    kernel = torch.exp(-offset.square() / (2 * SSIM_SIGMA**2))
    kernel = (kernel / kernel.sum()).tolist()
    for axis in (-2, -1):  # a sum of shifted pictures: conv2d takes several times as long in float64
        size = x.shape[axis] - SSIM_WINDOW + 1
        total = torch.zeros_like(x.narrow(axis, 0, size))
        for i, weight in enumerate(kernel):
            total.add_(x.narrow(axis, i, size), alpha=weight)
        x = total
    return x


def _check_prediction(name: str, predicted: Tensor, truth: Tensor, *, channels: int) -> None:
    if predicted.shape != truth.shape or predicted.ndim != 3 or predicted.shape[0] != channels:
        raise ValueError(
            f"{name}: expected shape ({channels}, H, W) like the ground truth's {tuple(truth.shape)}, got {tuple(predicted.shape)}"
        )
    if not torch.isfinite(predicted).all():
        raise ValueError(f"{name}: {int((~torch.isfinite(predicted)).sum())} non-finite values in the prediction")


def _check_ground_truth(name: str, truth: Tensor, predicted: Tensor) -> None:
    if truth.shape != (1, *predicted.shape[1:]):
        raise ValueError(f"{name}: expected shape {(1, *predicted.shape[1:])}, got {tuple(truth.shape)}")
