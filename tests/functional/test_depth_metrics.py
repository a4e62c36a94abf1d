"""Depth metrics against their formulas written as loops."""

import math

import pytest
import torch

from co3d_ensemble.functional.depth_metrics import DEPTH_METRIC_NAMES, alignment_scale, depth_metrics


def depths(seed=0, shape=(5, 7)):
    return 0.5 + 3 * torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loops(predicted, truth):
    d, g = predicted.flatten().tolist(), truth.flatten().tolist()
    n = len(d)
    ratios = [max(a / b, b / a) for a, b in zip(d, g)]
    return {
        "abs_rel": sum(abs(a - b) / b for a, b in zip(d, g)) / n,
        "sq_rel": sum((a - b) ** 2 / b for a, b in zip(d, g)) / n,
        "rmse": math.sqrt(sum((a - b) ** 2 for a, b in zip(d, g)) / n),
        "rmse_log": math.sqrt(sum((math.log(a) - math.log(b)) ** 2 for a, b in zip(d, g)) / n),
        "log10": sum(abs(math.log10(a) - math.log10(b)) for a, b in zip(d, g)) / n,
        **{f"delta_{k}": sum(r < 1.25**k for r in ratios) / n for k in (1, 2, 3)},
    }


def test_every_metric_is_its_formula_written_as_a_loop():
    predicted, truth = depths(), depths(1)
    result = depth_metrics(predicted, truth, align="none")
    expected = loops(predicted, truth)
    assert tuple(expected) == DEPTH_METRIC_NAMES and set(result) == {*expected, "scale"}
    assert 0 < expected["delta_1"] < expected["delta_2"] < expected["delta_3"] < 1
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=1e-12), name


def test_a_ratio_that_equals_the_threshold_is_not_below_it():
    """delta < thr, not <=: the powers of 5/4 and their quotients have no rounding."""
    predicted, truth = torch.tensor([[1.0, 1.25, 1.5625, 1.0]]), torch.tensor([[1.25, 1.0, 1.0, 1.953125]])
    result = depth_metrics(predicted, truth, align="none")
    assert (result["delta_1"], result["delta_2"], result["delta_3"]) == (0, 0.5, 0.75)


@pytest.mark.parametrize(
    ("align", "factor"),
    [
        ("none", lambda d, g: 1.0),
        ("median", lambda d, g: g.quantile(0.5) / d.quantile(0.5)),
        ("scale", lambda d, g: (d * g).sum() / (d * d).sum()),
    ],
)
@pytest.mark.parametrize("shape", [(5, 7), (4, 6)])  # an odd and an even number of pixels
def test_predictions_are_multiplied_by_the_stated_factor(align, factor, shape):
    predicted, truth = depths(shape=shape), depths(1, shape)
    s = float(factor(predicted, truth))
    result = depth_metrics(predicted, truth, align=align)
    assert result["scale"] == pytest.approx(s)
    assert result["rmse"] == pytest.approx(loops(s * predicted, truth)["rmse"])


@pytest.mark.parametrize("align", ["median", "scale"])
def test_a_right_shape_in_another_unit_is_perfect_once_aligned(align):
    truth = depths()
    result = depth_metrics(17.0 * truth, truth, align=align)
    assert result["abs_rel"] == pytest.approx(0, abs=1e-12) and result["delta_1"] == 1 and result["scale"] == pytest.approx(1 / 17)


def test_the_least_squares_factor_is_the_best_one():
    predicted, truth = depths().flatten(), depths(1).flatten()
    s = alignment_scale(predicted, truth, "scale")
    error = [((f * s * predicted - truth) ** 2).sum() for f in (0.999, 1.0, 1.001)]
    assert error[1] < error[0] and error[1] < error[2]


def test_only_known_depths_in_range_inside_the_mask_count():
    predicted, truth = depths(), depths(1)
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(2)) > 0.3
    truth[0, 0], truth[0, 1], truth[0, 2] = 0.0, float("nan"), float("inf")
    predicted[0, 0] = -1.0  # nobody looks there
    counted = mask & torch.isfinite(truth) & (truth > 1.0) & (truth < 3.0)
    result = depth_metrics(predicted, truth, mask, align="none", min_depth=1.0, max_depth=3.0)
    assert 5 < counted.sum() < 30
    expected = loops(predicted[counted].clamp(1.0, 3.0), truth[counted])
    assert result["abs_rel"] == pytest.approx(expected["abs_rel"]) and result["rmse_log"] == pytest.approx(expected["rmse_log"])


def test_single_precision_depths_are_measured_in_double():
    predicted, truth = depths().float(), depths(1).float()
    assert depth_metrics(predicted, truth) == depth_metrics(predicted.double(), truth.double())


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_counted_prediction_that_is_no_depth_is_refused_with_its_value(bad):
    predicted = depths()
    predicted[2, 3] = bad
    with pytest.raises(ValueError, match=f"1 predicted depths.*{bad}"):
        depth_metrics(predicted, depths(1))


def test_nothing_to_count_unequal_shapes_and_unknown_alignments_are_refused():
    with pytest.raises(ValueError, match="no pixel"):
        depth_metrics(depths(), torch.zeros(5, 7))
    with pytest.raises(ValueError, match=r"\(5, 7\), \(5, 6\)"):
        depth_metrics(depths(), depths(shape=(5, 6)))
    with pytest.raises(ValueError, match="'mean'"):
        depth_metrics(depths(), depths(1), align="mean")
