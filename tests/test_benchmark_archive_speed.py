"""The benchmark of archives: the way rebuilt from the challenge's description gives this package's scores."""

import json

from benchmarks import archive_speed
from co3d_ensemble.challenge import archive
from co3d_ensemble.challenge.archive_file import opened_archive


def test_both_ways_are_measured_and_agree(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(archive_speed, "SIZES", ((40, 50),))
    monkeypatch.setattr(archive_speed, "REPETITIONS", 1)
    monkeypatch.setattr(archive, "open_archive", opened_archive)
    assert archive_speed.main(["--frames", "2", "--json", str(tmp_path / "a.json")]) == 0
    (found,) = json.loads((tmp_path / "a.json").read_text())
    assert found["largest_difference_of_scores"] < 1e-5  # its pictures are float64, ours float32
    assert all(found[step][unit] > 0 for step in ("store", "official_evaluate") for unit in ("seconds", "cpu_seconds"))
    assert capsys.readouterr().out.count("times faster") == 4
