"""Whether masks and cameras fit together: the share of every mask's outline that lies on the visual hull of all masks.

Seen from the cameras that carved it, the visual hull fills the masks exactly (Laurentini 1994): on the ray of every outline pixel
lies a point that no other mask excludes. Masks or cameras that contradict each other leave outlines without such a point
(silhouette coherence: Hernandez, Schmitt and Cipolla, PAMI 2007). We test sampled outline pixels against the masks themselves
instead of comparing whole silhouettes of a carved grid: a grid that is coarse enough to be quick fattens the hull so much that
cameras with the wrong axes fill the masks of a compact object as well as the right ones do (IoU 0.77 against 0.73).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from co3d_ensemble.functional.cameras import pixel_rays
from co3d_ensemble.functional.types import Frame, PinholeCamera
from co3d_ensemble.functional.visual_hull import candidate_box

SLACK_PIXELS = 0.5  # a point next to the mask counts as inside: what rounding to pixels costs
WRONG_PIXELS = 1.5  # a point as far outside a mask speaks against that mask
MIN_OUTLINE = 8  # outline pixels below which a frame says nothing
_MIN_VIEW_SHARE = 0.25  # a point that fewer of the cameras see is not on the object that they all look at, as in carving
_REACH = 1.2  # half length of a tested ray in half sides of the candidate box: up to its corners from most directions
REACH = 6  # pixels up to which distances are told apart
_FAR = 1e3  # pixels: of a camera that does not see a point, so that it never is the one that excludes it


@dataclass(frozen=True)
class Silhouette:
    """A mask with its camera; ``mask`` as in :class:`Frame`, uint8 (1, H, W)."""

    name: str
    mask: Tensor
    camera: PinholeCamera

    @classmethod
    def of(cls, frame: Frame) -> Silhouette:
        return cls(frame.name, frame.mask, frame.camera)

    def inverted(self) -> Silhouette:
        return replace(self, mask=255 - self.mask)

    def reduced(self, longest: int) -> Silhouette:
        """Area-averaged to a longest side of ``longest`` pixels; smaller masks are left alone."""
        height, width = self.mask.shape[-2:]
        if max(height, width) <= longest:
            return self
        ratio = longest / max(height, width)
        size = max(1, round(height * ratio)), max(1, round(width * ratio))
        mask = torch.nn.functional.interpolate(self.mask[None].float(), size=size, mode="area")[0].round().to(torch.uint8)
        return Silhouette(self.name, mask, self.camera.resized(*size))


def signed_distance(mask: Tensor) -> Tensor:
    """Pixels from every pixel's centre to the outline of the boolean mask (H, W), positive inside, at most ``REACH``: float32 (H, W)."""
    return torch.where(mask, _distance_to(~mask) - 0.5, 0.5 - _distance_to(mask))


def _distance_to(pixels: Tensor) -> Tensor:
    """Distance to the nearest true pixel, at most ``REACH`` + 0.5, one axis after the other (Felzenszwalb and Huttenlocher 2012)."""
    square = torch.where(pixels, 0.0, torch.inf)
    for _ in range(2):
        padded = torch.nn.functional.pad(square, (REACH, REACH), value=torch.inf)
        width = square.shape[1]
        shifted = (padded[:, REACH + shift : REACH + shift + width] + shift**2 for shift in range(-REACH, REACH + 1))
        square = functools.reduce(torch.minimum, shifted).T
    return square.sqrt().clamp_max(REACH + 0.5)


@dataclass(frozen=True)
class Coherence:
    """How well each mask fits the others.

    Attributes:
        covered: share of the outline's sampled pixels with a point of the hull on their ray, in [0, 1], shape (n,); NaN where
            the mask has no outline inside its picture.
        excluded: share of the hull's points, found from the other outlines, that the mask calls background, shape (n,);
            NaN where the camera sees none of them.
    """

    covered: Tensor
    excluded: Tensor

    @property
    def median(self) -> float | None:
        """Of ``covered`` over the frames that have an outline; None where fewer than half have one."""
        known = self.covered[~self.covered.isnan()]
        return float(known.median()) if 2 * len(known) >= len(self.covered) and len(known) else None


def coherence(
    judges: Sequence[Silhouette],
    others: Sequence[Silhouette] = (),
    *,
    tolerance: float = 0.1,
    rays: int = 64,
    samples: int = 64,
) -> Coherence:
    """Tests outlines against the masks of ``judges``; values for the judges, then for ``others``, which judge nobody.

    Args:
        judges, others: reduced to the size that is worked at; 24 masks of 64 pixels take a quarter of a second.
        tolerance: share of the judges that may exclude a point (bad masks), in [0, 1).
        rays: outline pixels per frame, evenly spread.
        samples: points per ray.

    Raises:
        ValueError: as :func:`candidate_box` does, where the cameras do not look at a common point, or all masks are empty.
    """
    box = candidate_box(judges)
    jury = _Jury(judges, tolerance)
    frames = [*judges, *others]
    covered, points = [], []
    for frame in frames:
        pixels = _outline(frame, rays)
        if len(pixels) < min(MIN_OUTLINE, rays):
            covered.append(torch.tensor(torch.nan))
            points.append(torch.zeros(0, 3))
            continue
        along = _points_on_rays(frame.camera, pixels, box, samples)
        best, where = jury.worst(along.reshape(-1, 3)).reshape(along.shape[:2]).max(dim=1)
        fits = best >= -SLACK_PIXELS
        covered.append(fits.float().mean())
        points.append(along[torch.arange(len(pixels)), where][fits])
    found = points[: len(judges)]
    hull, owner = torch.cat(found), torch.cat([torch.full((len(some),), i) for i, some in enumerate(found)])
    distance, seen = jury.distances(hull)
    seen &= owner != torch.arange(len(judges))[:, None]  # a mask is judged by the points that others found
    excluded = [_excluded(*pair) for pair in zip(distance, seen, strict=True)]
    for frame in others:
        (distance,), (seen,) = _Jury([frame], tolerance).distances(hull)
        excluded.append(_excluded(distance, seen))
    return Coherence(torch.stack(covered), torch.stack(excluded))


def _outline(frame: Silhouette, rays: int) -> Tensor:
    """Centres (n, 2) of foreground pixels beside background ones; the picture's border is no outline."""
    inside = frame.mask[0] > 127
    beside = torch.nn.functional.max_pool2d((~inside)[None].float(), 3, stride=1, padding=1)[0] > 0
    found = (inside & beside).nonzero()
    chosen = ((torch.arange(rays) + 0.5) * len(found) / rays).long().unique() if len(found) else found[:, 0]
    return found[chosen].flip(1) + 0.5


def _points_on_rays(camera: PinholeCamera, pixels: Tensor, box: Tensor, samples: int) -> Tensor:
    """Points (n, samples, 3) on the pixels' rays, centred where each passes the middle of ``box``."""
    origins, directions = pixel_rays(camera, pixels)
    middle = ((box.mean(dim=0) - origins) * directions).sum(dim=-1, keepdim=True)
    reach = _REACH * (box[1] - box[0]).max() / 2
    along = (middle + reach * torch.linspace(-1, 1, samples)).clamp_min(0)
    return origins[:, None] + along[..., None] * directions[:, None]


class _Jury:
    """Masks of several frames as signed distances, ready to judge points."""

    def __init__(self, frames: Sequence[Silhouette], tolerance: float) -> None:
        cameras = [frame.camera for frame in frames]
        self.R, self.T, self.focal, self.principal = (
            torch.stack([getattr(camera, name).float() for camera in cameras]) for name in ("R", "T", "focal", "principal")
        )
        self.size = torch.tensor([[camera.width, camera.height] for camera in cameras])
        flat = [signed_distance(frame.mask[0] > 127).reshape(-1) for frame in frames]
        self.distance = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True)
        self.tolerance = tolerance

    def distances(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Signed pixels of every point to every mask's outline, (n_frames, n), and whether the camera sees it."""
        view = points @ self.R + self.T[:, None]
        z = view[..., 2:]
        pixels = self.principal[:, None] - self.focal[:, None] * view[..., :2] / z
        seen = (z[..., 0] > 0) & ((pixels >= 0) & (pixels < self.size[:, None])).all(dim=-1)
        column, row = torch.where(seen[..., None], pixels, 0).long().unbind(dim=-1)
        return self.distance.gather(1, row * self.size[:, None, 0] + column), seen

    def worst(self, points: Tensor) -> Tensor:
        """Signed distance to the mask that excludes a point most, after the tolerated ones: shape (n,)."""
        distance, seen = self.distances(points)
        n_seen = seen.sum(dim=0)
        tolerated = (self.tolerance * n_seen).long()
        least = distance.where(seen, _FAR).topk(int(self.tolerance * len(seen)) + 1, dim=0, largest=False).values
        worst = least.gather(0, tolerated[None])[0]
        return worst.where(n_seen >= max(2.0, _MIN_VIEW_SHARE * len(seen)), -_FAR)


def _excluded(distance: Tensor, seen: Tensor) -> Tensor:
    """Share of the seen points (n,) that lie well outside a mask; NaN where there are fewer than ``MIN_OUTLINE``."""
    return (distance[seen] < -WRONG_PIXELS).float().mean() if seen.sum() >= MIN_OUTLINE else torch.tensor(torch.nan)
