"""Pinhole cameras in PyTorch3D's convention: pixels to rays, NDC intrinsics, small rotations, box intersection."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from co3d_ensemble.functional.types import PinholeCamera

NDC_FORMATS = ("ndc_isotropic", "ndc_norm_image_bounds")
_SMALL_ANGLE = 1e-4  # below it sin(x)/x and (1 - cos x)/x^2 lose digits; their series are exact to 1e-17 there


def pinhole_from_ndc(
    R: Tensor, T: Tensor, focal: Tensor, principal: Tensor, *, height: int, width: int, intrinsics_format: str = "ndc_isotropic"
) -> PinholeCamera:
    """Camera with intrinsics in pixels from CO3D's normalised ones.

    PyTorch3D's NDC has +x to the left and +y up. ``ndc_isotropic`` scales both axes by half the shorter image side,
    ``ndc_norm_image_bounds`` (CO3Dv1) each axis by half its own side.

    Args:
        R, T: extrinsics, (3, 3) and (3,), ``X_view = X_world @ R + T``.
        focal, principal: in NDC, shape (2,).
        height, width: picture size in pixels.

    Raises:
        ValueError: unknown ``intrinsics_format``.
    """
    size = focal.new_tensor([width, height])
    if intrinsics_format == "ndc_isotropic":
        half = (size.min() / 2).expand(2)
    elif intrinsics_format == "ndc_norm_image_bounds":
        half = size / 2
    else:
        raise ValueError(f"intrinsics_format={intrinsics_format!r}: expected one of {', '.join(NDC_FORMATS)}")
    return PinholeCamera(R=R, T=T, focal=focal * half, principal=size / 2 - principal * half, height=height, width=width)


def ndc_from_pinhole(camera: PinholeCamera) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`pinhole_from_ndc` in ``ndc_isotropic``: focal (2,), principal (2,)."""
    size = camera.focal.new_tensor([camera.width, camera.height])
    half = size.min() / 2
    return camera.focal / half, (size / 2 - camera.principal) / half


def pixel_centers(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """(x, y) of every pixel centre, row by row, shape (height * width, 2), float32."""
    y, x = torch.meshgrid(
        torch.arange(height, device=device, dtype=torch.float32), torch.arange(width, device=device, dtype=torch.float32), indexing="ij"
    )
    return torch.stack((x, y), dim=-1).reshape(-1, 2) + 0.5


def view_directions(xy: Tensor, focal: Tensor, principal: Tensor) -> Tensor:
    """Directions in camera space with z = 1 through pixel positions; all arguments (..., 2), result (..., 3)."""
    direction = (principal - xy) / focal  # x points left and y up, pixels run right and down
    return torch.cat((direction, torch.ones_like(direction[..., :1])), dim=-1)


def pixel_rays(camera: PinholeCamera, xy: Tensor) -> tuple[Tensor, Tensor]:
    """Rays through pixel positions.

    Args:
        camera: R, T on the device of ``xy``.
        xy: pixel positions, shape (n, 2); (0.5, 0.5) is the centre of the top left pixel.

    Returns:
        origins (n, 3) in world units and directions (n, 3) of unit length.
    """
    direction = view_directions(xy, camera.focal, camera.principal) @ camera.R.T
    return camera_center(camera.R, camera.T).expand_as(direction), torch.nn.functional.normalize(direction, dim=-1)


def camera_center(R: Tensor, T: Tensor) -> Tensor:
    """World position of the camera, (..., 3): ``-T R^T``."""
    return -(T[..., None, :] @ R.transpose(-1, -2))[..., 0, :]


def project(points: Tensor, camera: PinholeCamera) -> tuple[Tensor, Tensor]:
    """World points (..., 3) to pixel positions (..., 2) and camera z (...), world units."""
    view = points @ camera.R + camera.T
    z = view[..., 2]
    return camera.principal - camera.focal * view[..., :2] / z[..., None], z


def distance_to_depth(distance: Tensor, directions: Tensor, R: Tensor) -> Tensor:
    """Distance along unit-length rays to z in camera space.

    Args:
        distance: shape (...).
        directions: unit world directions, shape (..., 3).
        R: camera rotation, shape (3, 3); its third column is the viewing axis in world coordinates.
    """
    return distance * (directions @ R[:, 2])


def so3_exp(rotation_vector: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of rotation vectors (..., 3) in radians (Rodrigues' formula).

    ``R v`` rotates column vectors counter-clockwise about the vector. Differentiable at 0.
    """
    squared = rotation_vector.square().sum(dim=-1)[..., None, None]
    small = squared < _SMALL_ANGLE**2
    safe = torch.where(small, torch.ones_like(squared), squared)
    angle = safe.sqrt()
    first = torch.where(small, 1 - squared / 6, angle.sin() / angle)
    second = torch.where(small, 0.5 - squared / 24, (1 - angle.cos()) / safe)
    x, y, z = rotation_vector.unbind(dim=-1)
    zero = torch.zeros_like(x)
    skew = torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), dim=-1).reshape(*x.shape, 3, 3)
    return torch.eye(3, dtype=skew.dtype, device=skew.device) + first * skew + second * (skew @ skew)


def random_rotation_vector(angle_std: float, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Rotation vectors (*shape, 3) with axis uniform on the sphere and angle ~ N(0, angle_std), from torch's generator."""
    axis = torch.nn.functional.normalize(torch.randn(*shape, 3, device=device), dim=-1)
    return axis * (angle_std * torch.randn(*shape, 1, device=device))


def intersect_box(origins: Tensor, directions: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """Distances at which rays enter and leave an axis-aligned box (slab method).

    Args:
        origins, directions: shape (n, 3).
        box: lower and upper corner, shape (2, 3).

    Returns:
        near, far, shape (n,), with 0 <= near; near = far = 0 where the ray misses the box.
    """
    # a component of exactly 0 gives +-inf slabs (and nan at a face); a tiny positive one stays finite
    safe = torch.where(directions.abs() < 1e-12, torch.full_like(directions, 1e-12), directions)
    first = (box[0] - origins) / safe
    second = (box[1] - origins) / safe
    near = torch.minimum(first, second).amax(dim=-1).clamp_min(0)
    far = torch.maximum(first, second).amin(dim=-1)
    hit = far > near
    return torch.where(hit, near, 0), torch.where(hit, far, 0)


def nearest_point_to_rays(origins: Tensor, directions: Tensor) -> Tensor:
    """Least-squares point closest to lines ``origins + t directions`` (n, 3 each, unit directions): shape (3,)."""
    projector = torch.eye(3, dtype=origins.dtype, device=origins.device) - directions[:, :, None] * directions[:, None, :]
    return torch.linalg.lstsq(projector.sum(dim=0), (projector @ origins[:, :, None]).sum(dim=0)).solution[:, 0]


def angle_between(first: Tensor, second: Tensor) -> Tensor:
    """Radians between unit vectors (..., 3), accurate near 0 and pi."""
    return 2 * torch.atan2((first - second).norm(dim=-1), (first + second).norm(dim=-1)).clamp(max=math.pi)


def inverse_intrinsics(K: Tensor) -> Tensor:
    """``K^-1`` of matrices (fx, s, cx; 0, fy, cy; 0, 0, 1), shape (..., 3, 3), in closed form: exact zeros stay zeros."""
    fx, fy, skew, cx, cy = K[..., 0, 0], K[..., 1, 1], K[..., 0, 1], K[..., 0, 2], K[..., 1, 2]
    zero, one = torch.zeros_like(fx), torch.ones_like(fx)
    entries = (1 / fx, -skew / (fx * fy), (skew * cy / fy - cx) / fx, zero, 1 / fy, -cy / fy, zero, zero, one)
    return torch.stack(entries, dim=-1).reshape(K.shape)


def resized_intrinsics(K: Tensor, size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """K (..., 3, 3) for the picture resampled from ``size`` to ``new_size``, both (height, width).

    With (0.5, 0.5) at the centre of the top left pixel, pixel coordinates scale without an offset.
    """
    scale = K.new_tensor([new_size[1] / size[1], new_size[0] / size[0], 1.0])
    return K * scale[:, None]


def opencv_from_pinhole(camera: PinholeCamera) -> tuple[Tensor, Tensor, Tensor]:
    """K (3, 3), R (3, 3) and t (3,) in OpenCV's convention: ``X_camera = R X_world + t``, x right, y down, z into the scene.

    PyTorch3D has row vectors and x left, y up: both axes flip and R is transposed. Pixel coordinates are the same.
    """
    flip = camera.R.new_tensor([-1.0, -1.0, 1.0])
    K = torch.zeros_like(camera.R)
    K[0, 0], K[1, 1], K[2, 2] = camera.focal[0], camera.focal[1], 1.0
    K[:2, 2] = camera.principal
    return K, flip[:, None] * camera.R.T, flip * camera.T


def pinhole_from_opencv(K: Tensor, R: Tensor, t: Tensor, *, height: int, width: int) -> PinholeCamera:
    """Inverse of :func:`opencv_from_pinhole`.

    Raises:
        ValueError: K has skew, for which ``PinholeCamera`` has no place.
    """
    if K[0, 1] != 0:
        raise ValueError(f"K has skew {K[0, 1].item()}: a PinholeCamera has none")
    flip = R.new_tensor([-1.0, -1.0, 1.0])
    focal = torch.stack((K[0, 0], K[1, 1]))
    return PinholeCamera(R=R.T * flip, T=flip * t, focal=focal, principal=K[:2, 2].clone(), height=height, width=width)


def relative_pose(R_source: Tensor, t_source: Tensor, R_target: Tensor, t_target: Tensor) -> tuple[Tensor, Tensor]:
    """R (..., 3, 3), t (..., 3) with ``X_target = R X_source + t``, of two poses ``X = R X_world + t`` in OpenCV's convention."""
    R = R_target @ R_source.transpose(-1, -2)
    return R, t_target - (R @ t_source[..., None])[..., 0]
