"""Where the object can be, from its masks alone: a box and a carved voxel grid (Laurentini 1994), robust to bad masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from co3d_ensemble.functional.cameras import nearest_point_to_rays, pixel_rays, project
from co3d_ensemble.functional.types import Frame, PinholeCamera

COARSE_RESOLUTION = 64  # of the first carving, whose box the final grid refines
_MIN_VIEW_SHARE = 0.25  # a voxel that a smaller share of the cameras sees is not part of the object that they all look at
_CARVED_AT_ONCE = 1 << 16  # points; what a frame needs of them fits the CPU's cache
_COMPACTED_BELOW = 0.9  # share of the points still in question at which the others are left out
_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, are spread evenly, however many
_CANDIDATE_SCALE = 1.25  # slack of the first box around the masks' angular extent


class Masked(Protocol):
    """What is carved with: a :class:`Frame`, or anything else with its mask, uint8 (1, H, W), and its camera."""

    @property
    def mask(self) -> Tensor: ...

    @property
    def camera(self) -> PinholeCamera: ...


def _mask_stop(mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """Centroid (2,) and extent corners (4, 2) in pixels of a boolean mask (H, W); None when it is empty."""
    rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    if rows.numel() == 0:
        return None
    y, x = torch.stack((rows[0], rows[-1])) + 0.5, torch.stack((columns[0], columns[-1])) + 0.5
    corners = torch.stack((x[[0, 0, 1, 1]], y[[0, 1, 0, 1]]), dim=-1)
    return corners.mean(dim=0), corners


def candidate_box(frames: Sequence[Masked]) -> Tensor:
    """A cube that surely holds the object, from the masks' bounding boxes and the cameras; any scale, any centre.

    The centre is the point closest to the rays through the masks' centres (refitted once without the worst quarter of
    the frames); the half side is the 90th percentile over frames of the masks' reach around that centre.

    Returns:
        Lower and upper corner, shape (2, 3), world units.

    Raises:
        ValueError: no frame has a foreground pixel, or the cameras do not look at a common point.
    """
    origins, directions, corner_rays = [], [], []
    for frame in frames:
        stop = _mask_stop(frame.mask[0] > 127)
        if stop is None:
            continue
        centroid, corners = stop
        origin, direction = pixel_rays(frame.camera, centroid[None].to(frame.camera.focal))
        _, around = pixel_rays(frame.camera, corners.to(frame.camera.focal))
        origins.append(origin[0])
        directions.append(direction[0])
        corner_rays.append(around)
    if not origins:
        raise ValueError(f"none of the {len(frames)} frames has a foreground pixel in its mask")
    origin, direction, around = torch.stack(origins), torch.stack(directions), torch.stack(corner_rays)
    keep = torch.ones(len(origin), dtype=torch.bool)
    for _ in range(2):
        center = nearest_point_to_rays(origin[keep], direction[keep])
        offset = center - origin
        miss = (offset - (offset * direction).sum(-1, keepdim=True) * direction).norm(dim=-1) / offset.norm(dim=-1)
        keep = miss <= miss.quantile(0.75)
    along = ((center - origin) * direction).sum(dim=-1)
    if not torch.isfinite(center).all() or not (along[keep] > 0).all():
        raise ValueError("the cameras do not look at a common point in front of them: check the camera convention")
    # distance of the object's centre from the rays through the corners of the mask's bounding box
    offset = (center - origin)[:, None]
    reach = (offset - (offset * around).sum(-1, keepdim=True) * around).norm(dim=-1).amax(dim=-1)
    half = _CANDIDATE_SCALE * reach.quantile(0.9)
    return torch.stack((center - half, center + half))


def voxel_centers(box: Tensor, resolution: tuple[int, int, int]) -> Tensor:
    """Centres of a grid over ``box`` (2, 3), x slowest: shape (nx, ny, nz, 3)."""
    axes = [
        box[0, i] + (torch.arange(n, dtype=box.dtype, device=box.device) + 0.5) * (box[1, i] - box[0, i]) / n
        for i, n in enumerate(resolution)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def grid_resolution(box: Tensor, longest: int) -> tuple[int, int, int]:
    """Voxel counts of nearly cubic voxels with ``longest`` along the longest side of ``box`` (2, 3)."""
    side = box[1] - box[0]
    counts = (longest * side / side.max()).round().clamp_min(1).long().tolist()
    return counts[0], counts[1], counts[2]


def carve(frames: list[Frame], box: Tensor, resolution: tuple[int, int, int], *, tolerance: float) -> Tensor:
    """Voxels that fall inside the masks of all but a share ``tolerance`` of the frames that see them.

    A voxel is inside a mask when a foreground pixel lies within the voxel's projection, half a pixel wider: no occupied
    space is lost to the coarseness of grid or mask, however close the camera. A frame does not judge voxels outside its
    picture, behind it or around its camera; a voxel that less than a quarter of the frames see is empty.

    Args:
        frames: with ``mask`` (1, H, W) uint8.
        box: lower and upper corner, shape (2, 3).
        resolution: voxels per axis.
        tolerance: in [0, 1).

    Returns:
        Boolean grid, shape ``resolution``.
    """
    half_diagonal = 0.5 * ((box[1] - box[0]) / torch.tensor(resolution, dtype=box.dtype)).norm()
    # neighbours in a capture see much the same: frames from all around, in turn, rule a voxel out soonest
    order = torch.argsort((torch.arange(len(frames)) * _GOLDEN) % 1.0).tolist()
    views = [(frames[i].camera, _foreground_sums(frames[i].mask[0] > 127)) for i in order]
    points = voxel_centers(box, resolution).reshape(-1, 3)
    parts = [_carve_points(part, views, half_diagonal, tolerance) for part in points.split(_CARVED_AT_ONCE)]
    return torch.cat(parts).reshape(resolution)


def _carve_points(
    points: Tensor, views: list[tuple[PinholeCamera, Tensor]], half_diagonal: Tensor, tolerance: float
) -> Tensor:
    """Which of the points (n, 3) :func:`carve` keeps, bool (n,). A point is dropped as soon as the views left cannot save it."""
    result, kept = torch.zeros(len(points), dtype=torch.bool), torch.arange(len(points))
    seen, missed = torch.zeros(len(points), dtype=torch.int32), torch.zeros(len(points), dtype=torch.int32)
    for i, (camera, sums) in enumerate(views):
        pixels, z = project(points, camera)
        visible = (z > half_diagonal) & (pixels[:, 0] >= 0) & (pixels[:, 1] >= 0)
        visible &= (pixels[:, 0] < camera.width) & (pixels[:, 1] < camera.height)
        index = visible.nonzero()[:, 0]
        pixels, z = pixels[index], z[index, None]
        # farthest that a point within half_diagonal of (x, z) is seen from it: f h sqrt(1 + (x / z)^2) / (z - h) per axis
        reach = (camera.focal.square() + (pixels - camera.principal).square()).sqrt() * half_diagonal / (z - half_diagonal)
        seen[index] += 1
        missed[index] += ~_any_foreground(sums, pixels, reach + 0.5)
        possible = _passes(seen + (len(views) - 1 - i), missed, tolerance)
        if possible.sum() < _COMPACTED_BELOW * len(possible):
            points, kept, seen, missed = points[possible], kept[possible], seen[possible], missed[possible]
    enough = seen >= max(1.0, _MIN_VIEW_SHARE * len(views))
    result[kept[enough & _passes(seen, missed, tolerance)]] = True
    return result


def _passes(seen: Tensor, missed: Tensor, tolerance: float) -> Tensor:
    return seen - missed >= (1 - tolerance) * seen


def _foreground_sums(mask: Tensor) -> Tensor:
    """Summed-area table (H + 1, W + 1) of a boolean mask (H, W): one lookup per corner counts any rectangle."""
    return torch.nn.functional.pad(mask.int().cumsum(0).cumsum(1), (1, 0, 1, 0)).int()


def _any_foreground(sums: Tensor, pixels: Tensor, reach: Tensor) -> Tensor:
    """Whether the rectangle ``pixels +- reach`` (n, 2 each; x, y) touches a pixel of the mask with these :func:`_foreground_sums`."""
    height, width = sums.shape[0] - 1, sums.shape[1] - 1
    size = torch.tensor([width, height])
    x0, y0 = (pixels - reach).floor().long().clamp_min(0).minimum(size).unbind(-1)
    x1, y1 = ((pixels + reach).floor().long() + 1).clamp_min(0).minimum(size).unbind(-1)
    flat, row = sums.reshape(-1), width + 1
    return flat[y1 * row + x1] - flat[y0 * row + x1] - flat[y1 * row + x0] + flat[y0 * row + x0] > 0


def tight_box(occupied: Tensor, box: Tensor, margin: float) -> Tensor:
    """Box around the occupied voxels plus ``margin`` (in longest sides of that box) on every side, shape (2, 3).

    Raises:
        ValueError: no voxel is occupied.
    """
    cells = occupied.nonzero()
    if len(cells) == 0:
        raise ValueError(
            "the visual hull is empty: masks and cameras disagree (try data.bounds.hull_tolerance=0.3 or data.bounds.mode=near_far)"
        )
    size = (box[1] - box[0]) / torch.tensor(occupied.shape, dtype=box.dtype)
    low, high = box[0] + cells.amin(dim=0) * size, box[0] + (cells.amax(dim=0) + 1) * size
    slack = margin * (high - low).max()
    return torch.stack((low - slack, high + slack))


def visual_hull(frames: list[Frame], *, longest: int, tolerance: float, margin: float) -> tuple[Tensor, Tensor]:
    """Box of the object and its hull on a grid.

    Args:
        frames: known frames with masks and cameras.
        longest: voxels along the longest side of the final grid.
        tolerance: share of masks that may miss an occupied voxel.
        margin: of the box around the hull, in longest sides.

    Returns:
        box (2, 3) in world units and boolean grid (nx, ny, nz).
    """
    cube = candidate_box(frames)
    coarse = carve(frames, cube, (COARSE_RESOLUTION,) * 3, tolerance=tolerance)
    box = tight_box(coarse, cube, margin)
    return box, carve(frames, box, grid_resolution(box, longest), tolerance=tolerance)
