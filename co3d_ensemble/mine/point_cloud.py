"""Sequence point clouds: PLY files as CO3Dv2 has them, and which of their points a camera sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from co3d_ensemble.mine.views import visible_points

_TYPES = {
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("uchar", "uint8"), "u1"),
    **dict.fromkeys(("short", "int16"), "i2"),
    **dict.fromkeys(("ushort", "uint16"), "u2"),
    **dict.fromkeys(("int", "int32"), "i4"),
    **dict.fromkeys(("uint", "uint32"), "u4"),
    **dict.fromkeys(("float", "float32"), "f4"),
    **dict.fromkeys(("double", "float64"), "f8"),
}
_FORMATS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
NEIGHBOURHOOD = 5  # pixels: a point is hidden by points that far around it
SURFACE_DEPTH = 1.05  # a point more than 5% behind the nearest one around it lies on another surface


def read_ply_points(path: Path) -> Tensor:
    """x, y, z of the vertices of a PLY file (ascii or binary), float64, shape (n, 3).

    Raises:
        FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    data = path.read_bytes()
    header, separator, body = data.partition(b"end_header\n")
    lines = [line.split() for line in header.decode("ascii", "replace").splitlines()]
    if not separator or not lines or lines[0] != ["ply"]:
        raise ValueError(f"{path}: not a PLY file")
    layout = next((line[1] for line in lines if line[:1] == ["format"] and len(line) > 1), "")
    elements = [i for i, line in enumerate(lines) if line[:1] == ["element"]]
    first = lines[elements[0]] if elements else []
    if layout not in _FORMATS or first[1:2] != ["vertex"] or len(first) != 3 or not first[2].isdigit():
        raise ValueError(f"{path}: expected vertices first, and their number, in one of the formats {', '.join(_FORMATS)}")
    n = int(first[2])
    end = elements[1] if len(elements) > 1 else len(lines)
    properties = [line[1:] for line in lines[elements[0] + 1 : end] if line[:1] == ["property"] and len(line) > 1]
    names = [entry[-1] for entry in properties]
    if not {"x", "y", "z"} <= set(names) or any(entry[0] not in _TYPES for entry in properties):
        raise ValueError(f"{path}: vertices need the scalar properties x, y, z; they have {', '.join(names)}")
    try:
        if layout == "ascii":
            rows = np.array([line.split() for line in body.decode("ascii").splitlines()[:n]], dtype=np.float64)
            columns = [rows[:, names.index(axis)] for axis in "xyz"] if n else [np.zeros(0)] * 3
        else:
            kinds = np.dtype([(entry[-1], _FORMATS[layout] + _TYPES[entry[0]]) for entry in properties])
            vertices = np.frombuffer(body, kinds, count=n)
            columns = [vertices[axis] for axis in "xyz"]
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: truncated or malformed, expected {n} vertices of {len(names)} properties: {error}") from error
    points = torch.from_numpy(np.stack([np.asarray(column, dtype=np.float64) for column in columns], axis=1))
    if len(points) != n or not torch.isfinite(points).all():
        raise ValueError(f"{path}: expected {n} finite vertices, found {len(points)}")
    return points


def seen_points(xyz: Tensor, K: Tensor, *, height: int, width: int) -> Tensor:
    """(x, y, z) of the points (n, 3) in camera space that are in the picture and not behind other points; float32.

    A cloud has no surface that could hide anything, so the nearest points stand for it: this needs a dense cloud, as CO3D's
    are, with more points on the front of the object than ``NEIGHBOURHOOD`` squared pixels.
    """
    points = visible_points(xyz, K, height=height, width=width)
    column, row, z = points[:, 0].long(), points[:, 1].long(), points[:, 2]
    nearest = torch.full((height * width,), torch.inf).scatter_reduce(0, row * width + column, z, "amin")
    pad = NEIGHBOURHOOD // 2
    around = -torch.nn.functional.max_pool2d(-nearest.reshape(1, 1, height, width), NEIGHBOURHOOD, 1, pad)[0, 0]
    return points[z <= SURFACE_DEPTH * around[row, column]]
