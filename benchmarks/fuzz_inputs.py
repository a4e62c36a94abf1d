"""Damages inputs at random and counts how their reading ends: named, same result, traceback, unnamed, hang, ...

    python benchmarks/fuzz_inputs.py annotations                       # 3,000 inputs, from seed 0
    python benchmarks/fuzz_inputs.py annotations --count 300 --seed 7 --json FILE
    python benchmarks/fuzz_inputs.py annotations --only 1234           # one input again, with its damage and its end

Every input is read in a child process with limits of time and memory. Exit code 0 where none ended as it should not, else 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.fuzzing import Case, Target, fuzz, summary, table  # noqa: E402
from co3d_ensemble.scripts import run_script  # noqa: E402

TARGETS = {  # what is imported when it is asked for: module and class
    "annotations": ("fuzz_annotations", "Annotations"),
    "archives": ("fuzz_archives", "Archives"),
    "checkpoints": ("fuzz_checkpoints", "Checkpoints"),
}
TELL_EVERY_SECONDS = 10.0


def target_named(name: str) -> Target:
    module, kind = TARGETS[name]
    return getattr(importlib.import_module(f"benchmarks.{module}"), kind)()


def run(name: str, numbers: range, *, seed: int, verbose: bool = False) -> dict[str, object]:
    """Fuzzes one target with a line of progress every ten seconds."""
    print(f"{name}: {len(numbers)} inputs from seed {seed}", flush=True)
    target, began = target_named(name), time.monotonic()
    told, done = began, 0

    def tell(case: Case) -> None:
        nonlocal told, done
        done += 1
        if verbose:
            print(f"{case.number}: {case.damage}\n{case.outcome.value}: {case.told}", flush=True)
        elif case.outcome in target.faults:
            print(f"{name} {case.number} ({case.damage}): {case.outcome.value}: {case.told.strip()}", flush=True)
        elif time.monotonic() - told > TELL_EVERY_SECONDS:
            told = time.monotonic()
            left = (told - began) / done * (len(numbers) - done)
            print(f"{name}: {done} of {len(numbers)}, {left:.0f} s left", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        cases = fuzz(target, numbers, Path(scratch) / name, seed=seed, tell=tell)
    return summary(target, cases, seed=seed)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", choices=sorted(TARGETS))
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of one input, which is shown")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    numbers = range(given.count) if given.only is None else range(given.only, given.only + 1)
    results = [run(name, numbers, seed=given.seed, verbose=given.only is not None) for name in given.targets]
    print(table(results))  # type: ignore[arg-type]
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(results, indent=2) + "\n")
    return 1 if any(result["faults"] for result in results) else 0


if __name__ == "__main__":
    run_script(main)
