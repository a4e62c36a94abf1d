"""Disagreement maps, rank correlation and AUSE against loops and hand-computed cases."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from co3d_ensemble.functional.fusion import fuse_views
from co3d_ensemble.functional.types import Frame, PinholeCamera, RenderedView
from co3d_ensemble.functional.uncertainty import (
    color_disagreement,
    depth_disagreement,
    rank_correlation,
    score_uncertainty,
    sparsification_error,
)


def pixel(rgb: float, z: float, alpha: float) -> RenderedView:
    return RenderedView(torch.full((3, 1, 1), rgb), torch.full((1, 1, 1), z), torch.full((1, 1, 1), alpha))


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_colour_disagreement_is_the_deviation_over_members():
    assert color_disagreement([pixel(0.2, 1, 1), pixel(0.6, 1, 1)]).item() == pytest.approx(0.2)
    red = RenderedView(torch.tensor([0.6, 0.0, 0.0]).view(3, 1, 1), torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    assert color_disagreement([red, pixel(0.0, 1, 1)]).item() == pytest.approx(0.3 / math.sqrt(3))  # one colour of three


def test_depth_disagreement_is_over_the_members_that_have_a_surface():
    deviation, count = depth_disagreement([pixel(0.5, 2.0, 0.9), pixel(0.5, 3.0, 0.1), pixel(0.0, 0.0, 0.0)])
    assert deviation.item() == pytest.approx(0.5) and count.item() == 2
    for others in ([], [pixel(0.0, 0.0, 0.0)], [pixel(0.0, 9.0, 1e-4)]):
        deviation, count = depth_disagreement([pixel(0.5, 2.0, 0.9), *others])
        assert deviation.item() == 0.0 and count.item() == 1
    deviation, count = depth_disagreement([pixel(0.0, 0.0, 0.0)] * 2)
    assert deviation.item() == 0.0 and count.item() == 0


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_identical_members_have_exactly_no_uncertainty(count):
    random = torch.Generator().manual_seed(0)
    mask = torch.rand(1, 6, 7, generator=random)
    view = RenderedView(torch.rand(3, 6, 7, generator=random) * mask, 3 + torch.rand(1, 6, 7, generator=random), mask)
    assert color_disagreement([view] * count).max() == 0
    assert depth_disagreement([view] * count)[0].max() == 0


def test_non_finite_views_are_refused():
    with pytest.raises(ValueError, match="member 1: its depth"):
        depth_disagreement([pixel(0.5, 2.0, 0.9), pixel(0.5, float("nan"), 0.9)])


def naive_rho(first: list[float], second: list[float]) -> float:
    """Pearson's correlation of mean ranks, by counting."""

    def ranks(values):
        return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]

    a, b = ranks(first), ranks(second)
    ma, mb = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - ma) * (y - mb) for x, y in zip(a, b))
    return covariance / math.sqrt(sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b))


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation_counts_ties_at_their_mean_rank(seed):
    random = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(0, 5, (30,), generator=random).double() for _ in range(2))
    assert rank_correlation(first, second).item() == pytest.approx(naive_rho(first.tolist(), second.tolist()))


def test_rank_correlation_sees_order_only():
    values = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert rank_correlation(values, values.exp() * 1e6).item() == pytest.approx(1.0)
    assert rank_correlation(values, -(values**3)).item() == pytest.approx(-1.0)


@pytest.mark.parametrize("values", [vector(), vector(1.0), vector(2.0, 2.0, 2.0)])
def test_rank_correlation_without_an_order_is_nan(values):
    assert rank_correlation(values, torch.arange(len(values)).double()).isnan()


def naive_ause(uncertainty: list[float], error: list[float]) -> float:
    """The mean over all orders that ties allow, each curve summed by itself."""

    def area(order):
        kept = [error[i] for i in order]
        return sum(sum(kept[k:]) / len(kept[k:]) for k in range(len(kept))) / len(kept)

    n = len(error)
    orders = [o for o in itertools.permutations(range(n)) if all(uncertainty[a] >= uncertainty[b] for a, b in itertools.pairwise(o))]
    oracle = area(sorted(range(n), key=lambda i: -error[i]))
    return (sum(map(area, orders)) / len(orders) - oracle) / (sum(error) / n)


@pytest.mark.parametrize(
    ("uncertainty", "error"),
    [
        ([3.0, 1.0, 2.0, 0.5], [0.3, 0.4, 0.0, 0.2]),
        ([1.0, 1.0, 2.0, 2.0, 0.0], [0.3, 0.9, 0.0, 0.2, 0.1]),
        ([1.0, 1.0, 1.0, 1.0], [0.3, 0.9, 0.0, 0.2]),
        ([1.0, 2.0, 3.0], [0.5, 0.5, 0.5]),
        ([7.0], [0.5]),
    ],
)
def test_ause_is_the_mean_over_the_orders_that_ties_allow(uncertainty, error):
    assert sparsification_error(vector(*uncertainty), vector(*error)).item() == pytest.approx(naive_ause(uncertainty, error), abs=1e-12)


def test_ause_is_0_for_the_oracle_and_largest_for_its_reverse():
    error = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    oracle, constant, reverse = (sparsification_error(u, error).item() for u in (error * 9, torch.ones(200).double(), -error))
    assert oracle == pytest.approx(0.0, abs=1e-12) and oracle < constant < reverse


def test_ause_does_not_depend_on_units():
    random = torch.Generator().manual_seed(0)
    uncertainty, error = torch.rand(2, 50, generator=random, dtype=torch.float64)
    assert sparsification_error(10 * uncertainty, 7 * error).item() == pytest.approx(sparsification_error(uncertainty, error).item())


def test_ause_without_error_is_0_and_without_pixels_nan():
    assert sparsification_error(vector(1.0, 2.0), vector(0.0, 0.0)).item() == 0.0
    assert sparsification_error(vector(), vector()).isnan()


@pytest.mark.parametrize(
    ("uncertainty", "error", "told"),
    [
        (vector(1.0), vector(1.0, 2.0), "one length"),
        (vector(float("nan"), 1.0), vector(1.0, 2.0), "non-finite"),
        (vector(1.0, 1.0), vector(-1.0, 2.0), "negative"),
    ],
)
def test_bad_input_is_refused(uncertainty, error, told):
    with pytest.raises(ValueError, match=told):
        sparsification_error(uncertainty, error)


def scored_frame(*, depth: torch.Tensor | None, size: int = 20) -> Frame:
    camera = PinholeCamera(torch.eye(3), torch.zeros(3), torch.ones(2), torch.ones(2), size, size)
    mask = torch.zeros(1, size, size, dtype=torch.uint8)
    mask[:, :, : size // 2] = 255
    rgb = torch.full((3, size, size), 102, dtype=torch.uint8)  # 0.4
    return Frame("s/1", "s", 1, rgb, mask, camera, depth)


def test_uncertainty_that_follows_the_errors_scores_well_and_the_reverse_badly():
    size = 20
    ramp = torch.linspace(0.0, 0.2, size).view(1, size, 1).expand(1, size, size)
    truth = torch.full((1, size, size), 2.0)
    frame, inside = scored_frame(depth=truth), (torch.arange(size) < size // 2).float()

    def view(sign: float, error: torch.Tensor) -> RenderedView:
        spread = sign * ramp * inside
        off = torch.where(error > 0.12, error, 0.0)  # of the depth, of few pixels: the frame's best scale is 1
        return RenderedView((0.4 * inside + error * inside + spread).expand(3, -1, -1), truth + spread + off, inside.expand(1, size, -1))

    for error, good in ((ramp, True), (0.2 - ramp, False)):
        views = [view(1.0, error), view(-1.0, error)]
        scores = score_uncertainty(views, fuse_views(views), frame)
        for plane in ("rgb", "depth"):
            assert (scores[plane]["spearman"] > 0.5) == good and (scores[plane]["ause"] < 0.1) == good, (plane, scores)


def test_uncertainty_of_colour_counts_the_pixels_of_either_mask_and_of_depth_those_with_two_surfaces():
    frame = scored_frame(depth=torch.full((1, 20, 20), 2.0))
    inside = (frame.mask > 0).float()
    alone = RenderedView(0.4 * inside.expand(3, 20, 20), 2 * inside, inside)
    nothing = RenderedView(torch.zeros(3, 20, 20), torch.zeros(1, 20, 20), torch.zeros(1, 20, 20))
    scores = score_uncertainty([alone, nothing], fuse_views([alone, nothing]), frame)
    assert scores["depth"] == {"spearman": None, "ause": None}  # nowhere two surfaces
    assert scores["rgb"]["spearman"] is None and scores["rgb"]["ause"] == pytest.approx(0.0, abs=1e-6)  # all alike inside


def test_without_ground_truth_depth_its_scores_are_none():
    view = RenderedView(torch.rand(3, 20, 20), torch.ones(1, 20, 20), torch.ones(1, 20, 20))
    scores = score_uncertainty([view, view], view, scored_frame(depth=None))
    assert scores["depth"] == {"spearman": None, "ause": None}
