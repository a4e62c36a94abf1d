"""Writes the section "Figures" of benchmarks/README.md from the files in benchmarks/results.

    python benchmarks/report.py            # prints the tables
    python benchmarks/report.py --write    # puts them between the marks in README.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from co3d_ensemble.base.paths import listed
from co3d_ensemble.scripts import run_script

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- figures: written by report.py -->", "<!-- end of figures -->"
NOTHING = "No results are stored in `benchmarks/results` yet."


def number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def heading(result: Mapping[str, Any], title: str) -> list[str]:
    place = f"{result['machine']}, device {result['device']}, {result['threads']} CPU threads"
    place += f", bfloat16 {result['bfloat16']}" if "bfloat16" in result else ""  # results of before do not say it
    return [f"### {title}", "", f"{place}; torch {result['torch']}, PyTorch3D {result['pytorch3d']}; `{result['command']}`", ""]


def step_section(result: Mapping[str, Any]) -> list[str]:
    """Of one result of nerf_step.py."""
    title = f"Step: {result['mlp']} MLP, {result['rays']} rays x ({result['samples'][0]} + {result['samples'][1]})"
    memory = result["peak_memory_mb"]
    theirs = "Implicitron, float32" if "implicitron_precision" in result else "Implicitron"
    rows = [[theirs, number(result["implicitron_s"], 4), "1.0", number(memory.get("implicitron"), 0)]]
    for precision in ("float32", "bfloat16"):
        seconds = result.get(f"ours_{precision}_s")
        if seconds is not None:
            peak = number(memory.get(f"ours_{precision}"), 0)
            rows.append([f"ours, {precision}", number(seconds, 4), number(result[f"ratio_{precision}"]), peak])
    with_refinement = f"ours, {result['ours_precision']}, with its share of the grid's refinement"
    rows.append([with_refinement, number(result["ours_with_refinement_s"], 4), number(result["ratio_with_refinement"]), ""])
    lines = heading(result, title) + table(["", "seconds per step", "times faster", "peak MiB"], rows)
    lines += ["", f"On {result['sequence']}; the MLPs see {100 * result['occupied_share']:.1f} % of the samples.", ""]
    if "scaling" in result:
        cases = [
            [str(case["frames"]), str(case["longest_side"]), number(case["ours_s"], 4), number(case["implicitron_s"], 4)]
            for case in result["scaling"]
        ]
        lines += [*table(["frames", "longest side, px", "ours, s per step", "Implicitron, s per step"], cases), ""]
    return lines


VM_CASES = {"generated": "A generated scene", "hull": "The carved hull, start of a training"}


def vm_section(result: Mapping[str, Any]) -> list[str]:
    """Of one result of vm_step.py: a table of the cases, one of the parts of our step at several resolutions."""
    title = f"VM step: grid of {result['resolution']}^3, {result['rays']} rays x {result['samples']}"
    memory, rows = result["peak_memory_mb"], []
    for case in result["cases"]:
        place = f"{VM_CASES[case['name']]} ({case['sequence']}), {100 * case['occupied_share']:.2f} % occupied"
        of_scene = memory if case["name"] == "generated" else {}
        rows.append([place, "Implicitron", number(case["implicitron_s"], 3), "1.0", "", number(of_scene.get("implicitron"), 0)])
        for name, side in case["sides"].items():
            label = name.replace("_all_samples", ", every sample").replace("ours_", "ours, ")
            peak = number(of_scene.get(name), 0)
            rows.append(["", label, number(side["seconds"], 3), number(side["ratio"]), number(side["bar"], 0), peak])
    lines = heading(result, title)
    if rows:
        lines += [*table(["scene", "side", "seconds per step", "times faster", "bar", "peak MiB"], rows), ""]
    scaled = [row for row in result.get("scaling", ()) if "shares" in row]
    if scaled:
        names = list(scaled[0]["shares"])
        cells = [
            [f"{row['resolution']}^3", f"{row['parameters']:,}", number(row["ours_s"], 3)]
            + [f"{100 * row['shares'][name]:.0f} %" for name in names]
            for row in scaled
        ]
        lines += [*table(["grid", "parameters", "ours, s per step", *names], cells), ""]
    skipped = [f"{row['resolution']}^3 was left out: {row['skipped']}." for row in result.get("scaling", ()) if "skipped" in row]
    return [*lines, " ".join(skipped), ""] if skipped else lines


def quality_section(result: Mapping[str, Any]) -> list[str]:
    """Of one result of time_to_quality.py."""
    rows = []
    for name, run in result["runs"].items():
        final = run.get("final") or {}
        cells = [str(run["steps"]), number(run["final_db"], 2), number(final.get("psnr_masked"), 2), number(final.get("iou"), 3)]
        cells += [number(run["total_s"], 0), number(run["level_s"]), number(run.get("final_reached_s"), 0)]
        cells += [number(run.get("ours_reaches_final_s")), number(run.get("ratio")), number(run["peak_memory_mb"], 0)]
        rows.append([f"{name}, {run['precision']}" if run.get("precision") else name, *cells])
    head = ["run", "steps", "final psnr_masked, dB", "of all pixels", "IoU", "total, s", f"s to {number(result['level_db'], 2)} dB"]
    head += ["s to its final psnr", "s until ours has that psnr", "times sooner", "peak MiB"]
    lines = heading(result, "Time to quality") + table(head, rows)
    sentence = f"On {result['sequence']}; the mask hull in its mean colour scores {number(result['reference_db'], 2)} dB."
    if result["better_baseline"]:
        sentence += f" Against the better baseline, {result['better_baseline']}: {number(result['ratio'])} times sooner."
    return [*lines, "", sentence, ""]


PEER_METRICS = ("psnr_masked", "psnr_fg", "psnr_full_image", "depth_abs_fg", "iou", "ssim", "lpips")


def peers_section(result: Mapping[str, Any]) -> list[str]:
    """Of one result of peers.py: a row per model, and below why the others have none."""
    rows, reasons = [], []
    for row in result["rows"]:
        if row["metrics"] is None:
            reasons.append(f"- {row['name']}: {row['reason']}")
            continue
        steps = " + ".join(f"{steps:,}" for steps in row["steps"])
        values = [number(row["metrics"].get(name), 2 if "psnr" in name else 3) for name in PEER_METRICS]
        model = f"{row['name']} (`{row['experiment']}`{''.join(f', {name}' for name in dict.fromkeys(row.get('precision', ())))})"
        rows.append([model, steps, number(row["seconds"] / 60), *values])
    title = f"Peers: {result['minutes']:g} minutes of training each"
    lines = heading(result, title) + table(["model", "steps", "minutes", *PEER_METRICS], rows)
    reference = number(result["reference_db"], 2)
    lines += ["", f"On {result['sequence']}; the mask hull in its mean colour scores psnr_masked {reference} dB.", ""]
    return [*lines, "Without scores:", "", *reasons, ""] if reasons else lines


def mine_render_section(result: Mapping[str, Any]) -> list[str]:
    """Of one result of mine_render.py: a row per number of planes."""
    rows = []
    for row in result["rows"]:
        memory = row.get("peak_memory_mb", {})
        cells = [str(row["planes"]), number(row["ours_s"], 3), number(row["reference_s"], 3), number(row["ratio"]), number(row["bar"], 0)]
        cells += [number(memory.get("ours"), 0), number(memory.get("reference"), 0)]
        cells += [number(row.get("memory_ratio")), number(row.get("memory_bar"), 0)]
        rows.append([*cells, f"{row['difference']['float32']:.1e}"])
    head = ["planes", "ours, s", "theirs, s", "times faster", "bar", "ours, MiB", "theirs, MiB", "times less", "bar", "differ by"]
    title = f"MINE: one target view of {result['width']} x {result['height']}"
    return [*heading(result, title), *table(head, rows), ""]


def mine_learning_table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Of the rows of mine_learning.py: the baselines of each data set, then a line per training and number of planes."""
    lines: list[list[str]] = []
    for name, row in rows.items():
        found = row["baselines"]
        if name in (next(iter(rows)), "cape"):
            where = "cape" if name == "cape" else "unseen rooms"
            lines.append([f"{where}: source as it is", "", number(found["psnr_copy"], 2), "", "", "", ""])
            plane = f"{number(found['psnr_warp'], 2)} ({number(found['psnr_warp_oracle'], 2)})"
            lines.append([f"{where}: one plane, z = {found['warp_depth']:.2f} (oracle)", "", plane, "", "", "", ""])
            if found["abs_rel_constant"] is not None:
                constant = f"{number(found['abs_rel_constant'], 3)} ({number(found['abs_rel_constant_oracle'], 3)})"
                lines.append([f"{where}: one depth, {number(found['constant_depth'], 2)} (oracle)", "", "", "", constant, "", ""])
        training = f"{name}: {row['steps']} steps with {row['trained_planes']} planes"
        for index, (n, scores) in enumerate(row["planes"].items()):
            label, minutes = ("the same weights", "") if index else (training, number(row["minutes"]))
            lines.append([label, n, *mine_scores(scores), minutes])
        if "shuffled" in row:
            lines.append(["the same weights, looks shuffled", str(row["shuffled_planes"]), *mine_scores(row["shuffled"]), ""])
    return table(["", "planes", "PSNR", "PSNR valid", "Abs Rel", "< 1.25", "minutes"], lines)


def mine_scores(scores: Mapping[str, float | None]) -> list[str]:
    digits = {"psnr": 2, "psnr_valid": 2, "abs_rel": 3, "delta_1": 3}
    return [number(scores[name], of) for name, of in digits.items()]


def mine_learning_section(result: Mapping[str, Any]) -> list[str]:
    """Of one result of mine_learning.py: its table, and each bar with what was reached."""
    lines = [*heading(result, f"MINE: learning, {result['scenes']} rooms for training, {result['unseen']} unseen")]
    lines += [*mine_learning_table(result["rows"]), ""]
    for name, bar in result.get("bars", {}).items():
        lines.append(f"- {name}: {bar['value']:.3f}, bar {bar['bar']:g}: {'met' if bar['met'] else 'NOT met'}")
    return [*lines, ""]


SECTIONS = {
    "nerf_step": step_section,
    "vm_step": vm_section,
    "time_to_quality": quality_section,
    "peers": peers_section,
    "mine_render": mine_render_section,
    "mine_learning": mine_learning_section,
}


def figures(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of all results, steps first.

    Raises:
        ValueError: a result of an unknown benchmark.
    """
    unknown = sorted({str(result.get("benchmark")) for result in results} - SECTIONS.keys())
    if unknown:
        raise ValueError(f"results of unknown benchmarks: {', '.join(unknown)}; known are {', '.join(SECTIONS)}")
    ordered = [result for name in SECTIONS for result in results if result["benchmark"] == name]
    lines = [line for result in ordered for line in SECTIONS[result["benchmark"]](result)]
    return "\n".join(lines).strip() if lines else NOTHING


def with_figures(readme: str, text: str) -> str:
    """``readme`` with ``text`` between the marks.

    Raises:
        ValueError: the marks are missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="update README.md instead of printing")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of result files")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md")
    arguments = parser.parse_args(argv)
    text = figures([json.loads(path.read_text()) for path in listed(arguments.results, "*.json")])
    if arguments.write:
        arguments.readme.write_text(with_figures(arguments.readme.read_text(), text))
    else:
        print(text)
    return 0


if __name__ == "__main__":
    run_script(main)
