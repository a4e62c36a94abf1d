"""NeRF, TensoRF, the ensemble and the Implicitron models of the challenge's table at equal wall-clock, on one sequence.

    python benchmarks/peers.py --output outputs/peers --minutes 10
    python benchmarks/peers.py --output outputs/peers --minutes 10 --rows nerf,implicitron_srn   # a part; the table takes all that is there
    python benchmarks/peers.py --output outputs/peers_cuda --minutes 60 --sizes full --device cuda

A row is an experiment, trained with launch/train_sequence.py for the same time (training.budget_minutes, one validation frame at
the end included); an ensemble's members share it equally. Each row has its own folder under --output, where an interrupted row
goes on and a finished one is only read. Scores are those of the target frames in each row's results.json, by the same code.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import co3d_ensemble  # noqa: F401  (before torch, see co3d_ensemble/base/threads.py)

# isort: split
import torch
from hydra.errors import HydraException

from benchmarks.common import SUBSET, circumstances, experiment, find_sequence, prepare
from benchmarks.report import peers_section
from benchmarks.time_to_quality import hull_reference, load_targets
from co3d_ensemble.assembly import CONFIG_DIR, compose_experiment, load_scene
from co3d_ensemble.base.quoting import override
from co3d_ensemble.base.signals import EXIT_INTERRUPTED, EXIT_PREEMPTED
from co3d_ensemble.composition import compose_ensemble, is_ensemble
from co3d_ensemble.files import write_json_atomic
from co3d_ensemble.scripts import configure_logging, first_line, reported, run_script
from co3d_ensemble.training.precision import used_precision
from co3d_ensemble.training.run_directory import RunDirectory
from launch import train_sequence

# name of a row and of its experiment at full size; the laptop preset is <experiment>_laptop
ROWS = (
    "nerf",
    "tensorf",
    "ensemble",
    "implicitron_nerf",
    "implicitron_nerf_wce",
    "implicitron_nerformer",
    "implicitron_srn",
    "implicitron_srn_wce",
    "implicitron_srn_noharm",
    "implicitron_srn_wce_noharm",
    "implicitron_idr",
)
# validations are on the clock, and a view of some peers takes as long as a hundred steps: one frame, at the end
COMMON = ("training.validate_every=1.0", "training.early_stopping_patience=null", "data.max_val_frames=1", "training.progress=false")
PLAN = "plan.json"
GENERATED = "generated"  # the plan's word for a sequence that lies in the folder itself


@dataclass(frozen=True)
class Row:
    """
    Attributes:
        experiment: a file of ``configs/experiment``.
        overrides: all of its Hydra overrides.
        folder: where its ``results.json`` will be.
        member_folders: of the runs that are trained for it, its own or its members'.
    """

    name: str
    experiment: str
    overrides: tuple[str, ...]
    folder: Path
    member_folders: tuple[Path, ...]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the rows' runs")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training per row (default: %(default)s)")
    parser.add_argument("--rows", help=f"comma-separated: train only these of {', '.join(ROWS)}")
    parser.add_argument("--sizes", choices=("laptop", "full"), default="laptop", help="which presets (default: %(default)s)")
    parser.add_argument("--dataset-root", type=Path, help="CO3Dv2 root (default: ../shared/data/co3d beside the checkout, else generated)")
    parser.add_argument("--category", default="cape")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="of every row, repeatable")
    parser.add_argument("--override-row", action="append", default=[], metavar="ROW:KEY=VALUE", help="of one row, repeatable")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--machine", help="the machine in words, for the result file")
    parser.add_argument("--json", type=Path, help="result file (default: OUTPUT/peers.json)")
    parser.add_argument("--markdown", type=Path, help="the table as a file (default: OUTPUT/peers.md)")
    arguments = parser.parse_args(argv)
    if not arguments.minutes > 0:
        parser.error("--minutes must be positive")
    named = [("--rows", name) for name in (arguments.rows or "").split(",")]
    named += [("--override-row", entry.partition(":")[0]) for entry in arguments.override_row]
    for option, name in named:
        if name and name not in ROWS:
            parser.error(f"{option} {name}: expected some of {', '.join(ROWS)}")
    if any("=" not in entry.partition(":")[2] for entry in arguments.override_row):
        parser.error("--override-row takes ROW:KEY=VALUE")
    return arguments


def planned_row(name: str, arguments: argparse.Namespace, *, root: Path, category: str, device: torch.device) -> Row:
    """
    Raises:
        ValueError, hydra.errors.HydraException: there is no such experiment, or an override does not fit it.
    """
    chosen = name if arguments.sizes == "full" else f"{name}_laptop"
    if not (CONFIG_DIR / "experiment" / f"{chosen}.yaml").is_file():
        raise ValueError(f"there is no experiment {chosen}")
    output = arguments.output / name
    where = {"dataset_root": root, "category": category, "subset_name": SUBSET, "output_dir": output}
    place = (f"experiment={chosen}", *(override(key, value) for key, value in where.items()))
    own = [entry.partition(":")[2] for entry in arguments.override_row if entry.partition(":")[0] == name]
    overrides = [*place, f"device={device}", *COMMON, *arguments.override, *own]
    runs = output / category / SUBSET
    if is_ensemble(overrides):
        config, members = compose_ensemble(overrides)
        overrides.append(f"training.budget_minutes={arguments.minutes / len(members)}")
        return Row(name, chosen, tuple(overrides), runs / config.name, tuple(runs / member for member in members))
    folder = runs / compose_experiment(overrides).member
    return Row(name, chosen, (*overrides, f"training.budget_minutes={arguments.minutes}"), folder, (folder,))


def scored(row: Row) -> dict[str, Any]:
    """The entry of a finished row: its scores, and what the runs trained for it took together."""
    results = json.loads((row.folder / "results.json").read_text())
    runs = [json.loads((folder / "results.json").read_text()) for folder in row.member_folders]
    return {
        "name": row.name,
        "experiment": row.experiment,
        "metrics": results["metrics"],
        "precision": [used_precision(RunDirectory(folder).config) for folder in row.member_folders],
        "steps": [run["steps"] for run in runs],
        "seconds": sum(run["seconds"] for run in runs),
        "reason": None,
    }


def without_scores(name: str, reason: str) -> dict[str, Any]:
    return {"name": name, "experiment": None, "metrics": None, "precision": [], "steps": [], "seconds": None, "reason": reason}


def hold_to_plan(arguments: argparse.Namespace, device: torch.device, root: Path, category: str) -> None:
    """Writes down what every row of the folder has in common; ``training.budget_minutes`` of a run that began is not looked at again.

    A sequence that was generated in the folder moves with it. What an older plan does not say is taken to be the same.

    Raises:
        ValueError: the folder was begun with other settings, naming them.
    """
    plan = {
        "minutes": arguments.minutes,
        "sizes": arguments.sizes,
        "data": GENERATED if root.resolve().is_relative_to(arguments.output.resolve()) else str(root.resolve()),
        "category": category,
        "subset_name": SUBSET,
        "device": device.type,
        "override": arguments.override,
        "override_row": sorted(arguments.override_row),
    }
    path = arguments.output / PLAN
    begun = json.loads(path.read_text()) if path.exists() else plan
    differing = [f"{key}={begun.get(key)!r}" for key in plan if begun.get(key, plan[key]) != plan[key]]
    if differing:
        raise ValueError(f"{arguments.output} was begun with {', '.join(differing)}: use another --output or remove it")
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, plan)


def train_rows(rows: Mapping[str, Row], chosen: Sequence[str]) -> tuple[int, dict[str, str]]:
    """Trains the chosen rows that are not finished.

    Returns:
        Exit status of an interruption, else 0, and why a row failed by its name.
    """
    failed = {}
    for name in chosen:
        if name not in rows:
            continue
        print(f"{name}: {rows[name].experiment}", flush=True)
        status = train_sequence.main(list(rows[name].overrides))
        if status in (EXIT_INTERRUPTED, EXIT_PREEMPTED):
            return status, failed
        if status:
            failed[name] = f"training ended with exit code {status}; the message is above the table"
    return 0, failed


def benchmark(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    device = prepare(arguments.device, arguments.threads)
    root, category = find_sequence(arguments.dataset_root, arguments.category, arguments.output)
    hold_to_plan(arguments, device, root, category)
    rows, missing = {}, {}
    for name in ROWS:
        try:
            rows[name] = planned_row(name, arguments, root=root, category=category, device=device)
        except (HydraException, ValueError) as error:
            missing[name] = first_line(error)
    status, failed = train_rows(rows, arguments.rows.split(",") if arguments.rows else ROWS)
    if status:
        print("interrupted: the same command goes on", file=sys.stderr)
        return status
    missing |= failed
    entries = []
    for name in ROWS:
        if name in missing:
            entries.append(without_scores(name, missing[name]))
        elif (rows[name].folder / "results.json").exists():
            entries.append(scored(rows[name]))
        else:
            entries.append(without_scores(name, "not trained yet"))
    shown = "nerf" if arguments.sizes == "full" else "nerf_laptop"
    settings = experiment((f"experiment={shown}", *arguments.override), root=root, category=category, device=device)
    scene = load_scene(settings)
    targets = load_targets(settings, scene)
    side = settings.data.longest_side
    size = "at their full size" if side is None else f"of at most {side} px"
    result = {
        **circumstances("peers", argv, device, arguments.machine),
        "sequence": f"{category}/{SUBSET}, {len(scene.train)} frames and {len(targets)} targets {size}",
        "minutes": arguments.minutes,
        "sizes": arguments.sizes,
        "reference_db": hull_reference(scene, targets),
        "rows": entries,
    }
    write_json_atomic(arguments.json or arguments.output / "peers.json", result)
    text = "\n".join(peers_section(result))
    (arguments.markdown or arguments.output / "peers.md").write_text(text)
    print(text)
    return 1 if failed else 0


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    configure_logging()
    return reported(lambda: benchmark(arguments, argv))


if __name__ == "__main__":
    run_script(main)
