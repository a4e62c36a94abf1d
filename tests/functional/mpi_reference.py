"""Multiplane images rendered the slow way: rays cast through a stack of textured planes, one pixel at a time, in Python floats.

Shares no code and no formula with the package: points are moved between cameras, intersected and projected one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

LAST = 1e3


def unproject(K, x, y, z):
    """Camera point at depth z seen at pixel position (x, y), by solving K X = z (x, y, 1) from the bottom up."""
    Y = (y - K[1][2]) / K[1][1] * z
    X = (x * z - K[0][1] * Y - K[0][2] * z) / K[0][0]
    return [X, Y, z]


def apply(R, t, X):
    return [sum(R[i][j] * X[j] for j in range(3)) + t[i] for i in range(3)]


def back(R, t, X):
    moved = [X[i] - t[i] for i in range(3)]
    return [sum(R[j][i] * moved[j] for j in range(3)) for i in range(3)]


def project(K, X):
    return [sum(K[i][j] * X[j] for j in range(3)) / X[2] for i in range(2)]


def bilinear(picture, x, y):
    """Value of a list of rows at pixel position (x, y); beyond the outermost pixel centres that of the nearest one."""
    height, width = len(picture), len(picture[0])
    x, y = min(max(x - 0.5, 0.0), width - 1.0), min(max(y - 0.5, 0.0), height - 1.0)
    i, j = min(int(y), max(height - 2, 0)), min(int(x), max(width - 2, 0))
    total = 0.0
    for row in (i, i + 1):
        for column in (j, j + 1):
            weight = max(0.0, 1 - abs(y - row)) * max(0.0, 1 - abs(x - column))
            total += weight * picture[row][column] if weight else 0.0
    return total


def from_pictures(rgb, sigma) -> Callable:
    """Lookup (plane, x, y) -> (colour, sigma) of tensors (N, 3, H, W), (N, 1, H, W)."""
    pictures = torch.cat((rgb, sigma), dim=1).tolist()

    def lookup(plane, x, y):
        values = [bilinear(channel, x, y) for channel in pictures[plane]]
        return values[:3], values[3]

    return lookup


def ray_cast(lookup, z, *, K_source, K_target, R, t, source_size, target_size, mode="sigma"):
    """One entry's target view by casting a ray per pixel.

    Every plane that the ray meets in front of the target camera, coming from the source camera's side, inside the source
    picture, is looked up; distances are between the points themselves.

    Returns:
        rgb (3, h, w), z (1, h, w) not divided by alpha, alpha (1, h, w), count of planes inside (1, h, w), float64.
    """
    K_source, K_target, R, t, z = (torch.as_tensor(v, dtype=torch.float64).tolist() for v in (K_source, K_target, R, t, z))
    height, width = target_size
    rgb, depth, alpha, count = (torch.zeros(c, height, width, dtype=torch.float64) for c in (3, 1, 1, 1))
    center = back(R, t, [0.0, 0.0, 0.0])
    for row in range(height):
        for column in range(width):
            direction = [a - b for a, b in zip(back(R, t, unproject(K_target, column + 0.5, row + 0.5, 1.0)), center)]
            if direction[2] <= 1e-6 * math.hypot(*direction):
                continue
            steps = [(plane_z - center[2]) / direction[2] for plane_z in z]
            points = [[center[k] + step * direction[k] for k in range(3)] for step in steps]
            passing = 1.0
            for i, (step, point) in enumerate(zip(steps, points)):
                if step <= 0:
                    continue
                x, y = project(K_source, point)
                if not (0 <= x <= source_size[1] and 0 <= y <= source_size[0]):
                    continue
                count[0, row, column] += 1
                colour, value = lookup(i, x, y)
                if mode == "sigma":
                    delta = math.dist(points[i + 1], point) if i + 1 < len(z) else LAST
                    opacity = 1 - math.exp(-value * delta)
                else:
                    opacity = value
                weight = passing * opacity
                for channel in range(3):
                    rgb[channel, row, column] += weight * colour[channel]
                depth[0, row, column] += weight * apply(R, t, point)[2]
                alpha[0, row, column] += weight
                passing *= 1 - opacity
    return rgb, depth, alpha, count
