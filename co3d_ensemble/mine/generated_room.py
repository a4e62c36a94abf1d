"""Random rooms with things standing on the floor: what a generated scene shows, before it is photographed.

World axes are OpenCV's: x right, y DOWN, z ahead; the floor is y = 0, lengths are metres. What tells depth in a picture is
what tells it in a photograph: where a thing stands on the floor, the perspective of the floor's pattern, things of a few
known sizes, occlusion, shadows. Looks are drawn independently of all places, so colour tells nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator

PATTERNS = ("plain", "stripes", "checker", "spots", "marble")
KINDS = {  # shape and half extents in metres; a thing is scaled as a whole by a number from SIZES
    "ball": ("ball", (0.35, 0.35, 0.35)),
    "crate": ("box", (0.40, 0.40, 0.40)),
    "bench": ("box", (0.75, 0.25, 0.28)),
    "drum": ("cylinder", (0.38, 0.48, 0.38)),
    "pillar": ("cylinder", (0.20, 1.00, 0.20)),
}
SIZES = (0.88, 1.14)
N_THINGS = (3, 8)  # both included
ROOM_TURNS = (-25.0, 25.0)  # degrees from +z to the back wall's normal
BACK_WALLS, SIDE_WALLS = (7.0, 24.0), (3.0, 8.0)  # metres from the origin
NEAREST = 2.4  # z in metres of the nearest thing's middle
SIDEWAYS = 0.7  # |x| / z of a thing's middle, a little more than half of the widest field of view
CLEARANCE = 0.1  # metres on the floor between things, and from things to walls
PLACEMENT_TRIES = 40
FLOOR_WAVELENGTHS, WALL_WAVELENGTHS, THING_WAVELENGTHS = (0.9, 2.5), (1.2, 4.0), (0.35, 1.0)  # metres
MIN_CONTRAST = 0.35  # between a look's two colours, mean over the channels
LIGHT_HEIGHTS = (0.6, 1.2)  # radians above the horizon
AMBIENTS = (0.35, 0.55)

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Look:
    """A solid pattern of two colours; frequency (radians per metre), axis and phase live in the surface's own coordinates."""

    pattern: str
    colors: tuple[Vector, Vector]
    frequency: float
    axis: Vector
    phase: Vector


@dataclass(frozen=True)
class Thing:
    """A convex solid that stands on the floor, turned by ``turn`` radians about the vertical.

    Attributes:
        shape: ``ball`` | ``box`` | ``cylinder`` (upright).
        center: metres; ``y = -half[1]``.
        half: half extents along its own axes, metres.
    """

    shape: str
    center: Vector
    half: Vector
    turn: float
    look: Look

    @property
    def foot(self) -> float:
        """Radius of the circle on the floor that holds the thing."""
        return math.hypot(self.half[0], self.half[2]) if self.shape == "box" else self.half[0]


@dataclass(frozen=True)
class Wall:
    """The plane ``normal . X = offset``, seen from the side that its unit normal points to."""

    normal: Vector
    offset: float
    look: Look


@dataclass(frozen=True)
class Room:
    """Planes (the floor, the back wall, two side walls), things on the floor, and a light from above.

    Attributes:
        light: unit vector towards the light.
        ambient: light in shadow, as a share of full light.
    """

    walls: tuple[Wall, ...]
    things: tuple[Thing, ...]
    light: Vector
    ambient: float


def random_room(rng: Generator) -> Room:
    """A room around the origin, with things ahead of it."""
    turn = math.radians(rng.uniform(*ROOM_TURNS))
    walls = [Wall((0.0, -1.0, 0.0), 0.0, random_look(rng, FLOOR_WAVELENGTHS, PATTERNS[1:]))]
    for angle, reach in ((turn, BACK_WALLS), (turn + math.pi / 2, SIDE_WALLS), (turn - math.pi / 2, SIDE_WALLS)):
        inward = (-math.sin(angle), 0.0, -math.cos(angle))
        walls.append(Wall(inward, -float(rng.uniform(*reach)), random_look(rng, WALL_WAVELENGTHS, PATTERNS)))
    azimuth, height = rng.uniform(0, 2 * math.pi), rng.uniform(*LIGHT_HEIGHTS)
    light = (math.cos(height) * math.sin(azimuth), -math.sin(height), math.cos(height) * math.cos(azimuth))
    things: list[Thing] = []
    for _ in range(int(rng.integers(N_THINGS[0], N_THINGS[1] + 1))):
        things += _placed_thing(rng, things, walls)
    return Room(tuple(walls), tuple(things), light, float(rng.uniform(*AMBIENTS)))


def random_look(rng: Generator, wavelengths: tuple[float, float], patterns: Sequence[str]) -> Look:
    first = second = rng.uniform(0.05, 0.95, 3)
    while np.abs(first - second).mean() < MIN_CONTRAST:
        second = rng.uniform(0.05, 0.95, 3)
    pattern = patterns[int(rng.integers(len(patterns)))]
    axis, phase = rng.normal(size=3), rng.uniform(0, 2 * math.pi, 3)
    frequency = 2 * math.pi / rng.uniform(*wavelengths)
    return Look(pattern, (_vector(first), _vector(second)), frequency, _vector(axis / np.linalg.norm(axis)), _vector(phase))


def with_shuffled_looks(room: Room) -> Room:
    """The room where every thing has the look of the thing after it: of two or more, none keeps its own."""
    looks = [thing.look for thing in room.things]
    things = [replace(thing, look=look) for thing, look in zip(room.things, looks[1:] + looks[:1])]
    return replace(room, things=tuple(things))


def _placed_thing(rng: Generator, others: Sequence[Thing], walls: Sequence[Wall]) -> list[Thing]:
    """A thing of a random kind that stands free, or none where the tries found no place."""
    shape, half = list(KINDS.values())[int(rng.integers(len(KINDS)))]
    scale = rng.uniform(*SIZES)
    half = _vector([scale * extent for extent in half])
    look, turn = random_look(rng, THING_WAVELENGTHS, PATTERNS), float(rng.uniform(0, 2 * math.pi))
    farthest = max(abs(walls[1].offset), 2 * NEAREST)
    for _ in range(PLACEMENT_TRIES):
        z = NEAREST * (farthest / NEAREST) ** rng.uniform()
        thing = Thing(shape, _vector((z * rng.uniform(-SIDEWAYS, SIDEWAYS), -half[1], z)), half, turn, look)
        if _stands_free(thing, others, walls):
            return [thing]
    return []


def _stands_free(thing: Thing, others: Sequence[Thing], walls: Sequence[Wall]) -> bool:
    x, _, z = thing.center
    apart = (math.hypot(x - o.center[0], z - o.center[2]) > thing.foot + o.foot + CLEARANCE for o in others)
    inside = (x * w.normal[0] + z * w.normal[2] - w.offset > thing.foot + CLEARANCE for w in walls[1:])
    return all(apart) and all(inside)


def _vector(values: Sequence[float] | np.ndarray) -> Vector:
    x, y, z = (float(value) for value in values)
    return (x, y, z)
