"""One picture with its camera, and how two of one scene make a pair."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from co3d_ensemble.functional.cameras import relative_pose
from co3d_ensemble.mine.pairs import Pair


@dataclass(frozen=True)
class View:
    """A picture at the data set's size and what is known of it.

    Attributes:
        scene, name: for messages and ``Pair.name``.
        picture: colour in [0, 1], float32, shape (3, H, W).
        K: intrinsics in pixels of ``picture``, shape (3, 3).
        R, t: ``X_camera = R X_scene + t``, float64, (3, 3) and (3,); a pair's pose is their difference, so digits matter.
        points: all sparse points (x, y, z) of the picture, shape (n, 3); None where the data set has none.
        depth, mask: as in :class:`Pair`, shape (1, H, W).
    """

    scene: str
    name: str
    picture: Tensor
    K: Tensor
    R: Tensor
    t: Tensor
    points: Tensor | None = None
    depth: Tensor | None = None
    mask: Tensor | None = None


def make_pair(source: View, target: View, *, n_points: int) -> Pair:
    """A pair with ``n_points`` sparse points per picture (0: none), see :func:`chosen_points`."""
    R, t = relative_pose(source.R, source.t, target.R, target.t)
    source_points, target_points = (
        None if view.points is None or n_points == 0 else chosen_points(view.points, n_points) for view in (source, target)
    )
    return Pair(
        name=f"{source.scene}/{source.name}->{target.name}",
        source=source.picture,
        target=target.picture,
        K_source=source.K.float(),
        K_target=target.K.float(),
        R=R.float(),
        t=t.float(),
        source_points=source_points,
        target_points=target_points,
        source_depth=source.depth,
        target_depth=target.depth,
        source_mask=source.mask,
        target_mask=target.mask,
    )


def chosen_points(points: Tensor, n_points: int) -> Tensor:
    """``n_points`` rows (float32): of more, a subset drawn from torch's default generator; fewer are followed by rows of 0."""
    if len(points) > n_points:
        points = points[torch.randperm(len(points))[:n_points]]
    padding = points.new_zeros(n_points - len(points), 3)
    return torch.cat((points, padding)).float()


def visible_points(xyz: Tensor, K: Tensor, *, height: int, width: int) -> Tensor:
    """(x, y, z) of the points (n, 3) in camera space that fall into the picture, in front of the camera; float32."""
    projected = xyz.double() @ K.double().T
    z = projected[:, 2]
    x, y = projected[:, 0] / z, projected[:, 1] / z
    inside = (z > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return torch.stack((x, y, z), dim=1)[inside].float()
