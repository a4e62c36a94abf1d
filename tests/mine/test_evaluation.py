"""Scores of stacks whose views are known."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from co3d_ensemble.functional.metrics import ssim
from co3d_ensemble.mine.evaluation import (
    DEPTH_METRICS,
    VIEW_METRICS,
    PlaneSampling,
    Scoring,
    evaluate,
    score_depth,
    score_source,
    score_view,
    summarise,
)
from co3d_ensemble.mine.inference import render_pose
from co3d_ensemble.mine.pairs import Pair
from co3d_ensemble.mine.protocols import OTHERS, RULES, SourceTask
from co3d_ensemble.mine.trajectories import Pose
from tests.mine.stacks import camera, opaque_stack, smooth_picture

PLAIN = Scoring(OTHERS, lpips=None, no_lpips="no weights here")
DISPARITIES = (1.0, 0.5, 0.25)


def pair_of(stack, *, pixels=3.0, unit=1.0, noise=0.0):
    """What a camera sees that moves the stack's opaque plane by ``pixels``; translation and points in ``unit`` of the stack's."""
    t = torch.tensor([pixels / (stack.K[0, 0].item() * 0.5), 0.0, 0.0])
    target = render_pose(stack, Pose(torch.eye(3), t)).rgb[0]
    height, width = stack.size
    points = torch.tensor([[x + 0.5, y + 0.5, 2.0 * unit] for x in range(0, width, 5) for y in range(0, height, 5)] + [[0.0, 0.0, 0.0]])
    return Pair(
        "scene/0->1", stack.view.rgb[0], target + noise, stack.K, stack.K, torch.eye(3), t * unit, source_points=points, source_depth=None
    )


class KnownNetwork(torch.nn.Module):
    """Puts an opaque surface on the plane nearest to disparity 0.5, whatever the planes are."""

    mode = "sigma"

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.encoded = 0

    def encode(self, image):
        self.encoded += 1
        return image

    def decode(self, features, disparity, *, plane_chunk=None, n_scales=None):
        rgb = torch.zeros(*disparity.shape, *features.shape[1:])
        sigma = torch.zeros(*disparity.shape, 1, *features.shape[2:])
        sigma[:, (disparity[0] - 0.5).abs().argmin()] = 1e6
        return [(rgb, sigma)]


def task_of(pair, **changes):
    return SourceTask(pair.name, pair.source, pair.K_source, (("pairs", pair),), pair.source_points, **changes)


# Views


def test_the_true_view_scores_as_a_perfect_one():
    stack = opaque_stack()
    record = score_view(stack, pair_of(stack), scoring=PLAIN)
    assert record["psnr"] == record["psnr_valid"] == 100 and record["ssim"] == pytest.approx(1)
    assert record["valid_share"] == pytest.approx((32 - 4.5) / 32, abs=0.06)  # at 0.25 and 0.5 the planes move by 1.5 and 3 pixels


def test_psnr_counts_all_pixels_and_psnr_valid_those_that_two_planes_cover():
    stack = opaque_stack()
    pair = pair_of(stack)
    seen = render_pose(stack, Pose(pair.R, pair.t)).valid[0].expand(3, -1, -1)
    wrong = replace(pair, target=torch.where(seen, pair.target, pair.target + 0.5))
    record = score_view(stack, wrong, scoring=PLAIN)
    assert record["psnr_valid"] == 100
    assert record["psnr"] == pytest.approx(-10 * math.log10(0.25 * (~seen).float().mean().item()))


def test_the_protocols_border_is_not_scored():
    stack = opaque_stack(40, 60)
    pair = pair_of(stack, pixels=0.0)
    target = pair.target.clone()
    target[:, :2], target[:, -2:], target[:, :, :3], target[:, :, -3:] = 0, 0, 0, 0  # 5% of 40 and of 60
    spoilt = replace(pair, target=target)
    assert score_view(stack, spoilt, scoring=replace(PLAIN, rules=RULES["kitti_raw"]))["psnr"] > 90
    assert score_view(stack, spoilt, scoring=PLAIN)["psnr"] < 30


def test_lpips_sees_pictures_in_minus_one_to_one_and_is_null_with_a_reason_without_a_network():
    stack, seen = opaque_stack(), {}

    def network(predicted, truth):
        seen.update(predicted=predicted, truth=truth)
        return torch.tensor([[[[0.25]]]])

    pair = pair_of(stack)
    record = score_view(stack, pair, scoring=replace(PLAIN, lpips=network, no_lpips=None))
    assert record["lpips"] == 0.25 and "lpips" not in record["reasons"]
    assert seen["truth"].shape == (1, 3, 24, 32) and torch.equal(seen["truth"][0], 2 * pair.target - 1)
    assert seen["predicted"].min() == -1  # the black that no plane covers
    record = score_view(stack, pair, scoring=PLAIN)
    assert record["lpips"] is None and record["reasons"]["lpips"] == "no weights here"


def test_ssim_is_the_published_one_and_null_where_its_window_does_not_fit():
    stack = opaque_stack()
    pair = pair_of(stack, noise=0.1)
    pair = replace(pair, target=pair.target.clamp(0, 1))
    predicted = render_pose(stack, Pose(pair.R, pair.t)).rgb[0].clamp(0, 1)
    assert score_view(stack, pair, scoring=PLAIN)["ssim"] == pytest.approx(ssim(predicted, pair.target).item())
    small = opaque_stack(10, 32)
    record = score_view(small, pair_of(small), scoring=PLAIN)
    assert record["ssim"] is None and "32 x 10 pixels are smaller than its window" in record["reasons"]["ssim"]


# Scale


@pytest.mark.parametrize("unit", [1.0, 7.0])
def test_a_scenes_own_unit_is_taken_out_by_its_sparse_points(unit):
    pair = pair_of(opaque_stack(), unit=unit)
    planes = PlaneSampling((3,), 1.125, 0.125)
    records = {
        scale: list(score_source(KnownNetwork(), task_of(pair), 0, planes=planes, scoring=replace(PLAIN, scale=scale)))[0]
        for scale in ("auto", "points", "none")
    }
    plane = min(planes.disparities(3, 0, "cpu").tolist(), key=lambda d: abs(d - 0.5))
    assert records["auto"]["scale"] == records["points"]["scale"] == pytest.approx(plane / (1 / (2 * unit)), rel=1e-4)
    assert records["none"]["scale"] == 1
    assert records["auto"]["psnr_valid"] > 60
    if unit != 1:
        assert records["none"]["psnr"] < records["auto"]["psnr"] - 5


def test_without_points_auto_takes_translations_as_they_are_and_says_so_and_points_is_an_error():
    pair = replace(pair_of(opaque_stack()), source_points=None)
    planes = PlaneSampling((3,), 1.0, 0.1)
    (record,) = score_source(KnownNetwork(), task_of(pair), 0, planes=planes, scoring=PLAIN)
    assert record["scale"] == 1 and record["reasons"]["scale"] == "no sparse points"
    assert "translations of 1 of 1 are not scaled" in summarise([record])["pairs"]["3"]["reasons"]["scale"]
    with pytest.raises(ValueError, match="scene/0->1 has no sparse points"):
        list(score_source(KnownNetwork(), task_of(pair), 0, planes=planes, scoring=replace(PLAIN, scale="points")))


# Depth


def depth_task(truth, mask=None):
    return SourceTask("room", smooth_picture(24, 32), camera(24, 32), depth=truth, depth_mask=mask)


def test_the_true_depth_scores_as_a_perfect_one_at_the_truths_size():
    for size in ((24, 32), (48, 64), (12, 16)):
        record = score_depth(opaque_stack(), depth_task(torch.full((1, *size), 2.0)), OTHERS)
        assert record["abs_rel"] == pytest.approx(0, abs=1e-4) and record["delta_1"] == 1 and record["scale"] == 1


def test_alignment_range_and_mask_are_the_protocols():
    truth = torch.full((1, 24, 32), 6.0)
    truth[:, :4] = 0.0  # unknown
    truth[:, 4:8] = 60.0  # beyond 10 m
    truth[:, 8:12] = 1.0  # masked
    mask = torch.ones_like(truth)
    mask[:, 8:12] = 0
    record = score_depth(opaque_stack(), depth_task(truth, mask), RULES["nyu_depth"])
    assert record["scale"] == pytest.approx(3, rel=1e-3) and record["abs_rel"] == pytest.approx(0, abs=1e-4)
    unaligned = score_depth(opaque_stack(), depth_task(truth, mask), replace(RULES["nyu_depth"], depth_alignment="none"))
    assert unaligned["abs_rel"] == pytest.approx(4 / 6, rel=1e-3)


def test_a_picture_without_known_depth_has_null_scores_with_a_reason():
    record = score_depth(opaque_stack(), depth_task(torch.zeros(1, 24, 32)), OTHERS)
    assert all(record[name] is None for name in DEPTH_METRICS) and set(record["reasons"]) == set(DEPTH_METRICS)


# All of it


def test_a_picture_is_encoded_once_for_all_planes_and_views():
    pair, network = pair_of(opaque_stack()), KnownNetwork()
    pairs = tuple((row, pair) for row in ("n=5", "n=10", "random"))
    task = SourceTask("scene/0", pair.source, pair.K_source, pairs, pair.source_points, torch.full((1, 24, 32), 2.0))
    records = list(score_source(network, task, 0, planes=PlaneSampling((4, 8), 1.0, 0.1), scoring=PLAIN))
    assert network.encoded == 1
    assert [(record["row"], record["planes"]) for record in records] == [
        (row, count) for count in (4, 8) for row in ("n=5", "n=10", "random", "depth")
    ]
    closest = {
        count: min(PlaneSampling((count,), 1.0, 0.1).disparities(count, 0, "cpu").tolist(), key=lambda d: abs(d - 0.5)) for count in (4, 8)
    }
    finer = list(score_source(network, task, 0, planes=PlaneSampling((4,), 1.0, 0.1, fine=9), scoring=PLAIN))
    assert finer[-1]["planes"] == 4 and finer[-1]["abs_rel"] < 0.3 * records[3]["abs_rel"]
    for record in records:
        if record["row"] == "depth":
            assert record["abs_rel"] == pytest.approx(abs(1 / closest[record["planes"]] - 2) / 2, rel=1e-3)


def test_drawn_planes_are_the_same_for_a_seed_and_a_picture_and_fixed_ones_always():
    drawn = PlaneSampling((8,), 1.0, 0.1, kind="stratified")
    first = drawn.disparities(8, 3, "cpu")
    torch.rand(5)
    assert torch.equal(drawn.disparities(8, 3, "cpu"), first)
    assert not torch.equal(drawn.disparities(8, 4, "cpu"), first)
    assert not torch.equal(replace(drawn, seed=1).disparities(8, 3, "cpu"), first)
    fixed = PlaneSampling((8,), 1.0, 0.1)
    assert torch.equal(fixed.disparities(8, 3, "cpu"), fixed.disparities(8, 4, "cpu"))


def test_means_are_over_what_has_a_value_and_say_so():
    view = dict.fromkeys(VIEW_METRICS, 1.0)
    records = [
        {"name": "a", "row": "n=5", "planes": 4, **view, "lpips": None, "reasons": {"lpips": "no weights"}},
        {
            "name": "b",
            "row": "n=5",
            "planes": 4,
            **view,
            "psnr": 4.0,
            "psnr_valid": None,
            "lpips": None,
            "reasons": {"psnr_valid": "none", "lpips": "no weights"},
        },
        {"name": "a", "row": "n=5", "planes": 8, **view, "reasons": {}},
    ]
    means = summarise(records)["n=5"]
    assert list(means) == ["4", "8"] and means["4"]["n"] == 2 and means["8"]["reasons"] == {}
    assert means["4"]["psnr"] == 2.5 and means["4"]["psnr_valid"] == 1.0
    assert means["4"]["reasons"] == {"lpips": "no weights", "psnr_valid": "mean over 1 of 2, the others have none"}


def test_known_records_are_not_computed_again_and_the_order_is_the_same():
    pair, network = pair_of(opaque_stack()), KnownNetwork()
    tasks = [task_of(replace(pair, name=f"scene/{number}")) for number in range(3)]
    how = {"planes": PlaneSampling((4,), 1.0, 0.1), "scoring": PLAIN}
    kept = {}
    whole = evaluate(network, tasks, [0, 1, 2], keep=kept.__setitem__, **how)
    assert network.encoded == 3 and [record["name"] for record in whole] == ["scene/0", "scene/1", "scene/2"] and sorted(kept) == [0, 1, 2]
    again = evaluate(network, tasks, [0, 1, 2], known={0: kept[0], 2: kept[2]}, **how)
    assert again == whole and network.encoded == 4


def test_a_score_that_is_no_number_leaves_its_mean_out_and_says_so():
    class Broken(KnownNetwork):
        def decode(self, features, disparity, **how):
            ((rgb, sigma),) = super().decode(features, disparity, **how)
            return [(rgb, sigma * torch.nan if len(kept) == 1 else sigma)]

    kept = []
    task = task_of(pair_of(opaque_stack()), depth=torch.full((1, 24, 32), 2.0))
    planes = PlaneSampling((2,), 1.0, 0.25)
    records = evaluate(Broken(), [task] * 3, [0, 1, 2], planes=planes, scoring=PLAIN, keep=lambda index, own: kept.append(own))
    assert [record["psnr"] is None for record in records[::2]] == [False, True, False]
    assert records[2]["reasons"]["psnr"] == records[3]["reasons"]["abs_rel"] == "not finite" and json.dumps(records, allow_nan=False)
    means = summarise(records)
    for row, metric in (("pairs", "psnr"), ("pairs", "psnr_valid"), ("depth", "abs_rel")):
        assert means[row]["2"][metric] is None and means[row]["2"]["reasons"][metric] == "1 of 3 not finite, such as scene/0->1"
    assert means["pairs"]["2"]["valid_share"] > 0
