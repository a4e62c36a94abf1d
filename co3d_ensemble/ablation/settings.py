"""Settings of an ablation: a preset of ``configs/ablation`` and what the command line changes in it."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from co3d_ensemble.ablation.rows import ROWS, rows_named
from co3d_ensemble.assembly import CONFIG_DIR
from co3d_ensemble.base.paths import listed, plain_part
from co3d_ensemble.data.synthetic import SyntheticConfig
from co3d_ensemble.settings import setting

PRESETS = CONFIG_DIR / "ablation"


@dataclass
class AblationConfig:
    preset: str = setting("ablation_laptop", "file of configs/ablation: recipes, rows and generated sequences")
    dataset_root: str | None = setting(None, "CO3Dv2 root of `sequences`", literal=True)
    sequences: list[str] = setting([], "'<category>/<subset_name>' in dataset_root")
    generated: list[str] = setting([], "names in generated_sequences; written to <output_dir>/generated")
    generated_sequences: dict[str, dict[str, Any]] = setting({}, "settings of generated sequences by category, see SyntheticConfig")
    seeds: list[int] = setting([0, 1], "of weights, rays and noise; one run each")
    rows: list[str] = setting([], "rows of the table; empty: all of co3d_ensemble/ablation/rows.py but the optional ones")
    budget: float | None = setting(None, "minutes of training per cell; null: the steps of the preset, the same for every machine")
    output_dir: str = setting("outputs/ablation", "runs, logs, tables and plots", literal=True)
    jobs: int = setting(1, "cells that run at once")
    threads: int | None = setting(None, "CPU threads per cell; null: the machine's cores shared among the jobs")
    devices: list[str] = setting(["auto"], "devices that the jobs take in turn, e.g. [cuda:0,cuda:1]")
    nerf: list[str] = setting([], "the NeRF recipe: Hydra overrides as of launch/train_sequence.py")
    tensorf: list[str] = setting([], "the TensoRF recipe, likewise")
    row_overrides: dict[str, list[str]] = setting({}, "further Hydra overrides of single rows, by name")
    report_only: bool = setting(False, "write the tables and plots of what is finished, and train nothing")

    def __post_init__(self) -> None:
        for name in ("jobs", "threads", "budget"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: must be positive")
        for name in ("seeds", "devices", "sequences", "generated"):
            values = getattr(self, name)
            if name != "devices" and len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)}: names one twice")
        for name in ("seeds", "devices"):
            if not getattr(self, name):
                raise ValueError(f"{name}=[]: expected at least one")
        if self.sequences and self.dataset_root is None:
            raise ValueError(f"sequences={list(self.sequences)}: dataset_root must say where they are")
        for sequence in self.sequences:
            if sequence.count("/") != 1:
                raise ValueError(f"sequences: {sequence!r} is not '<category>/<subset_name>'")
            for what, name in zip(("category", "subset_name"), sequence.split("/"), strict=True):
                plain_part(name, f"sequences: {sequence!r}: {what}")
        self._check_generated()
        if len(self.devices) > self.jobs:
            raise ValueError(f"devices={list(self.devices)}: more than jobs={self.jobs}, which would leave some of them idle")
        rows_named(self.rows)
        rows_named(list(self.row_overrides))
        untrained = [row.name for row in ROWS if row.name in self.row_overrides and not row.is_trained]
        if untrained:
            raise ValueError(f"row_overrides.{untrained[0]}: that row trains nothing which settings could change")

    def _check_generated(self) -> None:
        missing = [name for name in self.generated if name not in self.generated_sequences]
        if missing:
            raise ValueError(f"generated={missing}: not in generated_sequences, which has {', '.join(self.generated_sequences) or 'none'}")
        known = {entry.name for entry in fields(SyntheticConfig)}
        for name, settings in self.generated_sequences.items():
            plain_part(name, "generated_sequences: name")
            unknown = sorted(set(settings) - known)
            if unknown:
                raise ValueError(f"generated_sequences.{name} has no {', '.join(unknown)}: expected keys among {', '.join(sorted(known))}")
            SyntheticConfig(**settings)

    @property
    def row_names(self) -> list[str]:
        return list(self.rows) or [row.name for row in ROWS if not row.optional]

    @property
    def threads_per_job(self) -> int:
        return self.threads or max(1, (os.cpu_count() or 1) // self.jobs)


def preset_defaults(name: str, folder: Path = PRESETS) -> Any:
    """The structured settings with a preset's values, to merge a command line into.

    Raises:
        ValueError: there is no such preset; omegaconf's errors name an unknown key of it.
    """
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"preset={name!r}: expected one of {', '.join(file.stem for file in listed(folder, '*.yaml'))}")
    return OmegaConf.merge(OmegaConf.structured(AblationConfig), OmegaConf.load(path), {"preset": name})
