"""What is exported shows the same views again: read back, and by a viewer written from the JSON's conventions alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from co3d_ensemble.mine.inference import blended, render_pose
from co3d_ensemble.mine.mpi_export import INDEX, alpha_to_uint8, read_mpi, source_alpha, write_mpi
from co3d_ensemble.mine.trajectories import Pose, trajectory
from tests.mine.stacks import random_stack

STILL = Pose(torch.eye(3), torch.zeros(3))
LEVEL = 1 / 255


def read_back(folder):
    exported = read_mpi(folder)
    return blended(exported.rgb, exported.alpha, exported.disparity, exported.K, mode="alpha", image=None)


def moved(stack):
    return trajectory("spiral", 5, focal=stack.K[0, 0].item(), width=stack.size[1], near=1.0, focus=0.3, amplitude=0.1)[1]


@pytest.mark.parametrize("mode", ["sigma", "alpha"])
@pytest.mark.parametrize("n_planes", [2, 16, 64])
def test_an_exported_stack_shows_the_same_source_view_to_8_bits(tmp_path, mode, n_planes):
    stack = random_stack(n_planes, mode=mode, blend=True)
    write_mpi(tmp_path, stack)
    again = read_back(tmp_path)
    assert (again.view.rgb - stack.view.rgb).abs().max() < 1.5 * LEVEL
    assert (again.view.alpha - stack.view.alpha).abs().max() < 0.51 * LEVEL
    assert torch.equal(again.K, stack.K) and torch.allclose(again.disparity, stack.disparity)


def test_planes_that_have_nothing_in_common_are_off_by_little_more(tmp_path):
    stack = random_stack(64)
    write_mpi(tmp_path, stack)
    difference = (read_back(tmp_path).view.rgb - stack.view.rgb).abs()
    assert difference.max() < 3 * LEVEL and difference.mean() < LEVEL


def test_from_another_camera_the_rounding_stays_as_small_and_the_rays_own_distances_make_a_small_difference(tmp_path):
    stack = random_stack(16)
    write_mpi(tmp_path, stack)
    unrounded = blended(stack.rgb, source_alpha(stack), stack.disparity, stack.K, mode="alpha", image=None)
    exported, exact, ours = (render_pose(each, moved(stack)).rgb for each in (read_back(tmp_path), unrounded, stack))
    assert (exported - exact).abs().max() < 2 * LEVEL
    difference = (exported - ours).abs()
    assert 0.1 * LEVEL < difference.max() < 0.05 and difference.mean() < 0.005


def test_256_planes_of_hardly_any_opacity_add_up(tmp_path):
    alpha = torch.full((256, 1, 2, 2), 0.0019)
    levels = alpha_to_uint8(alpha).double() / 255
    assert torch.equal((alpha * 255).round(), torch.zeros_like(alpha))  # each by itself would vanish
    exact, rounded = (1 - alpha.double()).cumprod(0), (1 - levels).cumprod(0)
    assert exact[-1].max() < 0.62 and (exact - rounded).abs().max() < 0.51 * LEVEL


def test_light_that_passes_is_right_to_half_a_level_behind_every_plane():
    alpha = torch.rand(64, 1, 16, 16, generator=torch.Generator().manual_seed(0)) ** 6
    alpha[:, :, 0] = 0.0
    alpha[5:, :, 1] = 1.0
    exact, rounded = (1 - alpha.double()).cumprod(0), (1 - alpha_to_uint8(alpha).double() / 255).cumprod(0)
    assert (exact - rounded).abs().max() < 0.501 * LEVEL
    naive = (1 - (alpha * 255).round().double() / 255).cumprod(0)
    assert (exact - naive).abs().max() > LEVEL  # what this avoids


def test_a_viewer_written_from_the_conventions_shows_our_view(tmp_path):
    stack = random_stack(6, mode="alpha")
    write_mpi(tmp_path, stack)
    pose = moved(stack)
    ours = render_pose(read_back(tmp_path), pose).rgb[0].permute(1, 2, 0).numpy()
    shown = viewer(tmp_path, pose.R.double().numpy(), pose.t.double().numpy())
    assert np.abs(shown - ours).max() < 1e-4


def viewer(folder, R, t):
    """Nothing but the files: NumPy, a loop over planes back to front, the homography and the blending of mpi.json."""
    index = json.loads((folder / INDEX).read_text())
    camera, height, width = index["intrinsics"], index["height"], index["width"]
    K = np.array([[camera["fx"], 0, camera["cx"]], [0, camera["fy"], camera["cy"]], [0, 0, 1]])
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    target = np.stack((x, y, np.ones_like(x)), -1)
    shown = np.zeros((height, width, 3))
    for plane in reversed(index["planes"]):
        pixels = np.array(Image.open(folder / plane["file"])).astype(float) / 255
        to_target = K @ (R + np.outer(t, [0, 0, 1]) / plane["depth"]) @ np.linalg.inv(K)
        source = target @ np.linalg.inv(to_target).T
        column, row = source[..., 0] / source[..., 2], source[..., 1] / source[..., 2]
        inside = (column >= 0) & (column <= width) & (row >= 0) & (row <= height)
        left, top = np.floor(column - 0.5).astype(int), np.floor(row - 0.5).astype(int)
        a, b = column - 0.5 - left, row - 0.5 - top
        value = 0
        for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
            weight = (b if down else 1 - b) * (a if right else 1 - a)
            value = value + weight[..., None] * pixels[np.clip(top + down, 0, height - 1), np.clip(left + right, 0, width - 1)]
        alpha = value[..., 3:] * inside[..., None]
        shown = alpha * value[..., :3] + (1 - alpha) * shown
    return shown


def test_the_index_tells_files_depths_camera_and_conventions(tmp_path):
    stack = random_stack(3)
    index = json.loads(write_mpi(tmp_path, stack, seen={"near_disparity": 0.7}).read_text())
    assert [plane["file"] for plane in index["planes"]] == ["plane_000.png", "plane_001.png", "plane_002.png"]
    assert [plane["disparity"] for plane in index["planes"]] == pytest.approx(stack.disparity.tolist())
    assert all(plane["depth"] * plane["disparity"] == pytest.approx(1) for plane in index["planes"])
    assert index["intrinsics"] == {"fx": 50.0, "fy": 50.0, "cx": 16.0, "cy": 12.0} and (index["width"], index["height"]) == (32, 24)
    assert "straight" in index["conventions"]["pixels"] and "source camera's rays" in index["conventions"]["alpha"]
    assert index["seen"] == {"near_disparity": 0.7}


def test_a_second_export_of_fewer_planes_leaves_none_of_the_first(tmp_path):
    write_mpi(tmp_path, random_stack(5))
    write_mpi(tmp_path, random_stack(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [INDEX, "plane_000.png", "plane_001.png"]


def test_a_broken_export_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{INDEX}: no such file"):
        read_mpi(tmp_path)
    write_mpi(tmp_path, random_stack(2))
    Image.new("RGBA", (32, 23)).save(tmp_path / "plane_001.png")
    with pytest.raises(ValueError, match=r"plane_001.png: is 32x23 \(width x height\), expected 32x24"):
        read_mpi(tmp_path)
    (tmp_path / "plane_001.png").write_bytes(b"")
    with pytest.raises(ValueError, match="plane_001.png: is unreadable or truncated"):
        read_mpi(tmp_path)
    (tmp_path / INDEX).write_text('{"format": "other"}')
    with pytest.raises(ValueError, match=f"{INDEX}: not an exported multiplane image"):
        read_mpi(tmp_path)


@pytest.mark.parametrize("name", ["../plane_001.png", "/plane_001.png", None])
def test_a_plane_outside_of_the_export_is_refused(tmp_path, name):
    index = write_mpi(tmp_path / "a", random_stack(2))
    content = json.loads(index.read_text())
    content["planes"][1]["file"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{INDEX}: not an exported multiplane image: "):
        read_mpi(tmp_path / "a")
