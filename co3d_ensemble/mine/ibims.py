"""iBims-1 (Koch et al., 2018): 100 indoor pictures with laser-scanned depth and masks.

ROOT/imagelist.txt     names, one per line
ROOT/<name>.mat        MATLAB v5: a struct ``data`` with rgb, depth, calib, mask_invalid, mask_transp and more
                       (also found in ROOT/gt_depth/ or ROOT/ibims1_core_mat/, as the archives unpack)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from co3d_ensemble.base.paths import inside
from co3d_ensemble.mine.depth_pairs import MATLAB_PIXEL, depth_pair, read_matlab5
from co3d_ensemble.mine.pairs import Pair
from co3d_ensemble.mine.pictures import check_settings, text_lines

LIST_FILE = "imagelist.txt"
FOLDERS = ("", "gt_depth", "ibims1_core_mat")
FIELDS = ("rgb", "depth", "calib", "mask_invalid", "mask_transp")


class IBims(Dataset[Pair]):
    """Pictures with depth, as pairs with themselves; ``source_depth`` is in metres at the scan's own size.

    Depth is 0, unknown, where the scan has none, where ``mask_invalid`` is 0, and where ``mask_transp`` is 0 (transparent
    surfaces), as the data set's own evaluation has it.

    Args:
        root: see the module's text.
        height, width: size of the pictures that the network gets.
        n_points, random_target: taken for likeness with the other data sets; nothing is drawn here.
        check: ``decode`` reads every file at once, ``headers`` only looks that it is there.

    Raises:
        ValueError, FileNotFoundError: naming the setting, or the file and what is wrong with it.
    """

    def __init__(
        self, root: str | Path, *, height: int, width: int, n_points: int = 0, random_target: bool = False, check: str = "headers"
    ) -> None:
        check_settings(height=height, width=width, fit="stretch", check=check, n_points=n_points)
        self.height, self.width = height, width
        lists = [Path(root) / folder / LIST_FILE for folder in FOLDERS]
        path = next((path for path in lists if path.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{lists[0]} is missing")
        names = text_lines(path)
        if not names:
            raise ValueError(f"{path}: empty, expected a name per line")
        self._paths = [_found(Path(root), name, path) for name in names]
        if check == "decode":
            for index in range(len(self)):
                self[index]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        path = self._paths[index]
        data = _fields(path)
        rgb, depth = data["rgb"], data["depth"].astype(np.float64)
        valid = np.isfinite(depth) & (depth > 0) & (data["mask_invalid"] != 0) & (data["mask_transp"] != 0)
        return depth_pair(
            f"ibims1/{path.stem}", rgb, np.where(valid, depth, 0), _intrinsics(path, data["calib"]), height=self.height, width=self.width
        )


def _found(root: Path, name: str, source: Path) -> Path:
    try:
        places = [inside(root / folder, f"{name}.mat") for folder in FOLDERS]
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{places[0]} is missing, also in {', '.join(folder for folder in FOLDERS if folder)}")
    return path


def _fields(path: Path) -> dict[str, Any]:
    """The struct's fields, checked for their shapes."""
    data = read_matlab5(path).get("data")
    if data is None or data.dtype.names is None or data.size != 1:
        raise ValueError(f"{path}: no struct data")
    missing = [name for name in FIELDS if name not in data.dtype.names]
    if missing:
        raise ValueError(f"{path}: data has no {', '.join(missing)}")
    fields = {name: np.asarray(data[name].reshape(-1)[0]) for name in FIELDS}
    size = fields["depth"].shape
    for name, shape in (("rgb", (*size, 3)), ("mask_invalid", size), ("mask_transp", size), ("calib", (3, 3))):
        if fields[name].shape != shape or len(size) != 2:
            raise ValueError(f"{path}: {name} has the shape {fields[name].shape}, expected {shape}, as depth has {size}")
    if fields["rgb"].dtype != np.uint8:
        raise ValueError(f"{path}: rgb is {fields['rgb'].dtype}, expected uint8")
    return fields


def _intrinsics(path: Path, calib: np.ndarray) -> torch.Tensor:
    """K in house pixels: ``calib`` is MATLAB's matrix, transposed, with pixel centres counted from 1."""
    K = torch.from_numpy(calib.astype(np.float64).T.copy())
    if not (torch.isfinite(K).all() and K[0, 0] > 0 and K[1, 1] > 0 and K[2].tolist() == [0, 0, 1]):
        raise ValueError(f"{path}: calib is no transposed matrix of intrinsics: {calib.tolist()}")
    K[:2, 2] += MATLAB_PIXEL
    return K
