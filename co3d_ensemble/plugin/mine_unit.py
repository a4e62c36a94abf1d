"""The unit of length that MINE sees a sequence in: fitted to sparse points of its photographs, and said."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from co3d_ensemble.functional.cameras import opencv_from_pinhole
from co3d_ensemble.functional.mpi import render_source_view
from co3d_ensemble.functional.mpi_losses import disparity_scale, values_at_points
from co3d_ensemble.functional.types import Frame, PinholeCamera
from co3d_ensemble.plugin.mine_views import SceneMPI, SourceImage

logger = logging.getLogger(__name__)


def frame_source(frame: Frame, device: torch.device) -> SourceImage:
    """The whole photograph of a frame."""
    return SourceImage(frame.rgb.to(device).float() / 255, None, frame.camera.to(device))


def log_unit(stack: SceneMPI, camera: PinholeCamera, points: Tensor, *, mode: str) -> Tensor | None:
    """Logarithm of the world units per unit of the network; None where the network sees nothing at the points.

    Args:
        stack: of one photograph, perhaps averaged down.
        camera: of that photograph, at its own size.
        points: (x, y, z), pixel position in it and z in world units, shape (n, 3).
    """
    K, _, _ = opencv_from_pinhole(stack.camera)
    seen = render_source_view(stack.rgb, stack.sigma, stack.depth, K[None], mode=mode)
    shrunk = points.new_tensor([stack.camera.width / camera.width, stack.camera.height / camera.height, 1.0])
    points = (points * shrunk).to(K.device)[None]
    disparity, there = values_at_points(seen.disparity, points)
    counted = points * (there & (disparity > 0))[..., None]
    return disparity_scale(seen.disparity, counted)[0].log() if counted.any() else None


def tell_unit(sequence: str, unit: float, *, n_photographs: int) -> None:
    """Logs a sequence's unit, in world units per unit of the network; of 0 photographs it could not be fitted: a warning."""
    if n_photographs:
        told = "sequence %s: %.4g world units per unit of the network, by the points of %d photographs"
        logger.info(told, sequence, unit, n_photographs)
    else:
        told = "sequence %s: no depth and no point cloud to fit the unit of length to: world units are taken for the network's"
        logger.warning(told + " (scene_scale=1; another number may suit it better)", sequence)
