"""Late fusion: the views of several models at one camera, averaged into one (CO3D many-view solution, "Late fusion").

The published fusion is the plain average of RGB, depth and mask. The rules beyond it only change the weights of the average:
they are never negative and sum to 1 over the members, so colour stays premultiplied by an opacity in [0, 1]. Depth deviates
from the published average: a member without a surface at a pixel has depth 0 there, which is no depth, so only members that
have a surface are averaged, each with its opacity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from co3d_ensemble.functional.types import SURFACE_ALPHA, RenderedView

PIXEL_METHODS = ("opacity", "confidence", "agreement")  # weights per pixel, from the views alone
WEIGHT_METHODS = ("weights", "fitted", "fitted_zones", "member")  # weights that the rule brings along
METHODS = ("mean", *PIXEL_METHODS, *WEIGHT_METHODS)

OPACITY_FLOOR = SURFACE_ALPHA  # where no member has a surface the opacities decide nothing: the plain average remains
CERTAINTY_FLOOR = 0.01  # equally uncertain members share their pixel; one that is certain has 100 times their weight
AGREEMENT_SCALE = 0.05  # distance from the members' median, in colour, at which a member's weight is halved
ZONE_EDGES = (0.1, 0.9)  # mean opacity that parts background, silhouette and inside
WEIGHT_SUM_TOLERANCE = 1e-4  # weights come from files and float32 maths


@dataclass(frozen=True)
class FusionRule:
    """How members are weighed; ``weights`` holds a row for all pixels, or one per zone (``fitted_zones``).

    Raises:
        ValueError: an unknown method, rows that the method does not take, a negative weight, or a row that does not sum to 1.
    """

    method: str = "mean"
    weights: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"fusion method {self.method!r}: expected one of {', '.join(METHODS)}")
        rows = 0 if self.method not in WEIGHT_METHODS else n_zones() if self.method == "fitted_zones" else 1
        if len(self.weights) != rows:
            raise ValueError(f"fusion method {self.method} takes {rows} rows of weights, got {len(self.weights)}")
        for row in self.weights:
            if not all(weight >= 0 for weight in row) or abs(sum(row) - 1) > WEIGHT_SUM_TOLERANCE:  # nan fails both
                raise ValueError(f"fusion weights {list(row)}: must not be negative and sum to 1")

    def as_json(self) -> dict[str, Any]:
        return {"method": self.method, "weights": [list(row) for row in self.weights]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> FusionRule:
        return cls(value["method"], tuple(tuple(row) for row in value["weights"]))


def fuse(views: Sequence[RenderedView], color: FusionRule, mask: FusionRule | None = None) -> RenderedView:
    """The members' views as one, by a rule for colour and depth and one for the mask (None: the same)."""
    color_weights = rule_weights(color, views)
    return fuse_views(views, color_weights, color_weights if mask is None else rule_weights(mask, views))


def fuse_views(views: Sequence[RenderedView], weights: Tensor | None = None, mask_weights: Tensor | None = None) -> RenderedView:
    """Weighted average of views of one size.

    Args:
        views: one per member, at least one, finite.
        weights: of colour and depth, shape (n_members,) or (n_members, 1, H, W); not negative, sum 1 over the members;
            None: the plain average.
        mask_weights: of the opacity, alike; None: as ``weights``.

    Returns:
        A view as ``RenderedView`` has it: depth is ``sum w a z / sum w a`` (a = opacity) over the members that have a surface
        where the fused opacity exceeds ``SURFACE_ALPHA``, else 0.

    Raises:
        ValueError: no views, sizes that differ, non-finite values (naming member and plane), or weights that are none.
    """
    rgb, depth, mask = stacked(views)
    weights = _checked_weights(weights, mask)
    mask_weights = weights if mask_weights is None else _checked_weights(mask_weights, mask)
    fused_mask = (mask_weights * mask).sum(dim=0)
    fused_depth = _mean_depth(depth, mask, weights)
    return RenderedView((weights * rgb).sum(dim=0), torch.where(fused_mask > SURFACE_ALPHA, fused_depth, 0.0), fused_mask)


def stacked(views: Sequence[RenderedView]) -> tuple[Tensor, Tensor, Tensor]:
    """rgb (n_members, 3, H, W), depth and mask (n_members, 1, H, W); errors as in :func:`fuse_views`."""
    if not views:
        raise ValueError("no views to fuse")
    sizes = [tuple(view.rgb.shape) for view in views]
    for member, view in enumerate(views):
        if sizes[member] != sizes[0] or not view.depth.shape == view.mask.shape == (1, *sizes[0][1:]):
            raise ValueError(f"views to fuse differ in size: {sizes}, member {member}'s depth {tuple(view.depth.shape)}")
        for name in ("rgb", "depth", "mask"):
            if not torch.isfinite(getattr(view, name)).all():
                raise ValueError(f"member {member}: its {name} has non-finite values")
    return tuple(torch.stack([getattr(view, name) for view in views]) for name in ("rgb", "depth", "mask"))


def has_surface(depth: Tensor, mask: Tensor) -> Tensor:
    """Where a member has a surface whose depth can be averaged; boolean, shape of the inputs."""
    return (mask > SURFACE_ALPHA) & (depth > 0)


def rule_weights(rule: FusionRule, views: Sequence[RenderedView]) -> Tensor:
    """The rule's weights at the given views, shape (n_members, 1, 1, 1) or (n_members, 1, H, W).

    Raises:
        ValueError: the rule was made for another number of members.
    """
    rgb, _, mask = stacked(views)
    if rule.method == "mean":
        return _checked_weights(None, mask)
    if rule.method == "opacity":
        return opacity_weights(mask)
    if rule.method == "confidence":
        return confidence_weights(mask)
    if rule.method == "agreement":
        return agreement_weights(rgb, mask)
    if len(rule.weights[0]) != len(views):
        raise ValueError(f"a fusion rule for {len(rule.weights[0])} members cannot fuse {len(views)}")
    table = torch.tensor(rule.weights, dtype=mask.dtype, device=mask.device)
    if rule.method == "fitted_zones":
        return table[zones(mask)].permute(2, 0, 1)[:, None]
    return table[0].view(-1, 1, 1, 1)


def opacity_weights(mask: Tensor) -> Tensor:
    """Weights proportional to the members' opacity: what one member has and another lacks is kept.

    Args:
        mask: opacities, shape (n_members, 1, H, W).

    Returns:
        Shape (n_members, 1, H, W).
    """
    shares = mask + OPACITY_FLOOR
    return shares / shares.sum(dim=0)


def confidence_weights(mask: Tensor) -> Tensor:
    """Weights by how decided each member's opacity a is: proportional to 0.01 + 1 - H(a) / ln 2, H the entropy of (a, 1 - a).

    A member that is undecided about a silhouette (a = 1/2) leaves it to one that is not, whatever that one says.
    Shapes as :func:`opacity_weights`.
    """
    inside = mask.clamp(0, 1)
    entropy = torch.special.entr(inside) + torch.special.entr(1 - inside)
    shares = CERTAINTY_FLOOR + 1 - entropy / math.log(2)
    return shares / shares.sum(dim=0)


def agreement_weights(rgb: Tensor, mask: Tensor) -> Tensor:
    """Robust weights ``1 / (1 + (d / 0.05)^2)``, d each member's distance from the members' median (Cauchy's weights, one step).

    The distance is the root mean square over the three colours and the opacity. Two members are equally far from their median,
    so this is the plain average for them; of three or more, outliers lose their say.

    Args:
        rgb, mask: shapes (n_members, 3, H, W) and (n_members, 1, H, W).

    Returns:
        Shape (n_members, 1, H, W).
    """
    values = torch.cat((rgb, mask), dim=1)
    ordered = values.sort(dim=0).values
    median = (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2
    squared = (values - median).square().mean(dim=1, keepdim=True)
    shares = 1 / (1 + squared / AGREEMENT_SCALE**2)
    return shares / shares.sum(dim=0)


def n_zones() -> int:
    return len(ZONE_EDGES) + 1


def zones(mask: Tensor) -> Tensor:
    """0 in the background, 1 on the silhouette, 2 inside, by the members' mean opacity.

    Args:
        mask: opacities, shape (n_members, 1, H, W).

    Returns:
        int64, shape (H, W).
    """
    mean = mask.mean(dim=0)[0]
    return sum((mean > edge).long() for edge in ZONE_EDGES)


def _mean_depth(depth: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Depth averaged over the members that have a surface, 0 where none has one; shape (1, H, W)."""
    opacity = mask * has_surface(depth, mask)
    shares = weights * opacity
    # a weight of 0 must not cost a surface that only this member has: there the opacity alone decides
    shares = torch.where(shares.sum(dim=0) > 0, shares, opacity)
    total = shares.sum(dim=0)
    return torch.where(total > 0, (shares * depth).sum(dim=0) / torch.where(total > 0, total, 1.0), 0.0)


def _checked_weights(weights: Tensor | None, mask: Tensor) -> Tensor:
    """As (n_members, 1, 1, 1) or (n_members, 1, H, W)."""
    count = len(mask)
    if weights is None:
        return mask.new_full((count, 1, 1, 1), 1 / count)
    if tuple(weights.shape) not in ((count,), (count, 1, 1, 1), tuple(mask.shape)):
        raise ValueError(f"weights of shape {tuple(weights.shape)} for {count} views: expected ({count},) or {tuple(mask.shape)}")
    weights = weights.to(mask).reshape(count, 1, *weights.shape[2:] if weights.ndim == 4 else (1, 1))
    excess = (weights.sum(dim=0) - 1).abs().max()
    if not (weights >= 0).all() or not excess <= WEIGHT_SUM_TOLERANCE:
        raise ValueError(f"weights must not be negative and sum to 1 over the members: least {weights.min()}, sum off by {excess}")
    return weights
