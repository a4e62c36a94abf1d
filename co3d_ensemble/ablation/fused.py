"""Cells that train nothing: the finished runs of several rows on one sequence, fused.

``python -m co3d_ensemble.ablation.fused ...`` is the child process of one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import OmegaConf

from co3d_ensemble.ablation.cells import Cell, CellResult
from co3d_ensemble.base.quoting import DEVICE, override, with_escapes
from co3d_ensemble.config import EnsembleConfig
from co3d_ensemble.ensemble import fuse_sequence
from co3d_ensemble.pipeline import checkpoint_stamp
from co3d_ensemble.scripts import run_with_settings
from co3d_ensemble.training.checkpoint import Checkpoints

PLAIN, BEST = "mean", "auto"  # the published fusion, and the one that wins on the validation frames


@dataclass(frozen=True)
class FusedCell:
    """The finished runs of one sequence and seed, fused once for all methods of fusion.

    The folder's name says which runs they are, so another choice of members never meets the results of this one.
    """

    cells: tuple[Cell, ...]
    method: str

    @property
    def member(self) -> str:
        rows = "_".join(cell.row for cell in self.cells)
        return f"ensemble_{rows}_seed{self.cells[0].seed}"

    @property
    def name(self) -> str:
        return f"{self.cells[0].sequence.name}/{self.member}"

    @property
    def results_path(self) -> Path:
        return self.cells[0].run.path.with_name(self.member) / "results.json"

    def is_finished(self) -> bool:
        """Whether it was fused from the runs as they are now; runs that were only scored again are the same runs."""
        if not self.results_path.exists():
            return False
        fused = self.results_path.stat().st_mtime_ns
        return all(cell.run.results_path.stat().st_mtime_ns <= fused for cell in self.cells) or self._is_of_the_checkpoints()

    def _is_of_the_checkpoints(self) -> bool:
        """Whether ``fuse_sequence`` would leave what is there as it is."""
        if not all(Checkpoints(cell.run.checkpoints).best.exists() for cell in self.cells):
            return False
        made_from = json.loads(self.results_path.read_text()).get("made_from", {})
        return made_from.get("members") == {cell.member: checkpoint_stamp(cell.run) for cell in self.cells}

    def command(self) -> tuple[str, ...]:
        """Of a child process that fuses them; ``device={device}`` is to be replaced."""
        first = self.cells[0]
        settings = {
            "dataset_root": first.sequence.root,
            "category": first.sequence.category,
            "subset_name": first.sequence.subset_name,
            "output_dir": first.output_dir,
            "name": self.member,
        }
        place = [override(key, value) for key, value in settings.items()]
        members = [override(f"members.{cell.member}.experiment", cell.row) for cell in self.cells]
        return (sys.executable, "-m", "co3d_ensemble.ablation.fused", *place, *members, DEVICE)


def read_fused(cell: FusedCell) -> CellResult:
    """Scores of the fusion by the cell's method."""
    results = json.loads(cell.results_path.read_text())
    return CellResult(metrics=results["metrics"] if cell.method == BEST else results["methods"][cell.method])


def main(arguments: Sequence[str]) -> int:
    """Fuses; the arguments are those of ``EnsembleConfig``."""

    def fuse(settings: EnsembleConfig) -> int:
        fuse_sequence(OmegaConf.create(with_escapes(asdict(settings))))
        return 0

    return run_with_settings(list(arguments), EnsembleConfig, __doc__ or "", fuse)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
