import math

import pytest
import torch

from co3d_ensemble.functional.metrics import (
    METRIC_NAMES,
    challenge_metrics,
    depth_abs_fg,
    iou,
    optimal_l1_scale,
    psnr_fg,
    psnr_full_image,
    psnr_masked,
    ssim,
)


def random_frame(seed, height=18, width=23, dtype=torch.float64):
    """Prediction and ground truth of one frame, with unknown and non-finite depth in the ground truth."""
    g = torch.Generator().manual_seed(seed)
    uniform = lambda c: torch.rand(c, height, width, generator=g, dtype=torch.float64)
    gt_depth = 3 + uniform(1)
    gt_depth[uniform(1) < 0.2] = 0
    gt_depth[uniform(1) < 0.05] = float("inf")
    frame = {
        "rgb": uniform(3),
        "mask": uniform(1),
        "depth": 2 * uniform(1),
        "gt_rgb": uniform(3),
        "gt_mask": uniform(1),
        "gt_depth": gt_depth,
        "gt_depth_mask": (uniform(1) > 0.3).double(),
    }
    return {k: v.to(dtype) for k, v in frame.items()}


def test_psnr_of_a_constant_error_is_its_closed_form_in_each_region():
    mask = torch.zeros(1, 4, 6, dtype=torch.float64)
    mask[:, :, :3] = 1
    gt = torch.full((3, 4, 6), 0.6, dtype=torch.float64)
    rgb = mask.expand(3, -1, -1) * 0.5  # error 0.1 inside; outside 0 against black and 0.6 against the photograph
    assert psnr_fg(rgb, gt, mask).item() == pytest.approx(20, abs=1e-12)
    assert psnr_masked(rgb, gt, mask).item() == pytest.approx(-10 * math.log10(0.01 / 2), abs=1e-12)
    assert psnr_full_image(rgb, gt).item() == pytest.approx(-10 * math.log10((0.01 + 0.36) / 2), abs=1e-12)


def test_a_perfect_picture_scores_100_dB():
    frame = random_frame(0)
    assert psnr_full_image(frame["gt_rgb"], frame["gt_rgb"]).item() == pytest.approx(100, abs=1e-12)


def test_psnr_fg_of_an_empty_mask_is_100_dB():
    gt = torch.rand(3, 5, 5)
    assert psnr_fg(torch.zeros_like(gt), gt, torch.zeros(1, 5, 5)).item() == pytest.approx(100, abs=1e-12)


def test_a_ground_truth_mask_of_exactly_one_half_is_background_but_a_prediction_of_one_half_is_foreground():
    half, one = torch.full((1, 2, 2), 0.5), torch.ones(1, 2, 2)
    assert iou(one, half).item() == 0
    assert iou(half, one).item() == pytest.approx(4 / 4.0001, abs=1e-12)


def test_iou_counts_pixels():
    mask, gt = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    mask[:, :2], gt[:, 1:3] = 0.9, 0.8
    assert iou(mask, gt).item() == pytest.approx(4 / (12 + 1e-4), abs=1e-12)
    assert iou(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)).item() == 0


def test_depth_error_ignores_the_predictions_unit():
    gt = torch.rand(1, 14, 15, dtype=torch.float64) + 2
    ones = torch.ones_like(gt)
    assert depth_abs_fg(gt * 37, gt, ones).item() == pytest.approx(0, abs=1e-12)
    frame = random_frame(3)
    args = frame["gt_depth"], frame["gt_mask"], frame["gt_depth_mask"]
    assert depth_abs_fg(frame["depth"], *args).item() == pytest.approx(depth_abs_fg(0.25 * frame["depth"], *args).item(), rel=1e-12)


def test_the_scale_minimises_the_absolute_error_over_all_candidate_ratios():
    g = torch.Generator().manual_seed(1)
    predicted, truth = torch.rand(31, generator=g, dtype=torch.float64), torch.rand(31, generator=g, dtype=torch.float64)
    best = min(sum(abs(t - s * p) for p, t in zip(predicted.tolist(), truth.tolist())) for s in (truth / predicted).tolist())
    s = optimal_l1_scale(predicted, truth)
    assert (truth - s * predicted).abs().sum().item() == pytest.approx(best, rel=1e-12)


def test_the_scale_is_1_without_predicted_depth_and_clipped_for_a_tiny_one():
    truth = torch.tensor([1.0, 2.0])
    assert optimal_l1_scale(torch.zeros(2), truth).item() == 1
    assert optimal_l1_scale(torch.empty(0), torch.empty(0)).item() == 1
    assert optimal_l1_scale(torch.full((2,), 1e-7), truth).item() == pytest.approx(1e4)


def test_depth_counts_only_known_foreground_pixels_off_the_border():
    shape = (1, 13, 13)  # the 5-pixel crop leaves 3 x 3
    gt, mask, depth_mask = torch.full(shape, 2.0), torch.ones(shape), torch.ones(shape)
    depth = torch.ones(shape)
    clean = depth_abs_fg(depth, gt, mask, depth_mask).item()
    assert clean == 0
    gt[0, 4, 6] = 50.0  # border
    gt[0, 5, 5], mask[0, 5, 5] = 50.0, 0.5  # background
    gt[0, 6, 6], depth_mask[0, 6, 6] = 50.0, 0.0  # invalid
    gt[0, 7, 7] = float("nan")  # unknown
    depth[0, 7, 6], gt[0, 7, 6] = 3.0, 0.0  # unknown
    assert depth_abs_fg(depth, gt, mask, depth_mask).item() == 0
    gt[0, 5, 6] = 3.0  # one of five counted pixels is off by 1 at the best scale, 2
    assert depth_abs_fg(depth, gt, mask, depth_mask).item() == pytest.approx(1 / 5, abs=1e-12)


def test_depth_error_of_a_picture_smaller_than_the_crop_or_without_foreground_is_0():
    small = torch.ones(1, 10, 30)
    assert depth_abs_fg(small, small * 3, small).item() == 0
    frame = random_frame(4)
    assert depth_abs_fg(frame["depth"], frame["gt_depth"], torch.zeros_like(frame["gt_mask"])).item() == 0


def test_depth_without_a_prediction_scores_the_mean_depth():
    gt = torch.full((1, 12, 12), 4.0)
    assert depth_abs_fg(torch.zeros_like(gt), gt, torch.ones_like(gt)).item() == 4


def test_depth_ground_truth_is_left_as_it_was():
    frame = random_frame(5)
    before = frame["gt_depth"].clone()
    depth_abs_fg(frame["depth"], frame["gt_depth"], frame["gt_mask"], frame["gt_depth_mask"])
    assert torch.equal(frame["gt_depth"], before)


@pytest.mark.parametrize("name", ["rgb", "mask", "depth"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("with_depth", [True, False])
def test_a_non_finite_prediction_is_refused_by_name(name, value, with_depth):
    frame = random_frame(6)
    frame[name][0, 0, 0] = value
    if not with_depth:
        frame["gt_depth"] = None
    with pytest.raises(ValueError, match=f"^{name}: 1 non-finite"):
        challenge_metrics(**frame)


@pytest.mark.parametrize("name", ["rgb", "mask", "depth", "gt_mask", "gt_depth_mask"])
def test_a_wrong_size_is_refused_rather_than_broadcast(name):
    frame = random_frame(6)
    frame[name] = frame[name][:, :1]
    with pytest.raises(ValueError, match="expected shape"):
        challenge_metrics(**frame)


def test_no_ground_truth_depth_gives_none_for_depth_alone():
    frame = random_frame(7)
    with_depth = challenge_metrics(**frame)
    frame["gt_depth"] = None
    without = challenge_metrics(**frame)
    assert without == {**with_depth, "depth_abs_fg": None}
    assert tuple(without) == METRIC_NAMES


def test_float32_inputs_give_the_float64_result():
    frame = random_frame(8, dtype=torch.float32)
    wide = {k: v.double() for k, v in frame.items()}
    assert challenge_metrics(**frame) == pytest.approx(challenge_metrics(**wide), abs=1e-7)  # differences of colours are float32


def naive_ssim(x, y):
    """SSIM as nested loops over channels and windows."""
    weights = [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)]
    total = sum(map(sum, weights))
    values = []
    for c in range(x.shape[0]):
        for top in range(x.shape[1] - 10):
            for left in range(x.shape[2] - 10):
                mx = my = xx = yy = xy = 0.0
                for i in range(11):
                    for j in range(11):
                        w = weights[i][j] / total
                        a, b = x[c][top + i][left + j].item(), y[c][top + i][left + j].item()
                        mx, my, xx, yy, xy = mx + w * a, my + w * b, xx + w * a * a, yy + w * b * b, xy + w * a * b
                numerator = (2 * mx * my + 1e-4) * (2 * (xy - mx * my) + 9e-4)
                values.append(numerator / ((mx * mx + my * my + 1e-4) * (xx - mx * mx + yy - my * my + 9e-4)))
    return sum(values) / len(values)


def test_ssim_matches_the_definition_written_as_loops():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.rand(2, 12, 13, generator=g, dtype=torch.float64) for _ in range(2))
    assert ssim(x, y).item() == pytest.approx(naive_ssim(x, y), rel=1e-10)
    assert ssim(x, x).item() == pytest.approx(1, abs=1e-12)


def test_ssim_refuses_a_picture_smaller_than_its_window():
    with pytest.raises(ValueError, match="at least 11"):
        ssim(torch.rand(3, 10, 40), torch.rand(3, 10, 40))


DEGENERATE = {
    "ordinary": {},
    "empty ground-truth mask": {"gt_mask": 0.0},
    "full ground-truth mask": {"gt_mask": 1.0},
    "no ground-truth depth": {"gt_depth": 0.0},
    "no valid depth": {"gt_depth_mask": 0.0},
    "blank prediction": {"rgb": 0.0, "mask": 0.0, "depth": 0.0},
    "tiny predicted depth": {"depth": 1e-7},
    "negative predicted depth": {"depth": -1.0},
}


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("size", [(18, 23), (9, 40), (61, 47)])
def test_equals_the_challenges_own_evaluation_to_1e_6(case, dtype, size):
    metric_utils = pytest.importorskip("co3d.challenge.metric_utils", reason="the official co3d package is not installed")
    frame = random_frame(9, *size, dtype=dtype)
    for name, value in DEGENERATE[case].items():
        frame[name] = torch.full_like(frame[name], value)
    mine = challenge_metrics(**frame)
    array = {k: v.numpy().copy() for k, v in frame.items()}  # the official function writes into its arguments
    official = metric_utils.eval_one_rgbda(
        array["rgb"],
        array["depth"],
        array["mask"],
        array["gt_rgb"],
        array["gt_depth"],
        array["gt_mask"],
        gt_depth_mask=array["gt_depth_mask"],
    )
    assert mine == pytest.approx({k: float(v) for k, v in official.items()}, abs=1e-6, rel=1e-6)
    assert tuple(mine) == tuple(metric_utils.EVAL_METRIC_NAMES)


def scale_by_sorting_all(predicted, truth):
    pairs = sorted(zip((truth / predicted.clamp_min(1e-10)).tolist(), predicted.abs().tolist()))
    total, passed = math.fsum(weight for _, weight in pairs), 0.0
    for ratio, weight in pairs:
        passed += weight
        if 2 * passed > total:
            return min(max(ratio, -1e4), 1e4)
    return 1.0


@pytest.mark.parametrize("kind", ["spread", "ties", "mostly zero", "in order", "negative", "two values"])
def test_the_scale_of_many_pixels_is_that_of_sorting_them_all(kind):
    g = torch.Generator().manual_seed(len(kind))
    predicted, truth = 1 + torch.rand(30_000, generator=g, dtype=torch.float64), 2 + torch.rand(30_000, generator=g, dtype=torch.float64)
    if kind == "ties":
        predicted, truth = (4 * predicted).round() / 4, (4 * truth).round() / 4
    elif kind == "mostly zero":
        predicted[torch.rand(30_000, generator=g) < 0.999] = 0
    elif kind == "in order":
        predicted, truth = predicted.sort().values, truth.sort(descending=True).values
    elif kind == "negative":
        predicted[::3] *= -1
    elif kind == "two values":
        predicted, truth = torch.ones_like(predicted), torch.where(torch.arange(30_000) % 2 == 0, 1.0, 3.0).double()
    assert optimal_l1_scale(predicted, truth).item() == scale_by_sorting_all(predicted, truth)


def test_no_input_is_changed_whatever_its_type():
    for dtype in (torch.float32, torch.float64):
        frame = random_frame(9, dtype=dtype)
        before = {name: value.clone() for name, value in frame.items()}
        challenge_metrics(**frame)
        assert all(torch.equal(frame[name].nan_to_num(), before[name].nan_to_num()) for name in frame)


@pytest.mark.parametrize("name", ["gt_depth", "gt_depth_mask", "gt_mask"])
def test_ground_truth_depth_of_which_nothing_is_counted_is_none_and_not_perfect(name):
    frame = random_frame(9)
    frame[name] = torch.zeros_like(frame[name])
    assert challenge_metrics(**frame)["depth_abs_fg"] is None
    assert depth_abs_fg(frame["depth"], frame["gt_depth"], frame["gt_mask"], frame["gt_depth_mask"]) == 0  # the challenge's own value
