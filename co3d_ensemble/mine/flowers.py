"""Flowers light fields (Srinivasan et al., 2017): Lytro Illum pictures of flowers, as ESLF files.

    ROOT/**/*.png                  the light fields
    ROOT/train.list, test.list     optional: paths under ROOT, one per line, as MINE's authors publish their split

An ESLF file has a little picture of 14 x 14 pixels behind each of 376 x 541 lenses: pixel (v, u) of all of them together is the
view from one place on the main lens. The outermost views are dark; the 8 x 8 in the middle are used, brightened by a gamma
of 0.4 as the data set's authors do.

The files carry no calibration. The cameras are those that MINE's authors publish for all of them (their
``input_pipelines/flowers/cam_params.txt``), in whose unit their disparities of 3 to 0.03 are: a focal length of 468.75 pixels (of a
picture 540 pixels wide), views 0.00128 apart and parallel to each other, and each principal point one pixel beside its neighbour's:
the camera was focused at a finite distance, 0.6, and what is there does not move between views. Farther things move the other way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from co3d_ensemble.base.paths import inside, listed
from co3d_ensemble.base.pictures import read_photo
from co3d_ensemble.mine.pairs import Pair
from co3d_ensemble.mine.pictures import check_settings, existing_folder, fit_size, picture_size, text_lines
from co3d_ensemble.mine.views import View, make_pair

LENSLET = 14  # pixels behind each lens, in each direction
N_VIEWS = 8  # used, in each direction
FIRST_VIEW = (LENSLET - N_VIEWS) // 2
CENTRE = N_VIEWS // 2  # the view that Srinivasan et al. start from
CORNERS = ((0, 0), (0, N_VIEWS - 1), (N_VIEWS - 1, 0), (N_VIEWS - 1, N_VIEWS - 1))
GAMMA = 0.4
FOCAL, FOCAL_WIDTH = 468.75, 540  # pixels
BASELINE = 0.00128  # between neighbouring views
FOCUS_DISPARITY = 1 / 0.6
SPLIT_SEED, SPLIT_SHARES = 0, (0.7, 0.15)  # train, val; the rest is test, as Tulsiani et al. (ECCV 2018) split the sorted files
LISTS = ("train.list", "test.list")
VAL_EVERY = 25  # where there are lists: of the training list, to validate on
SPLITS = ("train", "val", "test")
KEPT_LIGHT_FIELDS = 2  # decoded ones in memory, 40 MB each


class Flowers(Dataset[Pair]):
    """Pairs of views of one light field.

    ``random_target=True``: an item per light field, source and target drawn from torch's default generator among all 64 views.
    ``random_target=False``: four items per light field, from the central view to each corner.

    Args:
        root: folder of ESLF files at any depth; ``split``: ``train`` | ``val`` | ``test``.
        files: paths under ``root`` in place of the split's.
        height, width: picture size in pixels; ``fit``: ``stretch`` or ``crop``.
        focus_disparity: 1 / z of the plane that the camera was focused on, which the files show without parallax; 0: infinity.
            None: the published cameras'.
        n_points: taken for likeness with the other data sets; there are no sparse points.
        check: ``headers`` | ``decode`` | ``none``, how far files are checked at once (decoding one takes seconds).

    Raises:
        ValueError, FileNotFoundError: naming the setting, or the file and what is wrong with it.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        split: str = "train",
        files: Sequence[str] | None = None,
        height: int,
        width: int,
        fit: str = "stretch",
        focus_disparity: float | None = None,
        n_points: int = 0,
        random_target: bool = True,
        check: str = "headers",
    ) -> None:
        check_settings(height=height, width=width, fit=fit, check=check, n_points=n_points)
        root = existing_folder(Path(root), "light fields")
        self._paths = _split(root, split) if files is None else _named(root, files, "files")
        if not self._paths:
            raise FileNotFoundError(f"{root}: no light fields, *.png, for split={split!r}")
        for path in self._paths:
            if check != "none":
                _lens_grid(path, picture_size(path, check))
        self.height, self.width, self.fit = height, width, fit
        self.focus_disparity, self.random_target = FOCUS_DISPARITY if focus_disparity is None else focus_disparity, random_target
        self._decoded: OrderedDict[Path, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._paths) * (1 if self.random_target else len(CORNERS))

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        if self.random_target:
            path = self._paths[index]
            source, target = torch.randperm(N_VIEWS**2)[:2].tolist()
            places = divmod(source, N_VIEWS), divmod(target, N_VIEWS)
        else:
            path = self._paths[index // len(CORNERS)]
            places = (CENTRE, CENTRE), CORNERS[index % len(CORNERS)]
        return make_pair(*(self._view(path, *place) for place in places), n_points=0)

    def _view(self, path: Path, row: int, column: int) -> View:
        pixels = self._light_field(path)[row, column]
        image = Image.fromarray(np.ascontiguousarray(pixels))
        fit = fit_size((image.height, image.width), height=self.height, width=self.width, mode=self.fit)
        focal = FOCAL * image.width / FOCAL_WIDTH
        x, y = (BASELINE * (place - (N_VIEWS - 1) / 2) for place in (column, row))
        slide = focal * self.focus_disparity
        K = torch.tensor([[focal, 0, image.width / 2 + slide * x], [0, focal, image.height / 2 + slide * y], [0, 0, 1]])
        t = torch.tensor([-x, -y, 0.0], dtype=torch.float64)
        picture = fit.picture(image).pow(GAMMA)
        return View(path.stem, f"{row}_{column}", picture, fit.intrinsics(K.double()), torch.eye(3, dtype=torch.float64), t)

    def _light_field(self, path: Path) -> np.ndarray:
        """The used views of a file, shape (N_VIEWS, N_VIEWS, rows of lenses, columns of lenses, 3), uint8."""
        if path not in self._decoded:
            image = read_photo(path)
            rows, columns = _lens_grid(path, (image.height, image.width))
            lenses = np.asarray(image)[: rows * LENSLET, : columns * LENSLET].reshape(rows, LENSLET, columns, LENSLET, 3)
            used = slice(FIRST_VIEW, FIRST_VIEW + N_VIEWS)
            self._decoded[path] = lenses[:, used, :, used].transpose(1, 3, 0, 2, 4).copy()
            if len(self._decoded) > KEPT_LIGHT_FIELDS:
                self._decoded.popitem(last=False)
        return self._decoded[path]


def _lens_grid(path: Path, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of lenses of a file of (height, width) pixels."""
    if size[0] % LENSLET or size[1] % LENSLET or min(size) < LENSLET:
        raise ValueError(f"{path}: {size[1]}x{size[0]} pixels (width x height) are no whole number of {LENSLET}x{LENSLET} lens pictures")
    return size[0] // LENSLET, size[1] // LENSLET


def _split(root: Path, split: str) -> list[Path]:
    """The split's files: of the published lists, else the sorted files in the order that numpy's legacy generator shuffles them into,
    cut at 70 and 85 per cent."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    missing = [name for name in LISTS if not (root / name).is_file()]
    if len(missing) == 1:
        raise FileNotFoundError(f"{root / missing[0]} is missing: the published split is {' and '.join(LISTS)}")
    if not missing:
        train, test = (_named(root, text_lines(root / name), str(root / name)) for name in LISTS)
        held_out = train[::VAL_EVERY]
        return {"train": [path for i, path in enumerate(train) if i % VAL_EVERY], "val": held_out, "test": test}[split]
    paths = [path for path in listed(root, deep=True) if path.suffix.lower() == ".png"]
    np.random.RandomState(SPLIT_SEED).shuffle(paths)
    n_train, n_val = (round(share * len(paths)) for share in SPLIT_SHARES)
    cuts = {"train": (0, n_train), "val": (n_train, n_train + n_val), "test": (n_train + n_val, len(paths))}
    start, end = cuts[split]
    return paths[start:end]


def _named(root: Path, names: Sequence[str], source: str) -> list[Path]:
    try:
        return [inside(root, name) for name in names]
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
