"""The ablation's table and plots, from scores whose differences and intervals are known."""

from __future__ import annotations

import csv
import io
import math

import pytest
from PIL import Image

from co3d_ensemble.report.ablation_plots import mean_curve, plot_curves, plot_differences, psnr_of_rgb_loss
from co3d_ensemble.report.ablation_table import RowScores, csv_cells, csv_table, difference, differences, markdown_table, sequence_table


def scores(values, iou=0.9):
    return {column: {"psnr_masked": value, "iou": iou, "psnr_fg": 20.0, "depth_abs_fg": None} for column, value in values.items()}


BASE = RowScores("base", "all of it", None, scores({("a", 0): 20.0, ("a", 1): 21.0, ("b", 0): 30.0, ("b", 1): 30.5}), missing=0)
ROW = RowScores(
    "row",
    "- a part",
    "base",
    scores({("a", 0): 19.0, ("a", 1): 19.6, ("b", 0): 29.8}, iou=0.85),
    seconds={("a", 0): 60.0, ("a", 1): 120.0, ("b", 0): 90.0},
    best_share={("a", 0): 1.0, ("a", 1): 0.8, ("b", 0): 0.9},
    missing=1,
    note="stands in for another",
)
LONELY = RowScores("lonely", "builds on what is not asked for", "elsewhere", scores({("a", 0): 1.0}))


def test_differences_are_paired_by_sequence_and_seed():
    found = difference(ROW, BASE, "psnr_masked")
    assert found.by_column == pytest.approx({("a", 0): -1.0, ("a", 1): -1.4, ("b", 0): -0.2})
    assert (found.over_cells.count, found.over_sequences.count) == (3, 2)
    mean = -2.6 / 3
    deviation = math.sqrt(sum((x - mean) ** 2 for x in (-1.0, -1.4, -0.2)) / 2)
    assert found.over_cells.mean == pytest.approx(mean)
    assert found.over_cells.half_width == pytest.approx(4.302653 * deviation / math.sqrt(3), rel=1e-6)
    assert found.over_sequences.mean == pytest.approx((-1.2 - 0.2) / 2)
    assert found.over_sequences.half_width == pytest.approx(12.706205 * 0.5, rel=1e-6)  # two sequences: one degree of freedom


def test_a_metric_without_ground_truth_and_a_row_without_its_base_have_no_difference():
    assert difference(ROW, BASE, "depth_abs_fg").by_column == {}
    assert set(differences([BASE, ROW, LONELY], "psnr_masked")) == {"row"}


def test_the_markdown_table_shows_means_differences_and_what_is_missing():
    text = markdown_table([BASE, ROW, LONELY])
    lines = text.splitlines()
    head, row = (line.split("|") for line in (lines[0], lines[3]))
    assert len(head) == len(row) and {line.count("|") for line in lines[:5]} == {lines[0].count("|")}
    assert " 3 of 4 " in row and " 19.60 " not in row and " 22.80 " in row  # mean of 19.0, 19.6, 29.8
    assert " -0.87 +- 1.52 " in row and " -0.70 +- 6.35 " in row  # neither excludes 0
    assert " **-0.0500 +- 0.0000** " in row and " 1.5 " in row and " 90% " in row
    assert "- row: stands in for another" in text
    assert "with 1 comparisons" in text and "Student's t" in text


def test_one_cell_has_a_difference_without_an_interval():
    one = RowScores("one", "x", "base", scores({("a", 0): 20.5}))
    assert " +0.50 " in markdown_table([BASE, one]) and "nan" not in markdown_table([BASE, one])
    assert "with 0 comparisons per metric" in markdown_table([BASE, one])  # what has no interval cannot exclude 0


def test_the_table_of_sequences_is_the_mean_over_seeds():
    lines = sequence_table([BASE, LONELY]).splitlines()
    assert lines[0] == "| row | a | b |" and lines[2] == "| base | 20.50 | 30.25 |" and lines[3] == "| lonely | 1.00 |  |"


def test_csv_tables_hold_the_numbers_and_blanks_where_there_are_none():
    rows = list(csv.DictReader(io.StringIO(csv_table([BASE, ROW, LONELY]))))
    assert [row["row"] for row in rows] == ["base", "row", "lonely"]
    assert float(rows[1]["psnr_masked"]) == pytest.approx(22.8) and rows[1]["missing"] == "1" and rows[1]["depth_abs_fg"] == ""
    assert float(rows[1]["psnr_masked_difference"]) == pytest.approx(-2.6 / 3, rel=1e-5) and rows[1]["psnr_masked_difference_cells"] == "3"
    assert float(rows[1]["iou_difference_sequences"]) == pytest.approx(-0.05) and rows[1]["seconds"] == "90"
    assert rows[0]["psnr_masked_difference"] == rows[2]["psnr_masked_95_cells"] == ""
    cells = list(csv.DictReader(io.StringIO(csv_cells([BASE, ROW]))))
    assert len(cells) == 7
    assert cells[4] | {"psnr_fg": ""} == {
        "row": "row", "sequence": "a", "seed": "0", "psnr_masked": "19", "psnr_fg": "", "iou": "0.85", "depth_abs_fg": "",
        "ssim": "", "seconds": "60", "best_share": "1",
    }  # fmt: skip


def test_nothing_finished_is_a_table_all_the_same(tmp_path):
    empty = [RowScores("base", "x", None, {}, missing=2), RowScores("row", "y", "base", {}, missing=2)]
    assert "0 of 2" in markdown_table(empty) and "nan" not in markdown_table(empty)
    assert len(csv_table(empty).splitlines()) == 3 and len(csv_cells(empty).splitlines()) == 1
    assert plot_differences(empty, tmp_path / "a.png") is None and plot_curves({"base": []}, {"base": ([], [])}, tmp_path / "b.png") is None
    assert not list(tmp_path.iterdir())


def test_plots_are_whole_pictures(tmp_path):
    assert plot_differences([BASE, ROW], tmp_path / "a.png") == tmp_path / "a.png"
    curve = [(0.5, 20.0), (1.0, 21.0)]
    plot_curves({"base": curve, "row": []}, {"base": (curve, curve), "row": ([], [])}, tmp_path / "b.png")
    for path in (tmp_path / "a.png", tmp_path / "b.png"):
        with Image.open(path) as picture:
            assert picture.size[0] > 400 and len(picture.convert("RGB").getcolors(1 << 20)) > 3
    assert not list(tmp_path.glob("*.tmp*"))


def test_the_mean_curve_is_as_long_as_all_reach_on_the_grid_of_the_coarsest():
    fine = [(0.25, 1.0), (0.5, 2.0), (0.75, 3.0), (1.0, 4.0)]
    coarse = [(0.4, 10.0), (0.8, 20.0), (1.0, 30.0)]
    assert mean_curve([fine, coarse]) == [(0.4, pytest.approx(5.8)), (0.8, pytest.approx(11.6)), (1.0, pytest.approx(17.0))]
    stopped_early = fine[:3]
    assert [share for share, _ in mean_curve([stopped_early, coarse])] == [0.25, 0.5, 0.75]
    assert mean_curve([]) == [] and mean_curve([[]]) == []


def test_a_loss_of_three_channels_each_off_by_a_tenth_is_20_db():
    assert psnr_of_rgb_loss(3 * 0.1**2) == pytest.approx(20.0)
