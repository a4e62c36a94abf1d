"""What MINE renders from and what comes of it: records, the choice of photographs, a view from one of them, the average of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from co3d_ensemble.functional.cameras import opencv_from_pinhole, relative_pose
from co3d_ensemble.functional.mpi import render_target_view
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


def nearest_sources(
    sources: Sequence[PinholeCamera], target: PinholeCamera, count: int, *, depth: Tensor | float
) -> tuple[list[int], Tensor]:
    """Indices of the ``count`` sources nearest to the target by :func:`camera_distance`, and their weights, which sum to 1."""
    distances = torch.stack([camera_distance(source, target, depth) for source in sources])
    chosen = distances.argsort(stable=True)[:count]
    weights = torch.exp(-distances[chosen] / distances[chosen[0]].clamp_min(torch.finfo(distances.dtype).tiny))
    return chosen.tolist(), weights / weights.sum()


def view_of_scene(stack: SceneMPI, camera: PinholeCamera, *, unit: Tensor, mode: str, foreground: bool) -> tuple[RenderedView, Tensor]:
    """A multiplane image from another camera, and which pixels its photograph saw, bool, (1, H, W).

    Args:
        unit: world units per unit of the network.
        mode: ``sigma`` | ``alpha``, what ``stack.sigma`` is.
        foreground: on black, where the photograph has a mask: each plane takes the mask of the photograph's pixel.
    """
    K_source, R_source, t_source = opencv_from_pinhole(stack.camera)
    K_target, R_target, t_target = opencv_from_pinhole(camera)
    R, t = relative_pose(R_source, t_source, R_target, t_target)
    geometry = {
        "K_source": K_source[None],
        "K_target": K_target[None],
        "R": R[None],
        "t": t[None] / unit,
        "height": camera.height,
        "width": camera.width,
        "mode": mode,
    }
    rgb = stack.rgb
    masked = foreground and stack.mask is not None
    if masked:
        rgb = rgb * stack.mask[:, None]
    view = render_target_view(rgb, stack.sigma, stack.depth, **geometry)
    mask = view.alpha
    if masked:
        on_planes = stack.mask[:, None].expand(-1, rgb.shape[1], 3, -1, -1)
        mask = render_target_view(on_planes, stack.sigma, stack.depth, **geometry).rgb[:, :1]
    mask = mask.clamp(0, 1)
    depth = torch.where(mask > SURFACE_ALPHA, view.depth * unit, 0)
    return RenderedView(rgb=view.rgb.clamp(0, 1)[0], depth=depth[0], mask=mask[0]), view.valid[0]


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
