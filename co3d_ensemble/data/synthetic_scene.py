"""Rays traced analytically against a union of ellipsoids, boxes and cylinders, the ground truth of generated sequences.

Every solid is an affine image of a unit shape, optionally with one convex part cut out of it (the inside of a cup).
A ray meets a convex shape in one interval and a cut one in at most two, so the first surface, the mask and the depth
at a pixel centre are closed forms: exact ground truth for cameras, masks and z depth. All of it runs in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from co3d_ensemble.functional.cameras import so3_exp

SHAPES = ("ellipsoid", "box", "cylinder")  # unit sphere, cube [-1, 1]^3, cylinder of radius 1 about y with |y| <= 1
PATTERNS = ("plain", "stripes", "checker", "spots", "marble")
LIFT = 1e-6  # shadow rays ignore hits nearer than this (object units), far below a pixel and far above rounding
SPHERE_MARGIN = 1.02  # over the farthest of the sampled surface points, which are 7.5 degrees apart
PARALLEL = 1e-12  # speed, in half extents per unit of the parameter, under which a ray runs along a face or an axis


@dataclass(frozen=True)
class Texture:
    """A solid texture: ``color`` and ``second`` (linear RGB) mixed by a pattern of the position in object units."""

    color: tuple[float, float, float]
    second: tuple[float, float, float] = (1.0, 1.0, 1.0)
    pattern: str = "plain"
    frequency: float = 8.0  # radians per object unit
    axis: tuple[float, float, float] = (0.0, 1.0, 0.0)
    specular: float = 0.12

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern={self.pattern!r}: expected one of {', '.join(PATTERNS)}")


@dataclass(frozen=True)
class Solid:
    """An affine unit shape.

    Attributes:
        shape: one of ``SHAPES``.
        center: position, object units.
        size: half extents along the shape's own axes.
        texture: its look; a cut surface takes the look of what it is cut from.
        rotation: rotation vector in radians, shape to world.
        cut: convex solid removed from this one.
    """

    shape: str
    center: tuple[float, float, float]
    size: tuple[float, float, float]
    texture: Texture
    rotation: tuple[float, float, float] = (0.0, 0.0, 0.0)
    cut: Solid | None = None

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape={self.shape!r}: expected one of {', '.join(SHAPES)}")
        if not all(s > 0 for s in self.size):
            raise ValueError(f"size={self.size}: half extents must be positive")
        if self.cut is not None and self.cut.cut is not None:
            raise ValueError("a solid that is cut out must be convex, so it has no cut of its own")


@dataclass(frozen=True)
class Scene:
    """An object with clutter around it.

    Attributes:
        solids: the object's solids first, then the clutter.
        n_object: how many of them are the object.
        scale: world units per object unit.
        horizon, zenith: linear RGB of the background gradient.
    """

    solids: tuple[Solid, ...]
    n_object: int
    scale: float = 1.0
    horizon: tuple[float, float, float] = (0.55, 0.52, 0.48)
    zenith: tuple[float, float, float] = (0.20, 0.26, 0.36)

    def __post_init__(self) -> None:
        if not 0 < self.n_object <= len(self.solids):
            raise ValueError(f"n_object={self.n_object}: must lie in [1, {len(self.solids)}]")
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise ValueError(f"scale={self.scale}: must be positive and finite")


def surface_points(solids: Sequence[Solid]) -> Tensor:
    """Points on (or, for cut solids, enclosing) the surfaces, object units, shape (n, 3): for bounds."""
    angle = torch.linspace(0, 2 * math.pi, 49, dtype=torch.float64)[:-1]
    circle = torch.stack((angle.cos(), torch.zeros_like(angle), angle.sin()), dim=1)
    tilt = torch.linspace(-math.pi / 2, math.pi / 2, 25, dtype=torch.float64)
    up = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    unit = {
        "ellipsoid": torch.cat([circle * t.cos() + up * t.sin() for t in tilt]),
        "cylinder": torch.cat((circle + up, circle - up)),
        "box": torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3),
    }
    points = []
    for solid in solids:
        rotation = so3_exp(torch.tensor(solid.rotation, dtype=torch.float64))
        stretched = unit[solid.shape] * torch.tensor(solid.size, dtype=torch.float64)
        points.append(stretched @ rotation.T + torch.tensor(solid.center, dtype=torch.float64))
    return torch.cat(points)


class Surfaces:
    """The scene's surfaces as tensors, one row per solid and per cut, sorted by shape so that each shape is one slice.

    Attributes:
        to_local: shape (n_rows, 3, 3); ``local = (point - center) @ to_local`` maps a surface to its unit shape.
        centers: shape (n_rows, 3).
        owner: index of the solid that each row belongs to, shape (n_rows,).
        is_cut: whether the row is what is cut out of its owner, shape (n_rows,).
    """

    def __init__(self, solids: tuple[Solid, ...]) -> None:
        rows = [(solid, i, False) for i, solid in enumerate(solids)]
        rows += [(solid.cut, i, True) for i, solid in enumerate(solids) if solid.cut is not None]
        rows.sort(key=lambda row: SHAPES.index(row[0].shape))
        surfaces = [row[0] for row in rows]
        rotation = so3_exp(torch.tensor([s.rotation for s in surfaces], dtype=torch.float64))
        self.to_local = rotation / torch.tensor([s.size for s in surfaces], dtype=torch.float64)[:, None, :]
        self.centers = torch.tensor([s.center for s in surfaces], dtype=torch.float64)
        self.shape = torch.tensor([SHAPES.index(s.shape) for s in surfaces])
        self.owner = torch.tensor([row[1] for row in rows])
        self.is_cut = torch.tensor([row[2] for row in rows])
        self._stacked = self.to_local.transpose(1, 2).reshape(-1, 3)
        self._offset = torch.einsum("nji,nj->ni", self.to_local, self.centers)[:, :, None]
        self._counts = [int((self.shape == i).sum()) for i in range(len(SHAPES))]
        self._cut_rows = self.is_cut.nonzero()[:, 0]
        row_of_solid = {row[1]: j for j, row in enumerate(rows) if not row[2]}
        self._cut_owner_rows = torch.tensor([row_of_solid[i] for i in self.owner[self._cut_rows].tolist()], dtype=torch.long)

    def convex_intervals(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Where lines enter and leave the unit shape of every row, cuts not applied; see :meth:`intervals`."""
        local_origin = (self._stacked @ origins.T).reshape(len(self.centers), 3, len(origins)) - self._offset
        local_direction = (self._stacked @ directions.T).reshape(len(self.centers), 3, len(directions))
        parts = zip(_UNIT_INTERSECTIONS, local_origin.split(self._counts), local_direction.split(self._counts))
        found = [intersection(origin, direction) for intersection, origin, direction in parts if len(origin)]
        return torch.cat([near for near, _ in found]), torch.cat([far for _, far in found])

    def intervals(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Where lines run inside the solids, cuts removed.

        Args:
            origins, directions: shape (n_rays, 3), object units, one of them may be (1, 3); the direction's length is
                the unit of the parameters.

        Returns:
            enter, leave: shape (n_rows, n_rays), empty where not enter < leave. A line enters on the row's own surface: a
            solid's row holds its interval up to the cut, the cut's row the interval behind the cut.
        """
        enter, leave = self.convex_intervals(origins, directions)
        if len(self._cut_rows):
            cut, owner = self._cut_rows, self._cut_owner_rows
            cut_enter, cut_leave, own_enter, own_leave = enter[cut], leave[cut], enter[owner], leave[owner]
            passes = (cut_enter < cut_leave) & (cut_leave > own_enter) & (cut_enter < own_leave)
            leave[owner] = torch.where(passes, cut_enter, own_leave)
            enter[cut] = torch.where(passes, cut_leave, math.inf)
            leave[cut] = own_leave
        return enter, leave

    def first_hit(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Parameter of the first surface in front of the origin (inf: none) and its row, shape (n_rays,) each."""
        enter, leave = self.intervals(origins, directions)
        return enter.masked_fill_(~((enter < leave) & (enter > LIFT)), math.inf).min(dim=0)

    def occluded(self, origins: Tensor, directions: Tensor) -> Tensor:
        """Whether anything lies in front of points on the surfaces, shape (n_rays,)."""
        enter, leave = self.intervals(origins, directions)
        return (leave - enter.clamp_min_(LIFT) > LIFT).any(dim=0)


class Tracer:
    """First hits, shadows and normals of a scene; the object is tested only against rays that meet its bounding sphere.

    Rows are those of the object's surfaces, then those of the clutter's; ``owner`` (n_rows,) is the solid of each.
    """

    def __init__(self, scene: Scene) -> None:
        object_solids, clutter = scene.solids[: scene.n_object], scene.solids[scene.n_object :]
        self.object, self.clutter = Surfaces(object_solids), Surfaces(clutter) if clutter else None
        parts = [part for part in (self.object, self.clutter) if part is not None]
        self.to_local, self.centers, self.shape, self.is_cut = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("to_local", "centers", "shape", "is_cut")
        )
        self.owner = torch.cat([part.owner + i * scene.n_object for i, part in enumerate(parts)])
        points = surface_points(object_solids)
        self.middle = (points.amin(dim=0) + points.amax(dim=0)) / 2
        self.radius = SPHERE_MARGIN * (points - self.middle).norm(dim=1).max()

    def _near_object(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of the lines that meet the object's bounding sphere, and their origins and directions."""
        moment = torch.linalg.cross(*torch.broadcast_tensors(self.middle - origins, directions))
        near = (moment.square().sum(dim=1) < self.radius**2 * directions.square().sum(dim=1)).nonzero()[:, 0]
        return near, *(rays if len(rays) == 1 else rays[near] for rays in (origins, directions))

    def first_hit(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Parameter of the first surface in front of the origin (inf: none) and its row; see ``Surfaces.intervals``."""
        if self.clutter is None:
            return self.object.first_hit(origins, directions)
        first, row = self.clutter.first_hit(origins, directions)
        row += len(self.object.owner)
        near, near_origins, near_directions = self._near_object(origins, directions)
        object_first, object_row = self.object.first_hit(near_origins, near_directions)
        row[near] = torch.where(object_first < first[near], object_row, row[near])
        first[near] = torch.minimum(object_first, first[near])
        return first, row

    def occluded(self, points: Tensor, direction: Tensor) -> Tensor:
        """Whether anything lies in front of surface points (n, 3) along one direction (1, 3), shape (n,)."""
        if self.clutter is None:
            return self.object.occluded(points, direction)
        near, near_points, _ = self._near_object(points, direction)
        hidden = self.clutter.occluded(points, direction)
        hidden[near] |= self.object.occluded(near_points, direction)
        return hidden

    def normals(self, points: Tensor, row: Tensor) -> Tensor:
        """Outward unit normals at points (n, 3) on the surfaces of the given rows (n,)."""
        to_local = self.to_local[row]
        local = ((points - self.centers[row])[:, None, :] @ to_local)[:, 0]
        side = torch.nn.functional.one_hot(local.abs().argmax(dim=1), 3) * local.sign()
        radial = local * local.new_tensor([1.0, 0.0, 1.0])
        cap = local[:, 1].abs() > radial.norm(dim=1)  # on a cylinder either |y| or the radius is 1: the larger one
        tube = torch.where(cap[:, None], local.sign() * local.new_tensor([0.0, 1.0, 0.0]), radial)
        shape = self.shape[row][:, None]
        gradient = torch.where(shape == 0, local, torch.where(shape == 1, side, tube))
        normal = torch.nn.functional.normalize((to_local @ gradient[:, :, None])[:, :, 0], dim=1)
        return torch.where(self.is_cut[row][:, None], -normal, normal)


def _quadratic(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Interval in which ``a t^2 + 2 b t + c <= 0`` for a > 0; nan where there is none: every comparison with it fails."""
    root, inverse = (b * b - a * c).sqrt(), a.reciprocal()
    return (-b - root) * inverse, (root - b) * inverse


def _slab(origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Interval in which ``|origin + t direction| <= 1``."""
    safe = torch.where(direction.abs() < PARALLEL, PARALLEL, direction)  # parallel to the faces: in or out for good
    first, second = (-1 - origin) / safe, (1 - origin) / safe
    return torch.minimum(first, second), torch.maximum(first, second)


def _unit_sphere(origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    return _quadratic((direction * direction).sum(1), (origin * direction).sum(1), (origin * origin).sum(1) - 1)


def _unit_box(origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    near, far = _slab(origin, direction)
    return near.amax(dim=1), far.amin(dim=1)


def _unit_cylinder(origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    (ox, oy, oz), (dx, dy, dz) = origin.unbind(1), direction.unbind(1)
    # along the axis a and b vanish: with the floor the interval is all of the line for c < 0 and nan, a miss, for c > 0
    a = (dx * dx + dz * dz).clamp_min(PARALLEL**2)
    near, far = _quadratic(a, ox * dx + oz * dz, ox * ox + oz * oz - 1)
    bottom, top = _slab(oy, dy)
    return torch.maximum(near, bottom), torch.minimum(far, top)


_UNIT_INTERSECTIONS = (_unit_sphere, _unit_box, _unit_cylinder)  # in the order of SHAPES
