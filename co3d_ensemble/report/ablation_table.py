"""The table of an ablation: what every row scores, and how it differs from the row that it builds on, with intervals.

Differences are paired: a row's score minus that of the row it builds on, for the same sequence and seed, so that what is
common to both (an easy sequence, an unlucky seed) cancels.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from co3d_ensemble.functional.statistics import Interval, mean_interval

Column = tuple[str, int]  # (sequence, seed)

SCORES = ("psnr_masked", "psnr_fg", "iou", "depth_abs_fg", "ssim")
DIFFERENCES = ("psnr_masked", "iou")  # also with intervals
DIGITS = {"psnr_masked": 2, "psnr_fg": 2, "iou": 4, "depth_abs_fg": 4, "ssim": 4}
HOW = (
    "Rows nerf_* are of the NeRF member, tensorf_* of TensoRF. A difference is the mean of (row - the row it builds on) over the "
    "finished cells that both have, paired by sequence and seed; `- part` rows take a part away, so there a negative difference means "
    "that the part helps. Intervals are 95 %, mean +- t s / sqrt(n) with Student's t at n - 1 degrees of freedom. *Over cells*: n is "
    "the number of (sequence, seed) pairs, taken as independent: what to expect of other seeds on these sequences. *Over sequences*: n "
    "is the number of sequences, each the mean of its seeds: what to expect of other sequences like these. **Bold**: the interval over "
    "cells excludes 0; with {comparisons} comparisons per metric about {false:.1f} of each would do so by chance alone. *Min per cell* is "
    "training without loading and scoring, *best at* the share of the steps after which the validation was best, whose weights are scored."
)


@dataclass(frozen=True)
class RowScores:
    """What a row of the table is made of.

    Attributes:
        name, what, builds_on: as in the ablation's rows.
        scores: metrics by (sequence, seed) of the finished cells; None where there is no ground truth.
        seconds, best_share: of the training by (sequence, seed); the share of the steps after which the scored weights were
            taken. Empty for rows that train nothing.
        missing: cells that are not finished.
        note: for the reader, e.g. which row was chosen.
    """

    name: str
    what: str
    builds_on: str | None
    scores: Mapping[Column, Mapping[str, float | None]]
    seconds: Mapping[Column, float] = field(default_factory=dict)
    best_share: Mapping[Column, float] = field(default_factory=dict)
    missing: int = 0
    note: str = ""


@dataclass(frozen=True)
class Difference:
    """Of one metric between a row and the one that it builds on.

    Attributes:
        by_column: per (sequence, seed) that both have.
        over_cells, over_sequences: the same mean where every sequence has as many seeds; see ``HOW``.
    """

    by_column: Mapping[Column, float]
    over_cells: Interval
    over_sequences: Interval


def difference(row: RowScores, base: RowScores, metric: str) -> Difference:
    """Row minus base, paired."""
    found = {}
    for column, scores in row.scores.items():
        here, there = scores.get(metric), base.scores.get(column, {}).get(metric)
        if here is not None and there is not None:
            found[column] = here - there
    sequences: dict[str, list[float]] = {}
    for (sequence, _), value in found.items():
        sequences.setdefault(sequence, []).append(value)
    means = [fmean(values) for values in sequences.values()]
    return Difference(found, mean_interval(list(found.values())), mean_interval(means))


def differences(rows: Sequence[RowScores], metric: str) -> dict[str, Difference]:
    """By name, of the rows that build on one which is in the table and share a finished cell with it."""
    by_name = {row.name: row for row in rows}
    pairs = {row.name: (row, by_name[row.builds_on]) for row in rows if row.builds_on in by_name}
    found = {name: difference(row, base, metric) for name, (row, base) in pairs.items()}
    return {name: one for name, one in found.items() if one.by_column}


def markdown_table(rows: Sequence[RowScores]) -> str:
    """The table and how to read it."""
    found = {metric: differences(rows, metric) for metric in DIFFERENCES}
    head = ["row", "what", "against", "cells", "psnr_masked", "difference, dB: over cells", "over sequences"]
    head += ["IoU", "difference: over cells", "min per cell", "best at"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        psnr, overlap = (found[metric].get(row.name) for metric in DIFFERENCES)
        count = str(len(row.scores)) + (f" of {len(row.scores) + row.missing}" if row.missing else "")
        cells = [row.name, row.what, row.builds_on or "", count]
        cells += [_mean_text(row, "psnr_masked"), _interval_text(psnr and psnr.over_cells, 2, bold=True)]
        cells += [_interval_text(psnr and psnr.over_sequences, 2), _mean_text(row, "iou")]
        cells += [_interval_text(overlap and overlap.over_cells, 4, bold=True)]
        cells.append(f"{fmean(row.seconds.values()) / 60:.1f}" if row.seconds else "")
        cells.append(f"{fmean(row.best_share.values()):.0%}" if row.best_share else "")
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"- {row.name}: {row.note}" for row in rows if row.note]
    count = sum(one.over_cells.half_width is not None for one in found["psnr_masked"].values())
    how = HOW.format(comparisons=count, false=0.05 * count)
    return "\n".join([*lines, "", *notes, *([""] if notes else []), how, ""])


def sequence_table(rows: Sequence[RowScores]) -> str:
    """psnr_masked per row and sequence, mean over the seeds that are finished."""
    names = list(dict.fromkeys(sequence for row in rows for sequence, _ in row.scores))
    lines = ["| row | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for row in rows:
        cells = []
        for name in names:
            values = [scores["psnr_masked"] for (sequence, _), scores in row.scores.items() if sequence == name]
            values = [value for value in values if value is not None]
            cells.append(f"{fmean(values):.2f}" if values else "")
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def csv_table(rows: Sequence[RowScores]) -> str:
    """All that the Markdown table has and more, a line per row; empty where unknown."""
    found = {metric: differences(rows, metric) for metric in DIFFERENCES}
    head = ["row", "what", "builds_on", "cells", "missing", *SCORES]
    for metric in DIFFERENCES:
        head += [f"{metric}_difference", f"{metric}_difference_cells", f"{metric}_95_cells"]
        head += [f"{metric}_difference_sequences", f"{metric}_95_sequences"]
    head += ["seconds", "best_share", "note"]
    lines = []
    for row in rows:
        line = [row.name, row.what, row.builds_on, len(row.scores), row.missing, *(_mean_score(row, metric) for metric in SCORES)]
        for metric in DIFFERENCES:
            one = found[metric].get(row.name)
            line += [None] * 5 if one is None else _numbers(one)
        line += [fmean(values.values()) if values else None for values in (row.seconds, row.best_share)]
        lines.append([*line, row.note])
    return _csv(head, lines)


def _numbers(one: Difference) -> list[float | None]:
    cells, sequences = one.over_cells, one.over_sequences
    return [cells.mean, cells.count, cells.half_width, sequences.mean, sequences.half_width]


def csv_cells(rows: Sequence[RowScores]) -> str:
    """Every finished cell, a line each."""
    lines = []
    for row in rows:
        for column in sorted(row.scores):
            scores = [row.scores[column].get(metric) for metric in SCORES]
            lines.append([row.name, *column, *scores, row.seconds.get(column), row.best_share.get(column)])
    return _csv(["row", "sequence", "seed", *SCORES, "seconds", "best_share"], lines)


def _csv(head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([f"{value:.6g}" if isinstance(value, float) else value for value in line] for line in lines)
    return buffer.getvalue()


def _mean_score(row: RowScores, metric: str) -> float | None:
    values = [value for scores in row.scores.values() if (value := scores.get(metric)) is not None]
    return fmean(values) if values else None


def _mean_text(row: RowScores, metric: str) -> str:
    value = _mean_score(row, metric)
    return "" if value is None else f"{value:.{DIGITS[metric]}f}"


def _interval_text(interval: Interval | None, digits: int, *, bold: bool = False) -> str:
    if interval is None:
        return ""
    text = f"{interval.mean:+.{digits}f}" + ("" if interval.half_width is None else f" +- {interval.half_width:.{digits}f}")
    return f"**{text}**" if bold and interval.excludes_zero else text
