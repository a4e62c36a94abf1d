"""Damages what people hand in, reads it in a child process that can be killed, and counts how that ended: what every target shares."""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from co3d_ensemble.scripts import USER_ERRORS

PAGE, TICKS = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
IDLE_FACTOR = 6  # on a busy machine a sound input takes longer, but no more CPU
MEBIBYTE = 2**20
HARD_LIMIT_MEBIBYTES = 6144  # of address space above the parent's: keeps the machine alive, whatever an input asks for


class Outcome(StrEnum):
    """How the reading of a damaged input ended; the value is what tables show."""

    NAMED = "named"  # one line that names the file or entry
    SAME = "same result"
    OTHER = "other result"  # taken, with another result
    TRACEBACK = "traceback"  # an error that no script turns into a line
    UNNAMED = "unnamed"  # a line that does not say which file
    UNFORESEEN = "unforeseen"  # what was checked before did not find it
    MEMORY = "memory"
    HANG = "hang"
    KILLED = "killed"  # by a signal, as the kernel does for memory


ALWAYS_FAULTS = frozenset(set(Outcome) - {Outcome.NAMED, Outcome.SAME, Outcome.OTHER})


class Target(ABC):
    """One kind of input. ``prepare`` runs once, in this process; the other two in a child, on a copy of what it made.

    Attributes:
        faults: outcomes that should not be. ``OTHER`` is one where damage must not go unseen, as in an archive.
        seconds, mebibytes: limits of one input: what takes more CPU, or ``IDLE_FACTOR`` times as long, hangs; what needs more above the
            memory that it starts with is ``MEMORY``.
    """

    name: str
    faults: frozenset[Outcome] = ALWAYS_FAULTS
    seconds: float = 20.0
    mebibytes: int = 512

    @abstractmethod
    def prepare(self, folder: Path) -> None:
        """Writes a sound input into an empty folder, and keeps in ``self`` what its result is."""

    @abstractmethod
    def mutate(self, generator: random.Random, folder: Path) -> str:
        """Damages the copy in ``folder``; returns the kind of damage and its place in a line, ``kind: place``."""

    @abstractmethod
    def judge(self, folder: Path) -> tuple[Outcome, str]:
        """Reads the input as the scripts do. An error that it lets through counts as a traceback."""


@dataclass(frozen=True)
class Case:
    number: int
    damage: str
    outcome: Outcome
    told: str

    @property
    def kind(self) -> str:
        return self.damage.partition(":")[0]


def outcome_of_error(error: Exception, names: Collection[str]) -> Outcome:
    """What a script makes of an error: a line that names one of ``names``, a line that does not, or a traceback."""
    if not isinstance(error, USER_ERRORS):
        return Outcome.TRACEBACK
    line = str(error)
    is_line = "\n" not in line and line.isprintable()
    return Outcome.NAMED if is_line and any(name in line for name in names) else Outcome.UNNAMED


def fuzz(
    target: Target, numbers: Iterable[int], scratch: Path, *, seed: int = 0, tell: Callable[[Case], None] = lambda case: None
) -> list[Case]:
    """Runs the given inputs of a target; number and seed say what is done to each, whatever ran before.

    Args:
        scratch: a folder of its own; sound input and copies lie there.
        tell: called after each input.
    """
    sound, copy = scratch / "sound", scratch / "damaged"
    sound.mkdir(parents=True)
    target.prepare(sound)
    cases = []
    for number in numbers:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(sound, copy, symlinks=True)
        cases.append(_in_a_child(target, number, copy, seed))
        tell(cases[-1])
    shutil.rmtree(copy, ignore_errors=True)
    return cases


def _in_a_child(target: Target, number: int, folder: Path, seed: int) -> Case:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        gc.freeze()  # or its collections would copy the parent's memory page by page
        try:
            _limit_memory()
            _act(target, number, folder, seed, writer)
        finally:
            os._exit(0)  # nothing of the parent's, pytest's say, is to run here
    os.close(writer)
    began, received, hangs = time.monotonic(), b"", False
    while not hangs:
        ready, _, _ = select.select([reader], [], [], 0.1)
        chunk = os.read(reader, 1 << 16) if ready else b""
        received += chunk
        if ready and not chunk:
            break
        hangs = _cpu_seconds(child) > target.seconds or time.monotonic() - began > IDLE_FACTOR * target.seconds
    os.close(reader)
    if hangs:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    damage, before, outcome, told = _parsed(received)
    needed = (usage.ru_maxrss * 1024 - before) / MEBIBYTE
    if hangs:
        return Case(number, damage, Outcome.HANG, f"more than {target.seconds} s")
    if os.WIFSIGNALED(status) or outcome is None:
        return Case(number, damage, Outcome.KILLED, f"status {status}")
    if needed > target.mebibytes:
        return Case(number, damage, Outcome.MEMORY, f"{needed:.0f} MiB; {told}")
    return Case(number, damage, outcome, told)


def _act(target: Target, number: int, folder: Path, seed: int, writer: int) -> None:
    """Sends the damage first, so that a child which does not come back has told what was done to it."""
    damage = target.mutate(random.Random(f"{target.name}:{seed}:{number}"), folder)
    _send(writer, damage, _resident_bytes())
    try:
        outcome, told = target.judge(folder)
    except Exception:
        outcome, told = Outcome.TRACEBACK, traceback.format_exc(limit=-3)
    _send(writer, outcome.value, told)


def _send(writer: int, *parts: Any) -> None:
    data = (json.dumps(parts) + "\n").encode()
    while data:
        data = data[os.write(writer, data) :]


def _parsed(received: bytes) -> tuple[str, int, Outcome | None, str]:
    """Damage, resident bytes after it, outcome and what was told; what did not arrive is missing, 0, None and empty."""
    lines = [json.loads(line) for line in received.splitlines(keepends=True) if line.endswith(b"\n")]
    damage, before = lines[0] if lines else ("missing: the damage itself failed", 0)
    outcome, told = lines[1] if len(lines) > 1 else (None, "")
    return damage, before, None if outcome is None else Outcome(outcome), told


def _cpu_seconds(process: int) -> float:
    """Of a process that has not been waited for, and its children that have."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICKS


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * PAGE + HARD_LIMIT_MEBIBYTES * MEBIBYTE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def summary(target: Target, cases: Collection[Case], *, seed: int) -> dict[str, Any]:
    """Counts per outcome, of all inputs and per kind of damage, and the faults one by one."""
    counts = Counter(case.outcome.value for case in cases)
    kinds = sorted({case.kind for case in cases})
    faults = [case for case in cases if case.outcome in target.faults]
    return {
        "target": target.name,
        "seed": seed,
        "inputs": len(cases),
        "counts": {outcome.value: counts[outcome.value] for outcome in Outcome},
        "kinds": {kind: dict(Counter(case.outcome.value for case in cases if case.kind == kind)) for kind in kinds},
        "faults": [{"number": case.number, "damage": case.damage, "outcome": case.outcome.value, "told": case.told} for case in faults],
    }


def table(results: Collection[dict[str, Any]]) -> str:
    """A row per target, a column per outcome."""
    rows = [["inputs", "n", *(outcome.value for outcome in Outcome)]]
    rows += [[result["target"], str(result["inputs"]), *(str(count) for count in result["counts"].values())] for result in results]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in rows)
