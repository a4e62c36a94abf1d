"""What the finished cells of an ablation say: rows of scores, curves, and the files that show them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from co3d_ensemble.ablation.cells import Cell, CellResult, Plan, best_row, read_result
from co3d_ensemble.ablation.fused import FusedCell, read_fused
from co3d_ensemble.ablation.rows import ROWS, Row
from co3d_ensemble.files import write_text_atomic
from co3d_ensemble.report.ablation_plots import mean_curve, plot_curves, plot_differences, psnr_of_rgb_loss
from co3d_ensemble.report.ablation_table import Column, RowScores, csv_cells, csv_table, markdown_table, sequence_table

CURVE_ROWS = 8  # lines that a plot of curves can bear


class Results:
    """The finished cells of a plan, each looked at once.

    Attributes:
        failures: reason by name of the cells that cannot be finished.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.failures: dict[str, str] = {}
        self._rows = {row.name: row for row in plan.rows}
        self._read: dict[tuple[str, str], CellResult] = {}
        for cell in plan.cells:
            try:
                self.of(cell)
            except ValueError as error:  # a run of other settings is in its place
                self.failures[cell.name] = str(error)

    def of(self, cell: Cell | FusedCell) -> CellResult | None:
        """Of a cell, or None where it is not finished.

        Raises:
            ValueError: a run of other settings is in its place.
        """
        key = (cell.name, getattr(cell, "method", ""))
        if key not in self._read:
            if cell.name in self.failures or not cell.is_finished():
                return None
            self._read[key] = read_fused(cell) if isinstance(cell, FusedCell) else read_result(cell.run)
        return self._read[key]

    def has_ended(self, cell: Cell | FusedCell) -> bool:
        """Whether there is nothing to do for it: finished or failed."""
        return cell.name in self.failures or self.of(cell) is not None

    def columns(self) -> Iterator[Column]:
        yield from ((sequence.name, seed) for seed in self.plan.seeds for sequence in self.plan.sequences)

    def chosen(self, row: Row) -> str | None:
        """The member of a row of kind ``choice`` that validates best, see :func:`best_row`; None while that is open."""
        cells = {(name, *column): self.plan.cell(name, *column) for name in row.members for column in self.columns()}
        candidates = [name for name in row.members if not all(cells[name, *column].name in self.failures for column in self.columns())]
        found = {key: result.best_validation for key, cell in cells.items() if (result := self.of(cell)) is not None}
        return best_row(candidates, found)

    def cell(self, row: Row, column: Column) -> Cell | FusedCell | None:
        """What a row shows in a column; None while a choice that it depends on is open."""
        if row.is_trained:
            return self.plan.cell(row.name, *column)
        if row.kind == "choice":
            chosen = self.chosen(row)
            return None if chosen is None else self.plan.cell(chosen, *column)
        members = [self.cell(self._rows[name], column) for name in row.members]
        return None if None in members else FusedCell(tuple(members), row.method)  # type: ignore[arg-type]

    def fusable(self, seed: int) -> list[FusedCell]:
        """The cells of a seed that are still to be fused and whose members are finished; each once."""
        found = {}
        for row in self.plan.rows:
            for column in self.columns() if row.kind == "ensemble" else ():
                cell = self.cell(row, column) if column[1] == seed else None
                if cell is not None and not self.has_ended(cell) and all(self.of(member) is not None for member in cell.cells):
                    found[cell.name] = cell
        return list(found.values())

    def scores(self, row: Row) -> RowScores:
        """A row of the table, of what is finished."""
        cells = {column: self.cell(row, column) for column in self.columns()}
        found = {column: result for column, cell in cells.items() if cell is not None and (result := self.of(cell)) is not None}
        trained = found if row.is_trained else {}
        return RowScores(
            name=row.name,
            what=row.what,
            builds_on=row.builds_on,
            scores={column: result.metrics for column, result in found.items()},
            seconds={column: result.seconds for column, result in trained.items()},
            best_share={column: result.best_step / result.steps for column, result in trained.items()},
            missing=len(cells) - len(found),
            note="; ".join(filter(None, (self._note(row), no_difference(row, self.plan.rows)))),
        )

    def _note(self, row: Row) -> str:
        if row.kind == "choice":
            chosen = self.chosen(row)
            return "" if chosen is None else f"{chosen} (highest mean psnr_masked of the validation frames, over all cells)"
        if row.is_trained:
            owner = self.plan.cell(row.name, *next(self.columns())).row
            return "" if owner == row.name else f"has the settings of {owner}, whose runs it shows"
        return ""

    def curves(self, row: Row) -> tuple[list[tuple[float, float]], list[tuple[float, float]], list[tuple[float, float]]]:
        """Mean over the finished cells, by share of the steps: psnr_masked and psnr_fg of the validation, psnr of the ROI's rays."""
        found = [result for column in self.columns() if (result := self.of(self.plan.cell(row.name, *column))) is not None]

        def validation(metric: str) -> list[tuple[float, float]]:
            return mean_curve([_shares(result, [(step, metrics.get(metric)) for step, metrics in result.validation]) for result in found])

        losses = [[(step, loss and psnr_of_rgb_loss(loss)) for step, loss in result.training_rgb] for result in found]
        fit = mean_curve([_shares(result, curve) for result, curve in zip(found, losses)])
        return validation("psnr_masked"), validation("psnr_fg"), fit

    def write_report(self, output: Path, heading: str) -> None:
        """``table.md``, ``table.csv``, ``cells.csv``, ``differences.png`` and ``curves.png`` in ``output``."""
        rows = [self.scores(row) for row in self.plan.rows]
        parts = [heading, markdown_table(rows), "psnr_masked by sequence:\n", sequence_table(rows)]
        if self.failures:
            parts.append("Failed cells:\n\n" + "\n".join(f"- {name}: {reason}" for name, reason in self.failures.items()) + "\n")
        write_text_atomic(output / "table.md", "\n".join(parts))
        write_text_atomic(output / "table.csv", csv_table(rows))
        write_text_atomic(output / "cells.csv", csv_cells(rows))
        plot_differences(rows, output / "differences.png")
        shown = curve_rows(self.plan.rows)
        curves = {row.name: self.curves(row) for row in shown}
        validation = {name: curve for name, (curve, _, _) in curves.items()}
        plot_curves(validation, {name: (unseen, fit) for name, (_, unseen, fit) in curves.items()}, output / "curves.png")


def no_difference(row: Row, rows: Sequence[Row]) -> str:
    """Why a table of ``rows`` cannot say what ``row`` gains; empty where it can, or where the row builds on none."""
    if row.builds_on is None or row.builds_on in {other.name for other in rows}:
        return ""
    return f"no difference, because {row.builds_on}, which it builds on, is not in this table (rows=[...,{row.builds_on}] adds it)"


def curve_rows(rows: Sequence[Row]) -> list[Row]:
    """The trained rows whose curves are shown: the whole recipes and those that lead up to them, not the leave-one-out rows."""
    chosen_from = {name for row in ROWS for name in row.members}
    return [row for row in rows if row.is_trained and row.name in chosen_from][:CURVE_ROWS]


def _shares(result: CellResult, points: Sequence[tuple[int, float | None]]) -> list[tuple[float, float]]:
    """Steps as shares of the run's; without what is unknown."""
    return [(step / result.steps, value) for step, value in points if value is not None]
