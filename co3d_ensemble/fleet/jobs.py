"""The jobs of a fleet: every subset x every model, longest expected first."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """One child process, to be done once.

    Attributes:
        name: ``<category>/<subset_name>/<model>``: its run's folder below the output folder, and its own below ``fleet/jobs``.
        command: of the child; its argument ``device={device}`` gets the device that it runs on.
        recipe: digest of all settings that can change the result; what was done by another recipe is not done.
        expected_seconds: from earlier results, None where there are none.
        work: comparable among the jobs of a fleet, for their order; any unit.
    """

    name: str
    command: tuple[str, ...]
    recipe: str
    expected_seconds: float | None = None
    work: float = 1.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Job:
        return cls(**{**value, "command": tuple(value["command"])})


def longest_first(jobs: Iterable[Job]) -> list[Job]:
    """Jobs in the order they are claimed in: by expected seconds, those unknown by their work on the scale of the known.

    Longest first keeps the makespan within 4/3 of the optimum (Graham, SIAM J. Appl. Math. 1969), and close to it with many
    jobs per worker. Equal jobs are in the order of their names, so that every worker counts the same.
    """
    jobs = list(jobs)
    known = [job for job in jobs if job.expected_seconds is not None and job.work > 0]
    rate = math.fsum(job.expected_seconds for job in known) / math.fsum(job.work for job in known) if known else 1.0

    def length(job: Job) -> float:
        return job.work * rate if job.expected_seconds is None else job.expected_seconds

    return sorted(jobs, key=lambda job: (-length(job), job.name))


def chosen_subsets(
    available: Sequence[tuple[str, str]], *, categories: Sequence[str] = (), subsets: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """The (category, subset name) pairs that the filters leave; an empty filter leaves all.

    Raises:
        ValueError: a filter names what is not there, or nothing is left.
    """
    for name, wanted, there in (("categories", categories, [c for c, _ in available]), ("subsets", subsets, [s for _, s in available])):
        unknown = [value for value in wanted if value not in there]
        if unknown:
            raise ValueError(f"{name}={list(wanted)}: no {', '.join(unknown)} here, there are {', '.join(dict.fromkeys(there)) or 'none'}")
    left = [(c, s) for c, s in available if (not categories or c in categories) and (not subsets or s in subsets)]
    if not left:
        raise ValueError(f"categories={list(categories)}, subsets={list(subsets)}: no subset has both")
    return left


def digest(value: Any) -> str:
    """Of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
