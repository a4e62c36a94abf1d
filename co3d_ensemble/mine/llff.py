"""LLFF scenes (Mildenhall et al., 2019): photographs with a COLMAP sparse model, lens distortion undone.

ROOT/<scene>/sparse/0/           cameras, images, points3D as .bin or .txt (or in ROOT/<scene>/sparse/); of several models, sparse/0,
                                 sparse/1, ..., the one with most images
ROOT/<scene>/images/             the photographs, or a reduced copy such as images_4, whose files have the photographs' names
                                 or, as in nerf_llff_data, other names in the same order
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import torch
from PIL import Image
from torch import Tensor

from co3d_ensemble.base.paths import inside, listed
from co3d_ensemble.base.pictures import Expected, read_photo, shown_size
from co3d_ensemble.functional.cameras import pixel_centers, resized_intrinsics
from co3d_ensemble.mine.colmap import ColmapCamera, ColmapModel, colmap_models, image_names, read_colmap_model
from co3d_ensemble.mine.named_pictures import find_pictures
from co3d_ensemble.mine.pictures import (
    SIZE_TOLERANCE,
    Fit,
    check_settings,
    existing_folder,
    fit_size,
    picture_size,
    pictures_in,
    to_tensor,
)
from co3d_ensemble.mine.views import View, ViewPairs, visible_points

logger = logging.getLogger(__name__)

SPLITS = ("train", "val")
HOLD_OUT = 8  # every eighth photograph, from the first one in the order of names, as NeRF's and MINE's tests
SHRINK_STEP, MIN_SHRINK = 0.005, 0.6  # of the part of the undistorted picture that lies inside the photograph
BORDER_SAMPLES = 64  # per side, to see that a box's border lies inside the photograph


class LLFF(ViewPairs):
    """Pairs of photographs of one scene.

    In ``train`` source and target are among the photographs that are not held out; in ``val`` the source is a held-out one and
    the target any other.

    Args:
        root: see the module's text; ``scenes``: names of its folders, None: all that have a COLMAP model.
        images: folder of the photographs in each scene, e.g. ``images_4``; reduced ones decode faster.
        height, width: picture size in pixels; ``fit``: ``stretch`` (the reference's way) or ``crop``. What the undistorted
            picture would show from outside the photograph is cut off all around.
        n_neighbours: targets are the source's nearest cameras, that many.
        n_points: sparse points per picture, of those that COLMAP saw in it; 0: none.
        check: ``headers`` | ``decode`` | ``none``, how far pictures are checked at once.

    Raises:
        ValueError, FileNotFoundError: naming the setting, or the file and what is wrong with it.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        split: str = "train",
        scenes: Sequence[str] | None = None,
        images: str = "images",
        height: int,
        width: int,
        fit: str = "stretch",
        n_neighbours: int = 8,
        n_points: int = 256,
        random_target: bool = True,
        check: str = "headers",
        cache_megabytes: float = 512,
    ) -> None:
        super().__init__(n_points=n_points, random_target=random_target, cache_megabytes=cache_megabytes)
        check_settings(height=height, width=width, fit=fit, check=check, n_points=n_points)
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
        if n_neighbours < 1:
            raise ValueError(f"n_neighbours={n_neighbours}: must be at least 1")
        self.height, self.width, self.fit = height, width, fit
        folders = _scene_folders(existing_folder(Path(root), "LLFF scenes"), scenes)
        self._models = [read_colmap_model(_model_folder(folder, images)) for folder in folders]
        pointless = next((model.path for model in self._models if not any(image.point_ids for image in model.images)), None)
        if n_points and pointless:
            raise ValueError(f"{pointless}: none of its images sees a point; n_points=0 does without")
        self._names = [folder.name for folder in folders]
        self._paths = [_pictures(folder / images, model, check) for folder, model in zip(folders, self._models)]
        self._pairs: list[tuple[tuple[int, int], list[tuple[int, int]]]] = []
        for scene, model in enumerate(self._models):
            sources, targets = _split(len(model.images), split)
            for source in sources:
                near = _nearest(model, source, [target for target in targets if target != source], n_neighbours)
                if near:
                    self._pairs.append(((scene, source), [(scene, target) for target in near]))
        if not self._pairs:
            raise ValueError(f"{root}: no scene has two photographs for split={split!r}")

    def load(self, key: tuple[int, int]) -> View:  # type: ignore[override]
        scene, i = key
        model, path = self._models[scene], self._paths[scene][i]
        image = model.images[i]
        camera = model.cameras[image.camera_id]
        photo = read_photo(path, _reduced(model, image.camera_id))
        picture, K = undistorted(photo, camera, height=self.height, width=self.width, mode=self.fit)
        points = visible_points(model.points_of(image), K, height=self.height, width=self.width) if self.n_points else None
        return View(self._names[scene], str(PurePosixPath(image.name).with_suffix("")), picture, K, image.R, image.t, points=points)


def undistorted(photo: Image.Image, camera: ColmapCamera, *, height: int, width: int, mode: str) -> tuple[Tensor, Tensor]:
    """A photograph, perhaps reduced, as the pinhole camera without the lens sees it, and that camera's K at the new size.

    Returns:
        picture (3, height, width) in [0, 1] and K (3, 3), float64.
    """
    if not camera.distorts:
        fit = fit_size((photo.height, photo.width), height=height, width=width, mode=mode)
        K = resized_intrinsics(camera.K, (camera.height, camera.width), (photo.height, photo.width))
        return fit.picture(photo), fit.intrinsics(K)
    fit = _box_inside(camera, fit_size((camera.height, camera.width), height=height, width=width, mode=mode))
    left, top, _, _ = fit.box
    across, down = fit.scale
    pixels = pixel_centers(height, width).double() / torch.tensor([across, down]) + torch.tensor([left, top])
    lens = camera.distorted(pixels) / torch.tensor([camera.width, camera.height])  # shares of the photograph's sides
    # about as many pixels as the result has, so that sampling points of it neither blurs nor aliases
    small = [max(1, min(side, round(original * scale))) for side, original, scale in _sides(photo, camera, across, down)]
    reduced = to_tensor(photo.resize((small[0], small[1]), Image.Resampling.BICUBIC))
    grid = (2 * lens - 1).float().reshape(1, height, width, 2)
    sampled = torch.nn.functional.grid_sample(reduced[None], grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled[0], fit.intrinsics(camera.K)


def _sides(photo: Image.Image, camera: ColmapCamera, across: float, down: float) -> tuple[tuple[int, int, float], ...]:
    return (photo.width, camera.width, across), (photo.height, camera.height, down)


def _box_inside(camera: ColmapCamera, fit: Fit) -> Fit:
    """The fit with its box shrunk about its middle until the photograph has all of it."""
    left, top, right, bottom = fit.box
    middle = torch.tensor([(left + right) / 2, (top + bottom) / 2], dtype=torch.float64)
    half = torch.tensor([(right - left) / 2, (bottom - top) / 2], dtype=torch.float64)
    ends = torch.linspace(-1, 1, BORDER_SAMPLES, dtype=torch.float64)
    one = torch.ones_like(ends)
    border = torch.cat([torch.stack(side, dim=1) for side in ((ends, one), (ends, -one), (one, ends), (-one, ends))])
    size = torch.tensor([camera.width, camera.height], dtype=torch.float64)
    share = 1.0
    while share >= MIN_SHRINK:
        lens = camera.distorted(middle + share * half * border)
        if bool(((lens >= 0) & (lens <= size)).all()):
            (x, y), (dx, dy) = middle.tolist(), (share * half).tolist()
            return Fit((x - dx, y - dy, x + dx, y + dy), fit.height, fit.width)
        share -= SHRINK_STEP
    raise ValueError(f"camera {camera.model} {camera.parameters}: its distortion leaves less than {MIN_SHRINK} of the picture")


def _scene_folders(root: Path, names: Sequence[str] | None) -> list[Path]:
    if names is not None:
        return [existing_folder(inside(root, name), f"scene {name}") for name in names]
    folders = [folder for folder in listed(root) if folder.is_dir() and colmap_models(folder / "sparse")]
    if not folders:
        raise FileNotFoundError(f"{root}: no scene in it has a COLMAP model, <scene>/sparse/0/images.bin or .txt")
    return folders


def _model_folder(scene: Path, images: str) -> Path:
    """The model with most images; of several it is said which, and how many photographs none of them has."""
    models = colmap_models(scene / "sparse") or [scene / "sparse" / "0"]  # which is missing, as reading it will say
    if len(models) == 1:
        return models[0]
    names = {model: image_names(model) for model in models}
    chosen = max(models, key=lambda model: len(names[model]))
    registered = {PurePosixPath(name).with_suffix("") for found in names.values() for name in found}
    photographs = {path.relative_to(scene / images).with_suffix("") for path in pictures_in(scene / images, deep=True)}
    logger.warning(
        "%s: of %d COLMAP models the one with most images is taken, %s with %d; of %d photographs in %s, %d are in no model",
        *(scene, len(models), chosen.relative_to(scene), len(names[chosen])),
        *(len(photographs), images, sum(PurePosixPath(path) not in registered for path in photographs)),
    )
    return chosen


def _pictures(folder: Path, model: ColmapModel, check: str) -> list[Path]:
    """The picture of each of the model's images."""
    paths = find_pictures(existing_folder(folder, "photographs"), [image.name for image in model.images], str(model.path))
    for path, image in zip(paths, model.images) if check != "none" else ():
        picture_size(path, check, _reduced(model, image.camera_id))
    return paths


def _reduced(model: ColmapModel, camera_id: int) -> Expected:
    """The sizes of a camera's photograph and of its reduced copies."""
    camera = model.cameras[camera_id]
    return Expected(
        lambda height, width: width <= camera.width and abs(camera.height * width / camera.width - height) <= SIZE_TOLERANCE,
        f"no reduced copy of the {shown_size((camera.height, camera.width))} that {model.path} gives camera {camera_id}",
    )


def _split(n: int, split: str) -> tuple[list[int], list[int]]:
    """Sources and possible targets."""
    held_out = list(range(0, n, HOLD_OUT))
    rest = [i for i in range(n) if i % HOLD_OUT]
    return (rest, rest) if split == "train" else (held_out, list(range(n)))


def _nearest(model: ColmapModel, source: int, targets: Sequence[int], n: int) -> list[int]:
    """The ``n`` targets whose cameras stand nearest, the nearest first."""
    centers = torch.stack([-image.R.T @ image.t for image in model.images])
    distances = (centers[list(targets)] - centers[source]).norm(dim=1)
    return [targets[i] for i in distances.argsort(stable=True)[:n].tolist()]
