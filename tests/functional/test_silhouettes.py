"""Outlines of masks that are computed pixel by pixel, and how well they fit each other."""

from dataclasses import replace

import pytest
import torch

from co3d_ensemble.functional.silhouettes import REACH, Silhouette, coherence, signed_distance
from tests.functional.test_visual_hull import ball, frame, ring

CENTER = torch.tensor([1.0, 2.0, 3.0])


def photographed(cameras, inside):
    return [replace(Silhouette.of(frame(camera, inside)), name=f"thing/{i}") for i, camera in enumerate(cameras)]


@pytest.fixture(scope="module")
def balls():
    return photographed(ring(CENTER, 1.0, n=12), ball(CENTER, 1.0))


def test_signed_distance_is_that_of_a_search_over_all_pixels():
    mask = torch.rand(20, 26, generator=torch.Generator().manual_seed(0)) > 0.97
    places = torch.cartesian_prod(torch.arange(20.0), torch.arange(26.0))
    apart, inside = torch.cdist(places, places), mask.reshape(-1)
    naive = torch.where(inside, apart[:, ~inside].amin(1) - 0.5, 0.5 - apart[:, inside].amin(1)).clamp(-REACH, REACH)
    torch.testing.assert_close(signed_distance(mask).reshape(-1), naive)
    assert (signed_distance(torch.zeros(4, 5, dtype=torch.bool)) == -REACH).all()


def test_masks_of_one_object_fit_each_other(balls):
    found = coherence(balls)
    assert found.median == 1.0 and found.covered.min() > 0.97
    assert found.excluded.max() == 0


def test_no_scale_and_no_size_of_pictures_matters(balls):
    large = photographed([replace(f.camera, T=f.camera.T * 100) for f in balls], ball(CENTER * 100, 100.0))
    torch.testing.assert_close(coherence(large).covered, coherence(balls).covered, atol=0.05, rtol=0)


def test_a_mask_in_the_wrong_place_is_the_one_that_does_not_fit(balls):
    moved = [*balls]
    moved[3] = replace(balls[3], mask=balls[3].mask.roll(14, dims=2))
    found = coherence(moved, tolerance=0.1)
    assert found.covered.argmin() == 3 and found.covered[3] < 0.7
    assert found.excluded.argmax() == 3 and found.excluded[3] > 0.3
    assert found.covered[torch.arange(12) != 3].min() > 0.9


def test_a_mask_that_shows_only_part_of_the_object_excludes_what_the_others_show(balls):
    half = [*balls]
    half[5] = replace(balls[5], mask=balls[5].mask * (torch.arange(balls[5].mask.shape[2]) < balls[5].camera.principal[0]))
    found = coherence(half, tolerance=0.1)
    assert found.covered[5] > 0.9
    assert found.excluded.argmax() == 5 and found.excluded[5] > 0.15


def test_frames_that_do_not_judge_are_judged_all_the_same(balls):
    stray = replace(balls[0], mask=balls[0].mask.roll(14, dims=2))
    alone, found = coherence(balls[1:]), coherence(balls[1:], [balls[0], stray])
    torch.testing.assert_close(found.covered[:11], alone.covered)
    assert found.covered[11] > 0.97 and found.excluded[11] == 0
    assert found.covered[12] < 0.7 and found.excluded[12] > 0.3


def test_the_border_of_a_picture_is_no_outline(balls):
    full = [replace(f, mask=torch.full_like(f.mask, 255)) for f in balls]
    found = coherence(full)
    assert found.covered.isnan().all() and found.median is None
    cut = photographed(ring(CENTER, 1.0, n=12, zoom=2.4), ball(CENTER, 1.0))
    assert any(f.mask[0, 0].any() for f in cut)
    assert coherence(cut).median > 0.97


def test_cameras_without_a_common_point_are_an_error(balls):
    turn = torch.diag(torch.tensor([-1.0, 1.0, -1.0]))
    with pytest.raises(ValueError, match="common point"):
        coherence([replace(f, camera=replace(f.camera, R=f.camera.R @ turn, T=f.camera.T @ turn)) for f in balls])


def test_a_reduced_mask_is_the_average_and_its_camera_follows(balls):
    small = balls[0].reduced(30)
    assert small.mask.shape == (1, 20, 30) and (small.camera.height, small.camera.width) == (20, 30)
    blocks = balls[0].mask.float().reshape(1, 20, 2, 30, 2).mean(dim=(2, 4)).round().to(torch.uint8)
    assert torch.equal(small.mask, blocks)
    torch.testing.assert_close(small.camera.principal, balls[0].camera.principal / 2)
    assert balls[0].reduced(60) is balls[0]
