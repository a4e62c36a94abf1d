"""One photograph and a trained run to a video, pictures and an exported multiplane image: what ``launch/render_mine.py`` does."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING
from torch import Tensor
from torch.nn import functional as F

from co3d_ensemble.base.progress import tracked
from co3d_ensemble.files import write_json_atomic
from co3d_ensemble.functional.mpi import MPIView
from co3d_ensemble.functional.mpi_sampling import explicit_disparities, fixed_disparities
from co3d_ensemble.mine.assembly import load_trained_mine
from co3d_ensemble.mine.config import planes_to_show
from co3d_ensemble.mine.inference import (
    PlaneStack,
    enlarged,
    predict_stack,
    render_pose,
    surface_disparities,
    zoom_hiding_borders,
)
from co3d_ensemble.mine.mpi_export import remove_mpi, write_mpi
from co3d_ensemble.mine.photo import FITS, Photo, load_photo
from co3d_ensemble.mine.trajectories import TRAJECTORIES, Pose, trajectory
from co3d_ensemble.mine.video import QUALITIES, check_video, write_video
from co3d_ensemble.rendering import resolve_device
from co3d_ensemble.report.pictures import false_color, save_picture, to_uint8
from co3d_ensemble.settings import setting

logger = logging.getLogger(__name__)

NEAREST, MIDDLE, FARTHEST = 0.98, 0.5, 0.02  # quantiles of the disparities that are seen; a few stray pixels must not set the path
REPORT, RGB, DEPTH, VIDEO, DEPTH_VIDEO, MPI = "render.json", "rgb.png", "depth.png", "video.mp4", "depth.mp4", "mpi"  # what is written
LARGEST_AMPLITUDE = 0.25  # of the width: far beyond what one picture can show


@dataclass
class RenderConfig:
    image: str = setting(MISSING, "the photograph: any size, EXIF orientation, transparency", literal=True)
    checkpoint: str = setting(
        MISSING, "run directory of launch/train_mine.py, one of its checkpoints/*.pt, or a checkpoint file of MINE's authors", literal=True
    )
    preset: str | None = setting(None, "file of configs/mine that the authors' checkpoint goes with; null: its params.yaml beside it tells")
    output_dir: str = setting("outputs/renders", "files go to <output_dir>/<name of the photograph>", literal=True)
    fov: float | None = setting(None, "horizontal field of view of the photograph, degrees; null: EXIF's, or 60")
    fit: str = setting("whole", "whole: all of the photograph, its aspect kept | crop: its centre | stretch: as the reference does")
    background: float = setting(1.0, "grey value, 0 to 1, behind transparent pixels")
    planes: int | None = setting(None, "number of planes; null: as in the run's validations; the same weights serve any number")
    fine_planes: int | None = setting(None, "planes added where a first pass finds surfaces (coarse to fine); null: as in training")
    disparities: list[float] | None = setting(None, "1 / z of the planes themselves, descending, in the network's unit, in place of planes")
    plane_chunk: int | None = setting(None, "planes decoded and warped at once, to fit a small card; null: all")
    output_scale: float = setting(1.0, "size of the outputs in the network's; above 1 they take their detail from the photograph")
    trajectory: str = setting("circle", "circle | line | spiral")
    amplitude: float = setting(0.03, "how far the nearest surface moves at most, share of the picture's width")
    look_at: str = setting("middle", "what stays in place: near | middle | far (the median surface is the middle) | parallel: no turning")
    zoom: float | None = setting(None, "factor on the focal length of the views; null: as little as hides the picture's borders")
    frames: int = setting(60, "pictures of the video")
    fps: float = setting(30.0, "pictures per second")
    quality: int = setting(8, "of the video, 1 to 10")
    video: bool = setting(True, "write video.mp4")
    depth_video: bool = setting(False, "write depth.mp4, the disparity in false colours")
    export: bool = setting(True, "write the planes as PNGs and mpi/mpi.json")
    device: str = setting("auto", "auto | cpu | cuda | cuda:N")

    def __post_init__(self) -> None:
        choices = {"fit": FITS, "trajectory": tuple(TRAJECTORIES), "look_at": ("near", "middle", "far", "parallel")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        ranges: dict[str, tuple[float, float]] = {
            "fov": (1, 175),
            "background": (0, 1),
            "planes": (2, 1024),
            "fine_planes": (0, 1024),
            "plane_chunk": (1, 1024),
            "output_scale": (0.1, 8),
            "amplitude": (0, LARGEST_AMPLITUDE),
            "zoom": (0.5, 10),
            "frames": (1, 100_000),
            "fps": (1, 240),
            "quality": QUALITIES,
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}={value}: must lie in [{low:g}, {high:g}]")
        if self.disparities is not None:
            if self.planes is not None:
                raise ValueError(f"planes={self.planes}: disparities says how many there are")
            explicit_disparities(self.disparities, batch=1)  # checks them


def render_photo(settings: RenderConfig) -> dict[str, Any]:
    """Writes everything that ``settings`` asks for; returns what was done, as ``render.json`` has it.

    Raises:
        ValueError, FileNotFoundError: of the photograph or the checkpoint, naming it.
        RuntimeError: a video is wanted and cannot be written.
    """
    if settings.video or settings.depth_video:
        check_video()
    device = resolve_device(settings.device)
    image_path = Path(settings.image)
    if not image_path.is_file():
        raise FileNotFoundError(f"{image_path}: no such file")
    network, run = load_trained_mine(settings.checkpoint, device, settings.preset)
    photo = load_photo(
        image_path, height=run.data.height, width=run.data.width, fov=settings.fov, fit=settings.fit, background=settings.background
    )
    started = time.perf_counter()
    disparity = _disparities(settings, run).to(device)
    stack = predict_stack(
        network,
        photo.image.to(device),
        photo.K.to(device),
        disparity,
        plane_chunk=settings.plane_chunk,
        blend=run.model.blend_source,
        n_fine=run.model.n_fine_planes if settings.fine_planes is None else settings.fine_planes,
    )
    stack = _at_output_size(stack, photo, image_path, settings)
    seconds = {"planes": time.perf_counter() - started}

    folder = Path(settings.output_dir) / image_path.stem
    near, middle, far = surface_disparities(stack, (NEAREST, MIDDLE, FARTHEST))
    extremes = surface_disparities(stack, (1.0, 0.0))  # no border shows, also not behind those few pixels
    _remove_earlier(folder)
    files = [
        save_picture(folder / RGB, stack.view.rgb[0]),
        save_picture(folder / DEPTH, disparity_picture(stack.view, near, far)),
    ]
    if settings.export:
        suggested = {"near_disparity": near, "middle_disparity": middle, "far_disparity": far}
        files.append(write_mpi(folder / MPI, stack, seen=suggested))
    path = _path(stack, settings, near=near, middle=middle, far=far)
    zoom = settings.zoom or zoom_hiding_borders(path, stack.K, stack.size, extremes)
    if settings.video or settings.depth_video:
        started = time.perf_counter()
        files += _write_videos(folder, stack, path, zoom, (near, far), settings)
        seconds["views"] = time.perf_counter() - started
    height, width = stack.size
    report = {
        "image": str(image_path),
        "checkpoint": str(settings.checkpoint),
        "fov_degrees": photo.fov,
        "fov_from": photo.fov_source,
        "photograph": {"width": photo.original_size[1], "height": photo.original_size[0]},
        "width": width,
        "height": height,
        "planes": len(stack.disparity),
        "zoom": zoom,
        "disparity_seen": {"near": near, "middle": middle, "far": far},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "files": [str(file.relative_to(folder)) for file in files],
    }
    write_json_atomic(folder / REPORT, report)
    return {**report, "folder": str(folder)}


def _remove_earlier(folder: Path) -> None:
    """Removes an earlier rendering, its report first: what lies in the folder is of one rendering, whatever that one writes."""
    for name in (REPORT, RGB, DEPTH, VIDEO, DEPTH_VIDEO):
        (folder / name).unlink(missing_ok=True)
    remove_mpi(folder / MPI)


def disparity_picture(view: MPIView, near: float, far: float) -> Tensor:
    """A view's disparity in false colours, ``near`` red and ``far`` blue, black where there is no surface: uint8 (3, H, W)."""
    disparity, alpha = view.disparity[0, 0], view.alpha[0, 0]
    span = near - far
    nearness = (disparity - far) / span if span > 0 else torch.full_like(disparity, 0.5)
    colors = false_color(nearness.cpu(), "turbo").float()
    return (colors * (alpha * (disparity > 0)).clamp(0, 1).cpu()).round().to(torch.uint8)


def _disparities(settings: RenderConfig, run: Any) -> Tensor:
    """1 / z of the planes, without fine ones, descending, shape (N,)."""
    if settings.disparities is not None:
        return explicit_disparities(settings.disparities, batch=1)[0]
    count = settings.planes or planes_to_show(run)
    return fixed_disparities(count, run.model.near_disparity, run.model.far_disparity, batch=1)[0]


def _at_output_size(stack: PlaneStack, photo: Photo, path: Path, settings: RenderConfig) -> PlaneStack:
    """The stack at ``output_scale`` times its size; enlarged, it takes its detail from the photograph, as far as that has it."""
    if settings.output_scale == 1:
        return stack
    height, width = (max(16, 2 * round(side * settings.output_scale / 2)) for side in stack.size)
    if settings.output_scale > 1:
        # the same part of the photograph: of the whole one the aspect is kept to the network's rounding, so it is stretched to it
        fit = "crop" if settings.fit == "crop" else "stretch"
        image = load_photo(path, height=height, width=width, fov=photo.fov, fit=fit, background=settings.background).image
    else:
        image = F.interpolate(photo.image[None], (height, width), mode="area")[0]
    return enlarged(stack, image.to(stack.rgb.device))


def _path(stack: PlaneStack, settings: RenderConfig, *, near: float, middle: float, far: float) -> list[Pose]:
    focus = {"near": near, "middle": middle, "far": far, "parallel": 0.0}[settings.look_at]
    return trajectory(
        settings.trajectory,
        settings.frames,
        focal=stack.K[0, 0].item(),
        width=stack.size[1],
        near=near,
        focus=focus,
        amplitude=settings.amplitude,
    )


def _write_videos(
    folder: Path, stack: PlaneStack, path: list[Pose], zoom: float, span: tuple[float, float], settings: RenderConfig
) -> list[Path]:
    """The videos that are asked for, each view rendered once."""
    size = tuple(side - side % 2 for side in stack.size)  # a video's sides are even
    K = stack.K.clone()
    K[0, 0], K[1, 1] = zoom * K[0, 0], zoom * K[1, 1]
    K[0, 2], K[1, 2] = K[0, 2] - (stack.size[1] - size[1]) / 2, K[1, 2] - (stack.size[0] - size[0]) / 2
    depths: list[Tensor] = []

    def pictures() -> Any:
        for pose in tracked(path, "rendering", "views"):
            view = render_pose(stack, pose, K=K, size=size, plane_chunk=settings.plane_chunk)
            if settings.depth_video:
                depths.append(disparity_picture(view, *span))
            yield to_uint8(view.rgb[0])

    files = []
    if settings.video:
        write_video(folder / VIDEO, pictures(), fps=settings.fps, quality=settings.quality)
        files.append(folder / VIDEO)
    elif settings.depth_video:
        for _ in pictures():
            pass
    if settings.depth_video:
        write_video(folder / DEPTH_VIDEO, depths, fps=settings.fps, quality=settings.quality)
        files.append(folder / DEPTH_VIDEO)
    return files
