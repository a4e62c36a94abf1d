"""What the benchmarks of training steps share: arguments, sides that take turns in one process, memory in processes of their own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.common import say, synchronize
from co3d_ensemble.base.precision import AUTO, PRECISION_CHOICES, PRECISIONS, settled_precision
from co3d_ensemble.scripts import reported
from co3d_ensemble.training.stepper import Stepper

IMPLICITRON, OURS = "implicitron", "ours_"  # names of the sides; ours with the precision behind it
STEPS_PER_SAMPLE = {"cpu": 1, "cuda": 20}  # a CUDA step is too short to be timed alone
LONGEST_SIDE = 200  # pixels of the photographs


def step_parser(description: str | None, *, rays: int, repeats: int, network: str) -> argparse.ArgumentParser:
    """A parser with the arguments that all of them take.

    Args:
        rays, repeats: defaults.
        network: of ours, which ``--precision`` is for, in words.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset-root", type=Path, help="CO3Dv2 root (default: ../shared/data/co3d beside the checkout, else generated)")
    parser.add_argument("--category", default="cape")
    parser.add_argument("--longest-side", type=int, default=LONGEST_SIDE, help="of the photographs, pixels (default: %(default)s)")
    parser.add_argument("--rays", type=int, default=rays)
    choices = (*PRECISION_CHOICES, "both")
    parser.add_argument("--precision", choices=choices, default="both", help=f"of our {network} (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed samples per side (default: %(default)s)")
    parser.add_argument("--steps-per-sample", type=int, help="steps per timed sample (default: 1 on the CPU, 20 on CUDA)")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory, which takes a process per side")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--machine", help="the machine in words, for the result file")
    parser.add_argument("--json", type=Path, help="result file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # a child process that measures one side
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)  # a folder for generated scenes, of the parent of such a child
    return parser


def parse_step_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    arguments = parser.parse_args(argv)
    for name in ("repeats", "rays", "steps_per_sample"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return arguments


def precisions(arguments: argparse.Namespace, device: torch.device) -> list[str]:
    """Those to measure; first that of the presets on the device, which "ours_s" is of, where it is among them."""
    if arguments.precision != "both":
        return [settled_precision(arguments.precision, device)]
    return sorted(PRECISIONS, key=lambda name: name != settled_precision(AUTO, device))


def alternate(
    run: Mapping[str, Callable[[], None]], *, repeats: int, warm_up: int, steps_per_sample: int = 1, wait: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds per step of each side in ``repeats`` rounds; every round runs all sides in turn.

    Args:
        run: one step of a side, by name.
        warm_up: rounds that are not counted.
        wait: returns when the device has finished.
    """
    samples: dict[str, list[float]] = {name: [] for name in run}
    for i in range(warm_up + repeats):
        for name, step in run.items():
            say(f"round {i + 1} of {warm_up + repeats}, {name}, {steps_per_sample} steps")
            wait()
            start = time.perf_counter()
            for _ in range(steps_per_sample):
                step()
            wait()
            if i >= warm_up:
                samples[name].append((time.perf_counter() - start) / steps_per_sample)
    return samples


def steps_per_sample(arguments: argparse.Namespace, device: torch.device) -> int:
    return arguments.steps_per_sample or STEPS_PER_SAMPLE[device.type]


def measure(
    steppers: Mapping[str, Stepper], arguments: argparse.Namespace, device: torch.device, *, warm_up: int
) -> dict[str, list[float]]:
    """Seconds per step of each side, from its first step on, see :func:`alternate`."""
    samples = alternate(
        {name: _counted(stepper) for name, stepper in steppers.items()},
        repeats=arguments.repeats,
        warm_up=warm_up,
        steps_per_sample=steps_per_sample(arguments, device),
        wait=lambda: synchronize(device),
    )
    for stepper in steppers.values():
        stepper.check()
    return samples


def _counted(stepper: Stepper) -> Callable[[], None]:
    """``stepper`` as a function that runs its next step."""
    position = iter(range(stepper.config.max_steps))
    return lambda: stepper.run(next(position))


def memory_in_processes(script: str, argv: Sequence[str], names: Sequence[str], scratch: Path) -> dict[str, float]:
    """Peak memory in MiB of every side, each in a fresh process: ``script`` with ``--memory-of NAME`` behind ``argv``.

    Args:
        scratch: folder of this process, whose generated scenes the others use.
    """
    found = {}
    for name in names:
        say(f"peak memory of {name}, in a process of its own")
        command = [sys.executable, script, *argv, "--scratch", str(scratch), "--memory-of", name]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode != 0:
            raise RuntimeError(f"measuring the memory of {name} failed: {answer.stderr.strip()[-500:]}")
        found[name] = json.loads(answer.stdout.splitlines()[-1])["peak_memory_mb"]
    return found


def run_in_scratch(
    benchmark: Callable[[argparse.Namespace, Sequence[str], Path], int], arguments: argparse.Namespace, argv: Sequence[str]
) -> int:
    """Exit status of ``benchmark(arguments, argv, folder)``, whose folder is gone afterwards unless ``--scratch`` names one."""
    if arguments.scratch is not None:
        return reported(lambda: benchmark(arguments, argv, arguments.scratch))
    with tempfile.TemporaryDirectory() as scratch:
        return reported(lambda: benchmark(arguments, argv, Path(scratch)))
