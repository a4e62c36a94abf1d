"""The picture files that a list, such as a COLMAP model, names: by exact name, else by what leaves no doubt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from co3d_ensemble.base.paths import inside
from co3d_ensemble.base.pictures import read_header
from co3d_ensemble.mine.pictures import pictures_in

COLOR_MODES = ("RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


def find_pictures(folder: Path, names: Sequence[str], source: str) -> list[Path]:
    """The file of each name, in the order of the names.

    A name is a path relative to ``folder``, with subfolders and suffix. Where there is no such file, the one picture of that name with
    another suffix counts (reduced copies often have one). Where no name at all is found and there are as many pictures as names,
    the pictures are taken in their order, as in nerf_llff_data.

    Args:
        names: in the order of names.
        source: what names them, for messages.

    Raises:
        ValueError: a name leads out of the folder; several files could be meant, or two names mean one file, or what is there in place
            of a photograph is gray, as masks are that lie among photographs: naming both.
        FileNotFoundError: naming the first file that is missing.
    """
    found = [_exact(folder, name, source) for name in names]
    if not all(path.is_file() for path in found):
        found = _by_stem_or_order(folder, names, found, source)
    owner: dict[Path, str] = {}
    for name, path in zip(names, found):
        if path in owner:
            raise ValueError(f"{path}: {source} has two images for it, {owner[path]} and {name}")
        owner[path] = name
    return found


def _exact(folder: Path, name: str, source: str) -> Path:
    try:
        return inside(folder, name)
    except ValueError as error:
        raise ValueError(f"{source}: image name {error}") from error


def _by_stem_or_order(folder: Path, names: Sequence[str], exact: Sequence[Path], source: str) -> list[Path]:
    files = pictures_in(folder, deep=True)
    by_stem: dict[PurePosixPath, list[Path]] = {}
    for path in files:
        by_stem.setdefault(PurePosixPath(path.relative_to(folder)).with_suffix(""), []).append(path)
    stems = [PurePosixPath(path.relative_to(folder)).with_suffix("") for path in exact]
    if len(files) == len(names) and not any(stem in by_stem for stem in stems):
        return files
    found = []
    for name, path, stem in zip(names, exact, stems):
        candidates = [path] if path.is_file() else by_stem.get(stem, [])
        if not candidates:
            raise FileNotFoundError(f"{path} is missing: {source} has {len(names)} images, the folder {len(files)}")
        if len(candidates) > 1:
            raise ValueError(f"{path} is missing, and both {candidates[0]} and {candidates[1]} could be the image {name} of {source}")
        if candidates[0] != path and read_header(candidates[0]).mode not in COLOR_MODES:
            raise ValueError(
                f"{path} is missing, and {candidates[0]} is gray, as masks are: if it is the photograph, "
                f"give it the name that {source} has"
            )
        found.append(candidates[0])
    return found
