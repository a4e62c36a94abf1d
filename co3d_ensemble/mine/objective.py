"""What a batch of pairs costs: MINE's losses at four scales of the planes (Li et al., ICCV 2021, "Loss function").

The reference compares colours at all scales and adds up; so do we. Two things are ours: pixels of the target that no plane covers
count neither in L1 nor in SSIM (the reference masks L1 only), and pictures are reduced by averages, not by picking pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from co3d_ensemble.functional.mpi import MPIView, blend_source, render_source_view, render_target_view
from co3d_ensemble.functional.mpi_losses import (
    disparity_scale,
    edge_aware_smoothness,
    edge_threshold_smoothness,
    l1_loss,
    log_disparity_loss,
    ssim_loss,
)
from co3d_ensemble.mine.pairs import Pair

ALL_SCALES = 4


@dataclass(frozen=True)
class Objective:
    """Which losses of a batch are computed, and how.

    Attributes:
        names: losses of ``mine.config.LOSSES``.
        mode: of the planes, ``sigma`` or ``alpha``.
        blend: visible source pixels keep the photograph's colours.
        calibrate: fit the planes' unit to the source's sparse points (of a pair whose source has none, the target does not count);
            False: the data's unit is the planes'.
        smoothness_gmin, smoothness_ratio: see :func:`edge_threshold_smoothness`.
    """

    names: frozenset[str]
    mode: str = "sigma"
    blend: bool = True
    calibrate: bool = True
    smoothness_gmin: float = 2.0
    smoothness_ratio: float = 0.1

    def losses(self, planes: Sequence[tuple[Tensor, Tensor]], disparity: Tensor, pair: Pair) -> dict[str, Tensor]:
        """Unweighted scalars by name, each summed over the scales.

        Args:
            planes: colour and density (or opacity) of the network at scales 1, 1/2, .. of the pictures' size, rounded up.
            disparity: of the planes, descending, shape (B, N).
            pair: a batch.
        """
        if self.calibrate:
            pair = without_points_of_no_unit(pair)
        total: dict[str, Tensor] = {}
        unit: Tensor | None = None
        for scale, (rgb, sigma) in enumerate(planes):
            small = reduced(pair, scale)
            source, target, unit = self._views(rgb, sigma, disparity, small, unit)
            for name, value in self._at_one_scale(source, target, small, unit, full=scale == 0).items():
                total[name] = total[name] + value if name in total else value
        return total

    def _views(self, rgb: Tensor, sigma: Tensor, disparity: Tensor, pair: Pair, unit: Tensor | None) -> tuple[MPIView, MPIView, Tensor]:
        """The planes at both cameras, and by how much larger their disparities are than the data's (B,): that of the full scale."""
        depth = disparity.reciprocal()
        source = render_source_view(rgb, sigma, depth, pair.K_source, mode=self.mode)
        if self.blend:
            rgb = blend_source(rgb, source.transmittance, pair.source)
        if unit is None:
            if self.calibrate:
                unit = disparity_scale(source.disparity, pair.source_points)
            else:
                unit = torch.ones_like(disparity[:, 0])
        height, width = pair.target.shape[-2:]
        target = render_target_view(
            rgb,
            sigma,
            depth,
            K_source=pair.K_source,
            K_target=pair.K_target,
            R=pair.R,
            t=pair.t / unit.detach()[:, None],
            height=height,
            width=width,
            mode=self.mode,
        )
        if self.calibrate:  # where the unit is not known, nobody knows what the target shows either
            target = replace(target, valid=target.valid & _has_points(pair).view(-1, 1, 1, 1))
        return source, target, unit

    def _at_one_scale(self, source: MPIView, target: MPIView, pair: Pair, unit: Tensor, *, full: bool) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if "loss_rgb_target" in self.names:
            found["loss_rgb_target"] = l1_loss(target.rgb, pair.target, target.valid)
        if "loss_ssim_target" in self.names:
            found["loss_ssim_target"] = ssim_loss(target.rgb, pair.target, target.valid)
        if "loss_smooth_v1_target" in self.names and full:
            limits = {"min_gradient": self.smoothness_gmin, "edge_ratio": self.smoothness_ratio}
            found["loss_smooth_v1_target"] = edge_threshold_smoothness(target.disparity, pair.target, **limits)
        for side, view, picture, points in (
            ("source", source, pair.source, pair.source_points),
            ("target", target, pair.target, pair.target_points),
        ):
            if f"loss_smooth_v2_{side}" in self.names:
                found[f"loss_smooth_v2_{side}"] = edge_aware_smoothness(view.disparity, picture)
            if f"loss_disparity_{side}" in self.names:
                found[f"loss_disparity_{side}"] = log_disparity_loss(view.disparity, points, unit)
        return found


def without_points_of_no_unit(pair: Pair) -> Pair:
    """A batch whose pictures without source points, and so without a unit of length, have no target points either."""
    if pair.target_points is None:
        return pair
    return replace(pair, target_points=torch.where(_has_points(pair)[:, None, None], pair.target_points, 0.0))


def _has_points(pair: Pair) -> Tensor:
    """(B,), bool."""
    return (pair.source_points[..., 2] > 0).any(dim=1)


def reduced(pair: Pair, scale: int) -> Pair:
    """A batch at 1 / 2^scale of its size, rounded up: the network's grid, whose last pixels may lie half outside of the picture.

    Intrinsics and the points' pixel positions go along; depth and masks are left out.
    """
    if scale == 0:
        return pair
    factor = 2**scale

    def averaged(picture: Tensor) -> Tensor:
        height, width = picture.shape[-2:]
        padded = F.pad(picture, (0, -width % factor, 0, -height % factor), mode="replicate")
        return F.avg_pool2d(padded, factor)

    def moved(points: Tensor | None) -> Tensor | None:
        return None if points is None else torch.cat((points[..., :2] / factor, points[..., 2:]), dim=-1)

    def shrunk(K: Tensor) -> Tensor:
        return torch.cat((K[:, :2] / factor, K[:, 2:]), dim=1)

    return Pair(
        name=pair.name,
        source=averaged(pair.source),
        target=averaged(pair.target),
        K_source=shrunk(pair.K_source),
        K_target=shrunk(pair.K_target),
        R=pair.R,
        t=pair.t,
        source_points=moved(pair.source_points),
        target_points=moved(pair.target_points),
    )
