"""How close to the best possible packing a fleet comes: the real claims, locks and records, with jobs that only sleep.

    python benchmarks/fleet_simulation.py --workers 8 32 136          # in scaled time: an hour is a second
    python benchmarks/fleet_simulation.py --workers 8 32 --deaths 10 --joins 3

Workers are processes forked from this one, at a store like torchrun's. A death is SIGKILL to a worker at a random time; as under
torchrun, all others are then told to stop (their jobs write checkpoints) and a new round begins. A late join does the same with
one worker more. The overhead is what a worker spends on a job beyond its length.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import co3d_ensemble  # noqa: F401  (before torch, see co3d_ensemble/base/threads.py)

# isort: split
from torch.distributed import TCPStore

from co3d_ensemble.base.signals import EXIT_PREEMPTED, StopSignals
from co3d_ensemble.files import remove_temporaries
from co3d_ensemble.fleet.bound import die_with_parent
from co3d_ensemble.fleet.claims import Reception, Round, ask_for_round
from co3d_ensemble.fleet.disk import JobFolder, unfinished
from co3d_ensemble.fleet.jobrun import Terms
from co3d_ensemble.fleet.jobs import Job, longest_first
from co3d_ensemble.fleet.status import packed
from co3d_ensemble.fleet.worker import work
from co3d_ensemble.scripts import run_script

N_JOBS = 176  # 88 subsets x 2 models
MEDIAN_HOURS, SPREAD = 2.0, 0.5  # lognormal, as sequences of 100 to 300 frames differ; a few take four times the median
CHECKPOINT_SHARE = 0.02  # of a median job between two checkpoints


class Sleeper:
    """A child that sleeps its length in steps and writes down how far it has come."""

    def __init__(self, folder: JobFolder, seconds: float, interval: float) -> None:
        self._file, self._seconds, self._interval = folder.run / "slept", seconds, interval
        folder.run.mkdir(parents=True, exist_ok=True)
        self._before = float(self._file.read_text()) if self._file.exists() else 0.0
        self._began = self._saved = time.monotonic()
        self._status: int | None = None
        self.slept = folder.run / "all_slept"

    def poll(self) -> int | None:
        if self._status is None:
            now = time.monotonic()
            if self._before + now - self._began >= self._seconds:
                self._end(0, self._seconds)
            elif now - self._saved >= self._interval:
                self._save(self._before + now - self._began)
                self._saved = now
        return self._status

    def send_signal(self, number: int) -> None:
        if self._status is None:
            self._end(EXIT_PREEMPTED, self._before + time.monotonic() - self._began)

    def wait(self) -> int:
        assert self._status is not None
        return self._status

    def _save(self, value: float) -> None:
        temporary = self._file.with_name(f"slept.tmp-{os.getpid()}")
        temporary.write_text(repr(value))
        os.replace(temporary, self._file)

    def _end(self, status: int, value: float) -> None:
        self._save(value)
        self._status = status
        if status == 0:
            with open(self.slept, "a") as file:
                file.write("done\n")


@dataclass
class Fleet:
    """Attributes: lengths: seconds by job name. interval: seconds between checkpoints."""

    output: Path
    lengths: dict[str, float]
    interval: float

    def jobs(self) -> list[Job]:
        return longest_first(Job(name, ("sleep",), "sleep", seconds) for name, seconds in self.lengths.items())

    def worker(self, number: int, port: int, leads: bool, started: float) -> int:
        """One worker's life; returns its exit code."""

        def connect() -> TCPStore:
            return TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))

        def start(job: Job, log: Path) -> Sleeper:
            return Sleeper(JobFolder(self.output, job.name), self.lengths[job.name], self.interval)

        terms = Terms(output_dir=self.output, worker=str(number), device="cpu", start=start, busy_pause=0.2)
        with StopSignals() as signals:
            store, reception = connect(), None
            if leads:
                round = Round.new(store, unfinished(self.output, self.jobs()))
                reception = Reception(connect(), round)
                reception.start()
            else:
                round = ask_for_round(store, seconds=60, stopping=lambda: bool(signals.reason))
            if round is not None:
                work(round, terms, slots=1, grace_seconds=5, stopping=lambda: bool(signals.reason))
                while leads and not signals.reason and not round.all_ended():
                    time.sleep(0.005)
            if reception is not None:
                if not signals.reason:
                    round.close({})
                reception.close()
            while round is not None and not leads and not signals.reason and round.outcome() is None:
                time.sleep(0.02)
            return EXIT_PREEMPTED if signals.reason else 0

    def run_round(self, workers: int, events: list[tuple[float, str]], started: float, generator: random.Random) -> int:
        """One round, until all is done or something happens; returns the number of workers of the next, 0 when done."""
        server, port = serve()
        pids = []
        for number in range(workers):
            pid = os.fork()
            if pid == 0:
                status = 1
                die_with_parent(os.getppid())
                try:
                    status = self.worker(number, port, number == 0, started)
                finally:
                    os._exit(status)
            pids.append(pid)
        alive = set(pids)
        following = 0
        while alive:
            if events and time.monotonic() - started >= events[0][0] and following == 0:
                _, what = events.pop(0)
                if what == "death":
                    os.kill(generator.choice(sorted(alive)), signal.SIGKILL)
                following = workers + (what == "join")
                for pid in alive:
                    os.kill(pid, signal.SIGTERM)
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if pid:
                alive.discard(pid)
            else:
                time.sleep(0.002)
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
        return following


def serve() -> tuple[int, int]:
    """Process id and port of a store in a process of its own: forking from one that has the store's threads may deadlock."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        die_with_parent(os.getppid())
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        os.write(writer, str(store.port).encode())
        while True:
            time.sleep(60)
    os.close(writer)
    port = int(os.read(reader, 16))
    os.close(reader)
    return pid, port


def simulate(
    output: Path, lengths: Sequence[float], workers: int, *, deaths: int, joins: int, interval: float, seed: int
) -> dict[str, float]:
    """One fleet from its first round to its end."""
    generator = random.Random(seed)
    names = {f"thing{i}/manyview_dev_0/model": seconds for i, seconds in enumerate(lengths)}
    fleet = Fleet(output, names, interval)
    ideal = packed(lengths, workers)
    bound = max(max(lengths), sum(lengths) / workers)
    moments = sorted((generator.uniform(0, 0.9 * ideal), what) for what in ["death"] * deaths + ["join"] * joins)
    started, rounds, n = time.monotonic(), 0, workers
    while n:
        n = fleet.run_round(n, moments, started, generator)
        rounds += 1
    makespan = time.monotonic() - started
    attempts = [json.loads((JobFolder(output, name).attempts).read_text()) for name in names]
    remove_temporaries(output)
    done_once = all((output / name / "all_slept").read_text() == "done\n" for name in names)
    # what was slept beyond the jobs' lengths is lost work; what attempts took beyond sleeping is overhead
    slept = sum(sum(entry["seconds"] for entry in record["history"]) for record in attempts)
    overhead = (slept - sum(lengths)) / len(names)
    return {
        "workers": workers,
        "rounds": rounds,
        "makespan": makespan,
        "packing": ideal,
        "bound": bound,
        "beyond the lengths per job, ms": 1000 * overhead,
        "lost": sum(record["history"][i]["how"] == "lost" for record in attempts for i in range(len(record["history"]))),
        "done once": float(done_once and all(JobFolder(output, name).done.exists() for name in names)),
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 32, 136])
    parser.add_argument("--deaths", type=int, default=0)
    parser.add_argument("--joins", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=N_JOBS)
    parser.add_argument("--hour", type=float, default=1.0, help="seconds that stand for an hour (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.ERROR)
    generator = random.Random(options.seed)
    lengths = [options.hour * MEDIAN_HOURS * generator.lognormvariate(0, SPREAD) for _ in range(options.jobs)]
    interval = options.hour * MEDIAN_HOURS * CHECKPOINT_SHARE
    span = f"{min(lengths):.2f} to {max(lengths):.2f} s, {sum(lengths):.1f} s in all"
    print(f"{len(lengths)} jobs of {span}; checkpoints every {interval:.3f} s", flush=True)
    good = True
    for workers in options.workers:
        with tempfile.TemporaryDirectory() as folder:
            found = simulate(
                Path(folder), lengths, workers, deaths=options.deaths, joins=options.joins, interval=interval, seed=options.seed
            )
        good &= bool(found["done once"])
        over = 100 * (found["makespan"] / found["packing"] - 1)
        over_bound = 100 * (found["makespan"] / found["bound"] - 1)
        told = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        print(f"{told}: makespan {over:+.1f} % over packing, {over_bound:+.1f} % over the bound", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    run_script(main)
