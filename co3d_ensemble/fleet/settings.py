"""Settings of a fleet. What is not one of them is a Hydra override for every job, as of ``launch/train_sequence.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import MISSING

from co3d_ensemble.settings import setting

SEQUENCE_SETS = ("dev", "test")
AUDITS = ("headers", "full")


@dataclass
class FleetConfig:
    dataset_root: str = setting(MISSING, "CO3Dv2 root folder", literal=True)
    output_dir: str = setting(
        "outputs", "runs go to <output_dir>/<category>/<subset_name>/<model>, logs to <output_dir>/fleet", literal=True
    )
    sequence_set: list[str] = setting(["dev"], "dev, test or both: [dev,test]")
    experiment: str = setting("ensemble", "file of configs/experiment; of an ensemble every member is a model")
    categories: list[str] = setting([], "only these; empty: all of category_to_subset_name_list.json")
    subsets: list[str] = setting([], "only these subset names, e.g. [manyview_dev_0]; empty: all")
    models: list[str] = setting([], "only these models of the experiment; empty: all")
    device: str = setting("auto", "auto: the worker's own GPU, cuda:<LOCAL_RANK>, or cpu where there is none")
    jobs_per_device: int = setting(1, "jobs that a worker runs at once on its device")
    threads: int | None = setting(None, "CPU threads per job; null: the node's cores shared among its jobs")
    max_attempts: int = setting(3, "consecutive attempts without a newer checkpoint after which a job has failed")
    retry_failed: bool = setting(False, "try again what an earlier call gave up")
    grace_seconds: float = setting(25.0, "for checkpoints after SIGTERM, then SIGKILL; below the 30 s that torchrun gives")
    join_seconds: float = setting(300.0, "how long a worker waits for its round's first worker")
    min_free_gb: float = setting(1.0, "less free space in output_dir stops the fleet instead of failing its jobs")
    dry_run: bool = setting(False, "print jobs, order, disk needs and expected hours, and check the data; start nothing")
    probe_seconds: float = setting(0.0, "how long the dry run times steps of each model on one subset, for the expected hours; 0: not")
    audit: str = setting("headers", "of the dry run: headers | full (decodes every picture)")
    audit_workers: int | None = setting(None, "processes of the dry run's checks; null: one per core")
    finish_only: bool = setting(False, "do the last step alone: render what is missing, fuse, score, export, summarise")

    def __post_init__(self) -> None:
        for name in ("sequence_set", "categories", "subsets", "models"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)}: names one twice")
        if not self.sequence_set or not set(self.sequence_set) <= set(SEQUENCE_SETS):
            raise ValueError(f"sequence_set={list(self.sequence_set)}: expected a list of {' and '.join(SEQUENCE_SETS)}")
        for name in ("jobs_per_device", "max_attempts", "threads", "audit_workers", "join_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: must be positive")
        for name in ("grace_seconds", "min_free_gb", "probe_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if self.audit not in AUDITS:
            raise ValueError(f"audit={self.audit!r}: expected one of {', '.join(AUDITS)}")


PER_JOB = ("category", "subset_name", "member", "name")  # what the fleet itself sets for every job


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The fleet's own settings, and the overrides for its jobs.

    Raises:
        ValueError: an override of what the fleet sets itself.
    """
    own, overrides = [], []
    for argument in arguments:
        key = argument.partition("=")[0]
        if key.lstrip("+~") in PER_JOB:
            raise ValueError(f"{argument}: the fleet sets that for every job; categories=, subsets= and models= choose among them")
        (own if key in FleetConfig.__dataclass_fields__ or key in ("-h", "--help") else overrides).append(argument)
    return own, overrides
