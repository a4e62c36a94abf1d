"""One worker of a fleet from its first line to its exit: rank 0 leads, the others follow, all of them work."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from co3d_ensemble.base.quoting import DEVICE
from co3d_ensemble.base.signals import EXIT_INTERRUPTED, EXIT_PREEMPTED, StopSignals
from co3d_ensemble.files import remove_temporaries, write_json_atomic
from co3d_ensemble.fleet.attempts import new_record
from co3d_ensemble.fleet.claims import STORE_ERRORS, Reception, Round, RoundError, ask_for_round, connect, connect_again
from co3d_ensemble.fleet.disk import FAILURES_FILE, FINISH, FleetState, JobFolder, fleet_folder, read_json, unfinished
from co3d_ensemble.fleet.environment import check_environment, terms_of
from co3d_ensemble.fleet.jobrun import Terms
from co3d_ensemble.fleet.jobs import Job, digest
from co3d_ensemble.fleet.session import bound_to_agent, session, take_fleet_lock, whose
from co3d_ensemble.fleet.settings import FleetConfig
from co3d_ensemble.fleet.worker import run_alone, work
from co3d_ensemble.scripts import WRONG_ARGUMENTS, first_line
from co3d_ensemble.training.lock import RunDirectoryBusy

logger = logging.getLogger(__name__)

DONE, FAILED, REQUEUE = "done", "failed", "requeue"  # of fleet_state.json
ERROR, JOBS_FAILED, BUSY = 1, 3, 4  # exit codes beside those of the scripts
IDLE_SECONDS = 0.5  # between two looks at a round that others are still busy with
LEAVE_SECONDS = 20.0

Outcome = dict[str, Any]  # state, code, reason


def run_fleet(settings: FleetConfig, overrides: Sequence[str], arguments: Sequence[str]) -> int:
    """Works until the fleet's work is done or this worker is told to stop.

    Args:
        arguments: both, as typed: the last step's process gets them.

    Returns:
        Exit code: 0 done; 1 it cannot go on (full disk, no data set); 2 wrong settings; 3 some jobs failed for good; 4 another
        fleet is at work in the folder; 130 Ctrl-C, 143 SIGTERM. Under torchrun, which starts a worker anew whose code is not 0,
        everything that a new start cannot cure is 0, and ``fleet_state.json`` says what it was.
    """
    elastic = "TORCHELASTIC_RUN_ID" in os.environ
    if elastic and not bound_to_agent():
        return EXIT_PREEMPTED
    with StopSignals() as signals:

        def stopping() -> bool:
            return bool(signals.reason)

        try:
            member = lead if int(os.environ.get("RANK", 0)) == 0 else follow
            outcome = member(settings, overrides, arguments, stopping)
        except (RoundError, *STORE_ERRORS, OSError) as error:
            if not signals.reason:
                print(f"error: {error}", file=sys.stderr)
                return ERROR
            outcome = None
        if outcome is None:
            return EXIT_INTERRUPTED if signals.reason == "interrupted" else EXIT_PREEMPTED
    if outcome["code"]:
        print(f"error: {outcome['reason']}", file=sys.stderr)
    return 0 if elastic else outcome["code"]


def lead(settings: FleetConfig, overrides: Sequence[str], arguments: Sequence[str], stopping: Callable[[], bool]) -> Outcome | None:
    """Lists the jobs, opens the round, works, and does the last step; None when told to stop."""
    store, world = connect(timeout_seconds=settings.join_seconds), int(os.environ.get("WORLD_SIZE", 1))
    with ExitStack() as held:
        jobs, refusal = prepare(settings, overrides, held, stopping)
        nothing = refusal is not None or settings.finish_only
        round = Round.new(store, [] if nothing else unfinished(settings.output_dir, jobs), {"refusal": refusal})
        if world > 1:
            reception = Reception(connect_again(), round)
            reception.start()
            held.callback(reception.close)
        if refusal is None:
            outcome = lead_jobs(round, jobs, settings, arguments, stopping)
        else:
            outcome = refusal
        if outcome is not None:
            round.close(outcome)
            round.wait_until_left(world - 1, LEAVE_SECONDS)
        return outcome


def follow(settings: FleetConfig, overrides: Sequence[str], arguments: Sequence[str], stopping: Callable[[], bool]) -> Outcome | None:
    """Works in the round that rank 0 leads, and waits for its end: torchrun takes a worker that leaves early for a lost one."""
    store = connect(timeout_seconds=settings.join_seconds)
    round = ask_for_round(store, seconds=settings.join_seconds, stopping=stopping)
    if round is None:
        return None
    if round.terms["refusal"] is None:
        work(round, terms_of(settings), slots=settings.jobs_per_device, grace_seconds=settings.grace_seconds, stopping=stopping)
    while not stopping():
        outcome = round.outcome()
        if outcome is not None:
            round.leave()
            return outcome
        time.sleep(IDLE_SECONDS)
    return None


def prepare(
    settings: FleetConfig, overrides: Sequence[str], held: ExitStack, stopping: Callable[[], bool]
) -> tuple[list[Job], Outcome | None]:
    """Locks the output folder and lists the jobs; or why there is nothing to lead."""
    from co3d_ensemble.fleet.plan import make_plan  # seconds of imports, which followers and restarts need not wait for

    folder, state = fleet_folder(settings.output_dir), FleetState(settings.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        take_fleet_lock(settings, held, stopping)
    except RunDirectoryBusy as busy:
        return [], {"state": REQUEUE, "code": BUSY, "reason": f"another fleet is at work: {busy}"}
    except OSError as error:
        return [], {"state": FAILED, "code": ERROR, "reason": f"output_dir={settings.output_dir}: {error}"}
    try:
        remove_temporaries(folder)
        before = state.read() or {}
        first = before["first_started"] if before.get("state") == REQUEUE else time.time()
        state.write(REQUEUE, "under way, or ended without a word", first_started=first, **whose())
        check_environment(settings)
        jobs = make_plan(settings, overrides).jobs
        listed = [{"name": job.name, "recipe": job.recipe, "expected_seconds": job.expected_seconds} for job in jobs]
        slots = int(os.environ.get("WORLD_SIZE", 1)) * settings.jobs_per_device
        write_json_atomic(folder / "jobs.json", {"jobs": listed, "slots": slots})
        if settings.retry_failed:
            for job in jobs:
                reopen(JobFolder(settings.output_dir, job.name), session())
        return jobs, None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        outcome = {"state": FAILED, "code": WRONG_ARGUMENTS, "reason": first_line(error)}
    except OSError as error:
        outcome = {"state": FAILED, "code": ERROR, "reason": str(error)}
    with suppress(OSError):
        state.write(FAILED, outcome["reason"], **whose())
    return [], outcome


def lead_jobs(
    round: Round, jobs: Sequence[Job], settings: FleetConfig, arguments: Sequence[str], stopping: Callable[[], bool]
) -> Outcome | None:
    """The leader's share of the jobs, then the last step."""
    terms, state = terms_of(settings), FleetState(settings.output_dir)
    folders = {job.name: JobFolder(settings.output_dir, job.name) for job in jobs}
    first = (state.read() or {}).get("first_started")
    logger.info("%d jobs, %d of them to do", len(jobs), len(round.jobs))
    try:
        work(round, terms, slots=settings.jobs_per_device, grace_seconds=settings.grace_seconds, stopping=stopping)
        while not stopping() and not round.all_ended():
            time.sleep(IDLE_SECONDS)
        if not stopping():
            finish(jobs, terms, settings, arguments, stopping)
        if stopping():
            state.write(REQUEUE, "told to stop", first_started=first, **whose())
            return None
        failures = {name: read_json(folder.failed)["error"] for name, folder in folders.items() if folder.failed.exists()}
        last = JobFolder(settings.output_dir, FINISH)
        if last.failed.exists():
            failures[FINISH] = read_json(last.failed)["error"]
        failures |= read_json(fleet_folder(settings.output_dir) / FAILURES_FILE) or {}
    except OSError as error:
        with suppress(OSError):
            state.write(FAILED, str(error), first_started=first, **whose())
        raise
    for name, error in failures.items():
        logger.error("%s: %s", name, error)
    outcome: Outcome = {"state": DONE, "code": 0, "reason": f"{len(jobs)} jobs"}
    if failures:
        outcome = {"state": FAILED, "code": JOBS_FAILED, "reason": f"failed: {', '.join(failures)}; see {settings.output_dir}/summary.md"}
    state.write(outcome["state"], outcome["reason"], first_started=first, ended=time.time(), **whose())
    return outcome


def finish(jobs: Sequence[Job], terms: Terms, settings: FleetConfig, arguments: Sequence[str], stopping: Callable[[], bool]) -> None:
    """Runs the last step as a job, unless it was done for these very results."""
    made_from = []
    for job in sorted(jobs, key=lambda job: job.name):  # their order changes with what is known of their lengths
        folder = JobFolder(settings.output_dir, job.name)
        made_from.append([job.name, read_json(folder.done), folder.failed.exists()])
    given = [argument for argument in arguments if not argument.startswith(("device=", "finish_only="))]
    command = (sys.executable, "-m", "co3d_ensemble.fleet.finish", *given, DEVICE)
    folder = JobFolder(settings.output_dir, FINISH)
    if settings.finish_only or read_json(fleet_folder(settings.output_dir) / FAILURES_FILE):
        folder.done.unlink(missing_ok=True)
    reopen(folder)
    logger.info("the last step: fusing, scoring, exporting (%s)", folder.log)
    last = Job(FINISH, command, digest(made_from))
    run_alone(last, terms, grace_seconds=settings.grace_seconds, stopping=stopping)


def reopen(folder: JobFolder, session: str | None = None) -> None:
    """Lets a job that was given up be tried again; once per session, where one is given."""
    record = read_json(folder.attempts) or new_record()
    if (folder.failed.exists() or record["fruitless"]) and (session is None or record.get("reopened_in") != session):
        write_json_atomic(folder.attempts, {**record, "fruitless": 0, "reopened_in": session})
        folder.failed.unlink(missing_ok=True)
