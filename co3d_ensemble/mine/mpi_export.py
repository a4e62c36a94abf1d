"""A multiplane image as a folder of RGBA PNGs and a JSON file, with all that a viewer needs to show it from other cameras.

A plane's opacity is ``alpha_i = 1 - exp(-sigma_i delta_i)`` with delta_i along the SOURCE camera's ray through the pixel. The
source view is exact; for another camera the renderer takes delta_i along that camera's own rays, so a viewer's picture differs
from ours by as much as the distances between planes do, ``delta' / delta``: the ratio of 1 / cos of the angles between the two
rays and the planes' normal, a few percent for the small movements that a multiplane image allows.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from co3d_ensemble.base.paths import inside
from co3d_ensemble.base.pictures import exactly, read_rgba
from co3d_ensemble.files import write_bytes_atomic, write_json_atomic
from co3d_ensemble.functional.mpi import plane_distances
from co3d_ensemble.mine.inference import PlaneStack

INDEX = "mpi.json"
FORMAT, VERSION = "co3d_ensemble.mpi", 1
LEVELS = 255  # of an 8-bit channel

CONVENTIONS = {
    "planes": "nearest first; parallel to the source's picture at z = depth = 1 / disparity; each shows the source's full field of view",
    "pixels": "RGBA, 8 bit, straight (not premultiplied) alpha, colours in [0, 1] as the photograph has them (sRGB)",
    "coordinates": "the centre of the top left pixel is (0.5, 0.5), x to the right, y down",
    "camera": "x right, y down, z into the scene; x_pixel = fx x / z + cx, y_pixel = fy y / z + cy",
    "other_cameras": "X_target = R X_source + t maps pixels of the plane at depth d by K_target (R + t n^T / d) K^-1, n = (0, 0, 1)",
    "compositing": "over, back to front: C = alpha_i rgb_i + (1 - alpha_i) C, from black; outside of its picture a plane is transparent",
    "alpha": "1 - exp(-sigma delta), delta along the source camera's rays: exact for the source view, close to it for others",
}


@dataclass(frozen=True)
class ExportedMPI:
    """What :func:`read_mpi` reads: planes in mode ``alpha``.

    Attributes:
        rgb, alpha: in [0, 1], shapes (N, 3, H, W) and (N, 1, H, W), nearest first.
        disparity: descending, shape (N,).
        K: intrinsics in pixels, shape (3, 3).
        index: all of the JSON file.
    """

    rgb: Tensor
    alpha: Tensor
    disparity: Tensor
    K: Tensor
    index: dict[str, Any]


def source_alpha(stack: PlaneStack) -> Tensor:
    """Opacity of every plane along the source camera's rays, shape (N, 1, H, W)."""
    if stack.mode == "alpha":
        return stack.sigma
    height, width = stack.size
    distances = plane_distances(stack.disparity.reciprocal()[None], stack.K[None], height, width)[0]
    return -torch.expm1(-stack.sigma * distances)


def alpha_to_uint8(alpha: Tensor) -> Tensor:
    """Opacities to 0..255 so that the light that passes all planes down to any one is right to half a level.

    Rounding every opacity by itself adds up: 256 planes of alpha 0.0019 let 61% of the light pass, and none of them rounds to 1.
    Each is therefore chosen for the transmittance behind it, given what the rounded ones before it let pass.

    Args:
        alpha: in [0, 1], nearest first, shape (N, ...).
    """
    exact = torch.ones_like(alpha[0], dtype=torch.float64)
    passed = exact.clone()
    levels = []
    for plane in alpha.double():
        exact = exact * (1 - plane)
        # where nothing passes, any opacity will do: the plane's own
        wanted = torch.where(passed > 0, 1 - exact / passed.clamp_min(torch.finfo(torch.float64).tiny), plane)
        level = (LEVELS * wanted).round().clamp(0, LEVELS)
        passed = passed * (1 - level / LEVELS)
        levels.append(level.to(torch.uint8))
    return torch.stack(levels)


def write_mpi(folder: Path, stack: PlaneStack, **more: Any) -> Path:
    """Writes ``plane_000.png`` (the nearest) and so on, then ``mpi.json``, last: who finds it finds all of them.

    Args:
        more: further entries of the JSON file.

    Returns:
        The JSON file's path.
    """
    folder = Path(folder)
    remove_mpi(folder)
    index = folder / INDEX
    rgb = (stack.rgb.detach().cpu().double().clamp(0, 1) * LEVELS).round().to(torch.uint8)
    pixels = torch.cat((rgb, alpha_to_uint8(source_alpha(stack).detach().cpu())), dim=1).permute(0, 2, 3, 1).contiguous().numpy()
    planes = []
    for number, (plane, disparity) in enumerate(zip(pixels, stack.disparity.tolist(), strict=True)):
        name = f"plane_{number:03d}.png"
        buffer = io.BytesIO()
        Image.fromarray(plane).save(buffer, format="PNG")
        write_bytes_atomic(folder / name, buffer.getvalue())
        planes.append({"file": name, "disparity": disparity, "depth": 1 / disparity})
    height, width = stack.size
    K = stack.K.detach().cpu().double()
    intrinsics = {"fx": K[0, 0].item(), "fy": K[1, 1].item(), "cx": K[0, 2].item(), "cy": K[1, 2].item()}
    entries = {"format": FORMAT, "version": VERSION, "width": width, "height": height, "intrinsics": intrinsics, "planes": planes}
    write_json_atomic(index, {**entries, "conventions": CONVENTIONS, **more})
    return index


def remove_mpi(folder: Path) -> None:
    """Removes what :func:`write_mpi` wrote, if anything, index first; the folder stays where it holds something else."""
    (folder / INDEX).unlink(missing_ok=True)
    for plane in folder.glob("plane_*.png"):
        plane.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def read_mpi(folder: Path) -> ExportedMPI:
    """Reads what :func:`write_mpi` wrote, float32.

    Raises:
        FileNotFoundError: no export there.
        ValueError: naming the file that is broken, or of another size than the rest.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        height, width, camera = index["height"], index["width"], index["intrinsics"]
        files = [inside(folder, plane["file"]) for plane in index["planes"]]
        disparity = torch.tensor([float(plane["disparity"]) for plane in index["planes"]])
        K = torch.tensor([[camera["fx"], 0.0, camera["cx"]], [0.0, camera["fy"], camera["cy"]], [0.0, 0.0, 1.0]])
        if (index["format"], index["version"]) != (FORMAT, VERSION) or not files:
            raise ValueError(f"format {index['format']!r}, version {index['version']!r}, {len(files)} planes")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not an exported multiplane image: {error}") from error
    planes = torch.from_numpy(np.stack([read_rgba(file, exactly((height, width))) for file in files])).permute(0, 3, 1, 2).float() / LEVELS
    return ExportedMPI(planes[:, :3], planes[:, 3:], disparity, K, index)
