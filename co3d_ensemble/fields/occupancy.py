"""The occupancy grid: which voxels of the object's box may hold something. Both models skip samples outside them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class OccupancyGrid(nn.Module):
    """A boolean grid over a fixed box, carved by the visual hull and refined from the density during training.

    Buffers (all in the state dict, so a checkpoint renders as the model did):
        box: lower and upper corner, (2, 3), world units.
        hull: voxels that may ever be occupied, bool (nx, ny, nz).
        occupied: voxels whose samples are evaluated, bool (nx, ny, nz); a subset of ``hull``.
        density: largest recently seen density per voxel, (nx, ny, nz), per world unit.

    Args:
        box: shape (2, 3).
        hull: boolean grid.
        opacity_threshold: a voxel counts as empty when a ray crossing one voxel length of its density would be less
            opaque than this.
        decay: factor on the remembered density per refinement.
    """

    def __init__(self, box: Tensor, hull: Tensor, *, opacity_threshold: float = 0.005, decay: float = 0.9) -> None:
        super().__init__()
        self.opacity_threshold, self.decay = opacity_threshold, decay
        self.register_buffer("box", box.clone())
        self.register_buffer("_resolution", torch.tensor(hull.shape, device=box.device), persistent=False)
        self.register_buffer("hull", hull.clone())
        self.register_buffer("occupied", hull.clone())
        # infinite until seen: nothing is declared empty before the density there has been looked at
        self.register_buffer("density", torch.full(hull.shape, torch.inf, device=hull.device))

    def forward(self, points: Tensor) -> Tensor:
        """Whether points (..., 3) in world units lie in an occupied voxel: bool (...). False outside the box."""
        return self.along_rays(points, torch.zeros_like(points), points.new_zeros(*points.shape[:-1], 1))[..., 0]

    def along_rays(self, origins: Tensor, directions: Tensor, lengths: Tensor) -> Tensor:
        """The same for the points ``origins + lengths * directions`` without forming them.

        Args:
            origins, directions: shape (..., 3).
            lengths: shape (..., n_samples).

        Returns:
            bool (..., n_samples).
        """
        shape = self.occupied.shape
        per_unit = self._resolution / (self.box[1] - self.box[0])
        start, step = (origins - self.box[0]) * per_unit, directions * per_unit
        flat = inside = None
        for axis, n_voxels in enumerate(shape):  # axis by axis: contiguous (..., n_samples) passes instead of strided triples
            position = torch.addcmul(start[..., axis, None], lengths, step[..., axis, None])
            within = (position >= 0) & (position < n_voxels)
            index = position.clamp_(0, n_voxels - 1).long()
            flat = index if flat is None else flat.mul_(n_voxels).add_(index)
            inside = within if inside is None else inside.logical_and_(within)
        return inside.logical_and_(self.occupied.reshape(-1)[flat])

    @property
    def voxel_length(self) -> Tensor:
        """Mean side of a voxel, world units."""
        return ((self.box[1] - self.box[0]) / self._resolution).mean()

    @torch.no_grad()
    def refine(self, density: Callable[[Tensor], Tensor], *, part: tuple[int, int] = (0, 1), chunk: int = 1 << 18) -> None:
        """Looks at one random point of hull voxels and declares voxels empty or occupied (Mueller et al. 2022, C).

        The remembered density is the larger of the new one and ``decay`` times the old, where only every n-th voxel is looked at
        ``decay ** n``: forgetting takes as many refinements either way. A voxel is occupied when its
        opacity over one voxel length, or that of one of its 26 neighbours, reaches the threshold. Never leaves the hull.
        If nothing would remain, the grid is left as it is.

        Args:
            density: world points (n, 3) to density per world unit (n,).
            part: (i, n): every n-th hull voxel from the i-th on; of n refinements in turn each looks at others.
            chunk: points per call.
        """
        which, of = part
        cells = self.hull.reshape(-1).nonzero()[which % of :: of, 0]
        size = (self.box[1] - self.box[0]) / self._resolution
        _, ny, nz = self.hull.shape
        corners = torch.stack((cells // (ny * nz), cells // nz % ny, cells % nz), dim=-1)
        points = self.box[0] + (corners + torch.rand(corners.shape, device=cells.device, dtype=size.dtype)) * size
        new = torch.cat([density(part) for part in points.split(chunk)]) if len(points) else points[:, 0]
        remembered = self.density.reshape(-1)
        old = remembered[cells]
        remembered[cells] = torch.where(torch.isinf(old), new, torch.maximum(new, old * self.decay**of))
        opacity = -torch.expm1(-torch.where(self.hull, self.density, 0) * self.voxel_length)
        dense = (opacity >= self.opacity_threshold).float()
        grown = torch.nn.functional.max_pool3d(dense[None, None], 3, stride=1, padding=1)[0, 0] > 0
        refined = grown & self.hull
        if bool(refined.any()):
            self.occupied.copy_(refined)
