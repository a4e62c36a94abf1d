"""COLMAP models written as the format's page describes them, for the tests."""

import struct

import numpy as np

MODEL_NUMBERS = {"SIMPLE_PINHOLE": 0, "PINHOLE": 1, "SIMPLE_RADIAL": 2, "RADIAL": 3, "OPENCV": 4, "OPENCV_FISHEYE": 5, "FULL_OPENCV": 6}


def quaternion(R):
    """(w, x, y, z) of a rotation with a positive trace."""
    w = np.sqrt(1 + np.trace(R)) / 2
    return [w, (R[2, 1] - R[1, 2]) / (4 * w), (R[0, 2] - R[2, 0]) / (4 * w), (R[1, 0] - R[0, 1]) / (4 * w)]


def write_colmap(folder, cameras, images, points, *, binary):
    """Writes cameras {id: (model, width, height, parameters)}, points {id: xyz} and images.

    An image is (id, name, camera id, R, t, [(x, y, point id or -1), ...]).
    """
    folder.mkdir(parents=True, exist_ok=True)
    (_write_binary if binary else _write_text)(folder, cameras, images, points)
    return folder


def _write_text(folder, cameras, images, points):
    lines = ["# Camera list with one line of data per camera:", "#   CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]"]
    lines += [
        f"{i} {model} {width} {height} {' '.join(map(repr, parameters))}" for i, (model, width, height, parameters) in cameras.items()
    ]
    (folder / "cameras.txt").write_text("\n".join(lines) + "\n")
    lines = ["# Image list with two lines of data per image:"]
    for i, name, camera, R, t, features in images:
        pose = " ".join(repr(float(value)) for value in [*quaternion(np.asarray(R)), *t])
        lines += [f"{i} {pose} {camera} {name}", " ".join(f"{x} {y} {point}" for x, y, point in features)]
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    lines = ["# 3D point list with one line of data per point:"]
    lines += [f"{i} {' '.join(repr(float(v)) for v in xyz)} 10 20 30 0.5 1 0 2 0" for i, xyz in points.items()]
    (folder / "points3D.txt").write_text("\n".join(lines) + "\n")


def _write_binary(folder, cameras, images, points):
    data = struct.pack("<Q", len(cameras))
    for i, (model, width, height, parameters) in cameras.items():
        data += struct.pack("<iiQQ", i, MODEL_NUMBERS[model], width, height) + struct.pack(f"<{len(parameters)}d", *parameters)
    (folder / "cameras.bin").write_bytes(data)
    data = struct.pack("<Q", len(images))
    for i, name, camera, R, t, features in images:
        data += struct.pack("<i7di", i, *quaternion(np.asarray(R)), *map(float, t), camera) + name.encode() + b"\0"
        data += struct.pack("<Q", len(features)) + b"".join(struct.pack("<ddq", x, y, point) for x, y, point in features)
    (folder / "images.bin").write_bytes(data)
    data = struct.pack("<Q", len(points))
    for i, xyz in points.items():
        data += struct.pack("<Q3d3Bd", i, *map(float, xyz), 10, 20, 30, 0.5) + struct.pack("<Q4i", 2, 1, 0, 2, 0)
    (folder / "points3D.bin").write_bytes(data)
