"""A pair as a mirror shows it: another scene of the same kind, for nothing. The reference trains without."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from co3d_ensemble.mine.pairs import Pair


def mirrored(pair: Pair) -> Pair:
    """The pair with left and right exchanged in its pictures and, to match, in its cameras, poses and points.

    With F = diag(-1, 1, 1), which mirrors a camera's space, ``X_target = R X_source + t`` becomes ``F R F`` and ``F t``. A pixel
    x becomes W - x: the principal point moves there, and a skew changes its sign.
    """
    flip = torch.tensor([-1.0, 1.0, 1.0]).to(pair.R)
    source_width, target_width = pair.source.shape[-1], pair.target.shape[-1]
    return replace(
        pair,
        source=pair.source.flip(-1),
        target=pair.target.flip(-1),
        K_source=_intrinsics(pair.K_source, source_width),
        K_target=_intrinsics(pair.K_target, target_width),
        R=flip[:, None] * pair.R * flip,
        t=flip * pair.t,
        source_points=_points(pair.source_points, source_width),
        target_points=_points(pair.target_points, target_width),
        source_depth=_picture(pair.source_depth),
        target_depth=_picture(pair.target_depth),
        source_mask=_picture(pair.source_mask),
        target_mask=_picture(pair.target_mask),
    )


def _intrinsics(K: Tensor, width: int) -> Tensor:
    changed = K.clone()
    changed[0, 1], changed[0, 2] = -K[0, 1], width - K[0, 2]
    return changed


def _points(points: Tensor | None, width: int) -> Tensor | None:
    """A point on the right edge would fall out of the picture on the left: the edge's own pixel is kept."""
    if points is None:
        return None
    x = (width - points[:, :1]).clamp(max=width * (1 - torch.finfo(points.dtype).eps))
    return torch.cat((torch.where(points[:, 2:] > 0, x, points[:, :1]), points[:, 1:]), dim=1)


def _picture(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.flip(-1)
