"""The metrics of the CO3D challenge (Reizenstein et al., ICCV 2021; CO3Dv2 challenge, EvalAI 1819) and SSIM, on torch tensors.

Every function takes one frame, accumulates in float64 whatever the input's dtype (colours are subtracted in their own, which moves a
PSNR by less than 1e-7 dB in float32), and returns a float64 scalar on the input's device. Predictions must be finite, else
``ValueError``. Ground-truth masks are foreground probabilities and count as foreground where they exceed 1/2. All values equal the
challenge's own evaluation to 1e-6.
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

_SAMPLE, _MARGIN = 1024, 0.06  # pixels that bound the median of all: 4 standard deviations of a sample's median are 0.0625

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
    return _psnrs(rgb, gt_rgb, gt_mask)["psnr_masked"]


def psnr_fg(rgb: Tensor, gt_rgb: Tensor, gt_mask: Tensor) -> Tensor:
    """PSNR in dB over the values inside the ground-truth mask; 100 where the mask is empty.

    Args, Raises: as ``psnr_masked``.
    """
    _check_prediction("rgb", rgb, gt_rgb, channels=3)
    _check_ground_truth("gt_mask", gt_mask, rgb)
    return _psnrs(rgb, gt_rgb, gt_mask)["psnr_fg"]


def psnr_full_image(rgb: Tensor, gt_rgb: Tensor) -> Tensor:
    """PSNR in dB of the whole picture against the unmasked photograph; shapes and errors as ``psnr_masked``."""
    _check_prediction("rgb", rgb, gt_rgb, channels=3)
    return _psnr(_squared(rgb, gt_rgb).sum() / rgb.numel())


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
    return _depth_error(depth, gt_depth, gt_mask, gt_depth_mask)[0]


def _depth_error(depth: Tensor, gt_depth: Tensor, gt_mask: Tensor, gt_depth_mask: Tensor | None) -> tuple[Tensor, int]:
    """``depth_abs_fg`` and the number of pixels that it counts."""
    _check_prediction("depth", depth, gt_depth, channels=1)
    _check_ground_truth("gt_mask", gt_mask, depth)
    if gt_depth_mask is not None:
        _check_ground_truth("gt_depth_mask", gt_depth_mask, depth)
    counted = _counted_depth(gt_depth, gt_mask, gt_depth_mask)
    predicted, truth = (plane[_INNER].masked_select(counted).double() for plane in (depth, gt_depth))
    if gt_depth_mask is not None:
        truth = truth * gt_depth_mask[_INNER].masked_select(counted)
    error = (truth - optimal_l1_scale(predicted, truth) * predicted).abs().sum()
    return error / max(truth.numel(), MIN_DEPTH_PIXELS), truth.numel()


_INNER = (slice(None), slice(DEPTH_CROP, -DEPTH_CROP), slice(DEPTH_CROP, -DEPTH_CROP))


def _counted_depth(gt_depth: Tensor, gt_mask: Tensor, gt_depth_mask: Tensor | None) -> Tensor:
    """Which pixels off the border have ground-truth depth that is compared, bool."""
    gt_depth, gt_mask = gt_depth[_INNER], gt_mask[_INNER]
    counted = (gt_depth > 0) & (gt_depth < torch.inf) & (gt_mask > FOREGROUND)
    return counted if gt_depth_mask is None else counted & (gt_depth_mask[_INNER] > 0)


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
    ratios, weights = truth / predicted.clamp_min(MIN_PREDICTED_DEPTH), predicted.abs()
    total, below = weights.sum(), weights.new_zeros(())
    if len(ratios) > 16 * _SAMPLE:
        ratios, weights, below = _near_median(ratios, weights, total)
    ratios, order = torch.sort(ratios)
    beyond_half = 2 * (below + weights[order].cumsum(0)) - total > 0
    if not beyond_half.any():
        return truth.new_ones(())
    return ratios[beyond_half.byte().argmax()].clamp(-MAX_DEPTH_SCALE, MAX_DEPTH_SCALE)


def _near_median(ratios: Tensor, weights: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ratios among which the weighted median must be, their weights, and the weight of all below them: a tenth of the pixels has
    to be sorted instead of all. Everything where the bounds, from an evenly spread sample, turn out not to hold it.
    """
    step = len(ratios) // _SAMPLE
    sample, order = torch.sort(ratios[::step])
    shares = weights[::step][order].cumsum(0)
    first, last = (int((shares < share * shares[-1]).sum()) for share in (0.5 - _MARGIN, 0.5 + _MARGIN))
    low, high = sample[min(first, len(sample) - 1)], sample[min(last, len(sample) - 1)]
    below, near = torch.where(ratios < low, weights, 0).sum(), (ratios >= low) & (ratios <= high)
    kept = weights.masked_select(near)
    if not bool((2 * below <= total) & (2 * (below + kept.sum()) > total)):
        return ratios, weights, weights.new_zeros(())
    return ratios.masked_select(near), kept, below


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
        A float per name of ``METRIC_NAMES``; ``depth_abs_fg`` is None without ``gt_depth``, and where none of it is counted, for which
        the challenge's evaluation has 0, the score of a perfect depth.

    Raises:
        ValueError: for a non-finite prediction (the depth too, even without ground truth) or shapes that differ.
    """
    _check_prediction("depth", depth, gt_mask, channels=1)
    _check_prediction("rgb", rgb, gt_rgb, channels=3)
    _check_ground_truth("gt_mask", gt_mask, rgb)
    depth_error = None
    if gt_depth is not None:
        error, n_counted = _depth_error(depth, gt_depth, gt_mask, gt_depth_mask)
        depth_error = error.item() if n_counted else None
    return {
        **{name: value.item() for name, value in _psnrs(rgb, gt_rgb, gt_mask).items()},
        "depth_abs_fg": depth_error,
        "iou": iou(mask, gt_mask).item(),
    }


def _psnrs(rgb: Tensor, gt_rgb: Tensor, gt_mask: Tensor) -> dict[str, Tensor]:
    """The three PSNRs from one pass over the pictures."""
    inside = (gt_mask > FOREGROUND)[0]
    error = _squared(rgb, gt_rgb)
    error_inside = torch.where(inside, error, 0).sum()
    against_black = torch.where(inside, 0, _squared(rgb)).sum()
    n_inside = 3 * inside.sum()
    return {
        "psnr_masked": _psnr((error_inside + against_black) / rgb.numel()),
        "psnr_fg": _psnr(error_inside / n_inside.double().clamp_min(MIN_FOREGROUND_VALUES)),
        "psnr_full_image": _psnr(error.sum() / rgb.numel()),
    }


def _squared(rgb: Tensor, gt_rgb: Tensor | None = None) -> Tensor:
    """Squared difference (from black without ``gt_rgb``) per pixel, summed over the channels, float64, shape (H, W)."""
    total = rgb.new_zeros(rgb.shape[1:], dtype=torch.float64)
    difference = torch.empty_like(total)  # one channel at a time, in the same memory: new memory costs more than the arithmetic
    for i, channel in enumerate(rgb):
        difference.copy_(channel if gt_rgb is None else channel - gt_rgb[i])  # sub_ of mixed types takes four times as long
        total.addcmul_(difference, difference)
    return total


def _psnr(mse: Tensor) -> Tensor:
    return -10.0 * torch.log10(mse.clamp_min(MSE_FLOOR))


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
    if predicted.numel() and not torch.isfinite(torch.stack(torch.aminmax(predicted))).all():  # NaN is the least and the largest of all
        raise ValueError(f"{name}: {int((~torch.isfinite(predicted)).sum())} non-finite values in the prediction")


def _check_ground_truth(name: str, truth: Tensor, predicted: Tensor) -> None:
    if truth.shape != (1, *predicted.shape[1:]):
        raise ValueError(f"{name}: expected shape {(1, *predicted.shape[1:])}, got {tuple(truth.shape)}")
