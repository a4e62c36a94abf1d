"""Photographs of a synthetic scene: solid textures, one light with shadows, a little gloss; exact masks and depth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from co3d_ensemble.data.synthetic_scene import PATTERNS, Scene, Solid, Tracer
from co3d_ensemble.functional.cameras import camera_center, pixel_centers, view_directions
from co3d_ensemble.functional.types import PinholeCamera

RAYS_AT_ONCE = 4096  # keeps the (surfaces, rays) arrays in the processor's cache
LIGHT = (0.45, 0.80, 0.40)  # towards the light, world axes (y up)
KEY, SKY, BOUNCE = 0.85, 0.38, 0.16  # linear intensity of the light, and of the surroundings from above and below
GLOSS = 24.0  # Blinn-Phong exponent
GAMMA = 2.2  # linear light to picture values


@dataclass(frozen=True)
class SyntheticView:
    """Ground truth of one photograph, float64.

    Attributes:
        rgb: supersampled picture with the clutter, in [0, 1], shape (3, H, W).
        mask: 1 where the ray through the pixel's centre meets the object first, else 0, shape (1, H, W).
        depth: camera z of the first surface (object or clutter) at the pixel's centre, world units, 0 where there is
            none, shape (1, H, W). The object's own depth is ``depth * mask``.
    """

    rgb: Tensor
    mask: Tensor
    depth: Tensor


class _Looks:
    """The solids' textures as tables, one row per solid."""

    def __init__(self, solids: tuple[Solid, ...]) -> None:
        textures = [solid.texture for solid in solids]
        self.color, self.second, self.axis = (
            torch.tensor([getattr(t, name) for t in textures], dtype=torch.float64) for name in ("color", "second", "axis")
        )
        self.frequency = torch.tensor([t.frequency for t in textures], dtype=torch.float64)
        self.specular = torch.tensor([t.specular for t in textures], dtype=torch.float64)
        self.pattern = torch.tensor([PATTERNS.index(t.pattern) for t in textures])

    def albedo(self, points: Tensor, solid: Tensor) -> Tensor:
        """Linear RGB at points (n, 3) of the given solids (n,)."""
        phase = points * self.frequency[solid][:, None]
        along = (phase * self.axis[solid]).sum(dim=1)
        x, y, z = points.unbind(1)
        drift = torch.sin(2.3 * x + 1.1 * y + 0.4) + torch.sin(2.9 * y - 1.7 * z) + torch.sin(2.1 * z + 1.3 * x + 2.0)
        value = torch.stack(
            (
                torch.full_like(along, -9.0),
                torch.sin(along),
                2 * torch.sin(phase).prod(dim=1).sign() * torch.sin(phase).abs().amin(dim=1).sqrt(),
                torch.cos(phase).sum(dim=1) - 1.0,
                torch.sin(along + 1.5 * drift) + 0.3 * torch.sin(2.7 * along + 3 * drift),
            )
        ).gather(0, self.pattern[solid][None])[0]
        share = (0.5 + 0.5 * torch.tanh(5 * value))[:, None]  # soft edges: the pattern stays below the pixel grid's frequency
        return (self.color[solid] * (1 - share) + self.second[solid] * share) * (1 + 0.07 * drift)[:, None]


def _shade(scene: Scene, tracer: Tracer, looks: _Looks, origins: Tensor, directions: Tensor) -> Tensor:
    """Picture values in [0, 1] of rays, shape (n_rays, 3)."""
    view = torch.nn.functional.normalize(directions, dim=1)
    up = (0.5 + 0.5 * view[:, 1:2]).clamp(0, 1)
    zenith, horizon = view.new_tensor(scene.zenith), view.new_tensor(scene.horizon)
    color = horizon + (zenith - horizon) * up + 0.04 * torch.sin(3 * view[:, :1]) * torch.cos(2 * view[:, 2:])
    first, row = tracer.first_hit(origins, directions)
    hit = first.isfinite().nonzero()[:, 0]
    points = (origins if len(origins) == 1 else origins[hit]) + first[hit, None] * directions[hit]
    normal, solid = tracer.normals(points, row[hit]), tracer.owner[row[hit]]
    light = torch.nn.functional.normalize(view.new_tensor(LIGHT), dim=0)
    lambert = (normal @ light).clamp_min(0)
    lit = (lambert > 0).nonzero()[:, 0]
    shadow = tracer.occluded(points[lit], light[None])
    lambert[lit[shadow]] = 0
    half = torch.nn.functional.normalize(light - view[hit], dim=1)
    gloss = looks.specular[solid] * (normal * half).sum(dim=1).clamp_min(0) ** GLOSS * (lambert > 0)
    ambient = BOUNCE + (SKY - BOUNCE) * (0.5 + 0.5 * normal[:, 1])
    color[hit] = looks.albedo(points, solid) * (KEY * lambert + ambient)[:, None] + gloss[:, None]
    return color.clamp(0, 1) ** (1 / GAMMA)


def _rays(scene: Scene, camera: PinholeCamera, xy: Tensor) -> tuple[Tensor, Tensor]:
    """Origin (1, 3) in object units and directions (n, 3) with camera z = 1: the ray parameter is z depth / scale."""
    R, T = camera.R.double(), camera.T.double()
    directions = view_directions(xy, camera.focal.double(), camera.principal.double()) @ R.T
    return camera_center(R, T)[None] / scene.scale, directions


def render_views(scene: Scene, cameras: list[PinholeCamera], *, supersample: int = 2) -> list[SyntheticView]:
    """Exact photographs of the scene.

    Args:
        cameras: of one picture size; anywhere outside the solids.
        supersample: s x s colour samples per pixel; mask and depth always come from the pixel's centre.

    Raises:
        ValueError: ``supersample`` < 1, or cameras of different sizes.
    """
    if supersample < 1:
        raise ValueError(f"supersample={supersample}: must be at least 1")
    sizes = {(camera.height, camera.width) for camera in cameras}
    if len(sizes) != 1:
        raise ValueError(f"cameras of sizes {sorted(sizes)}: expected exactly one size")
    (height, width), n = next(iter(sizes)), len(cameras)
    tracer, looks = Tracer(scene), _Looks(scene.solids)
    fine_xy = pixel_centers(height * supersample, width * supersample).double() / supersample
    colors = [
        _shade(scene, tracer, looks, o, d) for o, d in _chunks([_rays(scene, camera, fine_xy) for camera in cameras])
    ]
    rgb = torch.cat(colors).reshape(n, height, supersample, width, supersample, 3).mean(dim=(2, 4)).permute(0, 3, 1, 2)
    xy = pixel_centers(height, width).double()
    hits = [tracer.first_hit(o, d) for o, d in _chunks([_rays(scene, camera, xy) for camera in cameras])]
    first, row = (torch.cat(values).reshape(n, 1, height, width) for values in zip(*hits))
    mask = (first.isfinite() & (tracer.owner[row] < scene.n_object)).double()
    depth = torch.where(first.isfinite(), first * scene.scale, 0.0)
    return [SyntheticView(*view) for view in zip(rgb.contiguous(), mask, depth)]


def render_view(scene: Scene, camera: PinholeCamera, *, supersample: int = 2) -> SyntheticView:
    """One exact photograph; see :func:`render_views`."""
    return render_views(scene, [camera], supersample=supersample)[0]


def _chunks(rays: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of a camera's rays, which share its origin, or the rays of several small cameras together."""
    n_together = RAYS_AT_ONCE // len(rays[0][1])
    if n_together > 1:
        for start in range(0, len(rays), n_together):
            group = rays[start : start + n_together]
            yield torch.cat([o.expand_as(d) for o, d in group]), torch.cat([d for _, d in group])
        return
    for origin, directions in rays:
        for part in directions.split(RAYS_AT_ONCE):
            yield origin, part
