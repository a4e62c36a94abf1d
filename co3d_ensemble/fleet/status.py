"""What ``launch/status.py`` shows, read from the output folder alone: whoever may read it can watch from any machine."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from co3d_ensemble.fleet.attempts import new_record
from co3d_ensemble.fleet.disk import FINISH, FleetState, JobFolder, fleet_folder, read_json
from co3d_ensemble.settings import setting

TAIL_BYTES = 16384  # of metrics.jsonl: holds the last line of either kind
STATES = ("running", "waiting", "interrupted", "done", "failed")  # the order in which they are shown
STYLES = {"running": "cyan", "waiting": "dim", "interrupted": "yellow", "done": "green", "failed": "bold red"}


@dataclass
class StatusConfig:
    output_dir: str = setting("outputs", "the fleet's output folder", literal=True)
    watch: bool = setting(False, "show the table again and again (or --watch)")
    json: bool = setting(False, "machine-readable (or --json)")
    every: float = setting(2.0, "seconds between two looks of --watch")

    def __post_init__(self) -> None:
        if not self.every > 0:
            raise ValueError(f"every={self.every}: must be positive")


@dataclass(frozen=True)
class JobStatus:
    """One job as it is now; None where nothing is known.

    Attributes:
        state: ``running`` (a worker holds it), ``interrupted`` (begun, nobody is at it), ``waiting``, ``done`` or ``failed``.
        psnr: psnr_masked in dB: of the targets when done, else of the last validation.
        seconds_left: of the present attempt.
    """

    name: str
    state: str
    worker: str | None = None
    step: int | None = None
    max_steps: int | None = None
    psnr: float | None = None
    rays_per_second: float | None = None
    seconds_left: float | None = None
    seconds: float = 0.0
    attempts: int = 0
    error: str | None = None


def read_status(output_dir: Path | str, *, now: float | None = None) -> dict[str, Any]:
    """``{"fleet": fleet_state.json, "jobs": [JobStatus], "counts": {state: n}, "seconds_left": estimate or None}``.

    Raises:
        ValueError: no fleet has been started in the folder, or a damaged file, which it names.
    """
    listed = read_json(fleet_folder(output_dir) / "jobs.json")
    if listed is None:
        raise ValueError(f"{output_dir}: no fleet has listed its jobs here (launch/train_all_sequences.py does)")
    now = time.time() if now is None else now
    jobs = [job_status(JobFolder(output_dir, job["name"]), job["recipe"], now) for job in listed["jobs"]]
    expected = {job["name"]: job["expected_seconds"] for job in listed["jobs"]}
    state = dict(FleetState(output_dir).read() or {})
    state["alive"] = JobFolder.folder_is_locked(fleet_folder(output_dir))
    state["finishing"] = JobFolder(output_dir, FINISH).is_locked()
    counts = {name: sum(job.state == name for job in jobs) for name in STATES}
    return {"fleet": state, "jobs": jobs, "counts": counts, "seconds_left": time_left(jobs, expected, listed["slots"])}


def job_status(folder: JobFolder, recipe: str, now: float) -> JobStatus:
    record = {**new_record(), **(read_json(folder.attempts) or {})}
    common: dict[str, Any] = {"name": "/".join(folder.run.parts[-3:]), "attempts": record["started"], "seconds": record["seconds"]}
    failed = read_json(folder.failed)
    if failed is not None:
        return JobStatus(state="failed", error=failed["error"], **common)
    if folder.is_done(recipe):
        results = read_json(folder.results)
        common |= {"step": results["steps"], "max_steps": results["steps"], "psnr": results["metrics"].get("psnr_masked")}
        return JobStatus(state="done", **common)
    training, validation = last_lines(folder.run / "metrics.jsonl")
    common |= {"step": training.get("step"), "psnr": validation.get("metrics", {}).get("psnr_masked"), "max_steps": max_steps(folder.run)}
    if not folder.is_locked():
        return JobStatus(state="interrupted" if record["started"] else "waiting", **common)
    running = record["running"] or {}
    if "began" in running:
        common["seconds"] += max(0.0, now - running["began"])
    speed, step, total = training.get("seconds_per_step"), common["step"], common["max_steps"]
    left = None if None in (speed, step, total) else speed * (total - step)
    return JobStatus(
        state="running", worker=running.get("worker"), rays_per_second=training.get("rays_per_second"), seconds_left=left, **common
    )


def last_lines(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last records of training and of validation in ``metrics.jsonl``; empty where there is none."""
    found: dict[str, dict[str, Any]] = {}
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        lines = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # torn: being written, or cut by the tail
            continue
        if isinstance(record, dict):
            found[str(record.get("kind"))] = record
    return found.get("train", {}), found.get("validation", {})


def max_steps(run: Path) -> int | None:
    """Of the run's configuration, without reading it as YAML: 200 files are looked at every two seconds."""
    try:
        lines = (run / "config.yaml").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    values = [line.split(":")[1].strip() for line in lines if line.startswith("  max_steps:")]
    return int(values[0]) if values and values[0].isdigit() else None


def time_left(jobs: Sequence[JobStatus], expected: Mapping[str, float | None], slots: int) -> float | None:
    """Seconds until the last job ends, if jobs take what was expected of them or else what the finished ones took; None: unknown."""
    finished = [job.seconds for job in jobs if job.state == "done" and job.seconds > 0]
    mean = sum(finished) / len(finished) if finished else None
    lengths = []
    for job in jobs:
        if job.state in ("done", "failed"):
            continue
        length = job.seconds_left
        if length is None:
            whole = expected.get(job.name)
            whole = mean if whole is None else whole
            if whole is None:
                return None
            length = max(0.0, whole - job.seconds)
        lengths.append(length)
    return packed(lengths, slots)


def packed(lengths: Sequence[float], slots: int) -> float:
    """Makespan of longest-first packing."""
    ends = [0.0] * max(1, slots)
    for length in sorted(lengths, reverse=True):
        i = min(range(len(ends)), key=ends.__getitem__)
        ends[i] += length
    return max(ends)


def as_json(status: Mapping[str, Any]) -> str:
    return json.dumps({**status, "jobs": [asdict(job) for job in status["jobs"]]}, indent=1)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def render(status: Mapping[str, Any]) -> Group:
    """The table, and a line of totals."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, justify in (("job", "left"), ("state", "left"), ("worker", "left"), ("step", "right"), ("psnr", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)
    for heading in ("rays/s", "time left", "spent", "attempts"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("error", overflow="fold")
    for job in sorted(status["jobs"], key=lambda job: STATES.index(job.state)):
        step = "-" if job.step is None else f"{job.step}/{job.max_steps or '?'}"
        rays = "-" if job.rays_per_second is None else f"{job.rays_per_second:,.0f}"
        psnr = "-" if job.psnr is None else f"{job.psnr:.2f}"
        table.add_row(
            job.name,
            Text(job.state, STYLES[job.state]),
            job.worker or "-",
            step,
            psnr,
            rays,
            duration(job.seconds_left),
            duration(job.seconds),
            str(job.attempts),
            job.error or "",
        )
    counts = ", ".join(f"{n} {name}" for name, n in status["counts"].items() if n)
    fleet = status["fleet"]
    at_work = "fusing, scoring and exporting" if fleet["finishing"] else "at work"
    state = at_work if fleet["alive"] else f"{fleet.get('state', 'unknown')} ({fleet.get('reason', '')})"
    left = "unknown" if status["seconds_left"] is None else duration(status["seconds_left"])
    return Group(table, Text(f"{len(status['jobs'])} jobs: {counts}. Fleet: {state}. Time left for all: {left}"))
