"""``summary.md`` and ``summary.csv``: scores per subset and model with means as in the challenge's leaderboard, cost, failures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from co3d_ensemble.files import write_text_atomic
from co3d_ensemble.fleet.attempts import new_record
from co3d_ensemble.fleet.disk import JobFolder, read_json
from co3d_ensemble.functional.metrics import METRIC_NAMES

HEADINGS = ("PSNR masked", "PSNR fg", "PSNR full", "depth abs fg", "IoU")  # of METRIC_NAMES
MEAN = "MEAN"


@dataclass(frozen=True)
class Row:
    """One model on one subset, or a model's mean.

    Attributes:
        scores: value per metric, None where there is none.
        cost: hours and attempts of its training; None of a fusion.
    """

    subset: str
    model: str
    scores: Mapping[str, float | None]
    cost: Mapping[str, float] | None = None


def read_rows(output_dir: Path | str, subsets: Sequence[tuple[str, str]], models: Sequence[str], fused: str | None) -> list[Row]:
    """What the runs' own ``results.json`` say, subset by subset; a model without results has none."""
    rows = []
    for category, subset in subsets:
        for model in [*models, *([] if fused is None else [fused])]:
            folder = JobFolder(output_dir, f"{category}/{subset}/{model}")
            results = read_json(folder.results) or {}
            scores = {name: results.get("metrics", {}).get(name) for name in METRIC_NAMES}
            rows.append(Row(f"{category}/{subset}", model, scores, None if model == fused else cost_of(folder)))
    return rows


def cost_of(folder: JobFolder) -> dict[str, float]:
    record = {**new_record(), **(read_json(folder.attempts) or {})}
    return {"hours": record["seconds"] / 3600, "gpu_hours": record["gpu_seconds"] / 3600, "attempts": record["started"]}


def with_means(rows: Sequence[Row]) -> list[Row]:
    """Every model's rows, then its mean over the subsets that have a value."""
    found = []
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        means = {}
        for name in METRIC_NAMES:
            values = [row.scores[name] for row in mine if row.scores[name] is not None]
            means[name] = sum(values) / len(values) if values else None
        costs = [row.cost for row in mine if row.cost is not None]
        total = {key: sum(cost[key] for cost in costs) for key in ("hours", "gpu_hours", "attempts")} if costs else None
        found += [*mine, Row(MEAN, model, means, total)]
    return found


def csv_text(rows: Sequence[Row]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["subset", "model", *METRIC_NAMES, "hours", "gpu_hours", "attempts"])
    for row in rows:
        cost = ["", "", ""] if row.cost is None else [f"{row.cost['hours']:.4f}", f"{row.cost['gpu_hours']:.4f}", row.cost["attempts"]]
        writer.writerow([row.subset, row.model, *("" if row.scores[n] is None else f"{row.scores[n]:.5f}" for n in METRIC_NAMES), *cost])
    return buffer.getvalue()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns line up as plain text, too."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in (header, *rows)]
    return [f"| {line} |" for line in (lines[0], " | ".join("-" * width for width in widths), *lines[1:])]


def scored_cells(scores: Mapping[str, Any]) -> list[str]:
    return ["-" if scores.get(name) is None else f"{scores[name]:.{3 if name in ('iou', 'depth_abs_fg') else 2}f}" for name in METRIC_NAMES]


def markdown(
    rows: Sequence[Row],
    *,
    exports: Mapping[str, Mapping[str, Any]],
    failures: Mapping[str, str],
    wall_hours: float | None,
) -> str:
    """The page.

    Args:
        rows: with their means.
        exports: by sequence set: ``model``, ``archive``, ``results`` of ``score_archive`` (or None), or ``error``.
        failures: error by name of a job or subset.
        wall_hours: since the fleet was first started; None: unknown.
    """
    header = ["subset", "model", *HEADINGS]
    lines = ["# Summary", ""]
    for sequence_set, export in exports.items():
        lines += [f"## Submission: {sequence_set}", ""]
        if "error" in export:
            lines += [f"No archive: {export['error']}", ""]
            continue
        lines += [f"`{Path(export['archive']).name}`, made of `{export['model']}`, checked.", ""]
        if export["results"] is None:
            lines += ["No ground truth here: not scored.", ""]
            continue
        scored = [*export["results"]["subsets"].items(), (MEAN, export["results"]["mean"])]
        lines += table(header, [[bold(name), bold(export["model"], name), *scored_cells(scores)] for name, scores in scored])
        lines += ["", "Scores of the archive's own bytes at the original resolution, depth in the PNG's units, as in the challenge.", ""]
    lines += ["## Models", ""]
    cells = []
    for row in rows:
        cost = ["", "", ""]
        if row.cost is not None:
            cost = [f"{row.cost['hours']:.2f}", f"{row.cost['gpu_hours']:.2f}", f"{row.cost['attempts']:.0f}"]
        cells.append([bold(row.subset), bold(row.model, row.subset), *scored_cells(row.scores), *cost])
    lines += table([*header, "hours", "GPU-hours", "attempts"], cells)
    lines += ["", "Scores at each run's own resolution, depth in world units; hours of all attempts, summed in the MEAN rows.", ""]
    total = [row.cost for row in rows if row.subset == MEAN and row.cost is not None]
    spent = f"{sum(cost['hours'] for cost in total):.2f} job-hours, {sum(cost['gpu_hours'] for cost in total):.2f} GPU-hours"
    lines += ["## Cost", "", f"{'Wall-clock unknown' if wall_hours is None else f'{wall_hours:.2f} hours of wall-clock'}, {spent}.", ""]
    lines += ["## Failures", ""]
    lines += [f"- `{name}`: {error}" for name, error in failures.items()] or ["None."]
    return "\n".join(lines) + "\n"


def bold(text: str, of: str | None = None) -> str:
    return f"**{text}**" if (text if of is None else of) == MEAN else text


def write_summary(output_dir: Path | str, rows: Sequence[Row], **told: Any) -> None:
    """See :func:`markdown` for what is told."""
    rows = with_means(rows)
    write_text_atomic(Path(output_dir) / "summary.csv", csv_text(rows))
    write_text_atomic(Path(output_dir) / "summary.md", markdown(rows, **told))
