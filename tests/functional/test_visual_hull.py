"""Visual hulls of objects whose masks are computed pixel by pixel: nothing of the object is lost, at any scale."""

import math
from dataclasses import replace

import pytest
import torch

from co3d_ensemble.functional.cameras import pixel_centers, pixel_rays, project
from co3d_ensemble.functional.types import Frame, PinholeCamera
from co3d_ensemble.functional.visual_hull import candidate_box, carve, grid_resolution, tight_box, visual_hull, voxel_centers

SETTINGS = {"longest": 24, "tolerance": 0.06, "margin": 0.05}


def look_at(eye, target, *, height, width, focal, principal=None) -> PinholeCamera:
    forward = torch.nn.functional.normalize(target - eye, dim=0)
    up = torch.tensor([0.0, 1.0, 0.0])
    left = torch.nn.functional.normalize(torch.linalg.cross(up, forward), dim=0)
    R = torch.stack((left, torch.linalg.cross(forward, left), forward), dim=1)  # columns: view axes in the world
    center = torch.tensor([width / 2, height / 2]) if principal is None else torch.tensor(principal)
    return PinholeCamera(R, -eye @ R, torch.tensor([focal, focal]), center, height, width)


def ring(center, radius, *, n=20, sizes=((40, 60), (48, 32)), distance=4.0, zoom=1.0) -> list[PinholeCamera]:
    """Cameras around ``center`` at two heights, of alternating non-square sizes, principal points off centre."""
    cameras = []
    for i in range(n):
        angle, (height, width) = 2 * math.pi * i / n, sizes[i % len(sizes)]
        eye = center + distance * radius * torch.tensor([math.cos(angle), 0.3 + 0.3 * (i % 3), math.sin(angle)])
        principal = (width * 0.54, height * 0.47)
        cameras.append(look_at(eye, center, height=height, width=width, focal=zoom * 0.9 * min(height, width), principal=principal))
    return cameras


def frame(camera, inside) -> Frame:
    """``inside`` maps ray origins and directions to whether the ray hits the object."""
    origins, directions = pixel_rays(camera, pixel_centers(camera.height, camera.width))
    mask = inside(origins, directions).reshape(1, camera.height, camera.width)
    rgb = torch.zeros(3, camera.height, camera.width, dtype=torch.uint8)
    return Frame("thing/0", "thing", 0, rgb, mask.to(torch.uint8) * 255, camera)


def ball(center, radius):
    def hit(origins, directions):
        offset = center - origins
        along = (offset * directions).sum(-1, keepdim=True)
        return (offset - along * directions).norm(dim=-1) < radius

    return hit


def brick(box):
    def hit(origins, directions):
        first, second = (box[0] - origins) / directions, (box[1] - origins) / directions
        return torch.minimum(first, second).amax(-1) < torch.maximum(first, second).amin(-1)

    return hit


def in_hull(points, box, hull):
    index = ((points - box[0]) / (box[1] - box[0]) * torch.tensor(hull.shape)).floor().long()
    assert ((index >= 0) & (index < torch.tensor(hull.shape))).all(), "a point of the object lies outside the box"
    return hull[index[:, 0], index[:, 1], index[:, 2]]


def points_of_ball(center, radius, n=4000):
    points = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    shell = torch.rand(n, 1, generator=torch.Generator().manual_seed(1)) ** (1 / 6)
    return center + radius * shell * torch.nn.functional.normalize(points, dim=-1)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_hull_holds_the_whole_ball_at_any_scale_and_place_and_little_else(scale):
    center, radius = scale * torch.tensor([3.0, -2.0, 7.0]), scale
    frames = [frame(camera, ball(center, radius)) for camera in ring(center, radius)]
    box, hull = visual_hull(frames, **SETTINGS)
    assert max(hull.shape) == 24
    assert in_hull(points_of_ball(center, radius), box, hull).all()
    assert ((box[1] - box[0]) < 3.2 * radius).all()
    far = voxel_centers(box, hull.shape)[hull].sub(center).norm(dim=-1)
    assert far.max() < 2.2 * radius
    assert hull.float().mean() * (box[1] - box[0]).prod() < 2 * (4 / 3 * math.pi * radius**3)


def test_hull_holds_an_elongated_box_and_follows_its_shape():
    corners = torch.tensor([[-2.0, -0.4, -0.6], [2.0, 0.4, 0.6]]) + torch.tensor([1.0, 5.0, -3.0])
    center = corners.mean(dim=0)
    frames = [frame(camera, brick(corners)) for camera in ring(center, 2.0)]
    box, hull = visual_hull(frames, **SETTINGS)
    points = corners[0] + torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)) * (corners[1] - corners[0])
    assert in_hull(points, box, hull).all()
    side = box[1] - box[0]
    assert side.argmax() == 0 and side[1] < 0.6 * side[0]
    assert hull.shape == grid_resolution(box, 24)


def test_no_part_of_the_object_is_lost_close_to_the_cameras():
    cameras = ring(torch.zeros(3), 1.0, n=12, distance=1.15, zoom=0.22, sizes=((150, 220), (200, 150)))
    frames = [frame(camera, ball(torch.zeros(3), 1.0)) for camera in cameras]
    box = torch.tensor([[-1.1] * 3, [1.1] * 3])
    hull = carve(frames, box, (10, 10, 10), tolerance=0.0)
    assert in_hull(points_of_ball(torch.zeros(3), 1.0, 20_000), box, hull).all()


@pytest.mark.parametrize("x", [0.0, 3.0])
def test_a_voxel_stays_when_the_only_foreground_pixel_shows_one_of_its_corners(x):
    camera = PinholeCamera(torch.eye(3), torch.zeros(3), torch.tensor([100.0, 100.0]), torch.tensor([210.0, 110.0]), 220, 420)
    box = torch.tensor([[x - 1, -1.0, 2.0], [x + 1, 1.0, 4.0]])
    for corner in range(8):
        point = torch.stack([box[(corner >> axis) & 1, axis] for axis in range(3)])
        column, row = project(point, camera)[0].floor().long().tolist()
        mask = torch.zeros(1, 220, 420, dtype=torch.uint8)
        mask[0, row, column] = 255
        shown = Frame("thing/0", "thing", 0, mask.expand(3, -1, -1), mask, camera)
        assert carve([shown], box, (1, 1, 1), tolerance=0.0).all()


@pytest.mark.parametrize("bad", [0, 255])
def test_five_percent_of_wrong_masks_change_little(bad):
    center = torch.tensor([1.0, 2.0, 3.0])
    frames = [frame(camera, ball(center, 1.0)) for camera in ring(center, 1.0)]
    good_box, good_hull = visual_hull(frames, **SETTINGS)
    frames[7] = replace(frames[7], mask=torch.full_like(frames[7].mask, bad))
    box, hull = visual_hull(frames, **SETTINGS)
    assert in_hull(points_of_ball(center, 1.0), box, hull).all()
    assert ((box[1] - box[0]) < 1.3 * (good_box[1] - good_box[0])).all()
    volume, good = (h.float().mean() * (b[1] - b[0]).prod() for h, b in ((hull, box), (good_hull, good_box)))
    assert volume < 1.3 * good


def test_a_share_of_tolerated_masks_may_miss_a_voxel_and_no_more():
    center = torch.zeros(3)
    frames = [frame(camera, ball(center, 1.0)) for camera in ring(center, 1.0)]
    empty = [replace(f, mask=torch.zeros_like(f.mask)) for f in frames]
    box = torch.tensor([[-1.0] * 3, [1.0] * 3])
    middle = (4, 4, 4)
    assert carve(empty[:2] + frames[2:], box, (9, 9, 9), tolerance=0.1)[middle]
    assert not carve(empty[:3] + frames[3:], box, (9, 9, 9), tolerance=0.1)[middle]
    assert not carve(empty[:1] + frames[1:], box, (9, 9, 9), tolerance=0.0)[middle]


def test_frames_do_not_judge_what_lies_outside_their_picture():
    center = torch.zeros(3)
    frames = [frame(camera, ball(center, 1.0)) for camera in ring(center, 1.0, n=12)]
    beside = center + torch.tensor([0.0, 100.0, 0.0])
    blind = [frame(camera, ball(center, 1.0)) for camera in ring(beside, 1.0, n=12)]  # look elsewhere, masks empty
    assert all((f.mask == 0).all() for f in blind)
    box = torch.tensor([[-1.5] * 3, [1.5] * 3])
    assert torch.equal(carve(frames, box, (9, 9, 9), tolerance=0.0), carve(frames + blind, box, (9, 9, 9), tolerance=0.0))


def test_what_few_cameras_see_is_empty():
    center = torch.zeros(3)
    frames = [frame(camera, ball(center, 1.0)) for camera in ring(center, 1.0, n=12)]
    far = torch.tensor([[40.0] * 3, [41.0] * 3])
    assert not carve(frames, far, (3, 3, 3), tolerance=0.0).any()


def test_the_candidate_cube_holds_the_object_despite_bad_masks():
    center = torch.tensor([1.0, 2.0, 3.0])
    frames = [frame(camera, ball(center, 1.0)) for camera in ring(center, 1.0)]
    frames[3] = replace(frames[3], mask=torch.zeros_like(frames[3].mask))
    corner = torch.zeros_like(frames[4].mask)
    corner[:, :3, :3] = 255  # something else was segmented
    frames[4] = replace(frames[4], mask=corner)
    low, high = candidate_box(frames)
    assert (low <= center - 1).all() and (high >= center + 1).all()
    assert ((high - low) < 4).all()
    assert ((low + high) / 2 - center).norm() < 0.03


def test_masks_that_are_all_empty_are_an_error():
    frames = [frame(camera, lambda o, d: torch.zeros(len(d), dtype=torch.bool)) for camera in ring(torch.zeros(3), 1.0, n=3)]
    with pytest.raises(ValueError, match="none of the 3 frames has a foreground pixel"):
        visual_hull(frames, **SETTINGS)


def test_masks_and_cameras_that_disagree_are_an_error_that_says_what_to_try():
    center = torch.zeros(3)
    cameras = ring(center, 1.0)
    shifts = torch.randn(len(cameras), 3, generator=torch.Generator().manual_seed(0))
    shifts = 1.2 * torch.nn.functional.normalize(shifts, dim=-1)
    frames = [frame(camera, ball(center + shift, 0.15)) for camera, shift in zip(cameras, shifts)]
    with pytest.raises(ValueError, match="visual hull is empty.*hull_tolerance"):
        visual_hull(frames, **SETTINGS)


def test_cameras_that_look_away_from_the_object_are_an_error_that_names_the_convention():
    frames = [frame(camera, ball(torch.zeros(3), 1.0)) for camera in ring(torch.zeros(3), 1.0)]
    flip = torch.diag(torch.tensor([1.0, -1.0, -1.0]))

    def turned(f):
        center = -f.camera.T @ f.camera.R.T
        R = f.camera.R @ flip
        return replace(f, camera=replace(f.camera, R=R, T=-center @ R))

    with pytest.raises(ValueError, match="camera convention"):
        candidate_box([turned(f) for f in frames])


def test_tight_box_is_the_occupied_extent_plus_the_margin():
    occupied = torch.zeros(10, 20, 10, dtype=torch.bool)
    occupied[2:4, 5:15, 9] = True
    box = tight_box(occupied, torch.tensor([[0.0, 0.0, 0.0], [10.0, 40.0, 10.0]]), 0.1)
    torch.testing.assert_close(box, torch.tensor([[0.0, 8.0, 7.0], [6.0, 32.0, 12.0]]))


def test_voxel_centers_and_resolution_by_hand():
    box = torch.tensor([[0.0, 1.0, 2.0], [4.0, 2.0, 2.1]])
    assert grid_resolution(box, 8) == (8, 2, 1)
    centers = voxel_centers(box, (8, 2, 1))
    torch.testing.assert_close(centers[3, 1, 0], torch.tensor([1.75, 1.75, 2.05]))
