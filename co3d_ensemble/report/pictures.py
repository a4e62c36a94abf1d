"""Pictures of results: comparison sheets of target frames, depth and error in false colours, training curves.

Pictures are uint8 tensors (3, H, W); files appear whole, by write-to-temporary, fsync and rename.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from co3d_ensemble.files import write_bytes_atomic
from co3d_ensemble.functional.metrics import psnr_masked
from co3d_ensemble.functional.types import RenderedView

ERROR_RANGE = 0.25  # mean absolute colour error shown brightest: a quarter of the range is plainly wrong
DISAGREEMENT_RANGE = 0.125  # of the standard deviation shown brightest: two members that differ by ERROR_RANGE
COLUMNS = ("photograph", "target", "render", "depth, near red", "mask", f"error, 0 to {ERROR_RANGE}")
DEPTH_QUANTILES = (0.02, 0.98)  # a few stray samples must not flatten the colours of the rest
_SMALLEST_SIDE, _LARGEST_SIDE = 160, 384  # longest side of a cell in pixels: tiny frames visible, sheets of few megabytes
_GAP, _HEADER, _CAPTION = 4, 30, 26
_BACKGROUND, _TEXT, _FAINT = (22, 24, 28), (235, 235, 235), (175, 180, 190)

SheetRow = tuple[str, Tensor, RenderedView, Tensor]
EnsembleRow = tuple[str, Tensor, Tensor, Sequence[RenderedView], RenderedView, Tensor]


@lru_cache
def _palette(name: str) -> Tensor:
    """256 colours of a matplotlib colour map, uint8, shape (256, 3)."""
    colors = matplotlib.colormaps[name](np.arange(256))[:, :3]
    return torch.from_numpy((colors * 255).round().astype(np.uint8))


def false_color(values: Tensor, palette: str) -> Tensor:
    """Values in [0, 1], shape (H, W), in the colours of one of matplotlib's maps: uint8 (3, H, W)."""
    index = (values.clamp(0, 1) * 255).round().long()
    return _palette(palette)[index].permute(2, 0, 1)


def to_uint8(image: Tensor) -> Tensor:
    """Picture in [0, 1] (or uint8 already), shape (1 or 3, H, W) -> uint8 (3, H, W) on the CPU; what is not finite is black."""
    image = image.detach().cpu()
    if image.dtype != torch.uint8:
        image = (image.float().nan_to_num(0.0, 0.0, 0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    return image.expand(3, -1, -1)


def depth_to_rgb(depth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Depth in false colours, near red and far blue, fading to black with the opacity.

    Args:
        depth: z in any unit, 0 where there is no surface, shape (1, H, W).
        mask: opacity; the colours span the depths where it exceeds 0.5; shape (1, H, W).

    Returns:
        uint8, shape (3, H, W).
    """
    depth = depth.detach().cpu().float()[0]
    opacity = torch.ones_like(depth) if mask is None else mask.detach().cpu().float()[0].nan_to_num(0.0).clamp(0, 1)
    surface = torch.isfinite(depth) & (depth > 0)
    inside = surface & (opacity > 0.5)
    if not inside.any():
        inside = surface
    if not inside.any():
        return torch.zeros(3, *depth.shape, dtype=torch.uint8)
    # numpy: torch.quantile refuses more than 16 million values
    near, far = np.quantile(depth[inside].numpy(), DEPTH_QUANTILES)
    span = far - near
    nearness = (far - depth) / span if span > 0 else torch.full_like(depth, 0.5)
    colors = false_color(nearness.nan_to_num(0.0, 0.0, 0.0), "turbo")
    return (colors * (opacity * surface)).round().to(torch.uint8)


def error_to_rgb(predicted: Tensor, target: Tensor, *, largest: float = ERROR_RANGE) -> Tensor:
    """Mean absolute colour difference per pixel in false colours: black is equal, pale yellow is ``largest`` or more.

    Args:
        predicted, target: in [0, 1], shape (3, H, W).

    Returns:
        uint8, shape (3, H, W).
    """
    error = (predicted.detach().cpu().float() - target.detach().cpu().float()).abs().mean(dim=0)
    return false_color(error.nan_to_num(largest) / largest, "inferno")


def comparison_sheet(rows: Sequence[SheetRow]) -> Tensor:
    """One row per frame: photograph | masked target | render | depth | rendered mask | error.

    Args:
        rows: (title, photograph in [0, 1] or uint8 (3, H, W), rendered view, foreground probability in [0, 1] or uint8
            (1, H, W)); frames may differ in size, the parts of one row may not.

    Returns:
        uint8, shape (3, height, width); tiny frames are enlarged without smoothing, large ones reduced.

    Raises:
        ValueError: no rows, or the parts of a row differ in size; the message names the row.
    """
    return sheet(COLUMNS, [_row_cells(*row) for row in rows])


def ensemble_sheet(members: Sequence[str], rows: Sequence[EnsembleRow]) -> Tensor:
    """One row per frame: masked target | each member | the fused view | its depth | its mask | its error | the disagreement.

    Args:
        members: names, in the order of the views.
        rows: (title, photograph, foreground probability, the members' views, fused view, standard deviation of the members'
            colours (1, H, W)); pictures, errors and result as in :func:`comparison_sheet`.
    """
    columns = ("target", *members, "ensemble", *COLUMNS[3:], f"disagreement, 0 to {DISAGREEMENT_RANGE}")
    strips = []
    for title, photograph, gt_mask, views, fused, deviation in rows:
        caption, (_, target, *shown) = _row_cells(title, photograph, fused, gt_mask)
        finite = [psnr_masked(view.rgb, _unit(photograph), _unit(gt_mask)).item() for view in views]
        caption += f" (members {', '.join(f'{value:.1f}' for value in finite)})"
        uncertain = false_color(deviation.cpu()[0] / DISAGREEMENT_RANGE, "inferno")
        strips.append((caption, [target, *(to_uint8(view.rgb) for view in views), *shown, uncertain]))
    return sheet(columns, strips)


def sheet(columns: Sequence[str], strips: Sequence[tuple[str, list[Tensor]]]) -> Tensor:
    """Captioned rows of cells under the columns' names.

    Args:
        strips: caption and cells, uint8 (3, H, W), per row; the cells of a row have one size.

    Returns:
        uint8, shape (3, height, width); tiny cells are enlarged without smoothing, large ones reduced.

    Raises:
        ValueError: no rows.
    """
    strips = [(caption, [_fit(cell) for cell in cells]) for caption, cells in strips]
    if not strips:
        raise ValueError("a comparison sheet needs at least one row")
    cell_width = max(cells[0].shape[2] for _, cells in strips)
    width = _GAP + len(columns) * (cell_width + _GAP)
    height = _HEADER + sum(_CAPTION + cells[0].shape[1] + _GAP for _, cells in strips)
    canvas = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    left = [_GAP + column * (cell_width + _GAP) for column in range(len(columns))]
    for x, name in zip(left, columns, strict=True):
        draw.text((x + cell_width / 2, _HEADER / 2), _fitting(name, cell_width), fill=_TEXT, font=_font(17), anchor="mm")
    y = _HEADER
    for caption, cells in strips:
        draw.text((_GAP + 2, y + _CAPTION / 2), caption, fill=_FAINT, font=_font(15), anchor="lm")
        y += _CAPTION
        for x, cell in zip(left, cells, strict=True):
            canvas.paste(_to_pil(cell), (x + (cell_width - cell.shape[2]) // 2, y))
        y += cells[0].shape[1] + _GAP
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def _fitting(name: str, width: int) -> str:
    """A column's name, cut where it would run into the next column's (members may be called anything)."""
    while len(name) > 1 and _font(17).getlength(name) > width:
        name = name[:-2] + "…"
    return name


def _row_cells(title: str, photograph: Tensor, view: RenderedView, gt_mask: Tensor) -> tuple[str, list[Tensor]]:
    """Caption and the six cells of one frame, all of one size."""
    sizes = {tuple(part.shape[-2:]) for part in (photograph, gt_mask, view.rgb, view.depth, view.mask)}
    if len(sizes) != 1:
        raise ValueError(f"{title}: photograph, mask and rendered view differ in size: {sorted(sizes)}")
    gt, view = _unit(photograph), view.cpu()
    foreground = (_unit(gt_mask) > 0.5).float()
    target = gt * foreground
    cells = [
        to_uint8(gt),
        to_uint8(target),
        to_uint8(view.rgb),
        depth_to_rgb(view.depth, view.mask),
        to_uint8(view.mask),
        error_to_rgb(view.rgb, target),
    ]
    finite = bool(torch.isfinite(view.rgb).all())
    score = f"psnr_masked {psnr_masked(view.rgb, gt, foreground).item():.1f} dB" if finite else "render is not finite"
    return f"{title}   {score}", cells


def _unit(image: Tensor) -> Tensor:
    """uint8 or float picture -> float in [0, 1] on the CPU."""
    image = image.detach().cpu()
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()


def _fit(cell: Tensor) -> Tensor:
    """Tiny cells enlarged by a whole factor without smoothing, large ones reduced by averaging."""
    height, width = cell.shape[1:]
    longest = max(height, width)
    if longest > _LARGEST_SIDE:
        scale = _LARGEST_SIDE / longest
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        return torch.from_numpy(np.array(_to_pil(cell).resize(size, Image.Resampling.BOX))).permute(2, 0, 1)
    factor = max(1, _SMALLEST_SIDE // longest)
    return cell.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def _to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


@lru_cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def save_picture(path: str | os.PathLike[str], image: Tensor) -> Path:
    """Writes a picture, uint8 or in [0, 1], shape (1 or 3, H, W); the suffix chooses the format. Returns the path."""
    path = Path(path)
    buffer = io.BytesIO()
    Image.init()
    if path.suffix.lower() not in Image.EXTENSION:
        raise ValueError(f"{path}: no picture format has the suffix {path.suffix!r}")
    _to_pil(to_uint8(image)).save(buffer, format=Image.EXTENSION[path.suffix.lower()])
    write_bytes_atomic(path, buffer.getvalue())
    return path


Curve = Sequence[tuple[float, float | None]]  # (step, value); None is left out


def training_curve(quality: Mapping[str, Curve], losses: Mapping[str, Curve], path: str | os.PathLike[str]) -> Path:
    """Plots a run: quality in dB above, losses (logarithmic where positive) below, over the step. PNG, written whole.

    Raises:
        ValueError: there is no value to plot.
    """
    quality, losses = _with_values(quality), _with_values(losses)
    if not quality and not losses:
        raise ValueError(f"{path}: nothing to plot")
    figure = Figure(figsize=(8, 6), dpi=110)
    figure.subplots_adjust(left=0.1, right=0.96, bottom=0.08, top=0.98, hspace=0.06)  # a layout that measures the labels draws twice
    top, bottom = figure.subplots(2, 1, sharex=True)
    _plot(top, quality, "psnr in dB")
    _plot(bottom, losses, "loss")
    if any(value > 0 for points in losses.values() for _, value in points):
        bottom.set_yscale("log")
    bottom.set_xlabel("step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes_atomic(Path(path), buffer.getvalue())
    return Path(path)


def _with_values(curves: Mapping[str, Curve]) -> dict[str, list[tuple[float, float]]]:
    kept = {name: [(step, value) for step, value in points if value is not None] for name, points in curves.items()}
    return {name: points for name, points in kept.items() if points}


def _plot(axes: Any, series: dict[str, list[tuple[float, float]]], label: str) -> None:
    for name, points in sorted(series.items()):
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, marker="." if len(points) < 40 else None, linewidth=1.2, label=name)
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if series:
        axes.legend(fontsize=8)
