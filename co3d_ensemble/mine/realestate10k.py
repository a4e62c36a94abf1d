"""RealEstate10K (Zhou et al., 2018): clips of house tours, one text file of cameras each, with frames extracted beside.

    ROOT/<split>/<clip>.txt                         as published (or ROOT/cameras/<split>/<clip>.txt)
    ROOT/frames/<split>/<clip>/<timestamp>.jpg      the clip's frames, named by the file's timestamps (or .png)
    ROOT/frames/<split>/<clip>/sparse/              optional: a COLMAP model in the clip's coordinates, for sparse points;
                                                    launch/make_realestate10k_points.py makes it

A camera file's first line is the video's address; every other one has a timestamp in microseconds, fx, fy, cx, cy in shares
of the picture's width and height, two zeros, and the 3x4 matrix world to camera (x right, y down, z ahead), row by row.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from co3d_ensemble.base.paths import listed
from co3d_ensemble.base.pictures import read_photo
from co3d_ensemble.base.text import read_text
from co3d_ensemble.mine.clip_model import points_by_frame
from co3d_ensemble.mine.colmap import is_colmap_model
from co3d_ensemble.mine.pictures import (
    CHECKS,
    check_rotation,
    check_settings,
    existing_folder,
    fit_size,
    numbers,
    picture_size,
    pictures_by_stem,
)
from co3d_ensemble.mine.views import View, ViewPairs, visible_points

logger = logging.getLogger(__name__)

COLUMNS = 19
MAX_DIGITS = 18  # of a timestamp: what 64 bits hold
SAMPLE = "sample"  # the check that opens one picture per clip: there are tens of thousands of clips and millions of pictures
MODELS_KEPT = 64  # COLMAP models in memory
POINTS_SCRIPT = "launch/make_realestate10k_points.py"
MODEL_FOLDER = "sparse"  # beside the frames


@dataclass(frozen=True)
class Clip:
    """Cameras of a clip's frames that are on disk, in the file's order.

    The data set has millions of frames, and every reading process all of its clips: a frame has no Python object of its own.

    Attributes:
        folder: of the frames.
        files: names of the picture files in it, bytes, shape (n,).
        numbers: position of each frame in the camera file, from 0: what frame distances count.
        times: microseconds of each frame as the camera file has them, shape (n,).
        intrinsics: fx, fy, cx, cy in shares of the picture's sides, shape (n, 4).
        poses: (R | t) world to camera, shape (n, 3, 4).
        stray: where ``folder`` has pictures and fewer than two are of frames: what one is called and should be called; else "".
    """

    name: str
    folder: Path
    files: np.ndarray
    numbers: np.ndarray
    times: np.ndarray
    intrinsics: np.ndarray
    poses: np.ndarray
    stray: str

    def __len__(self) -> int:
        return len(self.files)

    def frame(self, index: int) -> Path:
        return self.folder / os.fsdecode(self.files[index])

    @property
    def frames(self) -> tuple[Path, ...]:
        return tuple(self.frame(index) for index in range(len(self)))

    @property
    def timestamps(self) -> list[int]:
        """Microseconds of each frame as the camera file has them; the file's own name may be off by less than half a frame."""
        return self.times.tolist()


def read_cameras(path: Path) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Timestamps, intrinsics (n, 4) and poses (n, 3, 4) of a camera file.

    Raises:
        ValueError: naming the file and the line that is malformed, not finite, distorted, or has no rotation.
    """
    timestamps: list[int] = []
    rows = []
    line_of: dict[int, int] = {}
    lines = read_text(path, strict=False).splitlines()
    for i, line in enumerate(lines[1:], 2):
        words, where = line.split(), f"{path}, line {i}"
        if not words:
            continue
        if len(words) != COLUMNS:
            raise ValueError(f"{where}: {len(words)} columns, expected {COLUMNS}: timestamp, fx fy cx cy, two zeros, 3x4 pose")
        values = numbers(words[1:], where)
        if min(values[:2]) <= 0:
            raise ValueError(f"{where}: focal lengths {values[:2]} must be positive")
        if values[4] or values[5]:
            raise ValueError(f"{where}: distortion {values[4:6]}: RealEstate10K's cameras have none, and none is undone here")
        check_rotation(np.reshape(values[6:], (3, 4))[:, :3], where)
        if not (words[0].isascii() and words[0].isdecimal() and len(words[0]) <= MAX_DIGITS):
            raise ValueError(f"{where}: timestamp {words[0]!r} is not a whole number of microseconds")
        timestamp = int(words[0])
        if timestamp in line_of:
            raise ValueError(f"{where}: timestamp {timestamp} is that of line {line_of[timestamp]} as well: two cameras for one frame")
        line_of[timestamp] = i
        timestamps.append(timestamp)
        rows.append(values)
    if not lines or not rows:
        raise ValueError(f"{path}: no cameras; expected the video's address and then one line per frame")
    table = np.array(rows)
    return timestamps, table[:, :4], table[:, 6:].reshape(-1, 3, 4)


def camera_files(root: Path, split: str) -> list[Path]:
    """The split's camera files, sorted; FileNotFoundError when there are none."""
    folders = (root / "cameras" / split, root / split)
    for folder in folders:
        if folder.is_dir() and (files := listed(folder, "*.txt")):
            return files
    raise FileNotFoundError(f"no camera files <clip>.txt in {folders[0]} or {folders[1]}")


def read_clip(root: Path, split: str, path: Path) -> Clip:
    """A clip with those of its frames that are on disk, perhaps none.

    A frame is the file of its timestamp, or where there is none the nearest one less than half a frame away: decoders count time
    otherwise than the published files do.

    Raises:
        ValueError: as :func:`read_cameras`, or two pictures of one timestamp.
    """
    timestamps, intrinsics, poses = read_cameras(path)
    folder = root / "frames" / split / path.stem
    on_disk = pictures_by_stem(folder) if folder.is_dir() else {}
    stems = [stem for stem in on_disk if stem.isascii() and stem.isdecimal() and len(stem) <= MAX_DIGITS]
    nearest = _nearest(np.array(timestamps, dtype=np.int64), np.array([int(stem) for stem in stems], dtype=np.int64))
    there = np.nonzero(nearest >= 0)[0]
    files = np.array([os.fsencode(on_disk[stems[i]].name) for i in nearest[there]], dtype=bytes)
    times, stray = np.array(timestamps, dtype=np.int64)[there], ""
    if on_disk and len(there) < 2:
        stray = f"{next(iter(on_disk.values()))} is called otherwise than, for example, {timestamps[0]}.jpg"
    return Clip(path.stem, folder, files, there, times, intrinsics[there], poses[there], stray)


def _nearest(wanted: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Index into ``present`` of the time nearest to each of ``wanted``; -1 where it is half a frame or more away.

    A frame's length is the distance to its nearer neighbour in ``wanted``, so that no time is nearest to two of them. Equal times are
    matched however near their neighbours are.
    """
    if not len(present):
        return np.full(len(wanted), -1)
    order = np.argsort(present, kind="stable")
    ascending = present[order]
    after = np.searchsorted(ascending, wanted).clip(0, len(present) - 1)
    before = (after - 1).clip(0)
    is_before = wanted - ascending[before] <= np.abs(ascending[after] - wanted)
    found = np.where(is_before & (ascending[before] <= wanted), before, after)
    gaps = np.diff(np.sort(wanted))
    by_time = np.argsort(wanted, kind="stable")
    frame = np.zeros(len(wanted), dtype=np.int64)
    if len(gaps):
        frame[by_time] = np.minimum(np.append(gaps, gaps[-1]), np.insert(gaps, 0, gaps[0]))
    distance = np.abs(ascending[found] - wanted)
    return np.where((distance == 0) | (2 * distance < frame), order[found], -1)


class RealEstate10K(ViewPairs):
    """Pairs of frames of one clip.

    Args:
        root: see the module's text; ``split``: ``train`` | ``test``.
        clips: names of clips; None: all of the split.
        height, width: picture size in pixels; ``fit``: ``stretch`` (the reference's way) or ``crop``.
        max_frame_distance: targets lie at most this many lines of the camera file away (the protocol's "random": 30).
        frame_distance: targets lie exactly this many lines later (the protocol's n = 5 and n = 10), instead.
        sources_per_clip: that many evenly spread frames of each clip are sources; None: every one that has a target.
        n_points: sparse points per picture from the COLMAP model beside the clip's frames; 0: none. Clips without a model are
            left out with a warning, unless all are.
        check: of the pictures, all at once before anything else: ``sample`` opens the header of the first one of each clip, ``headers``
            that of every picture and ``decode`` reads all of it, both long on a network file system; ``none`` and all others look
            that the pictures are there. A damaged one that the check did not open is an error where it is read.

    Raises:
        ValueError, FileNotFoundError: naming the setting, or the file and line; clips of fewer than two frames on disk are
            left out with a warning, unless all are.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        split: str = "train",
        clips: Sequence[str] | None = None,
        height: int,
        width: int,
        fit: str = "stretch",
        max_frame_distance: int = 30,
        frame_distance: int | None = None,
        sources_per_clip: int | None = None,
        n_points: int = 0,
        random_target: bool = True,
        check: str = "sample",
        cache_megabytes: float = 512,
    ) -> None:
        super().__init__(n_points=n_points, random_target=random_target, cache_megabytes=cache_megabytes)
        check_settings(height=height, width=width, fit=fit, check=check, n_points=n_points, checks=(SAMPLE, *CHECKS))
        least = {"max_frame_distance": max_frame_distance, "frame_distance": frame_distance, "sources_per_clip": sources_per_clip}
        for name, value in least.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.root, self.split, self.height, self.width, self.fit = Path(root), split, height, width, fit
        self._window = (1, max_frame_distance) if frame_distance is None else (frame_distance, frame_distance)
        self._both_ways = frame_distance is None
        existing_folder(self.root, "RealEstate10K")
        self._clips = self._readable_clips(clips, check)
        self._positions = {clip.name: c for c, clip in enumerate(self._clips)}
        chosen = [(c, f) for c, clip in enumerate(self._clips) for f in self._sources(clip, sources_per_clip)]
        if not chosen:
            raise ValueError(f"{self.root}: no two frames of one {split} clip are {self._window[0]} to {self._window[1]} frames apart")
        self._index = np.array(chosen, dtype=np.int32)  # millions of frames: no Python objects
        self._models: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._index)

    @property
    def clips(self) -> dict[str, Clip]:
        """The readable clips by name, for protocols that choose their own pairs: see :meth:`clip_view`."""
        return {clip.name: clip for clip in self._clips}

    def clip_view(self, name: str, frame: int) -> View:
        """The view of a clip's frame, which counts as in :meth:`Clip.frame`."""
        return self.view((self._positions[name], frame))

    def choices(self, index: int) -> tuple[Hashable, Sequence[Hashable]]:
        clip, source = self._index[index].tolist()
        return (clip, source), [(clip, target) for target in self._targets(self._clips[clip], source)]

    def load(self, key: tuple[int, int]) -> View:  # type: ignore[override]
        clip, frame = self._clips[key[0]], key[1]
        path = clip.frame(frame)
        image = read_photo(path)
        fit = fit_size((image.height, image.width), height=self.height, width=self.width, mode=self.fit)
        fx, fy, cx, cy = clip.intrinsics[frame] * (image.width, image.height, image.width, image.height)
        K = fit.intrinsics(torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64))
        pose = torch.from_numpy(clip.poses[frame])
        R, t, points = pose[:, :3], pose[:, 3], None
        if self.n_points:
            world = self._points(key[0])[path.name]
            points = visible_points(world @ R.T + t, K, height=self.height, width=self.width)
        return View(clip.name, path.stem, fit.picture(image), K, R, t, points=points)

    def _readable_clips(self, names: Sequence[str] | None, check: str) -> list[Clip]:
        files = camera_files(self.root, self.split)
        if names is not None:
            by_name = {path.stem: path for path in files}
            unknown = [name for name in names if name not in by_name]
            if unknown:
                raise ValueError(f"clips: {files[0].parent} has no {unknown[0]}.txt")
            files = [by_name[name] for name in names]
        clips, dropped = [], []
        for path in files:
            clip = read_clip(self.root, self.split, path)
            (clips if len(clip) > 1 else dropped).append(clip)
        frames = self.root / "frames" / self.split
        example = next((f"; {clip.stray}" for clip in dropped if clip.stray), "")
        if not clips:
            raise FileNotFoundError(f"{frames}: no clip has two frames named <clip>/<timestamp>.jpg or .png{example}")
        if dropped:
            told = "%d of %d clips have fewer than two frames in %s, such as %s%s"
            logger.warning(told, len(dropped), len(files), frames, dropped[0].name, example)
        if self.n_points:
            clips = _with_models(clips)
        for clip in clips if check != "none" else []:
            for path in (clip.frame(0),) if check == SAMPLE else clip.frames:
                picture_size(path, check)
        return clips

    def _targets(self, clip: Clip, source: int) -> list[int]:
        """Frames of the clip in the window, the nearest first."""
        offset = clip.numbers - clip.numbers[source]
        distance = np.abs(offset) if self._both_ways else offset
        near = np.nonzero((distance >= self._window[0]) & (distance <= self._window[1]))[0]
        return near[np.argsort(distance[near], kind="stable")].tolist()

    def _sources(self, clip: Clip, n: int | None) -> list[int]:
        gaps = np.diff(clip.numbers)
        if self._both_ways:
            near = np.concatenate((gaps, [np.inf])) <= self._window[1]
            near |= np.concatenate(([np.inf], gaps)) <= self._window[1]
        else:
            near = np.isin(clip.numbers + self._window[0], clip.numbers)
        able = np.nonzero(near)[0].tolist()
        if n is None or len(able) <= n:
            return able
        return [able[int((i + 0.5) * len(able) / n)] for i in range(n)]

    def _points(self, clip_index: int) -> dict[str, Tensor]:
        """World positions of the points that each frame sees, by file name; a frame that COLMAP left out sees none."""
        if clip_index not in self._models:
            if len(self._models) == MODELS_KEPT:
                self._models.pop(next(iter(self._models)))
            clip = self._clips[clip_index]
            poses = {path.name: pose for path, pose in zip(clip.frames, clip.poses)}
            self._models[clip_index] = points_by_frame(clip.folder / MODEL_FOLDER, poses)
        return self._models[clip_index]


def _with_models(clips: Sequence[Clip]) -> list[Clip]:
    """Those with a COLMAP model: of many clips a few have too little texture or movement to triangulate a point."""
    found, lacking = [], []
    for clip in clips:
        (found if is_colmap_model(clip.folder / MODEL_FOLDER) else lacking).append(clip)
    if not found:
        raise FileNotFoundError(
            f"{lacking[0].folder / MODEL_FOLDER} has no COLMAP model, and the camera files carry no points: "
            f"{POINTS_SCRIPT} makes it, or n_points=0"
        )
    if lacking:
        told = "%d of %d clips have no COLMAP model in %s/, such as %s, and are left out: %s makes it, n_points=0 does without"
        logger.warning(told, len(lacking), len(clips), MODEL_FOLDER, lacking[0].name, POINTS_SCRIPT)
    return found
