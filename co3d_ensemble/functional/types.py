"""The few records that travel between the floors. Shapes and units are stated once, here."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SURFACE_ALPHA = 1e-3  # below this opacity a pixel has no surface, so its depth is 0


@dataclass(frozen=True)
class PinholeCamera:
    """One pinhole camera in PyTorch3D's convention with intrinsics in pixels.

    World to view is ``X_view = X_world @ R + T`` (row vectors); the view axes are +X left, +Y up, +Z into the scene.
    The centre of the top left pixel is (0.5, 0.5); column grows to the right and row downwards.

    Attributes:
        R: rotation, shape (3, 3).
        T: translation in world units, shape (3,).
        focal: focal lengths (fx, fy) in pixels, shape (2,).
        principal: principal point (cx, cy) in pixels from the top left corner of the picture, shape (2,).
        height, width: picture size in pixels.
    """

    R: Tensor
    T: Tensor
    focal: Tensor
    principal: Tensor
    height: int
    width: int

    def to(self, device: torch.device | str) -> PinholeCamera:
        return replace(
            self, R=self.R.to(device), T=self.T.to(device), focal=self.focal.to(device), principal=self.principal.to(device)
        )

    def resized(self, height: int, width: int) -> PinholeCamera:
        """The same camera for the picture resampled to ``height x width`` pixels."""
        scale = torch.tensor([width / self.width, height / self.height], dtype=self.focal.dtype, device=self.focal.device)
        return replace(self, focal=self.focal * scale, principal=self.principal * scale, height=height, width=width)

    def strided(self, stride: int) -> PinholeCamera:
        """The camera whose pixel centres are those of every ``stride``-th row and column of this one's picture, from the first.

        Column j of the small picture is column ``stride j`` of the large one: ``j + 0.5 = (stride j + 0.5 + (stride - 1) / 2) / stride``.
        """
        focal, principal = self.focal / stride, (self.principal + (stride - 1) / 2) / stride
        return replace(self, focal=focal, principal=principal, height=-(-self.height // stride), width=-(-self.width // stride))


@dataclass(frozen=True)
class RenderedView:
    """What a model shows at one camera.

    Attributes:
        rgb: colour premultiplied by opacity, on black, in [0, 1], shape (3, H, W).
        depth: z in camera space, world units: ``sum w z / sum w`` where the opacity exceeds ``SURFACE_ALPHA``, else 0;
            shape (1, H, W).
        mask: opacity in [0, 1], shape (1, H, W).
    """

    rgb: Tensor
    depth: Tensor
    mask: Tensor

    def cpu(self) -> RenderedView:
        return RenderedView(self.rgb.cpu(), self.depth.cpu(), self.mask.cpu())


@dataclass(frozen=True)
class RayTargets:
    """Ground truth at sampled pixels.

    Attributes:
        rgb: unmasked colour in [0, 1], shape (n_rays, 3).
        mask: 1 inside the foreground mask, else 0, shape (n_rays,).
    """

    rgb: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Frame:
    """One decoded photograph with its camera, as the ray bank and the scoring take it.

    Attributes:
        name: ``<sequence>/<frame_number>`` - used in messages and result files.
        rgb: uint8, shape (3, H, W), not masked.
        mask: uint8 foreground probability times 255, shape (1, H, W).
        camera: its camera at this size.
        depth: optional ground-truth z depth in world units, 0 = unknown, shape (1, H, W), float32.
        depth_mask: optional 0/1 float32 validity of ``depth``, shape (1, H, W).
    """

    name: str
    sequence_name: str
    frame_number: int
    rgb: Tensor
    mask: Tensor
    camera: PinholeCamera
    depth: Tensor | None = None
    depth_mask: Tensor | None = None

    def strided(self, stride: int) -> Frame:
        """This frame at every ``stride``-th pixel, not averaged: scores of it are those of the full picture on fewer pixels."""
        pictures = {name: getattr(self, name) for name in ("rgb", "mask", "depth", "depth_mask")}
        fewer = {name: None if picture is None else picture[:, ::stride, ::stride].contiguous() for name, picture in pictures.items()}
        return replace(self, camera=self.camera.strided(stride), **fewer)
