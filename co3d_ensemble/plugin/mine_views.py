"""What MINE renders from and what comes of several photographs: records, the distance between cameras, the average of views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from co3d_ensemble.functional.cameras import relative_pose
from co3d_ensemble.functional.types import SURFACE_ALPHA, PinholeCamera, RenderedView


@dataclass(frozen=True)
class SourceImage:
    """A photograph to render from.

    Attributes:
        rgb: in [0, 1], not masked, shape (3, H, W).
        mask: foreground probability, shape (1, H, W), or None.
        camera: at the photograph's size.
    """

    rgb: Tensor
    mask: Tensor | None
    camera: PinholeCamera


@dataclass(frozen=True)
class SceneMPI:
    """The multiplane image of one photograph, with a batch dimension of 1, in the network's unit of length.

    Attributes:
        rgb, sigma, depth: as ``functional.mpi`` takes them.
        mask: of the photograph at the planes' size, shape (1, 1, H, W), or None.
        camera: at the planes' size, in world units.
    """

    rgb: Tensor
    sigma: Tensor
    depth: Tensor
    mask: Tensor | None
    camera: PinholeCamera


def camera_distance(source: PinholeCamera, target: PinholeCamera, depth: Tensor | float) -> Tensor:
    """How far a view is from another, in radians: by how much points at ``depth`` move, plus the angle between the views.

    Args:
        depth: where the scene is, in world units.
    """
    R, t = relative_pose(source.R.T, source.T, target.R.T, target.T)
    # 2 asin(|R - 1| / sqrt(8)) is the angle of a rotation, accurate near 0
    angle = 2 * torch.asin(((R - torch.eye(3, dtype=R.dtype, device=R.device)).norm() / 8**0.5).clamp(max=1))
    return t.norm() / depth + angle


def blended_views(rendered: Sequence[tuple[RenderedView, Tensor]], weights: Tensor) -> tuple[RenderedView, Tensor]:
    """The average of views over those of their pixels that are valid; what none of them saw is empty."""
    if len(rendered) == 1:
        return rendered[0]
    valid = torch.stack([seen for _, seen in rendered])
    share = weights.view(-1, 1, 1, 1) * valid
    share = share / share.sum(dim=0).clamp_min(torch.finfo(share.dtype).tiny)
    rgb, depth, mask = (torch.stack([getattr(view, name) for view, _ in rendered]) for name in ("rgb", "depth", "mask"))
    surface = share * mask * (depth > 0)
    total = (share * mask).sum(dim=0)
    weight = surface.sum(dim=0)
    z = (surface * depth).sum(dim=0) / weight.clamp_min(torch.finfo(weight.dtype).tiny)
    blended = RenderedView(rgb=(share * rgb).sum(dim=0), depth=torch.where(total > SURFACE_ALPHA, z, 0), mask=total)
    return blended, valid.any(dim=0)
