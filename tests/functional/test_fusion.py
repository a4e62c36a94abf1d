"""Late fusion against loops over pixels, and where members disagree about what there is."""

from __future__ import annotations

import math

import pytest
import torch

from co3d_ensemble.functional.fusion import (
    METHODS,
    PIXEL_METHODS,
    WEIGHT_METHODS,
    FusionRule,
    agreement_weights,
    confidence_weights,
    fuse,
    fuse_views,
    opacity_weights,
    rule_weights,
    zones,
)
from co3d_ensemble.functional.types import SURFACE_ALPHA, RenderedView

HEIGHT, WIDTH = 4, 5
RULES = [FusionRule("mean"), *(FusionRule(method) for method in PIXEL_METHODS)]


def random_view(seed: int, *, empty: float = 0.3) -> RenderedView:
    """Colour premultiplied by an opacity of which a share is 0, another 1; depth where there is a surface."""
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand(1, HEIGHT, WIDTH, generator=random, dtype=torch.float64)
    mask = torch.where(mask < empty, 0.0, torch.where(mask > 0.8, 1.0, mask))
    rgb = torch.rand(3, HEIGHT, WIDTH, generator=random, dtype=torch.float64) * mask
    depth = (3 + torch.rand(1, HEIGHT, WIDTH, generator=random, dtype=torch.float64)) * (mask > SURFACE_ALPHA)
    return RenderedView(rgb, depth, mask)


def empty_view() -> RenderedView:
    return RenderedView(*(torch.zeros(channels, HEIGHT, WIDTH, dtype=torch.float64) for channels in (3, 1, 1)))


def rule_for(method: str, count: int) -> FusionRule:
    rows = {"fitted_zones": 3}.get(method, 1) if method in WEIGHT_METHODS else 0
    row = (1.0, *[0.0] * (count - 1)) if method == "member" else tuple([1 / count] * count)
    return FusionRule(method, (row,) * rows)


def assert_same(first: RenderedView, second: RenderedView, **tolerance: float) -> None:
    for name in ("rgb", "depth", "mask"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), **{"rtol": 1e-12, "atol": 1e-14, **tolerance})


@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3], [0.0, 1.0, 0.0]])
def test_fusion_is_the_weighted_average_written_as_a_loop(weights):
    views = [random_view(seed) for seed in range(3)]
    fused = fuse_views(views, None if weights is None else torch.tensor(weights))
    w = weights or [1 / 3] * 3
    for y in range(HEIGHT):
        for x in range(WIDTH):
            mask = sum(w[m] * views[m].mask[0, y, x].item() for m in range(3))
            assert fused.mask[0, y, x].item() == pytest.approx(mask, abs=1e-7)
            for c in range(3):
                assert fused.rgb[c, y, x].item() == pytest.approx(sum(w[m] * views[m].rgb[c, y, x].item() for m in range(3)), abs=1e-7)
            having = [m for m in range(3) if views[m].mask[0, y, x] > SURFACE_ALPHA]
            opacity = {m: w[m] * views[m].mask[0, y, x].item() for m in having}
            depth = 0.0
            if mask > SURFACE_ALPHA:
                depth = sum(opacity[m] * views[m].depth[0, y, x].item() for m in having) / sum(opacity.values())
            assert fused.depth[0, y, x].item() == pytest.approx(depth, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_an_average_wherever_members_are_empty_opaque_or_between(method):
    views = [random_view(0), random_view(1), empty_view()]
    weights = rule_weights(rule_for(method, 3), views).expand(3, 1, HEIGHT, WIDTH)
    assert torch.isfinite(weights).all() and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(1, HEIGHT, WIDTH, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_identical_members_are_fused_to_themselves(method, count):
    view = random_view(3)
    assert_same(fuse([view] * count, rule_for(method, count)), view)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.method)
def test_a_member_without_any_surface_does_not_move_the_others_depth(rule):
    view = random_view(0)
    fused = fuse([view, empty_view()], rule)
    surface = fused.depth > 0
    assert torch.equal(surface, fused.mask > SURFACE_ALPHA) and surface.any()
    torch.testing.assert_close(fused.depth[surface], view.depth[surface])


def test_depth_is_weighed_by_opacity_and_not_mixed_with_the_background():
    def pixel(alpha: float, z: float) -> RenderedView:
        return RenderedView(torch.full((3, 1, 1), alpha), torch.full((1, 1, 1), z), torch.full((1, 1, 1), alpha))

    assert fuse_views([pixel(0.9, 2.0), pixel(0.3, 6.0)]).depth.item() == pytest.approx((0.9 * 2 + 0.3 * 6) / 1.2)
    assert fuse_views([pixel(0.9, 2.0), pixel(0.0, 0.0)]).depth.item() == pytest.approx(2.0)
    # depth behind an opacity that is no surface does not count
    assert fuse_views([pixel(0.9, 2.0), pixel(SURFACE_ALPHA, 99.0)]).depth.item() == pytest.approx(2.0)
    # the average of a hint of opacity with nothing is no surface
    assert fuse_views([pixel(1.5 * SURFACE_ALPHA, 2.0), pixel(0.0, 0.0)]).depth.item() == 0.0


def test_a_surface_that_only_a_member_of_weight_0_has_keeps_its_depth():
    view = random_view(0, empty=0.0)
    weights, mask_weights = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    fused = fuse_views([view, empty_view()], weights, mask_weights)
    torch.testing.assert_close(fused.depth, view.depth)
    assert fused.rgb.max() == 0 and torch.equal(fused.mask, view.mask)


def test_all_members_empty_give_an_empty_view():
    for rule in RULES:
        fused = fuse([empty_view(), empty_view()], rule)
        assert fused.rgb.max() == fused.depth.max() == fused.mask.max() == 0


def test_colour_stays_premultiplied_and_in_range():
    views = [random_view(seed) for seed in range(4)]
    for rule in RULES:
        fused = fuse(views, rule)
        assert (fused.rgb <= fused.mask + 1e-12).all() and fused.mask.max() <= 1 + 1e-12


def test_opacity_weights_follow_the_opacity_and_are_equal_where_there_is_none():
    weights = opacity_weights(torch.tensor([0.9, 0.0, 0.5]).view(1, 3, 1, 1).permute(1, 0, 2, 3))
    assert weights.flatten().tolist() == pytest.approx([0.901 / 1.403, 0.001 / 1.403, 0.501 / 1.403])
    assert opacity_weights(torch.zeros(2, 1, 1, 1)).flatten().tolist() == [0.5, 0.5]


def test_confidence_leaves_an_undecided_pixel_to_the_member_that_is_decided():
    weights = confidence_weights(torch.tensor([0.5, 0.0, 1.0]).view(3, 1, 1, 1)).flatten()
    assert weights.tolist() == pytest.approx([0.01 / 2.03, 1.01 / 2.03, 1.01 / 2.03])
    mirrored = confidence_weights(torch.tensor([0.2, 0.8]).view(2, 1, 1, 1)).flatten()
    assert mirrored.tolist() == pytest.approx([0.5, 0.5])


def test_agreement_silences_an_outlier_of_three_and_is_the_average_of_two():
    def grey(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)

    opaque = torch.ones(3, 1, 1, 1, dtype=torch.float64)
    weights = agreement_weights(grey([0.5, 0.5, 0.9]), opaque).flatten()
    distance = 0.4 * math.sqrt(3 / 4)  # three of four channels differ
    outlier = 1 / (1 + (distance / 0.05) ** 2)
    assert weights.tolist() == pytest.approx([1 / (2 + outlier), 1 / (2 + outlier), outlier / (2 + outlier)])
    assert agreement_weights(grey([0.1, 0.9]), opaque[:2]).flatten().tolist() == pytest.approx([0.5, 0.5])


def test_zones_part_background_silhouette_and_inside_and_each_has_its_weights():
    masks = torch.tensor([[0.0, 0.6, 1.0], [0.1, 0.4, 1.0]], dtype=torch.float64).view(2, 1, 1, 3)
    assert zones(masks).tolist() == [[0, 1, 2]]
    views = [RenderedView(mask.expand(3, 1, 3), mask * 2, mask) for mask in masks]
    rule = FusionRule("fitted_zones", ((1.0, 0.0), (0.5, 0.5), (0.25, 0.75)))
    assert rule_weights(rule, views)[:, 0, 0].tolist() == [[1.0, 0.5, 0.25], [0.0, 0.5, 0.75]]
    assert fuse(views, rule).mask.flatten().tolist() == pytest.approx([0.0, 0.5, 1.0])


def test_the_mask_may_have_a_rule_of_its_own():
    views = [random_view(0), random_view(1)]
    first, second = FusionRule("member", ((1.0, 0.0),)), FusionRule("member", ((0.0, 1.0),))
    fused = fuse(views, first, second)
    assert torch.equal(fused.rgb, views[0].rgb) and torch.equal(fused.mask, views[1].mask)


def test_a_rule_survives_json_and_follows_the_views_dtype():
    rule = FusionRule("fitted_zones", ((1.0, 0.0), (0.5, 0.5), (0.25, 0.75)))
    assert FusionRule.from_json(rule.as_json()) == rule
    assert fuse([random_view(0), random_view(1)], rule).rgb.dtype == torch.float64


@pytest.mark.parametrize("plane", ["rgb", "depth", "mask"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_are_refused_by_member_and_plane(plane, value):
    broken = random_view(1)
    getattr(broken, plane)[..., 2, 2] = value
    with pytest.raises(ValueError, match=f"member 1: its {plane} has non-finite"):
        fuse_views([random_view(0), broken])


def test_views_that_cannot_be_fused_are_refused():
    with pytest.raises(ValueError, match="no views"):
        fuse_views([])
    small = RenderedView(torch.zeros(3, 2, 2), torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="differ in size"):
        fuse_views([random_view(0), small])


@pytest.mark.parametrize(
    ("weights", "told"),
    [([0.5, 0.6], "sum"), ([-0.5, 1.5], "negative"), ([float("nan"), 1.0], "negative"), ([1.0], "shape")],
)
def test_weights_that_are_no_average_are_refused(weights, told):
    with pytest.raises(ValueError, match=told):
        fuse_views([random_view(0), random_view(1)], torch.tensor(weights))


@pytest.mark.parametrize(
    ("method", "weights", "told"),
    [
        ("median", (), "expected one of mean"),
        ("mean", ((1.0,),), "takes 0 rows"),
        ("fitted", (), "takes 1 rows"),
        ("fitted_zones", ((1.0,),), "takes 3 rows"),
        ("fitted", ((0.5, 0.6),), "sum to 1"),
        ("weights", ((-1.0, 2.0),), "not be negative"),
        ("weights", ((float("nan"), 1.0),), "not be negative"),
    ],
)
def test_a_rule_that_is_none_is_refused(method, weights, told):
    with pytest.raises(ValueError, match=told):
        FusionRule(method, weights)


def test_a_rule_for_another_number_of_members_is_refused():
    with pytest.raises(ValueError, match="for 3 members cannot fuse 2"):
        fuse([random_view(0), random_view(1)], FusionRule("fitted", ((0.2, 0.3, 0.5),)))
