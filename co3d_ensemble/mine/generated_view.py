"""Photographs of a generated room by analytic ray tracing: exact depth, and pictures without aliasing of far patterns.

A ray meets a wall in one point and a thing, which is convex, in one interval: the first surface is a closed form. A ray
is tested only against things whose bounding sphere it meets. Vectors are columns, (3, n): sums over rows of three are slow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from co3d_ensemble.functional.cameras import inverse_intrinsics, pixel_centers
from co3d_ensemble.mine.generated_room import Look, Room, Thing

LIFT = 1e-4  # metres: shadow rays ignore what is nearer to their start, far below a pixel's size and above float32's rounding
PARALLEL = 1e-9  # of a direction's component along a slab; such a ray is in or out of it for good
SPHERE_MARGIN = 1.02  # of the squared radius of bounding spheres, for float32
EDGE = 4.0  # how sharply a pattern changes its colour
KEPT_DETAIL = 0.35  # wavelengths that a pixel covers where a pattern's contrast has fallen to exp(-1/2)


@dataclass(frozen=True)
class Viewpoints:
    """Cameras of one room, float64: ``X_camera = R X_world + t``; R (V, 3, 3), t (V, 3), and one K (3, 3) in pixels."""

    R: Tensor
    t: Tensor
    K: Tensor
    height: int
    width: int

    def __len__(self) -> int:
        return len(self.R)


def trace_depth(room: Room, views: Viewpoints, *, step: int = 1) -> Tensor:
    """z of the first surface at every pixel centre (or every ``step``-th one's), metres, float64, shape (V, 1, H, W)."""
    xy = pixel_centers(views.height, views.width).reshape(views.height, views.width, 2)[::step, ::step]
    depth = [_first_hit(room, *_rays(views, v, xy.reshape(-1, 2), torch.float64))[0] for v in range(len(views))]
    return torch.stack(depth).reshape(len(views), 1, *xy.shape[:2])


def photograph(room: Room, views: Viewpoints, *, supersample: int = 2) -> Tensor:
    """Pictures in [0, 1] from ``supersample x supersample`` rays per pixel, float32, shape (V, 3, H, W)."""
    height, width, s = views.height, views.width, supersample
    xy = pixel_centers(height * s, width * s) / s
    pictures = []
    for v in range(len(views)):
        color = _shade(room, *_rays(views, v, xy, torch.float32), pixel=1 / float(views.K[0, 0]))
        pictures.append(color.reshape(3, height, s, width, s).mean(dim=(2, 4)))
    return torch.stack(pictures).clamp(0, 1)


def _rays(views: Viewpoints, index: int, xy: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Origin (3, 1) and world directions (3, n) of unit camera z, so that the ray's parameter is depth."""
    R = views.R[index]
    pixels = torch.cat((xy.double(), torch.ones(len(xy), 1, dtype=torch.float64)), dim=1).T
    return (-R.T @ views.t[index])[:, None].to(dtype), (R.T @ inverse_intrinsics(views.K) @ pixels).to(dtype)


def _first_hit(room: Room, origin: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ray parameter (n,); surface (n,), the index of a wall, or of a thing after the walls; and unit normal (3, n)."""
    normals = directions.new_tensor([wall.normal for wall in room.walls])
    offsets = directions.new_tensor([[wall.offset] for wall in room.walls])
    speed = normals @ directions
    first, surface = torch.where(speed < 0, (offsets - normals @ origin) / speed, math.inf).min(dim=0)
    normal = normals.T[:, surface]
    squared_length = directions.square().sum(dim=0)
    for i, thing in enumerate(room.things):
        offset = directions.new_tensor(thing.center)[:, None] - origin
        along = (offset.T @ directions)[0]
        rays = (offset.square().sum() - along.square() / squared_length < _squared_radius(thing)).nonzero()[:, 0]
        local_origin, local_directions = _local(thing, origin, directions[:, rays])
        enter, leave = _interval(thing.shape, local_origin, local_directions)
        seen = ((enter < leave) & (enter > LIFT) & (enter < first[rays])).nonzero()[:, 0]
        rays, enter = rays[seen], enter[seen]
        first[rays], surface[rays] = enter, len(room.walls) + i
        normal[:, rays] = _normals(thing, local_origin + enter * local_directions[:, seen])
    return first, surface, normal


def _shadows(room: Room, points: Tensor, surface: Tensor, light: Tensor) -> Tensor:
    """Whether a thing other than its own, which is convex, hides the light (3, 1) from a lit surface point (3, n)."""
    hidden = torch.zeros_like(surface, dtype=torch.bool)
    height, squared_length = (light.T @ points)[0], points.square().sum(dim=0)
    for i, thing in enumerate(room.things):
        center = points.new_tensor(thing.center)[:, None]
        along = (center * light).sum() - height
        gap = squared_length - 2 * (center.T @ points)[0] + center.square().sum() - along.square()
        rays = ((gap < _squared_radius(thing)) & (surface != len(room.walls) + i)).nonzero()[:, 0]
        enter, leave = _interval(thing.shape, *_local(thing, points[:, rays], light.expand(3, len(rays))))
        hidden[rays] |= (enter < leave) & (leave > LIFT)
    return hidden


def _squared_radius(thing: Thing) -> float:
    return SPHERE_MARGIN * (thing.half[1] ** 2 + (thing.foot**2 if thing.shape != "ball" else 0.0))


def _axes(thing: Thing, like: Tensor) -> Tensor:
    """Rotation (3, 3) whose rows are the thing's own axes in world coordinates."""
    c, s = math.cos(thing.turn), math.sin(thing.turn)
    return like.new_tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def _local(thing: Thing, origin: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Rays in the coordinates in which the thing is its unit shape; the parameter along them stays."""
    to_unit = _axes(thing, directions) / directions.new_tensor(thing.half)[:, None]
    return to_unit @ (origin - directions.new_tensor(thing.center)[:, None]), to_unit @ directions


def _interval(shape: str, origin: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays enter and leave the unit ball, cube [-1, 1]^3 or upright cylinder, (n,) each; NaN or enter > leave: nowhere."""
    if shape == "ball":
        return _quadratic(origin, directions)
    safe = torch.where(directions.abs() < PARALLEL, PARALLEL, directions)
    ends = (-1 - origin) / safe, (1 - origin) / safe
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    if shape == "box":
        return low.amax(dim=0), high.amin(dim=0)
    enter, leave = _quadratic(origin[::2], safe[::2])
    return torch.maximum(enter, low[1]), torch.minimum(leave, high[1])


def _quadratic(origin: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Where ``|origin + s directions| <= 1``."""
    a, b = directions.square().sum(dim=0), (directions * origin).sum(dim=0)
    root = (b.square() - a * (origin.square().sum(dim=0) - 1)).sqrt()
    return (-b - root) / a, (root - b) / a


def _normals(thing: Thing, local: Tensor) -> Tensor:
    """Outward unit normals (3, n) in world coordinates at points (3, n) of the unit shape's surface."""
    if thing.shape == "ball":
        gradient = local
    elif thing.shape == "box":
        gradient = torch.nn.functional.one_hot(local.abs().argmax(dim=0), 3).T * local.sign()
    else:
        cap = local[1].abs() > local[::2].square().sum(dim=0)  # on the surface |y| or the radius is 1: the larger one
        side = local * local.new_tensor([[1.0], [0.0], [1.0]])
        gradient = torch.where(cap, local.sign() * local.new_tensor([[0.0], [1.0], [0.0]]), side)
    to_world = (_axes(thing, local) / local.new_tensor(thing.half)[:, None]).T
    return torch.nn.functional.normalize(to_world @ gradient.to(local.dtype), dim=0)


def _shade(room: Room, origin: Tensor, directions: Tensor, *, pixel: float) -> Tensor:
    """Colour (3, n) of rays; ``pixel`` is a pixel's width at depth 1."""
    depth, surface, normal = _first_hit(room, origin, directions)
    points = origin + depth * directions
    slant = (normal * directions).sum(dim=0).abs() / directions.square().sum(dim=0).sqrt()
    footprint = depth * pixel / slant.clamp_min(PARALLEL)
    color = torch.empty_like(points)
    for i, owner in enumerate(room.walls + room.things):
        here = (surface == i).nonzero()[:, 0]
        if len(here):
            own = points[:, here]
            if isinstance(owner, Thing):
                own = _axes(owner, own) @ (own - own.new_tensor(owner.center)[:, None])
            color[:, here] = _albedo(owner.look, own, footprint[here])
    light = points.new_tensor(room.light)[:, None]
    lambert = (light.T @ normal)[0].clamp_min(0)
    lit = lambert.nonzero()[:, 0]
    lambert[lit] *= ~_shadows(room, points[:, lit], surface[lit], light)
    return color * (room.ambient + (1 - room.ambient) * lambert)


def _albedo(look: Look, points: Tensor, footprint: Tensor) -> Tensor:
    """Colour (3, n) of a look at points (3, n); its contrast fades where a pixel covers much of a wavelength."""
    first, second = points.new_tensor(look.colors)[:, :, None]
    if look.pattern == "plain":
        return first.expand(3, points.shape[1])
    x, _, z = look.frequency * points + points.new_tensor(look.phase)[:, None]
    level = (look.frequency * points[1]).cos()  # even in y: the floor, y = 0, is no edge of a pattern
    along = look.frequency * (points.new_tensor([look.axis]) @ points)[0] + look.phase[0]
    if look.pattern == "stripes":
        value = along.sin()
    elif look.pattern == "checker":
        value = torch.tanh(3 * x.sin()) * torch.tanh(3 * z.sin()) * torch.tanh(3 * level)
    elif look.pattern == "spots":
        value = x.cos() + level + z.cos() - 1
    else:
        drift = (0.6 * x + 0.3 * level).sin() + (0.5 * z - 0.4 * x).sin()
        value = (along + 1.5 * drift).sin() + 0.3 * (2.3 * along - 2 * drift).sin()
    wavelengths = footprint * (look.frequency / (2 * math.pi))
    share = 0.5 + 0.5 * torch.tanh(EDGE * value) * torch.exp(-0.5 * (wavelengths / KEPT_DETAIL).square())
    return first + (second - first) * share
