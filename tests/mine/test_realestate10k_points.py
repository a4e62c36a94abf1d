import importlib.util
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

from co3d_ensemble.functional.cameras import so3_exp
from co3d_ensemble.mine.colmap import read_colmap_model
from co3d_ensemble.mine.generated import plan_scene
from co3d_ensemble.mine.generated_view import Viewpoints, photograph, trace_depth
from co3d_ensemble.mine.realestate10k import RealEstate10K, read_clip
from co3d_ensemble.mine.realestate10k_points import pinhole_parameters, quaternion, triangulate_clip, write_known_model
from launch import make_realestate10k_points
from tests.mine.test_realestate10k import H, W, pose, timestamp, write_clip


def clip_of(root, name="0a1b"):
    return read_clip(root, "train", root / "train" / f"{name}.txt")


def test_the_model_without_points_has_the_clips_cameras_under_the_databases_ids(tmp_path):
    write_clip(tmp_path, n=5, missing=(2,))
    clip = clip_of(tmp_path)
    write_known_model(tmp_path, clip, {i: (10 + i, 20 + i) for i in range(4)})
    model = read_colmap_model(tmp_path)
    assert [image.name for image in model.images] == ["000000.jpg", "000001.png", "000002.png", "000003.jpg"]
    for i, (image, line) in enumerate(zip(model.images, (0, 1, 3, 4))):
        torch.testing.assert_close(image.R, torch.from_numpy(pose(line)[:, :3]), atol=1e-8, rtol=0)
        torch.testing.assert_close(image.t, torch.from_numpy(pose(line)[:, 3]), atol=1e-8, rtol=0)
        camera = model.cameras[20 + i]
        assert (camera.width, camera.height) == (W, H) and image.camera_id == 20 + i
        assert camera.K.tolist() == [[0.9 * W, 0, 0.5 * W], [0, 1.8 * H, 0.5 * H], [0, 0, 1]]
    assert pinhole_parameters(clip, 0) == (W, H, [0.9 * W, 1.8 * H, 0.5 * W, 0.5 * H]) and len(model.xyz) == 0


def test_quaternions_of_any_angle():
    axes = torch.nn.functional.normalize(torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1)
    for angle in (0.0, 0.3, 2.0, np.pi - 1e-9, np.pi):
        for axis in axes:
            w, x, y, z = quaternion(so3_exp(axis * angle).numpy())
            expected = np.array([np.cos(angle / 2), *(np.sin(angle / 2) * axis.numpy())])
            assert abs(np.dot(expected, [w, x, y, z])) == pytest.approx(1, abs=1e-12)  # up to its sign


def test_a_model_that_is_there_is_kept(tmp_path):
    write_clip(tmp_path, n=3)
    folder = tmp_path / "frames/train/0a1b/sparse"
    folder.mkdir()
    (folder / "images.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="cameras.bin is missing"):  # read, not made again
        triangulate_clip(clip_of(tmp_path), folder)


def test_without_pycolmap_the_script_says_what_to_install(tmp_path, monkeypatch, capsys):
    write_clip(tmp_path, n=3)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert make_realestate10k_points.main([f"root={tmp_path}"]) == 1
    assert "pip install 'co3d_ensemble[points]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["root={}", "split=val"], 1, "no camera files"),
        (["root={}", "clips=[zz]"], 1, "has no zz.txt"),
        (["root={}", "part=2", "parts=2"], 2, "part=2: must lie in"),
        ([], 2, "root"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, capsys, arguments, code, message):
    write_clip(tmp_path, n=2)
    assert make_realestate10k_points.main([argument.format(tmp_path) for argument in arguments]) == code
    errors = capsys.readouterr().err
    assert message in errors and "Traceback" not in errors


def test_clips_without_frames_are_counted(tmp_path, capsys):
    write_clip(tmp_path, n=3, missing=(0, 1, 2))
    assert make_realestate10k_points.main([f"root={tmp_path}"]) == 0
    assert "1 have fewer than two frames" in capsys.readouterr().out


FAKE = """
class CameraMode:
    PER_IMAGE = 0

def extract_features(database, pictures, image_names, camera_mode):
    import os, sys
    loaded = [name for name in ("PIL", "torch", "numpy", "co3d_ensemble") if name in sys.modules]
    raise RuntimeError(f"{sorted(os.listdir(pictures))} {image_names} with {loaded}")
"""


def test_pycolmap_is_loaded_in_a_process_that_has_neither_pillow_nor_torch_and_its_errors_name_the_clip(tmp_path, monkeypatch):
    """4.1 and newer break Pillow where both are loaded."""
    write_clip(tmp_path, n=3)
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/pycolmap.py").write_text(textwrap.dedent(FAKE))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.syspath_prepend(tmp_path / "packages")
    names = r"\['000000.jpg', '000001.png', '000002.jpg'\]"
    with pytest.raises(ValueError, match=rf"train/0a1b: pycolmap failed to extract \(1\): .*RuntimeError: {names} {names} with \[\]"):
        triangulate_clip(clip_of(tmp_path), tmp_path / "frames/train/0a1b/sparse")
    assert "pycolmap" not in sys.modules


@pytest.mark.slow
def test_triangulated_points_lie_on_the_surfaces_of_the_scene(tmp_path):
    pytest.importorskip("pycolmap", reason="pycolmap, which is optional, is not installed")
    height, width, n = 240, 360, 8
    plan = plan_scene(2, seed=0, n_views=2, height=height, width=width)
    first = -plan.views.R[0].T @ plan.views.t[0]
    steps = torch.arange(n, dtype=torch.float64)[:, None] * torch.tensor([0.08, -0.01, 0.05], dtype=torch.float64)
    R = plan.views.R[:1].expand(n, 3, 3)
    views = Viewpoints(R, -(R @ (first + steps)[:, :, None])[:, :, 0], plan.views.K, height, width)
    folder, lines = tmp_path / "frames/train/clip", ["https://www.youtube.com/watch?v=a"]
    folder.mkdir(parents=True)
    shares = plan.views.K[[0, 1, 0, 1], [0, 1, 2, 2]] / torch.tensor([width, height, width, height])
    for i, picture in enumerate(photograph(plan.room, views)):
        Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).save(folder / f"{timestamp(i)}.png")
        row = [*shares.tolist(), 0.0, 0.0, *torch.cat((R[i], views.t[i][:, None]), dim=1).flatten().tolist()]
        lines.append(f"{timestamp(i)} " + " ".join(f"{value:.9f}" for value in row))
    (tmp_path / "train").mkdir()
    (tmp_path / "train/clip.txt").write_text("\n".join(lines))
    assert make_realestate10k_points.main([f"root={tmp_path}"]) == 0
    pairs = RealEstate10K(tmp_path, height=height, width=width, n_points=300, frame_distance=1, random_target=False)
    depth = trace_depth(plan.room, views)
    for i in range(len(pairs)):
        x, y, z = pairs[i].source_points[pairs[i].source_points[:, 2] > 0].T
        truth = depth[i, 0, y.long(), x.long()]
        assert len(z) > 50 and (z / truth - 1).abs().median() < 0.04  # features at silhouettes and on repeated patterns stray
