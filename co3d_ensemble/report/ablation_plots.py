"""Two plots of an ablation: differences with their intervals, and validation curves over the steps."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from co3d_ensemble.files import write_bytes_atomic
from co3d_ensemble.report.ablation_table import RowScores, differences

LINEAR_DB = 0.1

Curve = Sequence[tuple[float, float]]  # (share of the run's steps, value)


def plot_differences(rows: Sequence[RowScores], path: Path) -> Path | None:
    """psnr_masked of every row against the one it builds on: a dot per cell, the mean with its intervals.

    The axis is linear up to ``LINEAR_DB`` and logarithmic beyond: parts are worth hundredths of a dB, or ten.

    Returns:
        ``path``, or None where no two rows can be compared yet.
    """
    found = differences(rows, "psnr_masked")
    shown = [row for row in rows if row.name in found]
    if not shown:
        return None
    sequences = list(dict.fromkeys(sequence for one in found.values() for sequence, _ in one.by_column))
    colors = dict(zip(sequences, _colors(len(sequences))))
    figure = Figure(figsize=(9, 1.2 + 0.34 * len(shown)), dpi=110, layout="constrained")
    axes = figure.subplots()
    for height, row in enumerate(reversed(shown)):
        one = found[row.name]
        for sequence, color in colors.items():
            values = [value for (where, _), value in one.by_column.items() if where == sequence]
            axes.plot(values, [height] * len(values), "o", color=color, markersize=4, alpha=0.7, label=sequence if height == 0 else None)
        for interval, width, alpha in ((one.over_sequences, 1.2, 0.8), (one.over_cells, 3.5, 0.9)):
            if interval.half_width is not None:
                ends = (interval.mean - interval.half_width, interval.mean + interval.half_width)
                axes.plot(ends, (height, height), "-", color="black", linewidth=width, alpha=alpha, zorder=1)
        axes.plot(one.over_cells.mean, height, "D", color="black", markersize=5)
        axes.annotate(f"{one.over_cells.mean:+.2f}", (1.01, height), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axes.axvline(0.0, color="grey", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=LINEAR_DB, linscale=1.5, subs=range(2, 10))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(shown)), [f"{row.what}  ({row.name})" for row in reversed(shown)], fontsize=8)
    axes.set_xlabel(
        "psnr_masked minus that of the row it builds on, dB\ndots: cells; numbers: means; thick: 95 % over cells; thin: over sequences"
    )
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7)
    return _save(figure, path)


def plot_curves(validation: Mapping[str, Curve], fit: Mapping[str, tuple[Curve, Curve]], path: Path) -> Path | None:
    """Validation over training, mean over cells: does it still rise at the end, and does it fall behind what is fitted?

    Args:
        validation: psnr_masked of the validation frames by row.
        fit: by row, psnr on the foreground of (validation frames, training rays).

    Returns:
        ``path``, or None where there is no curve.
    """
    if not any(validation.values()):
        return None
    colors = dict(zip(validation, _colors(len(validation))))
    figure = Figure(figsize=(11, 4.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in validation.items():
        if curve:
            left.plot(*zip(*curve), "-", marker=".", linewidth=1.2, color=colors[name], label=name)
    for name, (unseen, fitted) in fit.items():
        if unseen and fitted:
            right.plot(*zip(*unseen), "-", marker=".", linewidth=1.2, color=colors[name], label=name)
            right.plot(*zip(*fitted), "--", linewidth=1.0, color=colors[name])
    left.set_ylabel("psnr_masked of the validation frames, dB")
    right.set_ylabel("foreground psnr, dB")
    right.set_title("validation frames (solid) and training rays (dashed)", fontsize=9)
    for axes in (left, right):
        axes.set_xlabel("share of the training steps")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return _save(figure, path)


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """Mean of curves at the shares of the one with the fewest points, as far as all of them reach; linear in between."""
    curves = [curve for curve in curves if curve]
    if not curves:
        return []
    reach = min(curve[-1][0] for curve in curves)
    shares = [share for share, _ in min(curves, key=len) if share <= reach]
    values = np.mean([np.interp(shares, *zip(*curve)) for curve in curves], axis=0)
    return list(zip(shares, values.tolist()))


def psnr_of_rgb_loss(loss: float) -> float:
    """The psnr that a squared norm over three channels stands for; the training loss of the ROI in dB."""
    return -10 * math.log10(loss / 3)


def _colors(count: int) -> list[tuple[float, ...]]:
    palette = matplotlib.colormaps["tab10" if count <= 10 else "tab20"]
    return [palette(i % palette.N) for i in range(count)]


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes_atomic(Path(path), buffer.getvalue())
    return Path(path)
