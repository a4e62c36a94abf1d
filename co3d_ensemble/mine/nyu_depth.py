"""NYU-Depth V2 (Silberman et al., 2012): the labelled pictures of the official test split, with Eigen's crop.

ROOT/nyu_depth_v2_labeled.mat    as published: MATLAB v7.3, which is HDF5 with all axes the other way round
ROOT/splits.mat                  the official split, indices from 1
"""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.data import Dataset

from co3d_ensemble.mine.depth_pairs import MATLAB_PIXEL, depth_pair, read_matlab5
from co3d_ensemble.mine.pairs import Pair
from co3d_ensemble.mine.pictures import check_settings

LABELED_FILE, SPLITS_FILE = "nyu_depth_v2_labeled.mat", "splits.mat"
SPLITS = {"test": "testNdxs", "train": "trainNdxs"}
DEPTHS = ("depths", "rawDepths")
HEIGHT, WIDTH = 480, 640
EIGEN_CROP = (slice(45, 471), slice(41, 601))  # rows and columns, from 0, of what Eigen et al. (2014) and all since score
# the toolbox's camera_params.m: fx, fy, cx, cy of the colour camera, pixel centres counted from 1
TOOLBOX_INTRINSICS = (518.85790117450188, 519.46961112127485, 325.58244941119034, 253.73616633400465)


class NYUDepth(Dataset[Pair]):
    """Pictures with depth, as pairs with themselves; ``source_depth`` (1, 480, 640) is in metres, 0 outside the crop.

    Args:
        root: see the module's text; ``split``: ``test`` (654 pictures) | ``train`` (795).
        height, width: size of the pictures that the network gets.
        depth: ``depths``, the filled maps that tables are made on, or ``rawDepths``, the sensor's own.
        eigen_crop: score Eigen's crop only.
        n_points, random_target, check: taken for likeness with the other data sets; nothing is drawn here.

    Raises:
        ValueError, FileNotFoundError: naming the setting, or the file and what is wrong with it.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        split: str = "test",
        height: int,
        width: int,
        depth: str = "depths",
        eigen_crop: bool = True,
        n_points: int = 0,
        random_target: bool = False,
        check: str = "headers",
    ) -> None:
        check_settings(height=height, width=width, fit="stretch", check=check, n_points=n_points)
        for name, value, allowed in (("split", split, SPLITS), ("depth", depth, DEPTHS)):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
        self.height, self.width, self.eigen_crop, self._depth = height, width, eigen_crop, depth
        self._path, splits = Path(root) / LABELED_FILE, Path(root) / SPLITS_FILE
        if not self._path.is_file():
            raise FileNotFoundError(f"{self._path} is missing")
        self._file: tuple[int, h5py.File] | None = None
        n = self._check_shapes()
        content = read_matlab5(splits)
        if SPLITS[split] not in content:
            raise ValueError(f"{splits}: no variable {SPLITS[split]}")
        self._indices = np.asarray(content[SPLITS[split]]).astype(np.int64).reshape(-1) - 1
        if not len(self._indices) or self._indices.min() < 0 or self._indices.max() >= n:
            raise ValueError(f"{splits}: {SPLITS[split]} must be indices from 1 to {n}, the number of pictures of {self._path}")

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        number = int(self._indices[index])
        file = self._open()
        try:
            rgb, depth = np.asarray(file["images"][number]).transpose(2, 1, 0), np.asarray(file[self._depth][number]).T
        except OSError as error:
            raise ValueError(f"{self._path}: picture {number + 1} cannot be read: {error}") from error
        known = np.isfinite(depth) & (depth > 0)
        if self.eigen_crop:
            inside = np.zeros_like(known)
            inside[EIGEN_CROP] = True
            known &= inside
        fx, fy, cx, cy = TOOLBOX_INTRINSICS
        K = torch.tensor([[fx, 0, cx + MATLAB_PIXEL], [0, fy, cy + MATLAB_PIXEL], [0, 0, 1]], dtype=torch.float64)
        name = f"nyu_depth_v2/{number + 1:04d}"
        return depth_pair(name, rgb, np.where(known, depth, 0), K, height=self.height, width=self.width)

    def _open(self) -> h5py.File:
        """The file as this process has opened it: HDF5 files do not survive a fork."""
        if self._file is None or self._file[0] != os.getpid():
            try:
                self._file = (os.getpid(), h5py.File(self._path, "r"))
            except OSError as error:
                raise ValueError(f"{self._path}: damaged or no MATLAB v7.3 file: {error}") from error
        return self._file[1]

    def _check_shapes(self) -> int:
        """The number of pictures."""
        file = self._open()
        for name in ("images", self._depth):
            if name not in file:
                raise ValueError(f"{self._path}: no variable {name}")
        n = file["images"].shape[0]
        for name, shape in (("images", (n, 3, WIDTH, HEIGHT)), (self._depth, (n, WIDTH, HEIGHT))):
            if file[name].shape != shape:
                raise ValueError(f"{self._path}: {name} has the shape {file[name].shape}, expected (n, ..., {WIDTH}, {HEIGHT})")
        return n

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}
