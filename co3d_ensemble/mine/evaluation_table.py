"""The results of an evaluation as tables that fit a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from co3d_ensemble.mine.evaluation import DEPTH_METRICS, VIEW_METRICS

_HEADINGS = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "psnr_valid": "PSNR valid",
    "valid_share": "valid",
    "abs_rel": "Abs Rel",
    "sq_rel": "Sq Rel",
    "rmse": "RMSE",
    "rmse_log": "RMSE log",
    "log10": "log10",
    "delta_1": "< 1.25",
    "delta_2": "< 1.25^2",
    "delta_3": "< 1.25^3",
}


def table(results: Mapping[str, Any]) -> RenderableType:
    """The tables of views and of depth, a line per kind of pairs and number of planes, then what has to be known about them."""
    rows = results["results"]
    parts: list[RenderableType] = []
    notes: dict[str, None] = {}
    views = {name: by for name, by in rows.items() if name != "depth"}
    for title, metrics, groups in (
        ("views", VIEW_METRICS, views),
        ("depth", DEPTH_METRICS, {k: v for k, v in rows.items() if k == "depth"}),
    ):
        if not groups:
            continue
        shown = Table(title=title, title_justify="left", box=box.SIMPLE, show_edge=False, padding=0)
        if title == "views":
            shown.add_column("pairs")
        for heading in ("planes", "pictures", *(_HEADINGS[metric] for metric in metrics)):
            shown.add_column(heading, justify="right", no_wrap=True)
        for name, by in groups.items():
            for count, means in by.items():
                cells = [_number(metric, means[metric]) for metric in metrics]
                shown.add_row(*([name] if title == "views" else []), count, str(means["n"]), *cells)
                notes |= dict.fromkeys(f"{_HEADINGS.get(metric, metric)}: {reason}" for metric, reason in means["reasons"].items())
        parts.append(shown)
    protocol = results["protocol"]
    about = [f"PSNR: {protocol['psnr']}", f"translations: {protocol['translations']}"] if views else []
    notes = dict.fromkeys([protocol["text"], *about]) | notes
    if "depth" in rows:
        notes |= {f"depth alignment: {protocol['depth_alignment']}": None}
    notes |= dict.fromkeys(results["notes"])
    return Group(*parts, Text(), *(Text(f"- {note}") for note in notes))


def _number(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if metric.startswith("psnr") else f"{value:.1%}" if metric == "valid_share" else f"{value:.4f}"
