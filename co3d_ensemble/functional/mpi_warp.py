"""Plane-induced warps: where the planes of a source camera's multiplane image are met by a target camera's pixels.

Pixel coordinates have (0.5, 0.5) at the centre of the top left pixel, camera frames are OpenCV's (x right, y down, z into
the scene), and ``X_target = R X_source + t``. Plane i is ``z = z_i`` in the source camera's frame.

In what follows ``r = K_t^-1 q`` is the ray of target pixel q, ``u = R^T r`` the same in the source's axes, and
``o = -R^T t`` the target camera's centre. The ray meets plane i at ``z_target = (z_i - o_z) / u_z``, so

- the target depth of plane i is one picture, ``1 / u_z``, times one number per plane, ``z_i - o_z``;
- the source pixel is ``(1 - o_z / z_i) K_s (u / u_z) + K_s o / z_i``: one picture (where the plane at infinity is met), scaled
  and shifted per plane. A homography per plane and pixel, with its division, is not needed;
- neighbouring planes are ``(z_{i+1} - z_i) |r| / |u_z|`` apart along the ray, which is equation (6).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from co3d_ensemble.functional.cameras import inverse_intrinsics

LAST_DISTANCE = 1e3  # what the last plane reaches, as in the reference: any density there is almost opaque
GRAZING = 1e-6  # rays that rise less than this per unit length towards the planes never meet them inside a picture
NOWHERE = 1e18  # a position outside every picture, also after the smallest scale (1e-16) and in float32; not infinite: 0 * inf is NaN


def plane_homographies(K_source: Tensor, K_target: Tensor, R: Tensor, t: Tensor, depth: Tensor) -> Tensor:
    """Homographies from source pixels to target pixels, one per plane: ``H_i = K_t (R + t n^T / z_i) K_s^-1``, n = (0, 0, 1).

    Equation (5) of the slides reads ``K (R - t n^T / z_i) K^-1`` from target to source pixels. That is the same map where R
    and t lead from the target to the source and the plane is ``n^T X = -z_i`` in the target's frame; for planes that are
    fronto-parallel to the SOURCE camera at +z_i, as all of MINE's are, the sign is + and the map to sample with is the
    inverse, :func:`inverse_plane_homographies`. Two different cameras have two different K.

    Args:
        K_source, K_target: intrinsics in pixels, last row (0, 0, 1), shape (B, 3, 3).
        R, t: ``X_target = R X_source + t``, shapes (B, 3, 3) and (B, 3).
        depth: z_i > 0, shape (B, N).

    Returns:
        Shape (B, N, 3, 3), acting on homogeneous columns (x, y, 1); the third component of the result is z_target / z_i.
    """
    with _full_precision(K_source):
        normal_part = t[:, None, :, None] * _axis(depth) / depth[..., None, None]
        return K_target[:, None] @ (R[:, None] + normal_part) @ inverse_intrinsics(K_source)[:, None]


def inverse_plane_homographies(K_source: Tensor, K_target: Tensor, R: Tensor, t: Tensor, depth: Tensor) -> Tensor:
    """The inverse of :func:`plane_homographies` up to scale, in closed form (Sherman and Morrison), without a division by it.

    ``H_i^-1 ~ K_s ((1 + c / z_i) R^T - R^T t n^T R^T / z_i) K_t^-1`` with ``c = n^T R^T t``. It is finite for every plane, also
    for one that holds the target camera (``z_i = -c``), where it has rank 1.

    Returns:
        Shape (B, N, 3, 3), from target pixels to source pixels; the third component of the result is u_z, positive where the
        ray runs with the planes.
    """
    with _full_precision(K_source):
        transposed = R.transpose(1, 2)
        shift = (transposed @ t[:, :, None])[:, None]  # (B, 1, 3, 1)
        disparity = depth.reciprocal()[..., None, None]
        inner = (1 + shift[:, :, 2:] * disparity) * transposed[:, None] - shift * transposed[:, None, 2:] * disparity
        return K_source[:, None] @ inner @ inverse_intrinsics(K_target)[:, None]


@dataclass(frozen=True)
class PlaneHits:
    """Where the rays of a target picture meet the planes, factored into pictures and numbers per plane (see the module).

    Attributes:
        positions: in the source picture, of the plane at infinity, as ``grid_sample`` takes them (-1 and 1 are the outer
            edges of the picture), x before y, shape (B, 2, h, w); ``NOWHERE`` where the ray does not run with the planes
            and so meets none (they have a front side only).
        scale, shift: plane i is met at ``scale_i * positions + shift_i``; shapes (B, N) and (B, N, 2). A plane that is not
            in front of the target camera is met ``NOWHERE``.
        advance: z_target per unit of the source's z, ``1 / u_z``, shape (B, 1, h, w).
        length: length of the ray per unit of the source's z, ``|r| / u_z``, shape (B, 1, h, w).
        ahead: ``z_i - o_z``, how far plane i is in front of the target camera in the source's z, shape (B, N).
        spacing, rest: from plane i its density reaches ``spacing_i * length + rest_i`` along the ray: the spacing is
            ``z_{i+1} - z_i`` and the rest 0, but for the last plane 0 and ``LAST_DISTANCE``; shapes (B, N).
    """

    positions: Tensor
    scale: Tensor
    shift: Tensor
    advance: Tensor
    length: Tensor
    ahead: Tensor
    spacing: Tensor
    rest: Tensor


def plane_hits(
    K_source: Tensor,
    K_target: Tensor,
    R: Tensor,
    t: Tensor,
    *,
    depth: Tensor,
    source_size: tuple[int, int],
    target_size: tuple[int, int],
    dtype: torch.dtype,
) -> PlaneHits:
    """Meets the rays of all target pixels with all planes.

    Positions are computed in float64 (where the device has it) and rounded to ``dtype`` at the end: it is done once for all planes.

    Args:
        K_source, K_target, R, t, depth: as in :func:`plane_homographies`.
        source_size, target_size: (height, width) of the planes and of the target picture.
    """
    with _full_precision(K_source):
        wide = torch.float32 if depth.device.type == "mps" else torch.float64
        K_source, K_target, R, t, depth = (value.to(wide) for value in (K_source, K_target, R, t, depth))
        half = (source_size[1] / 2, source_size[0] / 2)  # numbers: a tensor made of them would have to be waited for on a GPU
        affine = torch.stack([K_source[:, axis] / half[axis] for axis in (0, 1)], dim=1)
        focal, principal = affine[..., :2], affine[..., 2:] - 1
        center = -R.transpose(1, 2) @ t[:, :, None]
        turned = R.transpose(1, 2) @ inverse_intrinsics(K_target)  # pixels (x, y, 1) to u
        numerators = focal @ turned[:, :2] + principal * turned[:, 2:]
        products = _linear(torch.cat((numerators, turned[:, 2:]), dim=1), *target_size)
        norm = pixel_directions(K_target, *target_size, dtype=dtype).square().sum(dim=1, keepdim=True).sqrt()
        runs_with = products[:, 2:] > GRAZING * norm
        advance = torch.where(runs_with, products[:, 2:], 1.0).reciprocal()
        ahead = depth - center[:, 2]
        in_front = ahead > 0
        epipole = (focal @ center[:, :2] + principal * center[:, 2:])[..., 0]
        hits = PlaneHits(
            positions=torch.where(runs_with, products[:, :2] * advance, NOWHERE),
            scale=torch.where(in_front, ahead / depth, 1.0),
            shift=torch.where(in_front[..., None], epipole[:, None] / depth[..., None], NOWHERE),
            advance=advance,
            length=norm * advance,
            ahead=ahead,
            spacing=F.pad(depth.diff(dim=1), (0, 1)),
            rest=F.pad(torch.zeros_like(depth[:, 1:]), (0, 1), value=LAST_DISTANCE),
        )
        return PlaneHits(**{entry.name: getattr(hits, entry.name).to(dtype) for entry in fields(PlaneHits)})


def pixel_directions(K: Tensor, height: int, width: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """``K^-1 (x, y, 1)`` of every pixel centre: (B, 3, height, width), the z component 1. Equation (3) at z = 1."""
    return _linear(inverse_intrinsics(K).to(dtype or K.dtype), height, width)


def _linear(matrices: Tensor, height: int, width: int) -> Tensor:
    """``M (x, y, 1)`` of every pixel centre, for matrices (B, 3, 3): (B, 3, height, width)."""
    x = torch.arange(width, device=matrices.device, dtype=matrices.dtype) + 0.5
    y = torch.arange(height, device=matrices.device, dtype=matrices.dtype) + 0.5
    columns = matrices[..., None, None]
    return columns[:, :, 0] * x + (columns[:, :, 1] * y[:, None] + columns[:, :, 2])


def _axis(like: Tensor) -> Tensor:
    return like.new_tensor([0.0, 0.0, 1.0])


def _full_precision(like: Tensor) -> torch.autocast:
    """Autocast would round poses and intrinsics to bf16 in every product of matrices."""
    return torch.autocast(like.device.type, enabled=False)
