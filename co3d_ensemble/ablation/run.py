"""The ablation itself: generated sequences, the jobs of what is missing, and the report of what is there."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from co3d_ensemble.ablation.cells import GENERATED_SUBSET, Cell, Plan
from co3d_ensemble.ablation.jobs import Job, run_jobs
from co3d_ensemble.ablation.results import Results, no_difference
from co3d_ensemble.ablation.rows import rows_named
from co3d_ensemble.ablation.settings import AblationConfig
from co3d_ensemble.assembly import CONFIG_DIR
from co3d_ensemble.base.machine import processor_name
from co3d_ensemble.base.precision import bfloat16_words, settled_precision
from co3d_ensemble.base.progress import Progress
from co3d_ensemble.base.quoting import DEVICE
from co3d_ensemble.data.synthetic import SyntheticConfig, generate_dataset
from co3d_ensemble.files import write_json_atomic
from co3d_ensemble.rendering import resolve_device
from co3d_ensemble.training.lock import FolderLock

logger = logging.getLogger(__name__)

REPOSITORY = CONFIG_DIR.parent
SECONDS_BETWEEN_REPORTS = 120.0


def ablate(settings: AblationConfig, command: Sequence[str] = ()) -> int:
    """Runs what is not finished and writes the report; the same call goes on after any interruption.

    Args:
        command: as typed, for the report.

    Returns:
        Exit status: 0, 1 where a cell failed (all others are done), or that of the signal that stopped it.

    Raises:
        ValueError: settings that cannot be run; RunDirectoryBusy: another ablation runs in the folder.
    """
    output = Path(settings.output_dir)
    plan = Plan(settings, rows_named(settings.row_names))
    output.mkdir(parents=True, exist_ok=True)
    with FolderLock(output):
        generate_missing(settings, output / "generated")
        ablation = _Ablation(plan, describe(settings, command))
        trained = {cell.name for cell in plan.cells}  # the other jobs fuse
        left = sum(not ablation.results.has_ended(cell) for cell in plan.cells)
        logger.info("%d cells, %d of them to train", len(plan.cells), left)
        for row in plan.rows:
            if why := no_difference(row, plan.rows):
                logger.warning("%s: %s", row.name, why)
        status = 0
        if not settings.report_only:
            path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
            with Progress("ablation", left, "cells trained") as shown:

                def ended(job: Job) -> None:
                    shown.advance(job.name in trained)
                    ablation.report_now_and_then()

                outcome = run_jobs(
                    ablation.pending,
                    devices=[settings.devices[i % len(settings.devices)] for i in range(settings.jobs)],
                    threads=settings.threads_per_job,
                    environment={**os.environ, "PYTHONPATH": path},
                    ended=ended,
                )
            ablation.results.failures |= outcome.failures
            status = outcome.status
        ablation.report()
    failures = ablation.results.failures
    for name, reason in failures.items():
        logger.error("%s: %s", name, reason)
    return status or (1 if failures else 0)


def generate_missing(settings: AblationConfig, root: Path) -> None:
    """Photographs the generated sequences that are not there yet, unless only a report is wanted.

    Raises:
        ValueError: one is there with other settings.
    """
    for name in settings.generated:
        config = SyntheticConfig(**settings.generated_sequences[name])
        stamp, wanted = root / f"{name}.json", asdict(config)
        if stamp.exists():  # written last, so that an interrupted generation starts anew
            if json.loads(stamp.read_text()) != wanted:
                raise ValueError(f"{root / name} was generated with other settings ({stamp}): use another output_dir, or remove both")
            continue
        if settings.report_only:
            continue
        logger.info("photographing %s", name)
        generate_dataset(root, {name: [GENERATED_SUBSET]}, config)
        write_json_atomic(stamp, wanted)


class _Ablation:
    """What is next, and the report of what is there."""

    def __init__(self, plan: Plan, heading: str) -> None:
        self.plan, self.output, self.heading = plan, Path(plan.settings.output_dir), heading
        self.results = Results(plan)
        self._reported = time.monotonic()

    def pending(self, failures: Mapping[str, str]) -> Iterator[Job]:
        """The trainings of a seed, then what fuses them once all of them have ended, then the next seed's."""
        self.results.failures |= failures
        for seed in self.plan.seeds:
            training = [cell for cell in self.plan.cells if cell.seed == seed and not self.results.has_ended(cell)]
            yield from (self._training_job(cell) for cell in training)
            if not training:
                yield from (self._job(cell.name, cell.command()) for cell in self.results.fusable(seed))

    def _training_job(self, cell: Cell) -> Job:
        script = str(REPOSITORY / "launch" / "train_sequence.py")
        return self._job(cell.name, (sys.executable, script, *cell.overrides, DEVICE))

    def _job(self, name: str, command: tuple[str, ...]) -> Job:
        return Job(name, command, self.output / "logs" / f"{name.replace('/', '_')}.log")

    def report(self) -> None:
        self.results.write_report(self.output, self.heading)
        self._reported = time.monotonic()

    def report_now_and_then(self) -> None:
        if time.monotonic() - self._reported >= SECONDS_BETWEEN_REPORTS:
            self.report()


def describe(settings: AblationConfig, command: Sequence[str]) -> str:
    """The table's heading: the command, the machine, the recipes and the sequences; paths as their last part only."""
    places = {name: str(value) for name in ("dataset_root", "output_dir") if (value := getattr(settings, name)) is not None}
    shown = shlex.join(command)
    for value in places.values():
        if len(Path(value).parts) > 1:  # "." and "/" are in any command, and have no last part
            shown = shown.replace(value, Path(value).name)
    lines = ["# Ablation", "", f"`{shown}`", ""]
    shared = f"{settings.jobs} jobs of {settings.threads_per_job} threads, devices {', '.join(settings.devices)}"
    lines.append(f"{os.cpu_count()} CPU cores ({processor_name()}), torch {torch.__version__}; {shared}.")
    device = resolve_device(settings.devices[0])
    lines.append(f"Precision auto is {settled_precision('auto', device)}: {bfloat16_words(device)}.")
    lines.append("Steps: " + ("as below." if settings.budget is None else f"as many as fit {settings.budget:g} minutes, per cell."))
    lines += ["", f"- NeRF recipe: `{' '.join(settings.nerf)}`", f"- TensoRF recipe: `{' '.join(settings.tensorf)}`"]
    lines += [f"- {name} only: `{' '.join(overrides)}`" for name, overrides in settings.row_overrides.items()]
    lines += [f"- {name}: given" for name in settings.sequences]
    for name in settings.generated:
        told = ", ".join(f"{key} {value}" for key, value in settings.generated_sequences[name].items())
        lines.append(f"- {name}/{GENERATED_SUBSET}: generated, {told}")
    return "\n".join([*lines, f"- seeds: {', '.join(map(str, settings.seeds))}", ""])
