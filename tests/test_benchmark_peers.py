"""benchmarks/peers.py on a tiny generated sequence."""

from __future__ import annotations

import json
import time
import types

import pytest
import torch

from benchmarks import peers, time_to_quality
from benchmarks.report import figures
from co3d_ensemble.training import budget
from tests.tiny import MODEL

DEV = "manyview_dev_0"
SMALL = {"data.longest_side": 24, "training.n_rays": 32, "data.val_share": 0.2, "model.occupancy.resolution": 16}
MINUTES = 0.03
SRN = "model.implicitron.args.implicit_function_SRNImplicitFunction_args"
NARROW = (f"{SRN}.raymarch_function_args.n_hidden_units=16", f"{SRN}.pixel_generator_args.n_hidden_units=16")


@pytest.fixture(autouse=True)
def short_probes(monkeypatch):
    """By the processor's clock, as other processes may be keeping it busy."""
    monkeypatch.setattr(budget, "time", types.SimpleNamespace(perf_counter=time.process_time))
    monkeypatch.setattr(budget, "WARM_UP_STEPS", 1)
    monkeypatch.setattr(budget, "MIN_TIMED_STEPS", 1)
    monkeypatch.setattr(time_to_quality, "HULL_SAMPLES", 32)


def arguments(root, output, *more: str) -> list[str]:
    small = [word for key, value in SMALL.items() for word in ("--override", f"{key}={value}")]
    nerf = [word for key, value in MODEL.items() for word in ("--override-row", f"nerf:{key}={value}")]
    srn = [word for setting in NARROW for word in ("--override-row", f"implicitron_srn:{setting}")]
    place = ["--dataset-root", str(root), "--category", "mug", "--output", str(output), "--device", "cpu", "--minutes", str(MINUTES)]
    return [*place, *small, *nerf, *srn, *more]


def test_rows_are_trained_for_equal_times_scored_and_tabled_and_a_second_call_only_reads(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "ROWS", ("nerf", "implicitron_srn", "implicitron_idr"))  # each is composed in each call
    output = tmp_path / "peers"
    assert peers.main(arguments(root, output, "--rows", "nerf")) == 0
    trained = (output / "nerf" / "mug" / DEV / "nerf" / "checkpoints" / "best.pt").stat().st_mtime_ns
    assert peers.main(arguments(root, output, "--rows", "nerf,implicitron_srn", "--json", str(tmp_path / "result.json"))) == 0
    assert (output / "nerf" / "mug" / DEV / "nerf" / "checkpoints" / "best.pt").stat().st_mtime_ns == trained
    result = json.loads((tmp_path / "result.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == list(peers.ROWS) and result["benchmark"] == "peers" and result["minutes"] == MINUTES
    for name in ("nerf", "implicitron_srn"):
        row = rows[name]
        assert row["metrics"]["psnr_masked"] > 0 and row["steps"][0] > 0 and row["reason"] is None
        assert 0 < row["seconds"] < 60  # 1.8 of the processor's, the loop's start and whatever else keeps it busy
        fixed = json.loads(next((output / name).rglob("budget.json")).read_text())
        assert fixed["budget_minutes"] == MINUTES
    assert rows["implicitron_idr"]["metrics"] is None and rows["implicitron_idr"]["reason"] == "not trained yet"
    table = (output / "peers.md").read_text()
    assert "| nerf (`nerf_laptop`, float32) |" in table and "- implicitron_idr: not trained yet" in table
    assert table in capsys.readouterr().out and table.strip() in figures([result]) + "\n"


def test_an_output_of_another_budget_is_refused(root, tmp_path, capsys):
    output = tmp_path / "peers"
    output.mkdir()
    begun = {"minutes": 7.0, "sizes": "laptop", "category": "mug", "device": "cpu", "override": [], "override_row": []}
    (output / peers.PLAN).write_text(json.dumps(begun))
    assert peers.main(["--dataset-root", str(root), "--category", "mug", "--output", str(output), "--device", "cpu"]) == 1
    assert "was begun with minutes=7.0" in capsys.readouterr().err


def test_an_output_of_another_data_set_is_refused_and_a_generated_one_moves_with_it(tmp_path):
    def hold(output, root, category="mug"):
        peers.hold_to_plan(peers.parse_arguments(["--output", str(output)]), torch.device("cpu"), root, category)

    given = tmp_path / "given"
    hold(given, tmp_path / "root")
    hold(given, tmp_path / "elsewhere" / ".." / "root")
    with pytest.raises(ValueError, match=f"given was begun with data='{tmp_path}/root': use another --output"):
        hold(given, tmp_path / "other")
    with pytest.raises(ValueError, match="begun with category='mug'"):
        hold(given, tmp_path / "root", "cup")
    generated = tmp_path / "generated_there"
    hold(generated, generated / "generated")
    moved = generated.rename(tmp_path / "moved")
    hold(moved, moved / "generated")
    with pytest.raises(ValueError, match="begun with data='generated'"):
        hold(moved, tmp_path / "root")


def test_a_row_whose_experiment_is_not_there_or_fails_has_a_reason_and_the_others_go_on(root, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "ROWS", ("nerf", "radiance_potato", "implicitron_srn"))
    more = ("--override-row", "nerf:training.schedule=nope")
    assert peers.main(arguments(root, tmp_path / "peers", *more)) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "peers" / "peers.json").read_text())["rows"]}
    assert rows["radiance_potato"]["reason"] == "there is no experiment radiance_potato_laptop"
    assert "training.schedule='nope'" in rows["nerf"]["reason"]
    assert rows["implicitron_srn"]["metrics"]["psnr_masked"] > 0


def test_an_ensembles_members_share_the_time_of_a_row(root, tmp_path):
    given = peers.parse_arguments(["--output", str(tmp_path), "--minutes", "10"])
    place = {"root": root, "category": "mug", "device": torch.device("cpu")}
    row = peers.planned_row("ensemble", given, **place)
    assert row.overrides[-1] == "training.budget_minutes=5.0"
    assert [folder.name for folder in row.member_folders] == ["nerf", "tensorf"] and row.folder.name == "ensemble"
    alone = peers.planned_row("implicitron_idr", given, **place)
    assert alone.overrides[-1] == "training.budget_minutes=10.0" and alone.member_folders == (alone.folder,)


def test_the_reference_is_of_the_size_that_the_rows_are_scored_at(root, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "ROWS", ())
    place = ["--dataset-root", str(root), "--category", "mug", "--device", "cpu", "--override", "data.val_share=0.2"]
    for sizes, told in (("laptop", "of at most 200 px"), ("full", "at their full size")):
        assert peers.main([*place, "--output", str(tmp_path / sizes), "--sizes", sizes]) == 0
        assert json.loads((tmp_path / sizes / "peers.json").read_text())["sequence"].endswith(told)


@pytest.mark.parametrize("sizes", ["laptop", "full"])
def test_every_row_s_experiment_composes(root, tmp_path, sizes):
    given = peers.parse_arguments(["--output", str(tmp_path), "--sizes", sizes])
    for name in peers.ROWS:
        row = peers.planned_row(name, given, root=root, category="mug", device=torch.device("cpu"))
        assert row.experiment == (name if sizes == "full" else f"{name}_laptop")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "nerv"], "--rows nerv: expected some of nerf, tensorf"),
        (["--override-row", "nerv:training.lr=1"], "--override-row nerv: expected"),
        (["--override-row", "nerf"], "ROW:KEY=VALUE"),
        (["--minutes", "0"], "--minutes must be positive"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit):
        peers.parse_arguments(["--output", str(tmp_path), *words])
    assert message in capsys.readouterr().err
