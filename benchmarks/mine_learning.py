"""Does MINE learn? Unseen generated rooms against baselines that learn nothing; rows for planes and smoothness; real photographs.

    python benchmarks/mine_learning.py --output OUT --json benchmarks/results/mine_learning_cpu.json
    python benchmarks/mine_learning.py --output OUT --rows rooms      # some rows now, the others later; the report takes what is there
    python benchmarks/mine_learning.py --output OUT --toy             # tiny, to try the script

Rows: rooms (the bars are its); n8, n8_unsmoothed, n16 and n32, trained with so many planes for the same, smaller number of steps; and
cape (neighbouring photographs of one CO3D sequence, no bar). Bars are for 16 planes. Every row is a run of launch/train_mine.py under
OUT/mine and goes on where it was interrupted; its scores lie in OUT/<row>.json. A curve and the rooms' picture sheet go beside the result
file; that of cape, which shows photographs that may not be copied, is OUT/cape.png.

Baselines: the source picture as it is; the source warped as one plane; one depth for all pixels. Plane and depth are one value for
all pictures, chosen on the training pairs; "oracle" is the best per picture. PSNR of all of them, and of MINE, is over the pixels
that the warped plane covers.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import co3d_ensemble  # noqa: F401  (before torch, see co3d_ensemble/base/threads.py)

# isort: split
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.common import DEFAULT_ROOT, SUBSET, circumstances, prepare, say
from benchmarks.report import mine_learning_table
from co3d_ensemble.base.quoting import override
from co3d_ensemble.fields.mpi_network import MPINetwork
from co3d_ensemble.files import write_json_atomic
from co3d_ensemble.functional.depth_metrics import depth_metrics
from co3d_ensemble.functional.metrics import psnr_fg, psnr_full_image
from co3d_ensemble.functional.mpi_sampling import fixed_disparities
from co3d_ensemble.mine.assembly import compose_mine, load_trained_mine, run_directory
from co3d_ensemble.mine.baselines import best_single_depths, candidate_depths, constant_depth_errors, warp_scores, warped
from co3d_ensemble.mine.generated import GeneratedPairs
from co3d_ensemble.mine.inference import PlaneStack, predict_stack, render_pose
from co3d_ensemble.mine.pairs import Pair
from co3d_ensemble.mine.protocols import PairTasks, evenly_spread
from co3d_ensemble.mine.run import train_mine
from co3d_ensemble.mine.training_data import open_pairs
from co3d_ensemble.mine.trajectories import Pose
from co3d_ensemble.report.pictures import depth_to_rgb, save_picture, sheet, to_uint8
from co3d_ensemble.scripts import configure_logging, reported, run_script
from co3d_ensemble.training.checkpoint import Checkpoints
from co3d_ensemble.training.records import read_metrics
from co3d_ensemble.training.run_directory import RunDirectory

UNSEEN = 1_000_000  # index of the first unseen scene; training has 0 .., validation 500,000 ..
BASE, CAPE = "rooms", "cape"
PSNR_GAIN, DEPTH_SHARE, SHUFFLE_CHANGE, MINUTES = 2.0, 0.5, 0.2, 30.0  # the bars
CANDIDATES = 60  # single depths that are tried
BASELINE_PAIRS = 200  # training pairs that they are chosen on
SCORED_PLANES = 16  # of the bars and of what is compared
EVALUATED_PLANES = (8, SCORED_PLANES, 32)
MORE_PLANES = (64, 256)  # of the base row: the same weights serve any number
SHOWN = 6
ENLARGED = 2  # times, in the picture sheet
COLUMNS = ("source", "target", "MINE", "one plane", "depth", "true depth")


@dataclass(frozen=True)
class Row:
    """A training and how it is scored."""

    name: str
    n_planes: int  # in training, drawn anew at every step
    overrides: tuple[str, ...] = ()
    planes: tuple[int, ...] = EVALUATED_PLANES


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--rows", help="comma-separated names: only these (the report takes all that are finished)")
    parser.add_argument("--scenes", type=int, default=600, help="training scenes (default: %(default)s)")
    parser.add_argument("--unseen", type=int, default=20, help="unseen scenes (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="of the row with the bars (default: %(default)s)")
    parser.add_argument("--row-steps", type=int, default=600, help="of each of the other rows on generated scenes (default: %(default)s)")
    parser.add_argument("--cape-steps", type=int, default=600, help="(default: %(default)s)")
    parser.add_argument(
        "--root", type=Path, help="CO3Dv2 root of cape (default: ../shared/data/co3d beside the checkout, else no such row)"
    )
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="of every row's run, repeatable")
    parser.add_argument("--toy", action="store_true", help="tiny pictures, few scenes and steps: to try the script")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--machine", help="the machine in words, for the result file")
    parser.add_argument("--json", type=Path, help="result file; pictures go beside it (default: OUTPUT/mine_learning.json)")
    arguments = parser.parse_args(argv)
    if arguments.toy:
        arguments.scenes, arguments.unseen, arguments.steps, arguments.row_steps, arguments.cape_steps = 2, 1, 2, 2, 2
    for name in ("scenes", "unseen", "steps", "row_steps", "cape_steps"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return arguments


def planned_rows(arguments: argparse.Namespace) -> list[Row]:
    """All rows that this machine has the data for."""
    unsmoothed = ("training.loss_weights.loss_smooth_v2_source=null", "training.loss_weights.loss_smooth_v2_target=null")
    rows = [
        Row(BASE, 8, planes=(*EVALUATED_PLANES, *(() if arguments.toy else MORE_PLANES))),
        Row("n8", 8),
        Row("n8_unsmoothed", 8, unsmoothed),
        Row("n16", 16),
        Row("n32", 32),
    ]
    root = arguments.root or DEFAULT_ROOT
    if (root / "category_to_subset_name_list.json").is_file():
        options = ["experiment=mine_co3d", override("data.root", root), f"+data.options.subsets=[cape/{SUBSET}]"]
        options += ["data.height=96", "data.width=96", "model.encoder=resnet18", "model.poolings=0", "data.workers=0"]
        # one sequence, so its unit is the planes' (the object stands at 4); it has neither depth nor points
        options += ["model.near_disparity=0.4", "model.far_disparity=0.02", "data.n_points=0", "training.calibrate_scale=false"]
        options += ["training.mirror=true"]
        options += ["training.loss_weights.loss_disparity_source=null", "training.loss_weights.loss_disparity_target=null"]
        rows.append(Row(CAPE, 16, tuple(options)))
    elif arguments.root is not None:
        raise ValueError(f"--root {root}: there is no category_to_subset_name_list.json in it")
    return rows


def row_config(row: Row, arguments: argparse.Namespace) -> Any:
    """The run of a row; one command line would compose the same."""
    steps = {BASE: arguments.steps, CAPE: arguments.cape_steps}.get(row.name, arguments.row_steps)
    overrides = list(row.overrides)
    if row.name != CAPE:
        overrides += ["experiment=mine_generated", f"data.train_options.n_scenes={arguments.scenes}"]
    if arguments.toy:
        overrides += ["data.height=32", "data.width=32", "data.max_val_pairs=2", "training.log_every=1", "training.validate_every=0.5"]
    overrides += [f"model.n_planes={row.n_planes}", f"training.max_steps={steps}", "training.epochs=null"]
    overrides += [override("output_dir", arguments.output), f"name={row.name}", f"device={arguments.device}", *arguments.override]
    return compose_mine(overrides)


def unseen_pairs(row: Row, config: Any, arguments: argparse.Namespace, *, shuffle: bool = False) -> Dataset[Pair]:
    """Pairs that neither training nor the choice of the checkpoint has seen; of cape, its validation frames, which chose it."""
    if row.name == CAPE:
        return open_pairs(config)[1]
    size = {"height": config.data.height, "width": config.data.width, "n_points": 0}
    return GeneratedPairs(arguments.unseen, first_scene=UNSEEN, random_target=False, shuffle_looks=shuffle, **size)


def items(pairs: Dataset[Pair], limit: int | None = None) -> Iterator[Pair]:
    """Pairs, drawn alike whenever they are asked for."""
    tasks = PairTasks(pairs, row="pairs")
    for index in evenly_spread(len(tasks), limit):
        yield tasks[index].pairs[0][1]


def baselines(config: Any, train: Dataset[Pair], unseen: Dataset[Pair]) -> dict[str, Any]:
    """Single depths of the training pairs, and their scores on the unseen ones."""
    candidates = candidate_depths(1 / config.model.near_disparity, 1 / config.model.far_disparity, CANDIDATES)
    chosen = best_single_depths(items(train, BASELINE_PAIRS), candidates)
    scores: dict[str, list[float]] = {name: [] for name in ("copy", "warp", "warp_oracle", "constant", "constant_oracle", "valid")}
    for pair in items(unseen):
        rgb, valid = warped(pair, [chosen.warp])
        if not valid.any():
            continue  # and in `learned` as well
        mask = valid[0].float()
        scores["copy"].append(psnr_fg(pair.source, pair.target, mask).item())
        scores["warp"].append(psnr_fg(rgb[0], pair.target, mask).item())
        scores["warp_oracle"].append(max(warp_scores(pair, candidates)))
        scores["valid"].append(mask.mean().item())
        if pair.source_depth is not None and chosen.constant is not None and (pair.source_depth > 0).any():
            constant = torch.full_like(pair.source_depth, chosen.constant)
            scores["constant"].append(depth_metrics(constant, pair.source_depth, align="none")["abs_rel"])
            scores["constant_oracle"].append(min(constant_depth_errors(pair.source_depth, candidates)))
    return {
        "warp_depth": chosen.warp,
        "constant_depth": chosen.constant,
        "psnr_copy": mean(scores["copy"]),
        "psnr_warp": mean(scores["warp"]),
        "psnr_warp_oracle": mean(scores["warp_oracle"]),
        "abs_rel_constant": mean(scores["constant"]),
        "abs_rel_constant_oracle": mean(scores["constant_oracle"]),
        "valid_share": mean(scores["valid"]),
        "pairs": len(scores["copy"]),
    }


def mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


@torch.no_grad()
def predicted(network: MPINetwork, config: Any, pair: Pair, n_planes: int) -> tuple[PlaneStack, Tensor, Tensor]:
    """The planes of a pair's source, and colour (3, H, W) and valid pixels (1, H, W) of its target."""
    model = config.model
    disparity = fixed_disparities(n_planes, model.near_disparity, model.far_disparity, batch=1)[0]
    stack = predict_stack(network, pair.source, pair.K_source, disparity, blend=model.blend_source)
    size = (pair.target.shape[-2], pair.target.shape[-1])
    view = render_pose(stack, Pose(pair.R, pair.t), K=pair.K_target, size=size)
    return stack, view.rgb[0].clamp(0, 1), view.valid[0]


@torch.no_grad()
def learned(network: MPINetwork, config: Any, unseen: Dataset[Pair], n_planes: int, warp_depth: float) -> dict[str, Any]:
    """Mean scores of the unseen pairs; ``psnr`` is over the pixels that the baseline's warp covers, as the baselines' is."""
    scores: dict[str, list[float]] = {name: [] for name in ("psnr", "psnr_valid", "psnr_whole", "abs_rel", "delta_1")}
    for pair in items(unseen):
        mask = warped(pair, [warp_depth])[1][0].float()
        if not mask.any():
            continue
        stack, rgb, valid = predicted(network, config, pair, n_planes)
        scores["psnr"].append(psnr_fg(rgb, pair.target, mask).item())
        scores["psnr_valid"].append(psnr_fg(rgb, pair.target, valid.float()).item())
        scores["psnr_whole"].append(psnr_full_image(rgb, pair.target).item())
        if pair.source_depth is not None and (pair.source_depth > 0).any():
            depth = stack.view.disparity[0].clamp_min(stack.disparity[-1]).reciprocal()
            found = depth_metrics(depth, pair.source_depth, align="none")
            for name in ("abs_rel", "delta_1"):
                scores[name].append(found[name])
    return {name: mean(values) for name, values in scores.items()}


def evaluated(row: Row, config: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """All scores of a finished run, from ``OUT/<row>.json`` where they were computed from the same checkpoint."""
    run = RunDirectory(run_directory(config))
    best = Checkpoints(run.checkpoints).best
    stamp = {"modified_ns": best.stat().st_mtime_ns, "unseen": arguments.unseen, "planes": list(row.planes)}
    path = arguments.output / f"{row.name}.json"
    if path.exists():
        known = json.loads(path.read_text())
        if known["stamp"] == stamp:
            return known
    network, stored = load_trained_mine(run.path)
    unseen, train = unseen_pairs(row, stored, arguments), open_pairs(stored)[0]
    found = baselines(stored, train, unseen)
    scores = {str(n): learned(network, stored, unseen, n, found["warp_depth"]) for n in row.planes}
    result: dict[str, Any] = {"stamp": stamp, "trained_planes": row.n_planes, "baselines": found, "planes": scores}
    if row.name == BASE:
        shuffled = unseen_pairs(row, stored, arguments, shuffle=True)
        result["shuffled_planes"] = SCORED_PLANES
        result["shuffled"] = learned(network, stored, shuffled, SCORED_PLANES, found["warp_depth"])
    ended = json.loads(run.results_path.read_text())
    validations = [{"step": record["step"], **record["metrics"]} for record in read_metrics(run.metrics_path, "validation")]
    result |= {"minutes": ended["seconds"] / 60, "steps": ended["steps"], "best_step": ended["best_step"], "validations": validations}
    write_json_atomic(path, result)
    if row.name in (BASE, CAPE):
        picture_sheet(network, stored, unseen, row, found["warp_depth"], arguments.output / f"{row.name}.png")
    return result


def picture_sheet(network: MPINetwork, config: Any, unseen: Dataset[Pair], row: Row, warp_depth: float, path: Path) -> None:
    strips = []
    for pair in items(unseen, SHOWN):
        stack, rgb, valid = predicted(network, config, pair, SCORED_PLANES)
        plane, covered = warped(pair, [warp_depth])
        mask = covered[0].float()
        cells = [to_uint8(picture) for picture in (pair.source, pair.target, rgb, plane[0])]
        depths = [stack.view.depth[0], *(() if pair.source_depth is None else (pair.source_depth,))]
        cells += depth_to_rgb(torch.cat(depths, dim=2)).chunk(len(depths), dim=2)  # in the same colours
        cells = [cell.repeat_interleave(ENLARGED, 1).repeat_interleave(ENLARGED, 2) for cell in cells]
        own, theirs = psnr_fg(rgb, pair.target, mask).item(), psnr_fg(plane[0], pair.target, mask).item()
        strips.append((f"{pair.name}   MINE {own:.1f} dB, one plane {theirs:.1f} dB", cells))
    save_picture(path, sheet(COLUMNS[: len(strips[0][1])], strips))


def judged(base: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The bars: value, what it must reach, and whether it does."""
    found, own = base["baselines"], base["planes"][str(SCORED_PLANES)]
    gain = own["psnr"] - max(found["psnr_copy"], found["psnr_warp"])
    share = own["abs_rel"] / found["abs_rel_constant"]
    change = abs(base["shuffled"]["abs_rel"] / own["abs_rel"] - 1)
    values = {
        "psnr_gain_db": (gain, PSNR_GAIN, gain >= PSNR_GAIN),
        "abs_rel_over_best_constant": (share, DEPTH_SHARE, share <= DEPTH_SHARE),
        "abs_rel_change_by_shuffled_looks": (change, SHUFFLE_CHANGE, change < SHUFFLE_CHANGE),
        "minutes": (base["minutes"], MINUTES, base["minutes"] <= MINUTES),
    }
    return {name: {"value": value, "bar": bar, "met": met} for name, (value, bar, met) in values.items()}


def curve(results: dict[str, dict[str, Any]], path: Path) -> None:
    """PSNR and Abs Rel of the validation scenes over the steps, a line per row; dashed: the best that learns nothing."""
    figure = Figure(figsize=(9, 4), dpi=110, layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, metric, label in zip(axes, ("psnr_valid", "abs_rel"), ("PSNR, dB (pixels that two planes cover)", "Abs Rel")):
        for name, result in results.items():
            points = [(record["step"], record[metric]) for record in result["validations"] if record.get(metric) is not None]
            if points and name != CAPE:
                axis.plot(*zip(*points), marker=".", label=name)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    found = next(iter(results.values()))["baselines"]
    axes[0].axhline(max(found["psnr_copy"], found["psnr_warp"]), color="0.4", linestyle="--", label="one plane (unseen scenes)")
    if found["abs_rel_constant"] is not None:
        axes[1].axhline(found["abs_rel_constant"], color="0.4", linestyle="--", label="one depth (unseen scenes)")
    for axis in axes:
        axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    configure_logging()
    return reported(lambda: benchmark(arguments, argv))


def benchmark(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    device = prepare(arguments.device, arguments.threads)
    rows = planned_rows(arguments)
    names = [row.name for row in rows]
    wanted = names if arguments.rows is None else arguments.rows.split(",")
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        raise ValueError(f"--rows {unknown[0]}: there are {', '.join(names)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    for row in rows:
        config = row_config(row, arguments)
        if row.name in wanted:
            say(f"row {row.name}")
            status = train_mine(config).exit_status
            if status:
                return status
        elif not RunDirectory(run_directory(config)).results_path.exists():
            continue
        results[row.name] = evaluated(row, config, arguments)
    path = arguments.json or arguments.output / "mine_learning.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {**circumstances("mine_learning", argv, device, arguments.machine), "scenes": arguments.scenes}
    report |= {"unseen": arguments.unseen, "rows": {name: {k: v for k, v in row.items() if k != "stamp"} for name, row in results.items()}}
    print("\n".join(mine_learning_table(results)))
    if BASE in results:
        report["bars"] = judged(results[BASE])
        for name, bar in report["bars"].items():
            print(f"{name}: {bar['value']:.3f}, bar {bar['bar']:g}: {'met' if bar['met'] else 'NOT met'}")
    write_json_atomic(path, report)
    trained = {name: row for name, row in results.items() if name != CAPE}
    if trained:
        curve(trained, path.with_suffix(".png"))
    if BASE in results:  # that of cape shows photographs, whose licence keeps them where they are: it stays in OUT
        path.with_name(f"{path.stem}_{BASE}.png").write_bytes((arguments.output / f"{BASE}.png").read_bytes())
    return 0


if __name__ == "__main__":
    run_script(main)
