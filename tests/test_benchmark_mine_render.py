"""The benchmark of target views runs end to end at toy size, and refuses sides that show different pictures."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import mine_render, report

SIZES = ["--planes", "2", "5", "--width", "64", "--height", "48", "--device", "cpu", "--repeats", "2"]


def test_it_writes_its_figures(tmp_path, capsys):
    path = tmp_path / "render.json"
    assert mine_render.main([*SIZES, "--no-memory", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert [row["planes"] for row in result["rows"]] == [2, 5]
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(row["reference_s"] / row["ours_s"])
        assert 0 < row["difference"]["float32"] <= 1e-5 and row["difference"]["float64"] <= 1e-9
        assert len(row["samples_s"]["ours"]) == 2
    assert "difference at most 1e-05" in capsys.readouterr().out
    assert "### MINE: one target view of 64 x 48" in report.figures([result])


def test_memory_is_measured_above_the_multiplane_image():
    arguments = mine_render.parse_arguments(["--planes", "64", "--width", "192", "--height", "128", "--device", "cpu"])
    with torch.inference_mode():
        theirs = mine_render.measure_memory(mine_render.REFERENCE, arguments, torch.device("cpu"))
    # at least the seven warped channels of all planes, once as they are and once warped
    assert theirs > 2 * 7 * 64 * 192 * 128 * 4 / 2**20


def test_different_pictures_are_refused(monkeypatch):
    cases = [mine_render.make_case(3, 48, 64, torch.device("cpu"), dtype) for dtype in (torch.float32, torch.float64)]
    mine_render.check(*cases)
    right = mine_render.ours
    monkeypatch.setattr(mine_render, "ours", lambda case: (right(case)[0] + 2e-5, *right(case)[1:]))
    with pytest.raises(RuntimeError, match="different pictures"):
        mine_render.check(*cases)


def test_the_reference_of_a_single_opaque_plane_is_its_warped_picture():
    case = mine_render.make_case(2, 48, 64, torch.device("cpu"))
    sigma = torch.tensor([1e6, 0.0]).view(1, 2, 1, 1, 1).expand_as(case.sigma)
    opaque = mine_render.Case(case.rgb, sigma, case.depth, case.K, case.R, case.t)
    rgb, _, opacity = mine_render.reference(opaque)
    warped = torch.nn.functional.grid_sample(case.rgb[0, :1], mine_render.source_grid(case)[:1], padding_mode="border", align_corners=False)
    torch.testing.assert_close(rgb, warped)
    torch.testing.assert_close(opacity, torch.ones_like(opacity))
