"""psnr_masked of the targets over training time: ours, Implicitron's NeRF as published, and at our sizes.

    python benchmarks/time_to_quality.py --output OUT --json out.json
    python benchmarks/time_to_quality.py --output OUT --cells ours,implicitron_published   # some now, the others later
    python benchmarks/time_to_quality.py --output OUT --device cuda --stride 1

Every run is a cell with its own folder under --output and goes on where it was interrupted; a finished cell is not run
again. The clock counts training steps only. A cell's max_steps is fixed before it starts, from its budget and the
measured speed or by --steps-..., because every schedule scales with it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import co3d_ensemble  # noqa: F401  (before torch, see co3d_ensemble/base/threads.py)

# isort: split
import torch
from omegaconf import DictConfig

from benchmarks.cells import Cell, CellRun, run_cell
from benchmarks.common import MLPS, SUBSET, circumstances, crossing, experiment, find_sequence, implicitron_samples, prepare, say
from co3d_ensemble.assembly import Scene, load_scene
from co3d_ensemble.base.precision import PRECISION_CHOICES
from co3d_ensemble.fields.occupancy import OccupancyGrid
from co3d_ensemble.files import write_json_atomic
from co3d_ensemble.functional.cameras import intersect_box, pixel_centers, pixel_rays
from co3d_ensemble.functional.metrics import psnr_masked
from co3d_ensemble.functional.types import Frame
from co3d_ensemble.plugin.frames import load_frames
from co3d_ensemble.scripts import configure_logging, reported, run_script

ABOVE_REFERENCE = 2.0  # dB over the hull in its mean colour: what a baseline must exceed to count as trained
HULL_SAMPLES = 512  # per ray, for the silhouette of the hull


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the cells")
    parser.add_argument("--dataset-root", type=Path, help="CO3Dv2 root (default: ../shared/data/co3d beside the checkout, else generated)")
    parser.add_argument("--category", default="cape")
    parser.add_argument("--longest-side", type=int, default=200, help="of the photographs, pixels (default: %(default)s)")
    parser.add_argument("--minutes-ours", type=float, default=15.0, help="(default: %(default)s)")
    parser.add_argument("--minutes-theirs", type=float, default=30.0, help="per learning rate (default: %(default)s)")
    parser.add_argument("--minutes-published", type=float, default=120.0, help="(default: %(default)s)")
    for side in ("ours", "theirs", "published"):
        parser.add_argument(f"--steps-{side}", type=int, metavar="N", help=f"fix max_steps, whatever --minutes-{side} says")
    parser.add_argument("--learning-rates", default="5e-4,1e-3,2e-3", help="of the baseline at our sizes (default: %(default)s)")
    parser.add_argument("--evaluations-ours", type=int, default=20, help="points on our curve (default: %(default)s)")
    parser.add_argument("--evaluations-theirs", type=int, default=10, help="points on each baseline's curve (default: %(default)s)")
    parser.add_argument("--stride", type=int, default=2, help="the curves score every n-th row and column; 1: all (default: %(default)s)")
    parser.add_argument("--full-final", action=argparse.BooleanOptionalAction, default=True, help="score all pixels at the end")
    parser.add_argument("--cells", help="comma-separated names: run only these (the report takes all that are finished)")
    parser.add_argument(
        "--theirs-precision",
        choices=PRECISION_CHOICES,
        default="float32",
        help="bfloat16 lends the baselines autocast, which they do not have: faster than their own where the device multiplies it "
        "natively, and there auto does so, too (default: %(default)s)",
    )
    parser.add_argument("--override-ours", action="append", default=[], metavar="KEY=VALUE", help="Hydra override, repeatable")
    parser.add_argument("--toy", action="store_true", help="tiny MLPs and few samples: to try the script")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--machine", help="the machine in words, for the result file")
    parser.add_argument("--json", type=Path, help="result file; the plot goes beside it (default: OUTPUT/time_to_quality.json)")
    arguments = parser.parse_args(argv)
    if arguments.stride < 1:
        parser.error("--stride must be at least 1")
    for side in ("ours", "theirs", "published"):
        if (getattr(arguments, f"steps_{side}") or 1) < 1:
            parser.error(f"--steps-{side} must be at least 1")
    return arguments


def planned_cells(arguments: argparse.Namespace) -> list[Cell]:
    """Ours, Implicitron's as published, and Implicitron's with nerf_laptop's MLP, rays and samples per learning rate."""
    common = (f"data.longest_side={arguments.longest_side}",)
    small_ours: tuple[str, ...] = ()
    small_theirs: tuple[str, ...] = (f"model.implicitron.precision={arguments.theirs_precision}",)
    if arguments.toy:
        small_ours = (*MLPS["toy"].ours(), "training.n_rays=64", "model.occupancy.resolution=16")
        small_ours += ("model.renderer.n_pts_per_ray_coarse=8", "model.renderer.n_pts_per_ray_fine=8")
        small_theirs += (*MLPS["toy"].implicitron(), *implicitron_samples(8, 8), "training.n_rays=64")
    ours = ("experiment=nerf_laptop", *common, *small_ours, *arguments.override_ours)
    preset = experiment(ours, root=Path("unused"), category="unused", device=torch.device("cpu"))
    renderer, rays = preset.model.renderer, preset.training.n_rays
    same = implicitron_samples(renderer.n_pts_per_ray_coarse, renderer.n_pts_per_ray_fine)
    theirs = ("experiment=implicitron_nerf_laptop", *common, *same, *small_theirs, f"training.n_rays={rays}")
    cells = [
        Cell("ours", ours, arguments.minutes_ours, arguments.evaluations_ours, arguments.steps_ours),
        Cell(
            "implicitron_published",
            ("experiment=implicitron_nerf", *common, *small_theirs),
            arguments.minutes_published,
            arguments.evaluations_theirs,
            arguments.steps_published,
        ),
    ]
    for rate in arguments.learning_rates.split(","):
        overrides = (*theirs, f"training.lr={float(rate)}")
        name = f"implicitron_laptop_lr{float(rate):g}"
        cells.append(Cell(name, overrides, arguments.minutes_theirs, arguments.evaluations_theirs, arguments.steps_theirs))
    return cells


def load_targets(config: DictConfig, scene: Scene) -> list[Frame]:
    """The targets with ground truth, at the run's resolution."""
    subset = scene.subset
    keys = [record.key for record in subset.targets if subset.scorable is None or record.key in subset.scorable]
    if not keys:
        raise ValueError(f"{config.category}/{config.subset_name}: no target has ground truth, so there is no quality to time")
    return load_frames(config.dataset_root, config.category, config.subset_name, keys, longest_side=config.data.longest_side)


def mean_foreground(frames: Sequence[Frame]) -> torch.Tensor:
    """Mean colour of the pixels in the masks, (3,), in [0, 1]."""
    pixels = torch.cat([frame.rgb[:, frame.mask[0] > 127] for frame in frames], dim=1)
    return pixels.double().mean(dim=1).float() / 255


def hull_reference(scene: Scene, targets: Sequence[Frame]) -> float:
    """Mean psnr_masked of the hull's silhouette at the targets, filled with the training frames' mean foreground colour."""
    colour = mean_foreground(scene.train)
    grid = OccupancyGrid(scene.box, scene.hull)
    shares = (torch.arange(HULL_SAMPLES) + 0.5) / HULL_SAMPLES
    scores = []
    for frame in targets:
        camera = frame.camera
        hits = []
        origins, directions = pixel_rays(camera, pixel_centers(camera.height, camera.width))
        for origin, direction in zip(origins.split(16_384), directions.split(16_384), strict=True):
            near, far = intersect_box(origin, direction, scene.box)
            lengths = near[:, None] + shares * (far - near)[:, None]
            hits.append((grid.along_rays(origin, direction, lengths) & (far > near)[:, None]).any(dim=1))
        silhouette = torch.cat(hits).reshape(1, camera.height, camera.width)
        picture = silhouette * colour[:, None, None]
        scores.append(float(psnr_masked(picture, frame.rgb.float() / 255, frame.mask.float() / 255)))
    return sum(scores) / len(scores)


def summarise(results: Mapping[str, Mapping[str, Any]], reference: float) -> dict[str, Any]:
    """When each cell reaches reference + 2 dB, and when ours reaches each baseline's final psnr_masked.

    ``ratio`` is that of the better baseline (higher final psnr): its own first time at that level over ours. None where
    ours, or a baseline, is missing or never got there.

    Args:
        results: of finished cells by name, as ``run_cell`` returns them.
        reference: psnr_masked of the hull in its mean colour, dB.
    """
    level = reference + ABOVE_REFERENCE
    curves = {name: ([p["seconds"] for p in r["points"]], [p["psnr_masked"] for p in r["points"]]) for name, r in results.items()}
    rows = {}
    for name, result in results.items():
        seconds, values = curves[name]
        rows[name] = {
            "final_db": values[-1],
            "total_s": result["seconds"],
            "level_s": crossing(seconds, values, level),
            "exceeds_level": values[-1] > level,
            "steps": result["max_steps"],
            "precision": result.get("precision"),  # cells of before say nothing
            "peak_memory_mb": result["peak_memory_mb"],
            "final": result["final"],
        }
        if name != "ours":
            reached = crossing(seconds, values, values[-1])
            ours = crossing(*curves["ours"], values[-1]) if "ours" in curves else None
            rows[name] |= {"final_reached_s": reached, "ours_reaches_final_s": ours, "ratio": _ratio(reached, ours)}
            if "ours" in curves:
                rows[name]["ratio_at_level"] = _ratio(rows[name]["level_s"], crossing(*curves["ours"], level))
    baselines = [name for name in rows if name != "ours"]
    better = max(baselines, key=lambda name: rows[name]["final_db"], default=None)
    return {
        "reference_db": reference,
        "level_db": level,
        "better_baseline": better,
        "ratio": rows[better]["ratio"] if better else None,
        "ratio_at_level": rows[better].get("ratio_at_level") if better else None,
        "runs": rows,
        "curves": {name: [[*point] for point in zip(*curve, strict=True)] for name, curve in curves.items()},
    }


def _ratio(theirs: float | None, ours: float | None) -> float | None:
    return None if theirs is None or ours is None else theirs / ours


def plot(result: Mapping[str, Any], path: Path) -> None:
    """psnr_masked over seconds of training, logarithmic time, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, curve in result["curves"].items():
        axes.plot(*zip(*curve, strict=True), marker="o", markersize=3, linewidth=2.5 if name == "ours" else 1.2, label=name)
    axes.axhline(result["reference_db"], color="grey", linestyle=":", label="hull in its mean colour")
    axes.axhline(result["level_db"], color="grey", linestyle="--", label=f"+ {ABOVE_REFERENCE:g} dB")
    axes.set(xscale="log", xlabel="seconds of training", ylabel="psnr_masked of the targets [dB]", title=result["machine"])
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def print_table(result: Mapping[str, Any]) -> None:
    def shown(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    print(f"\n{result['sequence']}; hull in its mean colour {result['reference_db']:.2f} dB, {result['machine']}")
    print(f"{'':28}{'final dB':>10}{'total s':>10}{'s to +2 dB':>12}{'s to final':>12}{'ours s':>10}{'ratio':>8}{'peak MiB':>10}")
    for name, row in result["runs"].items():
        cells = [shown(row["final_db"], 2), shown(row["total_s"]), shown(row["level_s"]), shown(row.get("final_reached_s"))]
        cells += [shown(row.get("ours_reaches_final_s")), shown(row.get("ratio")), shown(row["peak_memory_mb"], 0)]
        print(f"{name:28}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, (10, 10, 12, 12, 10, 8, 10), strict=True)))
    print(f"against the better baseline ({result['better_baseline']}): {shown(result['ratio'])} times sooner")


def benchmark(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    device = prepare(arguments.device, arguments.threads)
    root, category = find_sequence(arguments.dataset_root, arguments.category, arguments.output)
    cells = planned_cells(arguments)
    names = [cell.name for cell in cells]
    chosen = arguments.cells.split(",") if arguments.cells else names
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        raise ValueError(f"--cells {', '.join(unknown)}: expected some of {', '.join(names)}")
    place: dict[str, Any] = {"root": root, "category": category, "device": device}
    configs = [experiment(cell.overrides, **place, stored=CellRun.begun_with(arguments.output / cell.name)) for cell in cells]
    runs = [
        CellRun(arguments.output / cell.name, cell, config, stride=arguments.stride) for cell, config in zip(cells, configs, strict=True)
    ]
    say(f"loading {category}, carving its hull; then {', '.join(chosen)}")
    scene = load_scene(configs[0])  # the experiments share data, bounds and the grid's resolution
    targets = load_targets(configs[0], scene)
    results = {}
    for run in runs:
        if run.cell.name in chosen:
            say(f"cell {run.cell.name}")
            results[run.cell.name] = run_cell(run, scene, targets, device, stride=arguments.stride, full_final=arguments.full_final)
        elif run.result is not None:
            results[run.cell.name] = run.result
    reference = hull_reference(scene, [frame.strided(arguments.stride) for frame in targets])
    result = {
        **circumstances("time_to_quality", argv, device, arguments.machine),
        "sequence": f"{category}/{SUBSET}, {len(scene.train)} frames and {len(targets)} targets of at most {arguments.longest_side} px",
        "stride": arguments.stride,
        **summarise(results, reference),
    }
    path = arguments.json or arguments.output / "time_to_quality.json"
    write_json_atomic(path, result)
    plot(result, path.with_suffix(".png"))
    print_table(result)
    return 0


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    configure_logging()
    return reported(lambda: benchmark(arguments, argv))


if __name__ == "__main__":
    run_script(main)
