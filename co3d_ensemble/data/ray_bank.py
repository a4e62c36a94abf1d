"""All pixels and cameras of one sequence, resident on the device; rays are made on the fly from (frame, pixel)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from co3d_ensemble.functional.cameras import camera_center, random_rotation_vector, so3_exp, view_directions
from co3d_ensemble.functional.types import Frame, RayTargets


@dataclass(frozen=True)
class RayBatch:
    """Rays and what the photographs show there.

    Attributes:
        origins: world units, shape (n, 3).
        directions: unit length, shape (n, 3).
        frame: index of each ray's frame in the bank, shape (n,).
        xy: pixel positions, shape (n, 2).
        targets: colour and mask at those pixels.
    """

    origins: Tensor
    directions: Tensor
    frame: Tensor
    xy: Tensor
    targets: RayTargets


class RayBank:
    """Frames of any sizes as one flat uint8 table (n_pixels, 4) of colour and mask, plus one camera per frame.

    The cost of :meth:`sample` depends on the number of rays only: it gathers single pixels and never touches a whole
    image.

    Args:
        frames: at least one; pictures uint8, masks uint8 (foreground above 127).
        device: where everything lies.

    Raises:
        ValueError: no frames.
    """

    def __init__(self, frames: Sequence[Frame], device: torch.device | str = "cpu") -> None:
        if not frames:
            raise ValueError("a ray bank needs at least one frame")
        self.device = torch.device(device)
        self.names = [frame.name for frame in frames]
        cameras = [frame.camera for frame in frames]
        pixels = [torch.cat((frame.rgb, frame.mask)).reshape(4, -1).T for frame in frames]
        self.pixels = torch.cat(pixels).contiguous().to(self.device)
        counts = torch.tensor([len(p) for p in pixels])
        self.first = torch.cat((counts.new_zeros(1), counts.cumsum(0)[:-1])).to(self.device)
        self.width = torch.tensor([c.width for c in cameras], device=self.device)
        self.R = torch.stack([c.R for c in cameras]).float().to(self.device)
        self.center = torch.stack([camera_center(c.R.double(), c.T.double()) for c in cameras]).float().to(self.device)
        self.focal = torch.stack([c.focal for c in cameras]).float().to(self.device)
        self.principal = torch.stack([c.principal for c in cameras]).float().to(self.device)

    def __len__(self) -> int:
        return len(self.names)

    def sample(
        self,
        n_rays: int,
        generator: torch.Generator | None = None,
        *,
        angle_std: float = 0.0,
        shift_std: float = 0.0,
        pivot: Tensor | None = None,
    ) -> RayBatch:
        """Rays through pixels drawn uniformly, with replacement, from all frames.

        Args:
            n_rays: how many.
            generator: of the pixels; None draws from torch's default generator.
            angle_std, shift_std: camera jitter: every frame's camera is moved by its own random rotation (radians) about
                ``pivot`` and shift (in distances to ``pivot``) in this call.
            pivot: world point, shape (3,); needed for jitter.
        """
        index = torch.randint(len(self.pixels), (n_rays,), device=self.device, generator=generator)
        return self.rays(index, angle_std=angle_std, shift_std=shift_std, pivot=pivot)

    def rays(self, index: Tensor, *, angle_std: float = 0.0, shift_std: float = 0.0, pivot: Tensor | None = None) -> RayBatch:
        """Rays through given rows (n,) of the pixel table; jitter as in :meth:`sample`."""
        frame = torch.searchsorted(self.first, index, right=True) - 1
        within = index - self.first[frame]
        width = self.width[frame]
        xy = torch.stack((within % width, within // width), dim=-1) + 0.5
        view = view_directions(xy, self.focal[frame], self.principal[frame])
        directions = torch.nn.functional.normalize((self.R[frame] @ view[..., None])[..., 0], dim=-1)
        origins = self.center[frame]
        if angle_std > 0 or shift_std > 0:
            if pivot is None:
                raise ValueError("camera jitter needs a pivot")
            turn = so3_exp(random_rotation_vector(angle_std, (len(self),), self.device))[frame]
            offset = origins - pivot
            shift = torch.randn(len(self), 3, device=self.device)[frame] * (shift_std * offset.norm(dim=-1, keepdim=True))
            origins = pivot + (turn @ offset[..., None])[..., 0] + shift
            directions = (turn @ directions[..., None])[..., 0]
        pixel = self.pixels[index]
        targets = RayTargets(rgb=pixel[:, :3].float() / 255, mask=(pixel[:, 3] > 127).float())
        return RayBatch(origins=origins, directions=directions, frame=frame, xy=xy, targets=targets)
