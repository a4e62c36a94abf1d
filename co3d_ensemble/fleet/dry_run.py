"""What a fleet would do: its jobs and their order, disk and hours, and whether the data will do."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from co3d_ensemble.base.progress import Progress
from co3d_ensemble.data.agreement import strictest
from co3d_ensemble.fleet.checks import Pair, Report, check_all
from co3d_ensemble.fleet.disk import JobFolder
from co3d_ensemble.fleet.environment import check_environment, job_environment
from co3d_ensemble.fleet.plan import Plan, make_plan
from co3d_ensemble.fleet.probe import probe_models
from co3d_ensemble.fleet.run import JOBS_FAILED
from co3d_ensemble.fleet.settings import FleetConfig
from co3d_ensemble.fleet.status import duration, packed
from co3d_ensemble.scripts import WRONG_ARGUMENTS, first_line

SHOWN_FINDINGS = 5  # per subset
WORKERS = (1, 8, 32, 136)  # for which the hours are told
STATES_ON_DISK = 9  # float32 copies of the weights: model, EMA and Adam's two moments, twice (last, previous), and the best
MLP_BYTES = 20e6  # of a radiance MLP with its optimizer, all checkpoints together: 256 x 8 has 0.6 M weights
BYTES_PER_PIXEL = 18  # of a rendered target, a model's or the fusion's: float16 colour and mask, float32 depth, and 6 of the pictures


def dry_run(settings: FleetConfig, overrides: Sequence[str]) -> int:
    """Prints all that, and returns 0, or 3 where something would fail, or 2 for wrong settings."""
    try:
        plan = make_plan(settings, overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return WRONG_ARGUMENTS
    Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
    check_environment(settings)
    checked = 0
    with Progress("checking", len(plan.subsets), "subsets") as shown:

        def tell(done: int) -> None:
            nonlocal checked
            shown.advance(done - checked)
            checked = done

        reports = check_all(
            settings.dataset_root,
            settings.output_dir,
            plan.subsets,
            decode=settings.audit == "full",
            min_known_frames=max(config.data.min_known_frames for config in plan.models.configs.values()),
            agreement=strictest(config.data.check_agreement for config in plan.models.configs.values()),
            workers=settings.audit_workers,
            progress=tell,
        )
    for line in [*told_jobs(settings, plan), *told_disk(settings, plan, reports), *told_findings(settings, reports)]:
        print(line)
    for line in told_hours(settings, plan, reports):
        print(line)
    return JOBS_FAILED if any(report["errors"] for report in reports.values()) else 0


def told_jobs(settings: FleetConfig, plan: Plan) -> list[str]:
    done = {job.name for job in plan.jobs if JobFolder(settings.output_dir, job.name).is_done(job.recipe)}
    lines = [f"{len(plan.jobs)} jobs ({len(done)} done): {len(plan.subsets)} subsets x {', '.join(plan.models.overrides)}, in this order:"]
    for number, job in enumerate(plan.jobs, start=1):
        expected = "unknown" if job.expected_seconds is None else duration(job.expected_seconds)
        lines.append(f"  {number:3d}  {job.name}  {'done' if job.name in done else f'expected {expected}'}")
    return lines


def told_disk(settings: FleetConfig, plan: Plan, reports: Mapping[Pair, Report]) -> list[str]:
    checkpoints = len(plan.subsets) * sum(checkpoint_bytes(config) for config in plan.models.configs.values())
    copies = len(plan.models.overrides) + (plan.models.ensemble is not None)
    renders = copies * BYTES_PER_PIXEL * sum(report["pixels"] for report in reports.values())
    free = shutil.disk_usage(settings.output_dir).free
    short = "" if checkpoints + renders < free else ": NOT ENOUGH"
    parts = f"checkpoints {checkpoints / 1e9:.1f}, renders {renders / 1e9:.1f}"
    return [f"disk: about {(checkpoints + renders) / 1e9:.1f} GB in the end ({parts}), {free / 1e9:.1f} GB free{short}"]


def checkpoint_bytes(config: DictConfig) -> float:
    """Of a finished run; the VM factors at their final resolution, as if nothing were cropped."""
    if config.model.kind != "tensorf":
        return MLP_BYTES
    components = config.model.tensorf.n_density + config.model.tensorf.n_appearance
    return 4.0 * STATES_ON_DISK * 3 * components * config.model.grid.final_resolution**2


def told_hours(settings: FleetConfig, plan: Plan, reports: Mapping[Pair, Report]) -> list[str]:
    """From finished jobs, or else from a probe of each model on the first subset that can be trained."""
    lengths = {job.name: job.expected_seconds for job in plan.jobs}
    if None not in lengths.values():
        return [f"expected hours: {packed_hours(list(lengths.values()))}; from finished jobs in output_dir"]
    if not settings.probe_seconds:
        return ["expected hours: unknown (nothing is finished in output_dir yet that could tell; probe_seconds=10 times a few steps)"]
    good = [pair for pair, report in reports.items() if not report["errors"]]
    if not good:
        return ["expected hours: unknown (no subset can be trained)"]
    costs = probe_models(settings, plan, *good[0], environment=job_environment(settings))
    failed = [f"expected hours: unknown ({model} cannot be probed: {why})" for model, why in costs.items() if isinstance(why, str)]
    if failed:
        return failed
    for job in plan.jobs:
        category, subset, model = job.name.split("/")
        report = reports[category, subset]
        if lengths[job.name] is None:
            lengths[job.name] = costs[model].job_seconds(frames=report["known"], pixels=report["pixels"])
    each = ", ".join(f"{model} {duration(cost.loop_seconds)} of training in {cost.precision}" for model, cost in costs.items())
    return [f"expected hours: {packed_hours(list(lengths.values()))}; from a probe on {'/'.join(good[0])}: {each}"]


def packed_hours(seconds: Sequence[float]) -> str:
    spans = ", ".join(f"{packed(seconds, workers) / 3600:.2f} with {workers}" for workers in WORKERS)
    return f"{sum(seconds) / 3600:.2f} in all; {spans} jobs at once"


def told_findings(settings: FleetConfig, reports: Mapping[Pair, Report]) -> list[str]:
    bad = {pair: report for pair, report in reports.items() if report["errors"]}
    noted = sum(len(report["warnings"]) for report in reports.values())
    depth = "every picture decoded" if settings.audit == "full" else "headers only; audit=full decodes every picture"
    lines = [f"data: {len(reports)} subsets checked ({depth}): {len(bad)} cannot be trained or exported, {noted} findings"]
    for (category, subset), report in reports.items():
        shown = [*(f"ERROR {error}" for error in report["errors"]), *report["warnings"]]
        lines += [f"  {category}/{subset}: {text}" for text in shown[:SHOWN_FINDINGS]]
        if len(shown) > SHOWN_FINDINGS:
            lines.append(f"  {category}/{subset}: and {len(shown) - SHOWN_FINDINGS} more")
    return lines
