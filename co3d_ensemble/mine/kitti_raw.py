"""KITTI raw (Geiger et al., 2013): rectified colour stereo pairs of the city sequences.

    ROOT/<date>/calib_cam_to_cam.txt
    ROOT/<date>/<date>_drive_<number>_sync/image_02/data/<frame>.png    left   (or .jpg)
    ROOT/<date>/<date>_drive_<number>_sync/image_03/data/<frame>.png    right

The split of the 28 city sequences is that of Tulsiani et al. (ECCV 2018), which MINE follows: 20 to train, 4 each to validate
and to test. Translations are in metres. The files carry no sparse points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from co3d_ensemble.base.paths import plain_part
from co3d_ensemble.base.pictures import exactly, read_photo
from co3d_ensemble.base.text import read_text
from co3d_ensemble.mine.pictures import check_settings, existing_folder, fit_size, numbers, picture_size, pictures_by_stem
from co3d_ensemble.mine.views import View, ViewPairs

CITY_SEQUENCES = (
    *(
        f"2011_09_26_drive_{number}"
        for number in (
            *("0001", "0002", "0005", "0009", "0011", "0013", "0014", "0017", "0018", "0048", "0051", "0056"),
            *("0057", "0059", "0060", "0084", "0091", "0093", "0095", "0096", "0104", "0106", "0113", "0117"),
        )
    ),
    *("2011_09_28_drive_0001", "2011_09_28_drive_0002", "2011_09_29_drive_0026", "2011_09_29_drive_0071"),
)
SPLIT_SEED, SPLIT_ENDS = 0, {"train": (0, 20), "val": (20, 24), "test": (24, 28)}  # 70, 15 and 15 per cent of 28, rounded
LEFT_OUT = ("2011_09_26_drive_0117", "0000000074")  # a frame that the split's authors leave out
LEFT, RIGHT = 2, 3  # the cameras' numbers
SOURCES = ("left", "both")
HALF_PIXEL = 0.5  # KITTI counts pixel centres from 0, the house from 0.5


def city_sequences(split: str) -> list[str]:
    """Names of the split's sequences: the list in the order that numpy's legacy generator shuffles it into, as published."""
    if split not in SPLIT_ENDS:
        raise ValueError(f"split={split!r}: expected one of {', '.join(SPLIT_ENDS)}")
    names = list(CITY_SEQUENCES)
    np.random.RandomState(SPLIT_SEED).shuffle(names)
    start, end = SPLIT_ENDS[split]
    return names[start:end]


@dataclass(frozen=True)
class StereoCamera:
    """One rectified camera: K (3, 3) in house pixels, t (3,) with ``X_camera = X_rectified + t`` in metres, picture size."""

    K: Tensor
    t: Tensor
    height: int
    width: int


def read_calibration(path: Path) -> dict[int, StereoCamera]:
    """The rectified colour cameras of a ``calib_cam_to_cam.txt``.

    ``P_rect_0i = K [I | t]`` projects points of the rectified reference camera 0; ``S_rect_0i`` is the pictures' size.

    Raises:
        FileNotFoundError, ValueError: naming the file and the entry that is missing or malformed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected the calibration of the day")
    entries: Mapping[str, tuple[int, str]] = {}
    for i, line in enumerate(read_text(path, strict=False).splitlines(), 1):
        key, colon, value = line.partition(":")
        if colon:
            entries[key.strip()] = (i, value)  # type: ignore[index]
    cameras = {}
    for camera in (LEFT, RIGHT):
        values = {}
        for key, n in ((f"P_rect_0{camera}", 12), (f"S_rect_0{camera}", 2)):
            if key not in entries:
                raise ValueError(f"{path}: no entry {key}")
            line_number, text = entries[key]
            where = f"{path}, line {line_number}"
            values[key[0]] = numbers(text.split(), where)
            if len(values[key[0]]) != n:
                raise ValueError(f"{where}: {key} has {len(values[key[0]])} numbers, expected {n}")
        P = torch.tensor(values["P"], dtype=torch.float64).reshape(3, 4)
        if not (P[0, 0] > 0 and P[1, 1] > 0 and P[2, :3].tolist() == [0, 0, 1]):
            raise ValueError(f"{path}: P_rect_0{camera} is no projection of a rectified camera: {P.tolist()}")
        K = P[:, :3].clone()
        K[:2, 2] += HALF_PIXEL
        t = torch.linalg.solve(P[:, :3], P[:, 3])
        width, height = (int(side) for side in values["S"])
        cameras[camera] = StereoCamera(K, t, height, width)
    return cameras


class KITTIRaw(ViewPairs):
    """Stereo pairs: source and target are the two pictures of one moment.

    Args:
        root: see the module's text; ``split``: ``train`` | ``val`` | ``test``; sequences that are not on disk are an error.
        sequences: names such as ``2011_09_26_drive_0001`` in place of the split's.
        sources: ``left``: from left to right, as the tests go; ``both``: also from right to left; None: both to train, else left.
        height, width: picture size in pixels; ``fit``: ``stretch`` (as published) or ``crop``.
        n_points: taken for likeness with the other data sets; there are no sparse points.
        check: ``headers`` | ``decode`` | ``none``, how far pictures are checked at once.

    Raises:
        ValueError, FileNotFoundError: naming the setting, or the file and what is wrong with it.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        split: str = "train",
        sequences: Sequence[str] | None = None,
        sources: str | None = None,
        height: int,
        width: int,
        fit: str = "stretch",
        n_points: int = 0,
        random_target: bool = True,
        check: str = "headers",
        cache_megabytes: float = 0,
    ) -> None:
        super().__init__(n_points=n_points, random_target=random_target, cache_megabytes=cache_megabytes)
        check_settings(height=height, width=width, fit=fit, check=check, n_points=n_points)
        names = city_sequences(split) if sequences is None else [plain_part(name, "sequences") for name in sequences]
        sources = sources or ("both" if split == "train" else "left")
        if sources not in SOURCES:
            raise ValueError(f"sources={sources!r}: expected one of {', '.join(SOURCES)}")
        self.height, self.width, self.fit = height, width, fit
        root = existing_folder(Path(root), "KITTI raw")
        self._cameras = {date: read_calibration(root / date / "calib_cam_to_cam.txt") for date in {name[:10] for name in names}}
        frames = [(name, *pair) for name in names for pair in self._stereo_frames(root, name, check)]
        directions = [(LEFT, RIGHT), (RIGHT, LEFT)][: 2 if sources == "both" else 1]
        # (sequence, camera, picture) of source and of the one target
        self._pairs = [
            ((name, source, pictures[source - LEFT]), ((name, target, pictures[target - LEFT]),))
            for name, *pictures in frames
            for source, target in directions
        ]

    def load(self, key: tuple[str, int, Path]) -> View:  # type: ignore[override]
        sequence, number, path = key
        camera = self._cameras[sequence[:10]][number]
        image = read_photo(path, exactly((camera.height, camera.width), f"S_rect_0{number} of calib_cam_to_cam.txt says"))
        fit = fit_size((image.height, image.width), height=self.height, width=self.width, mode=self.fit)
        name = f"{path.stem}_{'left' if number == LEFT else 'right'}"
        return View(sequence, name, fit.picture(image), fit.intrinsics(camera.K), torch.eye(3, dtype=torch.float64), camera.t)

    def _stereo_frames(self, root: Path, name: str, check: str) -> list[tuple[Path, Path]]:
        folder = root / name[:10] / f"{name}_sync"
        sides = [
            pictures_by_stem(existing_folder(folder / f"image_0{camera}" / "data", f"camera {camera} of {name}"))
            for camera in (LEFT, RIGHT)
        ]
        alone = sorted(sides[0].keys() ^ sides[1].keys())
        if alone or not sides[0]:
            missing = f"frame {alone[0]} is in only one of image_02 and image_03" if alone else "no pictures"
            raise FileNotFoundError(f"{folder}: {missing}")
        frames = [(sides[0][stem], sides[1][stem]) for stem in sorted(sides[0]) if (name, stem) != LEFT_OUT]
        for pair in frames if check != "none" else []:
            for number, path in zip((LEFT, RIGHT), pair):
                camera = self._cameras[name[:10]][number]
                source = f"S_rect_0{number} of {name[:10]}/calib_cam_to_cam.txt says"
                picture_size(path, check, exactly((camera.height, camera.width), source))
        return frames
