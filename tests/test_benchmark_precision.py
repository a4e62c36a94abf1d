"""benchmarks/precision_step.py at toy size."""

from __future__ import annotations

import json

import pytest

from benchmarks import precision_step
from tests.tiny import MODEL, TENSORF


@pytest.mark.parametrize(("asked", "measured"), [("both", {"float32", "bfloat16"}), ("auto", {"float32"})])
def test_it_gives_rays_per_second_in_each_precision_and_says_what_auto_is(asked, measured, root, tmp_path, capsys):
    path, toy = tmp_path / "out.json", [f"--override={key}={value}" for key, value in {**MODEL, **TENSORF}.items()]
    sizes = ["--rays", "32", "--repeats", "1", "--longest-side", "24", "--precision", asked, "--device", "cpu", "--json", str(path)]
    assert precision_step.main([*toy, *sizes, "--dataset-root", str(root), "--category", "mug"]) == 0
    result = json.loads(path.read_text())
    assert result["auto_precision"] == "float32" and result["bfloat16"].startswith("emulated: a")
    assert list(result["presets"]) == ["nerf_laptop", "tensorf_laptop"]
    for row in result["presets"].values():
        seconds = {name: row["samples_s"][name][0] for name in measured}
        assert row == {**{name: pytest.approx(32 / seconds[name]) for name in measured}, "samples_s": row["samples_s"]}
    assert "auto is float32" in capsys.readouterr().out
