"""What needs no learning: the source picture as it is, or warped as one plane, and one depth for all pixels.

The depths are single values for all pictures, chosen on training pairs; per picture the best one is an oracle's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from co3d_ensemble.functional.metrics import psnr_fg
from co3d_ensemble.functional.mpi import render_target_view
from co3d_ensemble.mine.pairs import Pair


def candidate_depths(near: float, far: float, count: int) -> list[float]:
    """z at equal steps of the logarithm, from ``near`` to ``far``."""
    return torch.logspace(torch.tensor(near).log10().item(), torch.tensor(far).log10().item(), count, dtype=torch.float64).tolist()


def warped(pair: Pair, depths: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The source as a plane at each of some depths, seen by the target camera.

    Returns:
        Colour (len(depths), 3, H, W), and pixels whose ray meets the plane inside the source picture, bool, (len(depths), 1, H, W).
    """
    n = len(depths)
    view = render_target_view(
        pair.source.expand(n, 1, -1, -1, -1),
        torch.ones_like(pair.source[:1]).expand(n, 1, -1, -1, -1),
        pair.source.new_tensor(depths)[:, None],
        K_source=pair.K_source.expand(n, 3, 3),
        K_target=pair.K_target.expand(n, 3, 3),
        R=pair.R.expand(n, 3, 3),
        t=pair.t.expand(n, 3),
        height=pair.target.shape[-2],
        width=pair.target.shape[-1],
        mode="alpha",
    )
    return view.rgb, view.valid


def warp_scores(pair: Pair, depths: Sequence[float]) -> list[float]:
    """PSNR in dB of the warp at each depth, over the pixels that it covers; -inf where it covers none."""
    rgb, valid = warped(pair, depths)
    return [psnr_fg(picture, pair.target, mask.float()).item() if mask.any() else -torch.inf for picture, mask in zip(rgb, valid)]


def constant_depth_errors(depth: Tensor, depths: Sequence[float]) -> list[float]:
    """Abs Rel of a constant depth against the true one (1, H, W), for each of some values, over pixels with known depth."""
    known = depth[depth > 0].double()
    return [((known - z).abs() / known).mean().item() for z in depths]


@dataclass(frozen=True)
class SingleDepths:
    """The depths that do best on average over some pairs.

    Attributes:
        warp: z of the plane whose warps have the largest mean PSNR.
        constant: z with the smallest mean Abs Rel; None where no pair has depth.
    """

    warp: float
    constant: float | None


def best_single_depths(pairs: Iterable[Pair], depths: Sequence[float]) -> SingleDepths:
    """Chosen among candidates on training pairs."""
    quality = torch.zeros(len(depths), dtype=torch.float64)
    error = torch.zeros(len(depths), dtype=torch.float64)
    n_depth = 0
    for pair in pairs:
        quality += torch.tensor(warp_scores(pair, depths), dtype=torch.float64)
        if pair.source_depth is not None and (pair.source_depth > 0).any():
            error += torch.tensor(constant_depth_errors(pair.source_depth, depths), dtype=torch.float64)
            n_depth += 1
    return SingleDepths(depths[int(quality.argmax())], depths[int(error.argmin())] if n_depth else None)
