"""Compositing of warped planes in chunks: the inner loop of ``mpi.render_target_view``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from co3d_ensemble.functional.mpi_warp import LAST_DISTANCE, PlaneHits

STORED_CHUNK = 8


def render_planes_stored(
    rgb: Tensor, sigma: Tensor, hits: PlaneHits, *, mode: str, chunk: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Colour (B, 3, h, w), sum of weight times z (B, 1, h, w), opacity (B, 1, h, w) and number of planes (B, 1, h, w), by autograd."""
    batch, n_planes = hits.ahead.shape
    chunk = chunk or STORED_CHUNK
    passing = torch.ones_like(hits.length)
    image, along = hits.length.new_zeros(batch, 3, *hits.length.shape[-2:]), torch.zeros_like(hits.length)
    count = torch.zeros_like(hits.length, dtype=torch.int32)
    for first in range(0, n_planes, chunk):
        part = slice(first, min(first + chunk, n_planes))
        colour, value, seen = warp(rgb[:, part], sigma[:, part], hits, part)
        if mode == "sigma":
            alpha = -torch.expm1(-value * distances(hits, part))
        else:
            alpha = value
        alpha = torch.where(seen, alpha, torch.zeros_like(alpha))
        ahead = hits.ahead[:, part]
        for i in range(alpha.shape[1]):
            weight = passing * alpha[:, i]
            image = image + weight * colour[:, i]
            along = along + weight * ahead[:, i, None, None, None]
            passing = passing - weight
        count = count + seen.sum(dim=1, dtype=torch.int32)
    return image, along * hits.advance, 1 - passing, count


def render_planes(rgb: Tensor, sigma: Tensor, hits: PlaneHits, *, mode: str, chunk: int | None = None) -> tuple[Tensor, ...]:
    return render_planes_stored(rgb, sigma, hits, mode=mode, chunk=chunk)


def distances(hits: PlaneHits, part: slice) -> Tensor:
    """Equation (6) for some of the planes, (B, n, 1, h, w): the last plane of all reaches ``LAST_DISTANCE``."""
    spacing = hits.spacing[:, part, None, None, None] * hits.length[:, None]
    if part.stop < hits.ahead.shape[1]:
        return spacing
    return torch.cat((spacing, torch.full_like(hits.length[:, None], LAST_DISTANCE)), dim=1)


def warp(rgb: Tensor, sigma: Tensor, hits: PlaneHits, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Colour (B, n, 3, h, w), density or opacity (B, n, 1, h, w) and whether there is any (bool), as the target's pixels meet them."""
    grid = hits.positions[:, None] * hits.scale[:, part, None, None, None] + hits.shift[:, part, :, None, None]
    seen = (grid.abs() <= 1).all(dim=2, keepdim=True)
    seen &= (hits.ahead[:, part, None, None, None] > 0) & (hits.advance > 0)[:, None]
    planes = torch.cat((rgb, sigma), dim=2).to(grid.dtype).flatten(0, 1)
    warped = F.grid_sample(planes, grid.flatten(0, 1).permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
    warped = warped.unflatten(0, grid.shape[:2])
    return warped[:, :, :3], warped[:, :, 3:], seen
