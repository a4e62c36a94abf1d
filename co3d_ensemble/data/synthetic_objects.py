"""The objects and the clutter of generated sequences, built from the solids of ``synthetic_scene``.

Objects stand on the plane below them (y up) and are shifted and scaled so that the unit sphere encloses them.
Clearly non-convex on purpose: handles, open vessels, limbs, leaves; each part has its own colours.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from co3d_ensemble.data.synthetic_scene import PATTERNS, Scene, Solid, Texture, surface_points

Vector = tuple[float, float, float]
Looks = dict[str, Texture]
DISTINCT_HUES = 0.61803398875  # golden ratio: successive hues of a palette are far apart
ROD_AXIS = np.array([0.0, 1.0, 0.0])  # a cylinder's own axis


def _rgb(hue: float, saturation: float, value: float) -> Vector:
    return tuple(c**2.2 for c in colorsys.hsv_to_rgb(hue % 1.0, saturation, value))  # type: ignore[return-value]


def make_looks(rng: np.random.Generator, texture: str) -> Looks:
    """Textures by role (main, second, third, pale, dark, glossy); ``texture`` is ``auto`` or the pattern of the main role."""
    hue, looks = rng.uniform(), {}
    patterns = list(rng.permutation(PATTERNS[1:]))
    if texture != "auto":
        patterns = [texture, *(p for p in patterns if p != texture)]
    for i, role in enumerate(("main", "second", "third")):
        tilt = rng.normal(size=3) * 0.25 + ROD_AXIS
        looks[role] = Texture(
            color=_rgb(hue + i * DISTINCT_HUES, 0.75, 0.85),
            second=_rgb(hue + i * DISTINCT_HUES + 0.08, 0.25, 0.95),
            pattern=str(patterns[i]),
            frequency=float(rng.uniform(9, 13)),
            axis=tuple((tilt / np.linalg.norm(tilt)).tolist()),
        )
    looks["pale"] = Texture(color=_rgb(hue + 0.1, 0.15, 0.92), second=_rgb(hue + 0.1, 0.3, 0.8), pattern="marble", frequency=5.0)
    looks["dark"] = Texture(color=_rgb(0.07, 0.4, 0.16), second=_rgb(0.07, 0.5, 0.3), pattern="marble", frequency=7.0)
    looks["glossy"] = Texture(color=_rgb(0.6, 0.5, 0.25), specular=0.6)
    return looks


def rod(start: Vector, end: Vector, radius: float, texture: Texture) -> list[Solid]:
    """A capsule between two points: a cylinder with a ball at its end (its start is the end of the previous rod)."""
    first, last = np.asarray(start, float), np.asarray(end, float)
    length = float(np.linalg.norm(last - first))
    direction = (last - first) / length
    axis = np.cross(ROD_AXIS, direction)
    sine = float(np.linalg.norm(axis))
    angle = math.atan2(sine, float(ROD_AXIS @ direction))
    rotation = axis / sine * angle if sine > 1e-9 else np.zeros(3)  # (anti)parallel to y: a cylinder is symmetric
    tube = Solid("cylinder", tuple(((first + last) / 2).tolist()), (radius, length / 2, radius), texture, rotation=tuple(rotation.tolist()))
    return [tube, Solid("ellipsoid", tuple(last.tolist()), (radius,) * 3, texture)]


def _arc(points: np.ndarray, radius: float, texture: Texture) -> list[Solid]:
    return [solid for a, b in zip(points[:-1], points[1:]) for solid in rod(tuple(a), tuple(b), radius, texture)]


def _mug(look: Looks) -> list[Solid]:
    hole = Solid("cylinder", (0, 0.75, 0), (0.52, 1.3, 0.52), look["pale"])
    angles = np.linspace(math.radians(78), math.radians(-78), 7)
    handle = np.stack((0.55 + 0.42 * np.cos(angles), 0.42 * np.sin(angles), 0 * angles), axis=1)
    return [
        Solid("cylinder", (0, 0, 0), (0.6, 0.7, 0.6), look["main"], cut=hole),
        Solid("cylinder", (0, 0.02, 0), (0.612, 0.15, 0.612), look["second"], cut=replace(hole, center=(0, 0, 0))),
        Solid("cylinder", (0, 0.2, 0), (0.53, 0.03, 0.53), look["dark"]),
        Solid("cylinder", (0, -0.74, 0), (0.95, 0.05, 0.95), look["third"]),
        *_arc(handle, 0.09, look["second"]),
        *rod((0.1, -0.4, 0.1), (-0.42, 0.9, -0.2), 0.045, look["glossy"]),
        Solid("ellipsoid", (-0.44, 0.95, -0.21), (0.14, 0.18, 0.06), look["glossy"], rotation=(0, 0, 0.35)),
    ]


def _bear(look: Looks) -> list[Solid]:
    parts = [
        Solid("ellipsoid", (0, 0, 0), (0.58, 0.62, 0.52), look["main"]),
        Solid("ellipsoid", (0, -0.03, 0.14), (0.4, 0.44, 0.42), look["pale"]),
        Solid("ellipsoid", (0, 0.88, 0.03), (0.47, 0.42, 0.44), look["second"]),
        Solid("ellipsoid", (0, 0.79, 0.36), (0.2, 0.16, 0.18), look["pale"]),
        Solid("ellipsoid", (0, 0.86, 0.55), (0.08, 0.06, 0.06), look["glossy"]),
        Solid("cylinder", (0, 0.54, 0.02), (0.36, 0.07, 0.34), look["third"]),
        Solid("box", (0.2, 0.28, 0.5), (0.08, 0.25, 0.03), look["third"], rotation=(-0.2, 0, 0.15)),
    ]
    for side in (-1, 1):
        parts += [
            Solid("ellipsoid", (0.36 * side, 1.22, 0), (0.17, 0.17, 0.09), look["main"]),
            Solid("ellipsoid", (0.36 * side, 1.22, 0.06), (0.1, 0.1, 0.06), look["pale"]),
            Solid("ellipsoid", (0.17 * side, 0.98, 0.41), (0.05, 0.06, 0.05), look["glossy"]),
            Solid("ellipsoid", (0.62 * side, 0.12, 0.12), (0.2, 0.43, 0.2), look["second"], rotation=(-0.5, 0, 0.75 * side)),
            Solid("ellipsoid", (0.34 * side, -0.45, 0.42), (0.2, 0.19, 0.42), look["main"], rotation=(0, 0.4 * side, 0)),
            Solid("ellipsoid", (0.5 * side, -0.45, 0.78), (0.17, 0.2, 0.08), look["third"], rotation=(0, 0.4 * side, 0)),
        ]
    return parts


def _truck(look: Looks) -> list[Solid]:
    tray = Solid("box", (-0.42, 0.5, 0), (0.66, 0.42, 0.4), look["second"])
    parts = [
        Solid("box", (0, -0.2, 0), (1.2, 0.07, 0.34), look["dark"]),
        Solid("box", (-0.42, 0.17, 0), (0.74, 0.3, 0.48), look["main"], cut=tray),
        Solid("box", (0.72, 0.2, 0), (0.32, 0.4, 0.44), look["second"]),
        Solid("box", (0.74, 0.62, 0), (0.26, 0.05, 0.38), look["third"]),
        Solid("box", (0.79, 0.32, 0), (0.27, 0.17, 0.34), look["glossy"]),
        Solid("box", (0.72, 0.32, 0), (0.2, 0.15, 0.46), look["glossy"]),
        Solid("box", (1.14, 0.0, 0), (0.14, 0.16, 0.4), look["third"]),
        Solid("ellipsoid", (-0.7, 0.3, 0.1), (0.27, 0.27, 0.27), look["third"]),
        Solid("ellipsoid", (-0.2, 0.27, -0.12), (0.22, 0.22, 0.22), look["pale"]),
        *rod((0.55, 0.5, -0.36), (0.55, 0.95, -0.36), 0.06, look["glossy"]),
    ]
    for x in (-0.85, -0.15, 0.85):
        for side in (-1, 1):
            turn = (math.pi / 2, 0, 0)
            parts.append(Solid("cylinder", (x, -0.3, 0.42 * side), (0.26, 0.1, 0.26), look["dark"], rotation=turn))
            parts.append(Solid("cylinder", (x, -0.3, 0.44 * side), (0.12, 0.11, 0.12), look["pale"], rotation=turn))
    parts += [Solid("ellipsoid", (1.27, 0.02, 0.25 * side), (0.04, 0.08, 0.08), look["pale"]) for side in (-1, 1)]
    return parts


def _plant(look: Looks) -> list[Solid]:
    green = Texture(color=_rgb(0.32, 0.75, 0.5), second=_rgb(0.25, 0.6, 0.75), pattern="stripes", frequency=11.0, axis=(0.6, 0.5, 0.6))
    hole = Solid("cylinder", (0, 0, 0), (0.45, 0.6, 0.45), look["main"])
    parts = [
        Solid("cylinder", (0, -0.35, 0), (0.52, 0.45, 0.52), look["main"], cut=hole),
        Solid("cylinder", (0, 0.08, 0), (0.6, 0.09, 0.6), look["second"], cut=hole),
        Solid("cylinder", (0, -0.25, 0), (0.46, 0.22, 0.46), look["dark"]),
        *rod((0, -0.1, 0), (0.06, 0.95, 0.04), 0.05, green),
        Solid("ellipsoid", (0.06, 1.05, 0.04), (0.16, 0.14, 0.16), look["pale"]),
    ]
    for i in range(6):
        turn = i * math.pi / 3
        petal = (0.06 + 0.25 * math.cos(turn), 1.06, 0.04 - 0.25 * math.sin(turn))
        parts.append(Solid("ellipsoid", petal, (0.17, 0.06, 0.12), look["third"], rotation=(0, turn, 0)))
    for i in range(5):
        turn, height = i * 2 * math.pi / 5 + 0.3, 0.25 + 0.08 * (i % 3)
        place = (0.42 * math.cos(turn), height + 0.12, -0.42 * math.sin(turn))
        tilted = _compose((0, turn, 0), (0, 0, 0.55))
        parts.append(Solid("ellipsoid", place, (0.5, 0.05, 0.2), green, rotation=tilted))
    return parts


def _compose(outer: Vector, inner: Vector) -> Vector:
    """Rotation vector of ``outer`` after ``inner`` by way of unit quaternions."""

    def quaternion(vector: Vector) -> tuple[float, np.ndarray]:
        angle = float(np.linalg.norm(vector))
        return math.cos(angle / 2), np.asarray(vector, float) / angle * math.sin(angle / 2)

    (w1, v1), (w2, v2) = quaternion(outer), quaternion(inner)
    w, v = w1 * w2 - v1 @ v2, w1 * v2 + w2 * v1 + np.cross(v1, v2)
    return tuple((v / np.linalg.norm(v) * 2 * math.atan2(float(np.linalg.norm(v)), w)).tolist())  # type: ignore[return-value]


OBJECTS: dict[str, Callable[[Looks], list[Solid]]] = {"mug": _mug, "bear": _bear, "truck": _truck, "plant": _plant}


def _fit(solid: Solid, center: np.ndarray, radius: float) -> Solid:
    return replace(
        solid,
        center=tuple(((np.asarray(solid.center) - center) / radius).tolist()),
        size=tuple(s / radius for s in solid.size),
        cut=None if solid.cut is None else _fit(solid.cut, center, radius),
    )


def make_object(name: str, looks: Looks) -> list[Solid]:
    """Solids of one object, enclosed by the unit sphere about the middle of its bounding box.

    Raises:
        ValueError: unknown ``name``.
    """
    if name not in OBJECTS:
        raise ValueError(f"object={name!r}: expected one of {', '.join(OBJECTS)}")
    solids = OBJECTS[name](looks)
    points = surface_points(solids)
    center = (points.amin(dim=0) + points.amax(dim=0)) / 2
    radius = float((points - center).norm(dim=1).max())
    return [_fit(solid, center.numpy(), radius) for solid in solids]


def make_clutter(rng: np.random.Generator, floor: float) -> list[Solid]:
    """A patterned table top at height ``floor`` with a few low things around its middle."""
    hue = rng.uniform()
    wood = Texture(_rgb(0.08, 0.5, 0.62), _rgb(0.07, 0.6, 0.45), "marble", 4.0, (0.9, 0.0, 0.44), 0.05)
    cloth = Texture(_rgb(hue, 0.35, 0.75), _rgb(hue, 0.1, 0.9), "checker", 5.0, specular=0.02)
    solids = [
        Solid("cylinder", (0, floor - 0.06, 0), (4.2, 0.05, 4.2), wood),
        Solid("cylinder", (0.1, floor - 0.008, -0.1), (1.9, 0.007, 1.9), cloth),
    ]
    start = rng.uniform(0, 2 * math.pi)
    for i in range(6):
        shape = ("ellipsoid", "box", "cylinder")[i % 3]
        angle, distance = start + i * 2 * math.pi / 6 + rng.uniform(-0.25, 0.25), rng.uniform(2.2, 3.1)
        size = tuple(rng.uniform(0.12, 0.3, size=3).tolist())
        look = Texture(_rgb(rng.uniform(), 0.6, 0.7), _rgb(rng.uniform(), 0.3, 0.9), str(rng.choice(PATTERNS)), 14.0)
        place = (distance * math.cos(angle), floor + size[1], distance * math.sin(angle))
        solids.append(Solid(shape, place, size, look, rotation=(0, float(rng.uniform(0, 3)), 0)))
    return solids


def make_scene(name: str, rng: np.random.Generator, *, texture: str = "auto", scale: float = 1.0) -> Scene:
    """A scene with one object; ``rng`` decides its colours, patterns and clutter.

    Raises:
        ValueError: unknown object or texture, or a bad scale.
    """
    if texture not in ("auto", *PATTERNS):
        raise ValueError(f"texture={texture!r}: expected one of auto, {', '.join(PATTERNS)}")
    solids = make_object(name, make_looks(rng, texture))
    clutter = make_clutter(rng, floor=float(surface_points(solids)[:, 1].min()))
    return Scene(tuple(solids + clutter), n_object=len(solids), scale=scale)
