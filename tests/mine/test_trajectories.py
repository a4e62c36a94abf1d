"""Camera paths: what stays in place, what moves by how much, and that a repeated video does not jump."""

from __future__ import annotations

import math

import pytest
import torch

from co3d_ensemble.mine.trajectories import TRAJECTORIES, trajectory

CAMERA = {"focal": 90.0, "width": 120, "near": 0.8, "focus": 0.2, "amplitude": 0.05}


def path(kind, n_frames=16, **changes):
    return trajectory(kind, n_frames, dtype=torch.float64, **(CAMERA | changes))


def column(pose, point):
    """x in pixels from the principal point."""
    x, _, z = (pose.R @ torch.tensor(point, dtype=torch.float64) + pose.t).tolist()
    return CAMERA["focal"] * x / z


def centers(poses):
    return torch.stack([-pose.R.T @ pose.t for pose in poses])


@pytest.mark.parametrize("kind", TRAJECTORIES)
def test_poses_are_rigid_and_the_focus_stays_at_the_principal_point(kind):
    for pose in path(kind):
        assert torch.allclose(pose.R @ pose.R.T, torch.eye(3, dtype=torch.float64), atol=1e-12)
        assert torch.linalg.det(pose.R).item() == pytest.approx(1)
        point = pose.R @ torch.tensor([0, 0, 1 / CAMERA["focus"]], dtype=torch.float64) + pose.t
        assert point[:2].abs().max() < 1e-12 and point[2] > 0
        assert pose.R[0, 1].abs() < 1e-12  # the x axis stays level: no roll


def test_the_nearest_surface_moves_by_the_amplitude_where_the_camera_keeps_its_direction():
    poses = path("line", focus=0.0)
    assert all(torch.equal(pose.R, torch.eye(3, dtype=torch.float64)) for pose in poses)
    largest = max(abs(column(pose, [0.0, 0.0, 1 / CAMERA["near"]])) for pose in poses)
    assert largest == pytest.approx(CAMERA["amplitude"] * CAMERA["width"])


def test_near_and_far_move_in_opposite_directions_around_the_focus():
    pose = path("line")[4]  # a quarter: rightmost
    assert centers([pose])[0, 0] > 0
    assert column(pose, [0.0, 0.0, 1 / CAMERA["near"]]) < -1 and column(pose, [0.0, 0.0, 100.0]) > 1


@pytest.mark.parametrize("kind", TRAJECTORIES)
def test_a_path_closes_in_steps_of_about_one_size(kind):
    points = centers(path(kind, 64))
    steps = (points.roll(-1, 0) - points).norm(dim=-1)  # the last one leads to the first frame
    assert steps[-1] <= steps.max() and steps.max() < 0.5 * points.norm(dim=-1).max()


def test_shapes_of_the_paths():
    radius = CAMERA["amplitude"] * CAMERA["width"] / (CAMERA["focal"] * CAMERA["near"])
    circle, line, spiral = (centers(path(kind)) for kind in ("circle", "line", "spiral"))
    assert torch.allclose(circle[:, :2].norm(dim=-1), torch.tensor(radius, dtype=torch.float64)) and circle[:, 2].abs().max() < 1e-12
    assert line[:, 1:].abs().max() < 1e-12 and line[0].norm() < 1e-12
    assert line[:, 0].max().item() == pytest.approx(radius) and line[:, 0].min().item() == pytest.approx(-radius)
    assert spiral[:, 2].max().item() == pytest.approx(radius) and spiral[:, 2].min().item() == pytest.approx(-radius)
    angles = torch.atan2(spiral[:, 1], spiral[:, 0])
    assert torch.allclose(angles[:8], angles[8:], atol=1e-9)  # the second turn is like the first


@pytest.mark.parametrize(
    ("kind", "n_frames", "changes", "told"),
    [
        ("square", 4, {}, "trajectory='square': expected one of circle, line, spiral"),
        ("circle", 0, {}, "frames=0"),
        ("circle", 4, {"near": 0.0}, "near=0.0"),
        ("circle", 4, {"near": math.nan}, "near=nan"),
        ("circle", 4, {"amplitude": -0.1}, "amplitude=-0.1"),
    ],
)
def test_a_wrong_path_is_named(kind, n_frames, changes, told):
    with pytest.raises(ValueError, match=told):
        path(kind, n_frames, **changes)
