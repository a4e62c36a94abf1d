"""The learning benchmark's arithmetic, and a toy run of it."""

from __future__ import annotations

import json

import pytest

from benchmarks import mine_learning, report


def scores(psnr: float, abs_rel: float) -> dict:
    return {"psnr": psnr, "psnr_valid": psnr, "psnr_whole": psnr, "abs_rel": abs_rel, "delta_1": 0.5}


def base(psnr: float = 18.5, abs_rel: float = 0.2, shuffled: float = 0.22, minutes: float = 20.0) -> dict:
    found = {"psnr_copy": 14.0, "psnr_warp": 16.0, "psnr_warp_oracle": 17.0, "abs_rel_constant": 0.5, "abs_rel_constant_oracle": 0.4}
    found |= {"warp_depth": 4.0, "constant_depth": 3.0}
    planes = {"8": scores(10.0, 1.0), "16": scores(psnr, abs_rel)}
    learned = {"planes": planes, "shuffled": scores(psnr, shuffled), "shuffled_planes": 16}
    return {"trained_planes": 8, "steps": 5, "baselines": found, **learned, "minutes": minutes}


def test_bars_are_met_at_their_edge_and_missed_beyond():
    bars = mine_learning.judged(base(psnr=18.0, abs_rel=0.25, shuffled=0.25, minutes=30.0))
    assert {name: bar["value"] for name, bar in bars.items()} == pytest.approx(
        {"psnr_gain_db": 2.0, "abs_rel_over_best_constant": 0.5, "abs_rel_change_by_shuffled_looks": 0.0, "minutes": 30.0}
    )
    assert all(bar["met"] for bar in bars.values())
    missed = mine_learning.judged(base(psnr=17.9, abs_rel=0.26, shuffled=0.2, minutes=30.1))
    assert not any(bar["met"] for bar in missed.values())


def test_the_table_has_baselines_oracles_and_every_number_of_planes():
    result = {"rows": {"rooms": base()}, "bars": mine_learning.judged(base()), "scenes": 600, "unseen": 20}
    result |= {"benchmark": "mine_learning", "machine": "m", "device": "cpu", "threads": 2, "torch": "2", "pytorch3d": "0", "command": "c"}
    shown = report.figures([result])
    for part in (
        "14.00",
        "16.00 (17.00)",
        "0.500 (0.400)",
        "| rooms: 5 steps with 8 planes | 8 | 10.00",
        "| the same weights | 16 | 18.50",
        "looks shuffled",
        "20.0 |",
        "- psnr_gain_db: 2.500, bar 2: met",
    ):
        assert part in shown


def test_a_toy_run_reports_and_is_not_repeated(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mine_learning, "DEFAULT_ROOT", tmp_path)
    command = ["--output", str(tmp_path / "out"), "--json", str(tmp_path / "result.json"), "--toy", "--rows", "rooms", "--override"]
    command += ["training.progress=false"]
    assert mine_learning.main(command) == 0
    assert "| rooms: 2 steps with 8 planes | 8 |" in capsys.readouterr().out
    first = json.loads((tmp_path / "result.json").read_text())
    assert list(first["rows"]) == ["rooms"] and set(first["bars"]) == set(mine_learning.judged(base()))
    assert first["rows"]["rooms"]["steps"] == 2 and first["rows"]["rooms"]["planes"].keys() == {"8", "16", "32"}
    assert (tmp_path / "result.png").exists() and (tmp_path / "result_rooms.png").exists()
    monkeypatch.setattr(mine_learning, "learned", None)  # would be called if anything were scored again
    assert mine_learning.main(command) == 0
    assert json.loads((tmp_path / "result.json").read_text())["rows"] == first["rows"]
    assert mine_learning.main([*command, "--rows", "n64"]) == 1
    assert "error: --rows n64: there are rooms, n8, n8_unsmoothed, n16, n32" in capsys.readouterr().err
