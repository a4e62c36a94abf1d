"""Reader of COLMAP sparse models, text or binary (https://colmap.github.io/format.html), and their lens distortion.

COLMAP's pixel coordinates are the house's: (0.5, 0.5) is the centre of the top left pixel. Poses are world to camera, x right,
y down, z ahead.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from co3d_ensemble.base.paths import listed
from co3d_ensemble.base.text import read_text
from co3d_ensemble.mine.pictures import numbers

# model: (number in binary files, names of the parameters); other models are refused by name
MODELS = {
    "SIMPLE_PINHOLE": (0, ("f", "cx", "cy")),
    "PINHOLE": (1, ("fx", "fy", "cx", "cy")),
    "SIMPLE_RADIAL": (2, ("f", "cx", "cy", "k1")),
    "RADIAL": (3, ("f", "cx", "cy", "k1", "k2")),
    "OPENCV": (4, ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2")),
    "FULL_OPENCV": (6, ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6")),
}
_REFUSED = {
    **{5: "OPENCV_FISHEYE", 7: "FOV", 8: "SIMPLE_RADIAL_FISHEYE", 9: "RADIAL_FISHEYE", 10: "THIN_PRISM_FISHEYE"},
    **{11: "RAD_TAN_THIN_PRISM_FISHEYE", 12: "SIMPLE_DIVISION", 13: "DIVISION", 14: "SIMPLE_FISHEYE", 15: "FISHEYE"},
    **{16: "EUCM", 17: "EQUIRECTANGULAR"},
}
NAMES = {number: name for name, (number, _) in MODELS.items()} | _REFUSED  # in binary files
NO_POINT = 2**64 - 1  # the id of a feature without a point in binary files; -1 in text files


@dataclass(frozen=True)
class ColmapCamera:
    model: str
    height: int
    width: int
    parameters: dict[str, float]

    @property
    def K(self) -> Tensor:
        """Intrinsics without the distortion, float64, shape (3, 3)."""
        p = self.parameters
        fx, fy = p.get("fx", p.get("f")), p.get("fy", p.get("f"))
        return torch.tensor([[fx, 0, p["cx"]], [0, fy, p["cy"]], [0, 0, 1]], dtype=torch.float64)

    @property
    def distorts(self) -> bool:
        return any(value != 0 for name, value in self.parameters.items() if name[0] in "kp")

    def distorted(self, xy: Tensor) -> Tensor:
        """Where the photograph has what a pinhole camera with the same K has at pixels (..., 2).

        OpenCV's model: with r^2 = x^2 + y^2 of the direction (x, y, 1), (x, y) is scaled by
        (1 + k1 r^2 + k2 r^4 + k3 r^6) / (1 + k4 r^2 + k5 r^4 + k6 r^6) and moved by the tangential part (p1, p2).
        """
        K = self.K.to(xy)
        focal, principal = K[[0, 1], [0, 1]], K[:2, 2]
        x, y = ((xy - principal) / focal).unbind(-1)
        k1, k2, k3, k4, k5, k6, p1, p2 = (self.parameters.get(name, 0.0) for name in ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2"))
        r2 = x * x + y * y
        radial = (1 + r2 * (k1 + r2 * (k2 + r2 * k3))) / (1 + r2 * (k4 + r2 * (k5 + r2 * k6)))
        moved_x = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
        moved_y = y * radial + 2 * p2 * x * y + p1 * (r2 + 2 * y * y)
        return torch.stack((moved_x, moved_y), dim=-1) * focal + principal


@dataclass(frozen=True)
class ColmapImage:
    """One registered photograph: ``X_camera = R X_world + t``, float64; ``point_ids`` of the 3D points that it sees."""

    name: str
    camera_id: int
    R: Tensor
    t: Tensor
    point_ids: tuple[int, ...]


@dataclass(frozen=True)
class ColmapModel:
    """Cameras by id, images in the order of their names, and points: positions (n, 3), float64, with the row of each id."""

    path: Path
    cameras: dict[int, ColmapCamera]
    images: tuple[ColmapImage, ...]
    xyz: Tensor
    rows: dict[int, int]

    def points_of(self, image: ColmapImage) -> Tensor:
        """The 3D points that an image sees, in its camera's frame, shape (n, 3)."""
        rows = [self.rows[i] for i in image.point_ids]
        return self.xyz[rows].reshape(-1, 3) @ image.R.T + image.t


def is_colmap_model(folder: Path) -> bool:
    return any((folder / f"images.{suffix}").is_file() for suffix in ("bin", "txt"))


def colmap_models(folder: Path) -> list[Path]:
    """The folder and those in it that hold a model: of photographs that do not hang together COLMAP makes several, ``0``, ``1``, ..."""
    if not folder.is_dir():
        return []
    return [path for path in (folder, *(path for path in listed(folder) if path.is_dir())) if is_colmap_model(path)]


def image_names(folder: Path) -> list[str]:
    """Names of the images that the model in ``folder`` has; errors as :func:`read_colmap_model`."""
    suffix, readers = _layout(folder)
    return [image.name for image in _named(readers["images"], folder / f"images.{suffix}")]


def _layout(folder: Path) -> tuple[str, dict[str, Callable[[Path], Any]]]:
    return ("bin", _BINARY) if (folder / "images.bin").is_file() else ("txt", _TEXT)


def read_colmap_model(folder: Path) -> ColmapModel:
    """The model in ``folder``: cameras, images and points3D as .bin, or where there are none as .txt.

    Raises:
        FileNotFoundError, ValueError: naming the file, and in text the line, that is missing, malformed or contradicts another.
    """
    suffix, readers = _layout(folder)
    paths = {name: folder / f"{name}.{suffix}" for name in ("cameras", "images", "points3D")}
    for path in paths.values():
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: expected a COLMAP model, cameras, images and points3D as .bin or .txt")
    cameras, images, points = (_named(readers[name], path) for name, path in paths.items())
    for image in images:
        if image.camera_id not in cameras:
            raise ValueError(f"{paths['images']}: image {image.name} has camera {image.camera_id}, which {paths['cameras']} lacks")
        unknown = next((i for i in image.point_ids if i not in points), None)
        if unknown is not None:
            raise ValueError(f"{paths['images']}: image {image.name} sees point {unknown}, which {paths['points3D']} lacks")
    xyz = torch.tensor(list(points.values()), dtype=torch.float64).reshape(-1, 3)
    ordered = tuple(sorted(images, key=lambda image: image.name))
    return ColmapModel(folder, cameras, ordered, xyz, {i: row for row, i in enumerate(points)})


def _named(reader: Callable[[Path], Any], path: Path) -> Any:
    try:
        return reader(path)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: truncated or malformed: {error}") from error


def _unsupported(model: str) -> str:
    return (
        f"camera model {model} is not supported; supported are {', '.join(MODELS)} "
        "(colmap image_undistorter makes photographs and a model without distortion)"
    )


def _camera(model: str, width: int, height: int, parameters: list[float], where: str) -> ColmapCamera:
    if model not in MODELS:
        raise ValueError(f"{where}: {_unsupported(model)}")
    names = MODELS[model][1]
    n_focal = sum(name.startswith("f") for name in names)
    sizes = (width, height, *parameters[:n_focal])
    if len(parameters) != len(names) or not np.isfinite(parameters).all() or min(sizes) <= 0:
        raise ValueError(f"{where}: {model} needs a size and {', '.join(names)}, found {width}x{height} and {parameters}")
    return ColmapCamera(model, height, width, dict(zip(names, parameters)))


def _image(name: str, camera_id: int, pose: list[float], point_ids: tuple[int, ...], where: str) -> ColmapImage:
    w, x, y, z, *translation = pose
    norm = np.linalg.norm([w, x, y, z])
    if not (np.isfinite(pose).all() and abs(norm - 1) < 1e-3):
        raise ValueError(f"{where}: the pose of image {name} is no unit quaternion and translation: {pose}")
    w, x, y, z = (value / norm for value in (w, x, y, z))
    R = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    rotation, shift = torch.tensor(R, dtype=torch.float64), torch.tensor(translation, dtype=torch.float64)
    return ColmapImage(name, camera_id, rotation, shift, point_ids)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, content) of the lines that are no comments; an image without features has an empty line."""
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.startswith("#"):
            yield f"{path}, line {number}", line.strip()


def _whole(word: str, where: str) -> int:
    try:
        return int(word)
    except ValueError as error:
        raise ValueError(f"{where}: {word!r} is not a whole number") from error


def _text_cameras(path: Path) -> dict[int, ColmapCamera]:
    cameras = {}
    for where, line in _lines(path):
        if not line:
            continue
        words = line.split()
        if len(words) < 5:
            raise ValueError(f"{where}: expected CAMERA_ID MODEL WIDTH HEIGHT PARAMS, found {line!r}")
        width, height = _whole(words[2], where), _whole(words[3], where)
        cameras[_whole(words[0], where)] = _camera(words[1], width, height, numbers(words[4:], where), where)
    return cameras


def _text_images(path: Path) -> list[ColmapImage]:
    images = []
    lines = _lines(path)
    for where, line in lines:
        if not line:
            continue
        words = line.split(maxsplit=9)
        if len(words) != 10:
            raise ValueError(f"{where}: expected IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, found {line!r}")
        features_where, features = next(lines, (where, ""))
        ids = features.split()[2::3]
        if len(features.split()) != 3 * len(ids):
            raise ValueError(f"{features_where}: expected X Y POINT3D_ID for every feature")
        seen = tuple(i for i in (_whole(word, features_where) for word in ids) if i != -1)
        images.append(_image(words[9], _whole(words[8], where), numbers(words[1:8], where), seen, where))
    return images


def _text_points(path: Path) -> dict[int, list[float]]:
    points = {}
    for where, line in _lines(path):
        if not line:
            continue
        words = line.split()
        if len(words) < 8:
            raise ValueError(f"{where}: expected POINT3D_ID X Y Z R G B ERROR TRACK, found {line!r}")
        points[_whole(words[0], where)] = numbers(words[1:4], where)
    return points


class _Bytes:
    """A binary file read in order; struct.error past its end."""

    def __init__(self, path: Path) -> None:
        self.data, self.position = path.read_bytes(), 0

    def take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self.data, self.position)
        self.position += struct.calcsize("<" + layout)
        return values

    def skip(self, n: int) -> None:
        self.position += n
        if self.position > len(self.data):
            raise struct.error(f"the file ends {self.position - len(self.data)} bytes too early")

    def text(self) -> str:
        end = self.data.find(b"\0", self.position)
        if end < 0:
            raise struct.error("the file ends in a name")
        value = self.data[self.position : end].decode("utf-8")
        self.position = end + 1
        return value


def _binary_cameras(path: Path) -> dict[int, ColmapCamera]:
    file, cameras = _Bytes(path), {}
    for _ in range(file.take("Q")[0]):
        camera_id, number, width, height = file.take("iiQQ")
        model = NAMES.get(number, f"number {number}, which is none of COLMAP's known ones,")
        if model not in MODELS:  # how many parameters it has is not known here
            raise ValueError(f"{path}: camera {camera_id}: {_unsupported(model)}")
        parameters = list(file.take(f"{len(MODELS[model][1])}d"))
        cameras[camera_id] = _camera(model, width, height, parameters, f"{path}: camera {camera_id}")
    return cameras


def _binary_images(path: Path) -> list[ColmapImage]:
    file, images = _Bytes(path), []
    for _ in range(file.take("Q")[0]):
        _, *pose, camera_id = file.take("i7di")
        name, (n,) = file.text(), file.take("Q")
        start = file.position
        file.skip(24 * n)
        features = np.frombuffer(file.data, np.dtype([("xy", "<f8", 2), ("id", "<u8")]), count=n, offset=start)
        seen = tuple(int(i) for i in features["id"] if i != NO_POINT)
        images.append(_image(name, camera_id, list(pose), seen, str(path)))
    return images


def _binary_points(path: Path) -> dict[int, list[float]]:
    file, points = _Bytes(path), {}
    for _ in range(file.take("Q")[0]):
        point_id, x, y, z, *_, n = file.take("Q3d3BdQ")
        file.skip(8 * n)
        if not np.isfinite([x, y, z]).all():
            raise ValueError(f"{path}: point {point_id} is not finite: {x}, {y}, {z}")
        points[point_id] = [x, y, z]
    return points


_TEXT = {"cameras": _text_cameras, "images": _text_images, "points3D": _text_points}
_BINARY = {"cameras": _binary_cameras, "images": _binary_images, "points3D": _binary_points}
