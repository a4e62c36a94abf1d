"""The last step, in a process of its own: render what is missing, fuse, score, export, summarise.

    python -m co3d_ensemble.fleet.finish <arguments of launch/train_all_sequences.py>

is what the leading worker starts; ``finish_only=true`` of that script does the same under the fleet's lock.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from co3d_ensemble.base.quoting import with_escapes
from co3d_ensemble.ensemble import fuse_sequence
from co3d_ensemble.files import write_json_atomic
from co3d_ensemble.fleet.disk import FAILURES_FILE, FleetState, JobFolder, fleet_folder, read_json
from co3d_ensemble.fleet.plan import Plan, make_plan
from co3d_ensemble.fleet.settings import FleetConfig, split_arguments
from co3d_ensemble.fleet.summary import read_rows, write_summary
from co3d_ensemble.scripts import USER_ERRORS, run_with_settings
from co3d_ensemble.submission import export_submission

logger = logging.getLogger(__name__)


def finish(settings: FleetConfig, overrides: Sequence[str]) -> int:
    """Fuses and exports every subset whose jobs are done; says in the summary what is not.

    Returns:
        0; failures of single subsets or of an archive are the summary's, for the next call to try again.
    """
    plan = make_plan(settings, overrides)
    failures = failed_jobs(settings, plan)
    whole = complete_subsets(settings, plan)
    if plan.models.ensemble is not None:
        whole = fuse_all(settings, plan, whole, failures)
    exports: dict[str, dict[str, Any]] = {}
    for sequence_set in settings.sequence_set:
        exports[sequence_set] = export(settings, plan, sequence_set, whole, failures)
    write_json_atomic(fleet_folder(settings.output_dir) / FAILURES_FILE, failures)
    began = (FleetState(settings.output_dir).read() or {}).get("first_started")
    write_summary(
        settings.output_dir,
        read_rows(settings.output_dir, plan.subsets, list(plan.models.overrides), fused_name(plan)),
        exports=exports,
        failures=failures,
        wall_hours=None if began is None else (time.time() - began) / 3600,
    )
    return 0


def fused_name(plan: Plan) -> str | None:
    return None if plan.models.ensemble is None else plan.models.ensemble.name


def failed_jobs(settings: FleetConfig, plan: Plan) -> dict[str, str]:
    """Error by name, in the data set's order."""
    found = {}
    for name in (f"{category}/{subset}/{model}" for category, subset in plan.subsets for model in plan.models.overrides):
        record = read_json(JobFolder(settings.output_dir, name).failed)
        if record is not None:
            found[name] = f"{record['error']} ({record['attempts']} attempts, {record['log']})"
    return found


def complete_subsets(settings: FleetConfig, plan: Plan) -> list[tuple[str, str]]:
    """Those whose jobs are all done."""
    recipes = {job.name: job.recipe for job in plan.jobs}
    names = {pair: [f"{pair[0]}/{pair[1]}/{model}" for model in plan.models.overrides] for pair in plan.subsets}
    return [pair for pair in plan.subsets if all(JobFolder(settings.output_dir, n).is_done(recipes[n]) for n in names[pair])]


def fuse_all(settings: FleetConfig, plan: Plan, subsets: Sequence[tuple[str, str]], failures: dict[str, str]) -> list[tuple[str, str]]:
    """Fuses subset by subset and returns those where it worked; adds the others to ``failures``."""
    fused = []
    for number, (category, subset) in enumerate(subsets, start=1):
        place = {"dataset_root": settings.dataset_root, "output_dir": settings.output_dir, "device": settings.device}
        config = OmegaConf.merge(plan.models.ensemble, with_escapes({**place, "category": category, "subset_name": subset}))
        logger.info("fusing %s/%s (%d of %d)", category, subset, number, len(subsets))
        try:
            fuse_sequence(config)
            fused.append((category, subset))
        except USER_ERRORS as error:  # one bad subset must not keep the others out of the archive
            logger.exception("%s/%s cannot be fused", category, subset)
            failures[f"{category}/{subset}/{plan.models.ensemble.name}"] = str(error)
    return fused


def export(
    settings: FleetConfig, plan: Plan, sequence_set: str, whole: Sequence[tuple[str, str]], failures: dict[str, str]
) -> dict[str, Any]:
    """What the summary tells of one set's archive."""
    of_set = [pair for pair in whole if f"_{sequence_set}" in pair[1]]
    wanted = [pair for pair in plan.subsets if f"_{sequence_set}" in pair[1]]
    if not wanted:
        return {"error": "the data set has no such subset"}
    if not of_set:
        return {"error": "no subset of it is complete"}
    model = plan.models.exported
    try:
        done = export_submission(
            settings.dataset_root,
            settings.output_dir,
            sequence_set=sequence_set,
            models=[model],
            only=of_set,
            device=settings.device,
        )
    except USER_ERRORS as error:
        logger.exception("no archive of %s", sequence_set)
        failures[f"submission {sequence_set}"] = str(error)
        return {"error": str(error)}
    for category, subset in wanted:
        if (category, subset) not in of_set:
            failures.setdefault(f"{category}/{subset}", f"left out of the archive of {sequence_set}")
    return {"archive": done["archive"], "model": model, "results": done["results"]}


def main(arguments: list[str]) -> int:
    own, overrides = split_arguments(arguments)
    return run_with_settings(own, FleetConfig, __doc__, lambda settings: finish(settings, overrides))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
