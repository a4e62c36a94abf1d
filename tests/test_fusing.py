"""The choice of a fusion on validation frames: honest about what it was fitted on, and hard to fool."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from co3d_ensemble.config import FusionConfig
from co3d_ensemble.functional.fusion import fuse
from co3d_ensemble.functional.metrics import psnr_masked
from co3d_ensemble.functional.types import Frame, PinholeCamera, RenderedView
from co3d_ensemble.fusing import _products, candidates, choose_fusion

SIZE = 16
MEMBERS = ("good", "bad")


def frames_and_views(noise, count=6, bias=None):
    """Photographs of a grey disc, and members that see it with noise of the given sizes."""
    random = torch.Generator().manual_seed(0)
    camera = PinholeCamera(torch.eye(3), torch.zeros(3), torch.ones(2), torch.ones(2), SIZE, SIZE)
    grid = torch.arange(SIZE) - (SIZE - 1) / 2
    disc = ((grid[:, None] ** 2 + grid**2) < 30).float()[None]
    frames, views = [], {}
    for number in range(count):
        rgb = (255 * (0.3 + 0.4 * torch.rand(3, SIZE, SIZE, generator=random))).to(torch.uint8)
        frame = Frame(f"s/{number}", "s", number, rgb, (255 * disc).to(torch.uint8), camera)
        shown = []
        for member, std in enumerate(noise):
            error = std * torch.randn(3, SIZE, SIZE, generator=random) + (0.0 if bias is None else bias[member])
            mask = (disc + std * torch.randn(1, SIZE, SIZE, generator=random)).clamp(0, 1)
            shown.append(RenderedView((rgb / 255 + error).clamp(0, 1) * disc, 2 * disc, mask))
        record = SimpleNamespace(number=number)
        frames.append((record, frame))
        views[number] = shown
    return frames, lambda record, camera: views[record.number]


def chosen(noise, *, settings=None, **kwargs):
    frames, views_of = frames_and_views(noise, **kwargs)
    return choose_fusion(frames, views_of, MEMBERS[: len(noise)], settings or FusionConfig())


def test_equally_good_members_are_averaged_plainly_although_something_always_scores_best():
    fusion, report = chosen([0.1, 0.1])
    assert report["chosen"] == {"color": "mean", "mask": "mean"} and fusion.color.method == "mean"
    best = max(report["candidates"].values(), key=lambda entry: entry["psnr_masked"]["mean"])
    assert best["psnr_masked"]["gain"] < 0.05


def test_a_much_worse_member_is_weighed_down_by_the_inverse_of_its_variance():
    fusion, report = chosen([0.05, 0.15])
    assert report["chosen"]["color"] in ("fitted", "fitted_zones")
    fitted = report["candidates"]["fitted"]["color"]["weights"][0]
    assert fitted[0] == pytest.approx(0.9, abs=0.02)
    assert report["candidates"]["fitted"]["psnr_masked"]["gain"] > 1 > 0 > report["candidates"]["only_bad"]["psnr_masked"]["gain"]


def test_a_member_that_only_harms_leaves_the_other_alone():
    fusion, report = chosen([0.01, 0.01], bias=[0.0, 0.4])
    weights = report["candidates"]["fitted"]["color"]["weights"][0]
    assert weights[0] > 0.99
    assert report["candidates"]["only_good"]["psnr_masked"]["passes"]


def test_fitted_weights_are_scored_on_frames_that_they_were_not_fitted_on():
    frames, views_of = frames_and_views([0.1, 0.12], count=3)
    _, report = choose_fusion(frames, views_of, MEMBERS, FusionConfig())
    products = [_products(views_of(record, None), frame) for record, frame in frames]
    for name in ("fitted", "fitted_zones"):
        values = []
        for i, (record, frame) in enumerate(frames):
            color, _ = candidates(MEMBERS, [entry for j, entry in enumerate(products) if j != i])[name]
            values.append(psnr_masked(fuse(views_of(record, None), color).rgb, frame.rgb / 255, frame.mask / 255).item())
        assert report["candidates"][name]["psnr_masked"]["mean"] == pytest.approx(sum(values) / 3)
        final = candidates(MEMBERS, products)[name][0]  # what is used is fitted on all
        assert report["candidates"][name]["color"] == final.as_json()


def test_two_frames_that_disagree_change_nothing_and_one_frame_never_does():
    assert chosen([0.05, 0.15], count=1)[1]["chosen"] == {"color": "mean", "mask": "mean"}
    # good and bad change places from frame to frame
    frames, views_of = frames_and_views([0.05, 0.15], count=2)
    swapped = lambda record, camera: views_of(record, camera)[:: 1 if record.number else -1]
    assert choose_fusion(frames, swapped, MEMBERS, FusionConfig())[1]["chosen"]["color"] not in ("only_good", "only_bad", "fitted")


@pytest.mark.parametrize("method", ["mean", "opacity", "confidence", "agreement", "fitted", "fitted_zones"])
def test_a_method_that_is_asked_for_is_taken_whatever_wins(method):
    fusion, report = chosen([0.05, 0.15], settings=FusionConfig(method=method))
    assert (fusion.color.method, fusion.mask.method) == (method, method) and report["method"] == method
    assert report["candidates"]["fitted"]["psnr_masked"]["passes"]  # and the evidence is kept


def test_the_best_member_is_the_one_that_scores_best():
    fusion, report = chosen([0.15, 0.05], settings=FusionConfig(method="best_member"))
    assert fusion.color.weights == ((0.0, 1.0),) and report["chosen"]["color"] == "only_bad"


def test_weights_are_normalised_and_follow_the_members_order():
    fusion, _ = chosen([0.1, 0.1], settings=FusionConfig(method="weights", weights={"bad": 1.0, "good": 3.0}))
    assert fusion.color.weights == fusion.mask.weights == ((0.75, 0.25),)


def test_a_frame_that_is_hard_for_all_does_not_outweigh_the_others():
    frames, views_of = frames_and_views([0.1, 0.1], count=2)
    products = [_products(views_of(record, None), frame)["color"] for record, frame in frames]
    assert [entry.diagonal(dim1=1, dim2=2).sum().item() for entry in products] == pytest.approx([1.0, 1.0])


def test_perfect_members_leave_nothing_to_fit():
    fusion, report = chosen([0.0, 0.0], count=3)
    assert report["candidates"]["fitted"]["color"]["weights"] == [[0.5, 0.5]] and report["chosen"]["color"] == "mean"


def test_a_zone_that_no_validation_frame_shows_is_weighed_as_the_whole_picture_is():
    frames, views_of = frames_and_views([0.05, 0.15])
    faint = lambda record, camera: [RenderedView(view.rgb, view.depth, 0.5 * view.mask) for view in views_of(record, camera)]
    _, report = choose_fusion(frames, faint, MEMBERS, FusionConfig())  # no pixel is inside, with a mean opacity above 0.9
    whole, (_, _, inside) = (report["candidates"][name]["color"]["weights"] for name in ("fitted", "fitted_zones"))
    assert inside == pytest.approx(whole[0])
