"""From rows, sequences and seeds to cells: one training run each, shared between rows of the same configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from co3d_ensemble.ablation.rows import ROWS, Row
from co3d_ensemble.ablation.settings import AblationConfig
from co3d_ensemble.assembly import compose_experiment
from co3d_ensemble.base.quoting import override, with_escapes
from co3d_ensemble.pipeline import run_directory
from co3d_ensemble.scripts import first_line
from co3d_ensemble.training.records import read_metrics
from co3d_ensemble.training.run_directory import RunDirectory, config_differences

GENERATED_SUBSET = "manyview_dev_0"
CRITERION = "psnr_masked"  # of the validation frames: what picks the best checkpoint picks the best row


@dataclass(frozen=True)
class SequencePlace:
    """A sequence and where it lies."""

    root: Path
    category: str
    subset_name: str

    @property
    def name(self) -> str:
        return f"{self.category}/{self.subset_name}"


@dataclass(frozen=True)
class Cell:
    """One training run: a row's recipe on a sequence from a seed.

    Attributes:
        row: that owns the run; other rows of the same configuration read it.
        recipe: the row's Hydra overrides, and ``composed`` what they compose to without ``own``.
    """

    row: str
    sequence: SequencePlace
    seed: int
    output_dir: str
    recipe: tuple[str, ...]
    composed: DictConfig

    @property
    def own(self) -> dict[str, Any]:
        """The settings in which cells of one row differ."""
        return {
            "dataset_root": str(self.sequence.root),
            "category": self.sequence.category,
            "subset_name": self.sequence.subset_name,
            "output_dir": self.output_dir,
            "member": self.member,
            "training.seed": self.seed,
        }

    @property
    def overrides(self) -> tuple[str, ...]:
        """All Hydra overrides of ``launch/train_sequence.py``."""
        return (*self.recipe, *(override(key, value) for key, value in self.own.items()))

    @cached_property
    def config(self) -> DictConfig:
        """What they compose to."""
        config = self.composed.copy()
        for key, value in self.own.items():
            OmegaConf.update(config, key, with_escapes(value))
        return config

    @property
    def member(self) -> str:
        return member_name(self.row, self.seed)

    @property
    def name(self) -> str:
        return f"{self.sequence.name}/{self.member}"

    @cached_property
    def run(self) -> RunDirectory:
        return RunDirectory(run_directory(self.output_dir, self.sequence.category, self.sequence.subset_name, self.member))

    def is_finished(self) -> bool:
        """Whether the run is trained to its end and scored.

        Raises:
            ValueError: its folder holds a run of other settings.
        """
        if not self.run.results_path.exists():
            return False
        stored, wanted = self.run.config, self.config.copy()
        if self.run.fixed_max_steps is not None:
            OmegaConf.update(wanted, "training.max_steps", self.run.fixed_max_steps)
        differences = config_differences(stored, wanted)
        if differences:
            told = "; ".join(f"{key}: {before!r} in the run, {now!r} now" for key, (before, now) in differences.items())
            raise ValueError(f"{self.run.path} holds a run of other settings ({told}): use another output_dir, or remove the run")
        return True


@dataclass(frozen=True)
class CellResult:
    """What a finished run says of itself.

    Attributes:
        metrics: of the target frames at the run's resolution; None where there is no ground truth.
        validation: (step, metrics) in order; of averaged weights where there are such.
        training_rgb: (step, ``loss_roi_rgb``, mean since the last record); of the weights as trained.
        seconds, steps, best_step: of the training; ``best_step`` is that of the weights which were scored.
    """

    metrics: dict[str, float | None]
    validation: tuple[tuple[int, dict[str, float | None]], ...] = ()
    training_rgb: tuple[tuple[int, float | None], ...] = ()
    seconds: float | None = None
    steps: int | None = None
    best_step: int | None = None

    @property
    def best_validation(self) -> float | None:
        return max((metrics[CRITERION] for _, metrics in self.validation if metrics.get(CRITERION) is not None), default=None)


def read_result(run: RunDirectory) -> CellResult:
    """Of a finished run."""
    results = json.loads(run.results_path.read_text())
    validations, trainings = (read_metrics(run.metrics_path, kind) for kind in ("validation", "train"))
    return CellResult(
        metrics=results["metrics"],
        validation=tuple((record["step"], record["metrics"]) for record in validations),
        training_rgb=tuple((record["step"], record["losses"].get("loss_roi_rgb")) for record in trainings),
        seconds=results["seconds"],
        steps=results["steps"],
        best_step=results["best_step"],
    )


class Plan:
    """All cells of an ablation in the order in which they are run: a seed of all rows on all sequences before the next.

    Attributes:
        rows: of the table.
        sequences, seeds: its columns.
        cells: the runs, each once.
    """

    def __init__(self, settings: AblationConfig, rows: Sequence[Row]) -> None:
        self.settings, self.rows, self.seeds = settings, tuple(rows), tuple(settings.seeds)
        generated = Path(settings.output_dir) / "generated"
        self.sequences = [SequencePlace(Path(settings.dataset_root or ""), *name.split("/")) for name in settings.sequences]
        self.sequences += [SequencePlace(generated, name, GENERATED_SUBSET) for name in settings.generated]
        names = [sequence.name for sequence in self.sequences]
        if len(set(names)) < len(names):
            raise ValueError(f"sequences={names}: a generated and a given sequence have one name, and would share folders")
        if not names:
            raise ValueError("no sequence: set dataset_root and sequences, or generated")
        kinds = {row.kind for row in self.rows if row.is_trained}  # all rows of a kind: who owns a run must not depend on who is asked for
        self._recipes = {row.name: self._recipe(row) for row in ROWS if row.kind in kinds}
        self._owners = owners({name: config for name, (_, config) in self._recipes.items()})
        self._cells: dict[tuple[str, str, int], Cell] = {}
        for seed in self.seeds:
            for sequence in self.sequences:
                for row in self.rows:
                    if row.is_trained:
                        owner = self._owners[row.name]
                        key = (owner, sequence.name, seed)
                        self._cells.setdefault(key, self._cell(owner, sequence, seed))
        self.cells = list(self._cells.values())

    def cell(self, row: str, sequence: str, seed: int) -> Cell:
        """The run that a trained row reads there."""
        return self._cells[self._owners[row], sequence, seed]

    def _recipe(self, row: Row) -> tuple[list[str], DictConfig]:
        settings = self.settings
        overrides = [*getattr(settings, row.kind), *row.recipe(), *settings.row_overrides.get(row.name, [])]
        if settings.budget is not None:
            overrides.append(f"training.budget_minutes={settings.budget}")
        overrides.append("training.progress=false")
        try:
            config = compose_experiment(overrides)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise ValueError(f"row {row.name}: {first_line(error)}") from error
        return overrides, config

    def _cell(self, row: str, sequence: SequencePlace, seed: int) -> Cell:
        overrides, composed = self._recipes[row]
        return Cell(row, sequence, seed, self.settings.output_dir, tuple(overrides), composed)


def owners(configs: Mapping[str, Any]) -> dict[str, str]:
    """Row -> the first row of the same configuration, whose runs both read."""
    plain = {name: {**OmegaConf.to_container(config), "member": None} for name, config in configs.items()}
    return {name: next(other for other, same in plain.items() if same == config) for name, config in plain.items()}


def member_name(row: str, seed: int) -> str:
    return f"{row}_seed{seed}"


def best_row(candidates: Sequence[str], validations: Mapping[tuple[str, str, int], float | None]) -> str | None:
    """The row with the highest mean validation psnr_masked over the (sequence, seed) pairs that all candidates have.

    Args:
        validations: by (row, sequence, seed).
    """
    columns = {(sequence, seed) for _, sequence, seed in validations}
    shared = [column for column in columns if all(validations.get((row, *column)) is not None for row in candidates)]
    if not shared:
        return None
    return max(candidates, key=lambda row: sum(validations[row, *column] for column in shared))  # type: ignore[misc]
