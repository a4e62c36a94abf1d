"""Sparse points of a RealEstate10K clip: COLMAP triangulates its features with the clip's own cameras held fixed.

Structure from motion from scratch would find other cameras in another unit; so the published poses and intrinsics go in as a
model without points, and features matched between frames are triangulated in it. Needs pycolmap, which is optional.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from pathlib import Path

import numpy as np
import torch

from co3d_ensemble.mine.colmap import MODELS, ColmapModel, read_colmap_model
from co3d_ensemble.mine.pictures import picture_size
from co3d_ensemble.mine.pycolmap_process import require_pycolmap, run_pycolmap
from co3d_ensemble.mine.realestate10k import Clip

MIN_POINTS = 20  # of a clip's model; fewer say that the cameras do not fit the frames
POSE_TOLERANCE = 1e-6  # between poses that went in and that came out


def triangulate_clip(clip: Clip, folder: Path, *, overwrite: bool = False) -> ColmapModel:
    """Makes the COLMAP model of a clip's frames in ``folder``, which appears whole or not at all.

    Args:
        clip: with at least two frames on disk, all in one folder.
        overwrite: replace a model that is there; otherwise it is read and returned.

    Raises:
        ModuleNotFoundError: pycolmap is not installed.
        ValueError: pycolmap failed, or too few points were found; names the clip.
    """
    if (folder / "images.bin").is_file() and not overwrite:
        return read_colmap_model(folder)
    require_pycolmap()
    with tempfile.TemporaryDirectory(prefix="points_", dir=folder.parent) as scratch:
        model = _triangulate(clip, Path(scratch))
        if len(model.xyz) < MIN_POINTS:
            raise ValueError(f"{folder.parent}: {len(model.xyz)} points triangulated, expected at least {MIN_POINTS}")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(model.path, folder)
    return read_colmap_model(folder)


def _triangulate(clip: Clip, scratch: Path) -> ColmapModel:
    """The model in a folder under ``scratch``."""
    pictures, known, found = scratch / "pictures", scratch / "known", scratch / "sparse"
    for path in (pictures, known, found):
        path.mkdir()
    # COLMAP matches neighbours in the order of names, and timestamps of different lengths do not sort as numbers
    names = {f"{i:06d}{path.suffix.lower()}": path for i, path in enumerate(clip.frames)}
    for name, path in names.items():
        shutil.copyfile(path, pictures / name)  # pycolmap 3.13 takes a link's target for the name
    database = scratch / "database.db"
    folders = {"database": str(database), "pictures": str(pictures)}
    run_pycolmap("extract", clip.folder, **folders, names=list(names))
    write_known_model(known, clip, _set_cameras(database, clip))
    renamed = {name: path.name for name, path in names.items()}
    run_pycolmap("triangulate", clip.folder, **folders, known=str(known), found=str(found), renamed=renamed)
    result = read_colmap_model(found)
    _check_poses(result, clip)
    return result


def pinhole_parameters(clip: Clip, frame: int) -> tuple[int, int, list[float]]:
    """Width, height and (fx, fy, cx, cy) in pixels of a frame's picture."""
    height, width = picture_size(clip.frame(frame))
    return width, height, (clip.intrinsics[frame] * (width, height, width, height)).tolist()


def _set_cameras(database: Path, clip: Clip) -> dict[int, tuple[int, int]]:
    """Puts the clip's intrinsics into the database, where matching trusts them; image and camera id of every frame."""
    number, _ = MODELS["PINHOLE"]
    ids = {}
    with sqlite3.connect(database) as connection:
        for image, name, camera in connection.execute("SELECT image_id, name, camera_id FROM images").fetchall():
            frame = int(Path(name).stem)
            width, height, parameters = pinhole_parameters(clip, frame)
            connection.execute(
                "UPDATE cameras SET model = ?, width = ?, height = ?, params = ?, prior_focal_length = 1 WHERE camera_id = ?",
                (number, width, height, np.array(parameters, dtype="<f8").tobytes(), camera),
            )
            ids[frame] = (image, camera)
    connection.close()
    return ids


def write_known_model(folder: Path, clip: Clip, ids: dict[int, tuple[int, int]]) -> None:
    """A text model of the clip's cameras without points, with the database's ids (image, camera) by frame."""
    cameras, images = [], []
    for frame, (image, camera) in sorted(ids.items()):
        width, height, parameters = pinhole_parameters(clip, frame)
        cameras.append(f"{camera} PINHOLE {width} {height} {' '.join(map(repr, parameters))}")
        R, t = clip.poses[frame][:, :3], clip.poses[frame][:, 3]
        pose = " ".join(repr(float(value)) for value in (*quaternion(R), *t))
        images += [f"{image} {pose} {camera} {frame:06d}{clip.frame(frame).suffix.lower()}", ""]
    (folder / "cameras.txt").write_text("\n".join(cameras) + "\n", encoding="utf-8")
    (folder / "images.txt").write_text("\n".join(images) + "\n", encoding="utf-8")
    (folder / "points3D.txt").write_text("", encoding="utf-8")


def quaternion(R: np.ndarray) -> np.ndarray:
    """Unit quaternion (w, x, y, z) of a rotation (3, 3): the eigenvector that fits it best, for any angle (Bar-Itzhack, 2000)."""
    (a, b, c), (d, e, f), (g, h, i) = R
    symmetric = np.array(
        [
            [a + e + i, h - f, c - g, d - b],
            [h - f, a - e - i, b + d, c + g],
            [c - g, b + d, e - a - i, f + h],
            [d - b, c + g, f + h, i - a - e],
        ]
    )
    return np.linalg.eigh(symmetric)[1][:, -1]


def _check_poses(model: ColmapModel, clip: Clip) -> None:
    by_name = {path.name: i for i, path in enumerate(clip.frames)}
    for image in model.images:
        pose = torch.from_numpy(clip.poses[by_name[image.name]])
        # the published rotations are rounded, COLMAP's are exact: as far as R goes, their distance from each other counts
        error = max((image.t - pose[:, 3]).abs().max().item(), (image.R - pose[:, :3]).abs().max().item() - _rounding(pose[:, :3]))
        if error > POSE_TOLERANCE:
            raise ValueError(f"{clip.frames[0].parent}: COLMAP moved the camera of {image.name} by {error:.2g}")


def _rounding(R: torch.Tensor) -> float:
    return (R @ R.T - torch.eye(3, dtype=R.dtype)).abs().max().item()
