"""The COLMAP model beside a RealEstate10K clip: what every frame sees of its points, if it is a model of this clip."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from co3d_ensemble.mine.colmap import ColmapModel, read_colmap_model

# A model made with the clip's own cameras has them to their last digit; one that refined them is off by little. One that COLMAP made
# from scratch has other axes and another unit: its points would have wrong depths, and nothing would tell.
LARGEST_TURN = 0.05  # of an entry of the rotation
LARGEST_SHIFT = 0.1  # of a camera's centre, share of the largest distance between two of the clip's
ROUNDING = 1e-3  # in the clip's unit, in which cameras stand still to that


def points_by_frame(folder: Path, poses: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """World positions (n, 3), float64, of the points that each frame sees; a frame that COLMAP left out sees none.

    Args:
        folder: of the model.
        poses: (R | t) world to camera, shape (3, 4), of the clip's frames by file name.

    Raises:
        FileNotFoundError, ValueError: naming the file or folder: it cannot be read, has no frame of the clip or no point of them, or
            has another camera than the clip for a frame.
    """
    model = read_colmap_model(folder)
    _check_cameras(model, poses)
    seen = {image.name: model.xyz[[model.rows[i] for i in image.point_ids]].reshape(-1, 3) for image in model.images}
    found = {name: seen.get(name, model.xyz[:0]) for name in poses}
    if not any(len(points) for points in found.values()):
        raise ValueError(f"{folder}: none of the clip's {len(poses)} frames sees a point")
    return found


def _check_cameras(model: ColmapModel, poses: Mapping[str, np.ndarray]) -> None:
    own = [image for image in model.images if image.name in poses]
    if not own:
        told = f", such as {model.images[0].name}," if model.images else ""
        raise ValueError(f"{model.path}: none of its {len(model.images)} images{told} has the name of one of the clip's frames")
    clip = {name: torch.from_numpy(pose) for name, pose in poses.items()}
    R, t = (torch.stack([clip[image.name][:, part] for image in own]) for part in (slice(3), 3))
    model_R, model_t = torch.stack([image.R for image in own]), torch.stack([image.t for image in own])
    every = _centers(*(torch.stack([pose[:, part] for pose in clip.values()]) for part in (slice(3), 3)))
    allowed = LARGEST_SHIFT * torch.cdist(every, every).max() + ROUNDING  # of the clip, of which the model may have few frames
    shift = (_centers(model_R, model_t) - _centers(R, t)).norm(dim=1)
    off = ((model_R - R).abs().amax(dim=(1, 2)) > LARGEST_TURN) | (shift > allowed)
    if off.any():
        name = own[int(off.nonzero()[0])].name
        raise ValueError(f"{model.path}: its camera of {name} is not the clip's: the model must be in the clip's coordinates")


def _centers(R: Tensor, t: Tensor) -> Tensor:
    """World positions of cameras, (n, 3), from their world-to-camera rotations (n, 3, 3) and translations (n, 3)."""
    return -(R.transpose(1, 2) @ t[:, :, None])[..., 0]
