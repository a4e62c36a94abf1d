"""Multiplane images: compositing of planes and rendering of views (Li et al., "MINE", ICCV 2021, equations 1 to 7 of the slides).

A multiplane image has ``rgb`` (B, N, 3, H, W) in [0, 1] and ``sigma`` (B, N, 1, H, W), density per world unit >= 0 in mode
"sigma" or opacity in [0, 1] in mode "alpha". Its planes stand at ``depth`` (B, N) in front of the source camera, nearest first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from co3d_ensemble.functional.mpi_target import render_planes, render_planes_stored
from co3d_ensemble.functional.mpi_warp import LAST_DISTANCE, pixel_directions, plane_hits
from co3d_ensemble.functional.types import SURFACE_ALPHA

MODES = ("sigma", "alpha")
VALID_PLANES = 2  # a target pixel is valid where so many planes fall inside the source picture (all of them where there are fewer)


@dataclass(frozen=True)
class MPIView:
    """What a multiplane image shows at one camera per batch entry.

    Attributes:
        rgb: on black, equation (1), shape (B, 3, H, W).
        depth: z in the view's camera, world units: Z of equation (7) divided by alpha where alpha > ``SURFACE_ALPHA``, else 0.
            Equation (7) does not divide; its Z is too small wherever the planes are not opaque, which is why the reference
            divides too. Shape (B, 1, H, W).
        alpha: ``sum_i T_i (1 - exp(-sigma_i delta_i))``, shape (B, 1, H, W).
        disparity: the slides' D, for which they have no equation: 1 / depth as in the reference, not ``sum w_i / z_i``;
            0 where depth is 0, shape (B, 1, H, W).
        transmittance: T_i of equation (2) (source views), shape (B, N, 1, H, W); None in target views.
        valid: target pixels that at least two planes fall on from inside the source picture, bool, shape (B, 1, H, W);
            None in source views.
    """

    rgb: Tensor
    depth: Tensor
    alpha: Tensor
    disparity: Tensor
    transmittance: Tensor | None = None
    valid: Tensor | None = None


def plane_distances(depth: Tensor, K: Tensor, height: int, width: int) -> Tensor:
    """Equations (3) and (4): ``delta_i(x, y) = ||C(x, y, z_{i+1}) - C(x, y, z_i)||``, the last one 1e3.

    Back-projection is linear in z, so this is ``(z_{i+1} - z_i) ||K^-1 (x, y, 1)||``. Equation (4) has no value for the last
    plane, behind which there is none; ``LAST_DISTANCE`` is the reference's.

    Args:
        depth: ascending, shape (B, N).
        K: intrinsics in pixels of the picture of ``height`` x ``width``, shape (B, 3, 3).

    Returns:
        World units, shape (B, N, 1, height, width).
    """
    length = pixel_directions(K, height, width).norm(dim=1)[:, None, None].to(depth.dtype)
    inner = depth.diff(dim=1)[:, :, None, None, None] * length
    return torch.cat((inner, torch.full_like(length, LAST_DISTANCE)), dim=1)


def composite(
    rgb: Tensor, sigma: Tensor, distances: Tensor | None, depth: Tensor, *, mode: str = "sigma"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Equations (1), (2) and (7), front to back.

    T_i is the exact product. The reference multiplies by exp(-sigma delta) + 1e-6 to keep its gradient away from 0 in a
    cumulative product; sums of optical depths need no such offset.

    Args:
        rgb: shape (B, N, 3, H, W).
        sigma: density, or opacity in mode "alpha", shape (B, N, 1, H, W).
        distances: delta_i, shape (B, N, 1, H, W); unused, may be None, in mode "alpha".
        depth: z_i of the planes, shape (B, N), or of their points, shape (B, N, 1, H, W).

    Returns:
        I (B, 3, H, W), Z (B, 1, H, W) as in equation (7) (not divided by the opacity), weights ``T_i alpha_i`` and T_i, both
        (B, N, 1, H, W). The weights sum to the opacity of the pixel.

    Raises:
        ValueError: an unknown mode.
    """
    check_mode(mode)
    if mode == "sigma":
        optical_depth = sigma * distances
        transmittance = torch.exp(optical_depth - optical_depth.cumsum(dim=1))
        weights = transmittance * -torch.expm1(-optical_depth)
    else:
        passing = torch.cumprod(1 - sigma, dim=1)
        transmittance = torch.cat((torch.ones_like(sigma[:, :1]), passing[:, :-1]), dim=1)
        weights = transmittance * sigma
    if depth.dim() == 2:
        depth = depth[:, :, None, None, None]
    return weighted_sum(weights, rgb), (weights * depth).sum(dim=1), weights, transmittance


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """``sum_i w_i v_i`` over the planes without the products of all planes in memory: (B, N, 1, H, W), (B, N, C, H, W) to (B, C, H, W)."""
    total = torch.zeros_like(values[:, 0], dtype=torch.promote_types(weights.dtype, values.dtype))
    for weight, value in zip(weights.unbind(dim=1), values.unbind(dim=1)):  # unbind: its gradient is one stack
        total = total + weight * value
    return total


def render_source_view(rgb: Tensor, sigma: Tensor, depth: Tensor, K: Tensor, *, mode: str = "sigma") -> MPIView:
    """The multiplane image seen from its own camera: equations (1) to (4) and (7).

    Args:
        rgb, sigma: the planes (module docstring); of 16 bits, they are composited in float32.
        depth: of the planes, ascending, shape (B, N).
        K: intrinsics in pixels of the planes, shape (B, 3, 3).

    Returns:
        A view of H x W with ``transmittance``. Differentiable in all arguments.

    Raises:
        ValueError: shapes that do not fit, or an unknown mode.
    """
    check_planes(rgb, sigma, depth, mode)
    rgb, sigma, depth = (value.to(working_dtype(rgb)) for value in (rgb, sigma, depth))
    distances = plane_distances(depth, K, *rgb.shape[-2:]) if mode == "sigma" else None
    image, z, weights, transmittance = composite(rgb, sigma, distances, depth, mode=mode)
    return _view(image, z, weights.sum(dim=1), transmittance=transmittance)


def mean_plane_weights(view: MPIView) -> Tensor:
    """The weights ``T_i - T_{i+1}`` of a source view's planes, averaged over its pixels: what ``fine_disparities`` samples from.

    Returns:
        Shape (B, N); a row sums to the mean opacity.

    Raises:
        ValueError: a target view, which keeps no transmittance.
    """
    if view.transmittance is None:
        raise ValueError("mean_plane_weights: expected a source view, got one without transmittance")
    light = torch.cat((view.transmittance, 1 - view.alpha[:, None]), dim=1).mean(dim=(2, 3, 4))
    return light[:, :-1] - light[:, 1:]


def blend_source(rgb: Tensor, transmittance: Tensor, image: Tensor) -> Tensor:
    """``c_i <- T_i I_source + (1 - T_i) c_i``: what the source camera sees keeps the photograph's colours.

    Args:
        rgb: the planes' colours, shape (B, N, 3, H, W).
        transmittance: T_i of the source view, shape (B, N, 1, H, W). Its gradient is kept, as in the reference.
        image: the source photograph, shape (B, 3, H, W).
    """
    return torch.lerp(rgb.to(transmittance.dtype), image[:, None].to(transmittance.dtype), transmittance)


def render_target_view(
    rgb: Tensor,
    sigma: Tensor,
    depth: Tensor,
    *,
    K_source: Tensor,
    K_target: Tensor,
    R: Tensor,
    t: Tensor,
    height: int,
    width: int,
    mode: str = "sigma",
    plane_chunk: int | None = None,
    checkpoint: bool = True,
) -> MPIView:
    """The multiplane image seen from another camera: equations (1), (2), (5), (6) and (7).

    Colour and density are warped bilinearly (between the outermost pixel centres and the edge of the source picture they are
    those of the edge pixel); distances and depths come from geometry, see ``mpi_warp``: along a target ray neighbouring planes
    are ``(z_{i+1} - z_i) |r| / |u_z|`` apart. That equals equation (6), with its warped points, wherever the points were
    really warped and not taken from the source picture's edge. Nothing of a plane is left behind the target camera, at its
    centre, outside the source picture, or for rays that do not run with the planes: there its density is 0.

    Planes go through in chunks, front to back, with a running transmittance, so memory beyond the arguments' does not grow
    with their number.

    Args:
        rgb, sigma: the planes (module docstring); of 16 bits, they are composited in float32.
        depth: of the planes in the source camera, ascending, shape (B, N).
        K_source, K_target: intrinsics in pixels of the planes and of the target picture, shape (B, 3, 3).
        R, t: ``X_target = R X_source + t``, shapes (B, 3, 3) and (B, 3).
        height, width: of the target picture.
        plane_chunk: planes warped at a time; None is what suits the device.
        checkpoint: the warped planes are computed again in the backward pass; gradients reach rgb and sigma only, once. With
            False autograd keeps them: memory grows with N, but gradients also reach depth, poses and intrinsics, any order.

    Returns:
        A view of height x width with ``valid``.

    Raises:
        ValueError: shapes that do not fit, ``plane_chunk`` < 1, or an unknown mode.
    """
    check_planes(rgb, sigma, depth, mode)
    if plane_chunk is not None and plane_chunk < 1:
        raise ValueError(f"plane_chunk={plane_chunk}: expected at least 1")
    hits = plane_hits(
        K_source,
        K_target,
        R,
        t,
        depth=depth,
        source_size=(rgb.shape[-2], rgb.shape[-1]),
        target_size=(height, width),
        dtype=working_dtype(rgb),
    )
    render = render_planes if checkpoint else render_planes_stored
    image, along, passing, count = render(rgb, sigma, hits, mode=mode, chunk=plane_chunk)
    return _view(image, along * hits.advance, 1 - passing, valid=count >= min(VALID_PLANES, depth.shape[1]))


def working_dtype(planes: Tensor) -> torch.dtype:
    """float32 for planes of 16 bits, else their own."""
    return torch.promote_types(planes.dtype, torch.float32)


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")


def check_planes(rgb: Tensor, sigma: Tensor, depth: Tensor, mode: str) -> None:
    check_mode(mode)
    if rgb.dim() != 5 or rgb.shape[2] != 3:
        raise ValueError(f"rgb: expected shape (B, N, 3, H, W), got {tuple(rgb.shape)}")
    batch, planes, _, height, width = rgb.shape
    if sigma.shape != (batch, planes, 1, height, width):
        raise ValueError(f"sigma: expected shape {(batch, planes, 1, height, width)} like rgb's, got {tuple(sigma.shape)}")
    if planes < 1 or depth.shape != (batch, planes):
        raise ValueError(f"depth: expected shape {(batch, planes)} of at least one plane, got {tuple(depth.shape)}")


def _view(rgb: Tensor, z: Tensor, alpha: Tensor, *, transmittance: Tensor | None = None, valid: Tensor | None = None) -> MPIView:
    surface = alpha > SURFACE_ALPHA
    nothing = torch.zeros_like(z)
    depth = torch.where(surface, z / torch.where(surface, alpha, torch.ones_like(alpha)), nothing)
    # a surface's z is above 0: every plane that counts is in front of the camera
    disparity = torch.where(surface, torch.where(surface, depth, torch.ones_like(depth)).reciprocal(), nothing)
    return MPIView(rgb=rgb, depth=depth, alpha=alpha, disparity=disparity, transmittance=transmittance, valid=valid)
