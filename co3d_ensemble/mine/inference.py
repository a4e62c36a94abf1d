"""One picture to a multiplane image by one pass of encoder and decoder, then any number of views of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from co3d_ensemble.fields.mpi_network import ImageFeatures, MPINetwork
from co3d_ensemble.functional.mpi import MPIView, blend_source, mean_plane_weights, render_source_view, render_target_view
from co3d_ensemble.functional.mpi_sampling import fine_disparities
from co3d_ensemble.functional.mpi_warp import inverse_plane_homographies
from co3d_ensemble.mine.trajectories import Pose

SURFACE = 0.5  # a pixel counts as surface where its opacity is above
LARGEST_ZOOM = 2.0
ZOOM_STEPS = 12  # of a bisection: the zoom is exact to 1/4096


@dataclass(frozen=True)
class PlaneStack:
    """The multiplane image of one picture.

    Attributes:
        rgb: shape (N, 3, H, W), in [0, 1]; nearest plane first.
        sigma: density per world unit, or opacity in [0, 1] in mode ``alpha``; shape (N, 1, H, W).
        disparity: 1 / z of the planes in the picture's camera, descending, shape (N,).
        K: intrinsics of that camera in pixels, shape (3, 3).
        mode: ``sigma`` or ``alpha``.
        view: the stack seen from that camera, with a batch dimension of 1.
    """

    rgb: Tensor
    sigma: Tensor
    disparity: Tensor
    K: Tensor
    mode: str
    view: MPIView

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.rgb.shape[-2], self.rgb.shape[-1]


@torch.no_grad()
def predict_stack(
    network: MPINetwork,
    image: Tensor,
    K: Tensor,
    disparity: Tensor,
    *,
    features: ImageFeatures | None = None,
    plane_chunk: int | None = None,
    blend: bool = True,
    n_fine: int = 0,
) -> PlaneStack:
    """The multiplane image of a picture.

    Args:
        network: in evaluation mode.
        image: colours in [0, 1], shape (3, H, W).
        K: its intrinsics in pixels, shape (3, 3).
        disparity: 1 / z of the planes, descending, shape (N,).
        features: of ``network.encode(image[None])``, where it has been called before (other N of the same picture).
        plane_chunk: planes decoded at once; None: all.
        blend: visible source pixels keep the picture's colours, c_i <- T_i I + (1 - T_i) c_i.
        n_fine: coarse to fine: so many more planes, where a first pass over ``disparity`` finds surfaces, at equally spaced quantiles.
    """
    if features is None:
        features = network.encode(image[None])
    if n_fine:
        coarse = (part.float() for part in network.decode(features, disparity[None], plane_chunk=plane_chunk, n_scales=1)[0])
        seen = render_source_view(*coarse, disparity.reciprocal()[None], K[None], mode=network.mode)
        disparity = fine_disparities(disparity[None], mean_plane_weights(seen), n_fine, perturb=False)[0]
    rgb, sigma = (part.float() for part in network.decode(features, disparity[None], plane_chunk=plane_chunk, n_scales=1)[0])
    return blended(rgb[0], sigma[0], disparity, K, mode=network.mode, image=image if blend else None)


@torch.no_grad()
def blended(rgb: Tensor, sigma: Tensor, disparity: Tensor, K: Tensor, *, mode: str, image: Tensor | None) -> PlaneStack:
    """A stack of given planes (see :class:`PlaneStack`), its colours blended with the picture (3, H, W) unless that is None."""
    depth = disparity.reciprocal()[None]
    view = render_source_view(rgb[None], sigma[None], depth, K[None], mode=mode)
    if image is not None:
        rgb = blend_source(rgb[None], view.transmittance, image[None])[0]
        view = render_source_view(rgb[None], sigma[None], depth, K[None], mode=mode)
    return PlaneStack(rgb, sigma, disparity, K, mode, replace(view, transmittance=None))


@torch.no_grad()
def enlarged(stack: PlaneStack, image: Tensor) -> PlaneStack:
    """The stack resampled to the size of ``image`` (3, H', W'), the same picture at more pixels, and blended with it.

    Where the source's surfaces are seen, views then show the photograph's own detail instead of the network's size.
    """
    height, width = image.shape[-2:]
    scale = torch.tensor([width / stack.size[1], height / stack.size[0], 1.0], dtype=stack.K.dtype, device=stack.K.device)
    smaller = height < stack.size[0] or width < stack.size[1]
    rgb, sigma = (
        F.interpolate(part, (height, width), mode="bilinear", align_corners=False, antialias=smaller) for part in (stack.rgb, stack.sigma)
    )
    return blended(rgb, sigma, stack.disparity, scale[:, None] * stack.K, mode=stack.mode, image=image)


@torch.no_grad()
def render_pose(
    stack: PlaneStack, pose: Pose, *, K: Tensor | None = None, size: tuple[int, int] | None = None, plane_chunk: int | None = None
) -> MPIView:
    """The stack seen by another camera, with a batch dimension of 1.

    Args:
        pose: from the source's camera to the other.
        K: the other's intrinsics, shape (3, 3); None: the source's.
        size: (height, width) of the other's picture; None: the source's.
        plane_chunk: planes warped at once; None: the renderer's own choice.
    """
    height, width = size or stack.size
    chunk = {} if plane_chunk is None else {"plane_chunk": plane_chunk}
    return render_target_view(
        stack.rgb[None],
        stack.sigma[None],
        stack.disparity.reciprocal()[None],
        K_source=stack.K[None],
        K_target=(stack.K if K is None else K)[None],
        R=pose.R.to(stack.K)[None],
        t=pose.t.to(stack.K)[None],
        height=height,
        width=width,
        mode=stack.mode,
        **chunk,
    )


def surface_disparities(stack: PlaneStack, quantiles: Sequence[float]) -> list[float]:
    """Quantiles of the disparity that the source camera sees, over pixels with a surface (all, where there is none).

    Args:
        quantiles: in [0, 1]; 1 is the nearest.
    """
    disparity, alpha = stack.view.disparity[0, 0], stack.view.alpha[0, 0]
    surface = disparity[alpha > SURFACE] if (alpha > SURFACE).any() else disparity.flatten()
    order = surface.double().sort().values  # not torch.quantile, which refuses more than 16 million values
    return [order[round(quantile * (len(order) - 1))].item() for quantile in quantiles]


def zoom_hiding_borders(poses: Sequence[Pose], K: Tensor, size: tuple[int, int], disparities: Sequence[float]) -> float:
    """The smallest focal-length factor at which no view of ``poses`` shows what lies outside of the source picture.

    A view's picture is convex and a homography keeps it so: its four corners decide, on every plane of ``disparities``.

    Args:
        K: of the source and, before the zoom, of the views, shape (3, 3).
        size: (height, width) of all of them.
        disparities: of the planes that are looked at, such as the nearest and the farthest surface.

    Returns:
        A factor in [1, ``LARGEST_ZOOM``]; the latter also where more would be needed.
    """
    height, width = size
    corners = torch.tensor([[0.0, 0.0, 1.0], [width, 0.0, 1.0], [0.0, height, 1.0], [width, height, 1.0]], dtype=torch.float64).T
    n = len(poses)
    camera = K.detach().cpu().double()[None].expand(n, 3, 3)
    R, t = (torch.stack([getattr(pose, name).detach().cpu().double() for pose in poses]) for name in ("R", "t"))
    depth = torch.tensor([list(disparities)], dtype=torch.float64).reciprocal().expand(n, -1)
    to_source = inverse_plane_homographies(camera, camera, R, t, depth)
    margin = 1e-6 * width  # rounding must not cost a zoom where nothing moves

    def hides(zoom: float) -> bool:
        zoomed = corners.clone()
        zoomed[:2] = camera[0, :2, 2:] + (zoomed[:2] - camera[0, :2, 2:]) / zoom
        points = to_source @ zoomed
        x, y = (points[..., axis, :] / points[..., 2, :] for axis in (0, 1))
        return bool(((x >= -margin) & (x <= width + margin) & (y >= -margin) & (y <= height + margin)).all())

    low, high = 1.0, LARGEST_ZOOM
    if hides(low):
        return low
    for _ in range(ZOOM_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if hides(middle) else (middle, high)
    return high
