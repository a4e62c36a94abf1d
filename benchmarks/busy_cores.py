"""Rays per second of a training step alone, and beside a process that keeps one core busy, by the number of threads.

    python benchmarks/busy_cores.py
    python benchmarks/busy_cores.py --experiments tensorf_laptop --threads 1 2 --seconds 20 --json out.json

Every figure has a process of its own, started as the launch scripts are; ``--spinning`` repeats all with OpenMP's default wait, a busy
loop, in place of the project's (``co3d_ensemble/base/threads.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import co3d_ensemble  # noqa: F401  (before torch, see co3d_ensemble/base/threads.py)

# isort: split
import torch

from benchmarks.common import circumstances, experiment, find_sequence, make_stepper
from co3d_ensemble.assembly import load_scene
from co3d_ensemble.files import write_json_atomic
from co3d_ensemble.scripts import run_script

WARM_UP_STEPS = 3
BUSY = "while True: pass"
OWN, SPINNING = "sleeping", "spinning"
GOAL = 0.4  # share of the undisturbed speed that a training keeps beside a busy process
_SPINNING_ENVIRONMENT = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}  # the runtimes' defaults


def rays_per_second(arguments: argparse.Namespace, name: str) -> float:
    """In this process, on the CPU."""
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as scratch:
        root, category = find_sequence(arguments.dataset_root, arguments.category, Path(scratch))
        overrides = [f"experiment={name}", f"data.longest_side={arguments.longest_side}", *arguments.override]
        config = experiment(overrides, root=root, category=category, device=device)
        stepper = make_stepper(config, load_scene(config), device)
    for step in range(WARM_UP_STEPS):
        stepper.run(step)
    start, step = time.perf_counter(), WARM_UP_STEPS
    while time.perf_counter() - start < arguments.seconds:
        stepper.run(step)
        step += 1
    return config.training.n_rays * (step - WARM_UP_STEPS) / (time.perf_counter() - start)


@contextmanager
def busy_process(wanted: bool) -> Iterator[None]:
    """One process in an endless loop on one of the cores, for the block."""
    if not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measured_in_a_process(argv: Sequence[str], name: str, threads: int, waiting: str, busy: bool) -> float:
    environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")}
    environment |= {"OMP_NUM_THREADS": str(threads)} | (_SPINNING_ENVIRONMENT if waiting == SPINNING else {})
    with busy_process(busy):
        command = [sys.executable, __file__, *argv, "--one", name]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise RuntimeError(f"measuring {name} failed: {answer.stderr.strip()[-500:]}")
    return json.loads(answer.stdout.splitlines()[-1])["rays_per_second"]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", default=["nerf_laptop", "tensorf_laptop"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=15.0, help="of every measurement (default: %(default)s)")
    parser.add_argument("--spinning", action="store_true", help="also with OpenMP's default wait")
    parser.add_argument("--dataset-root", type=Path, help="CO3Dv2 root (default: ../shared/data/co3d beside the checkout, else generated)")
    parser.add_argument("--category", default="cape")
    parser.add_argument("--longest-side", type=int, default=200)
    parser.add_argument("--override", action="append", default=[], help="a setting of all experiments")
    parser.add_argument("--machine", help="the machine in words, for the result file")
    parser.add_argument("--json", type=Path, help="result file")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a child process that measures one experiment
    arguments = parser.parse_args(argv)
    if arguments.one:
        print(json.dumps({"rays_per_second": rays_per_second(arguments, arguments.one)}))
        return 0
    rows = []
    print(f"{'experiment':18} {'threads':>7} {'waiting':>9} {'alone':>10} {'beside a busy process':>22} {'kept':>6}", flush=True)
    for name in arguments.experiments:
        for threads in arguments.threads:
            for waiting in (OWN, SPINNING) if arguments.spinning else (OWN,):
                alone, beside = (measured_in_a_process(argv, name, threads, waiting, busy) for busy in (False, True))
                kept = beside / alone
                circumstance = {"experiment": name, "threads": threads, "waiting": waiting}
                rows.append({**circumstance, "alone": alone, "beside_a_busy_process": beside, "kept": kept})
                print(f"{name:18} {threads:7} {waiting:>9} {alone:10,.0f} {beside:22,.0f} {kept:6.0%}", flush=True)
    if arguments.json:
        facts = circumstances("busy_cores", argv, torch.device("cpu"), arguments.machine)
        write_json_atomic(arguments.json, {**facts, "goal": GOAL, "rays_per_second": rows})
    return 0


if __name__ == "__main__":
    run_script(main)
