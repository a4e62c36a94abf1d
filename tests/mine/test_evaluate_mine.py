"""launch/evaluate_mine.py as its users meet it: results, tables, interruptions, and how it tells what is wrong."""

from __future__ import annotations

import io
import json
import math
import shutil

import numpy as np
import pytest
from rich.console import Console

from co3d_ensemble.mine import evaluation_run
from co3d_ensemble.mine.evaluation import DEPTH_METRICS, VIEW_METRICS
from co3d_ensemble.mine.evaluation_data import open_test_set
from co3d_ensemble.mine.evaluation_run import EvaluateConfig
from co3d_ensemble.mine.evaluation_table import table
from co3d_ensemble.settings import settings_with_help
from launch import evaluate_mine
from tests.mine.stacks import mine_config, write_run
from tests.mine.test_kitti_raw import NAME, write_drive
from tests.mine.test_realestate10k import timestamp, write_clip

SCENES = {"data__options": {"n_scenes": 1, "first_scene": 3, "supersample": 1, "n_views": 4}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run", **SCENES)


@pytest.fixture(autouse=True)
def no_lpips_weights(tmp_path, monkeypatch):
    """Whatever this machine's user has downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def evaluate(run, output, *more):
    return evaluate_mine.main([f"checkpoint={run}", f"output_dir={output}", "device=cpu", *more])


def stored(output):
    return json.loads((output / "results.json").read_text())


def test_one_number_of_planes_needs_no_brackets(run, tmp_path):
    assert evaluate(run, tmp_path, "planes=3", "max_pictures=1") == 0
    assert list(stored(tmp_path)["results"]["pairs"]) == ["3"]


def test_one_checkpoint_is_scored_at_several_numbers_of_planes_in_views_and_depth(run, tmp_path, capsys):
    assert evaluate(run, tmp_path, "planes=[2,6]") == 0
    results = stored(tmp_path)
    assert results["complete"] and list(results["results"]) == ["pairs", "depth"]
    for row in results["results"].values():
        assert list(row) == ["2", "6"] and all(means["n"] == 4 for means in row.values())
    views, depth = results["results"]["pairs"]["6"], results["results"]["depth"]["6"]
    assert 3 < views["psnr"] < 40 and 0 < views["valid_share"] <= 1 and views["lpips"] is None
    assert "vgg16" in views["reasons"]["lpips"] and depth["abs_rel"] > 0 and 0 <= depth["delta_1"] <= depth["delta_3"] <= 1
    assert results["results"]["pairs"]["2"]["psnr"] != views["psnr"]
    records = [record for picture in results["pictures"].values() for record in picture]
    assert len(records) == 4 * 2 * 2
    psnr = [record["psnr"] for record in records if record["row"] == "pairs" and record["planes"] == 6]
    assert views["psnr"] == pytest.approx(math.fsum(psnr) / 4)
    assert results["protocol"]["border"] == 0 and results["size"] == [32, 48]

    shown = capsys.readouterr().out
    for part in ("PSNR", "SSIM", "LPIPS", "Abs Rel", "< 1.25^3", f"{views['psnr']:.2f}", f"{depth['abs_rel']:.4f}", "results.json"):
        assert part in shown
    assert f"LPIPS: {views['reasons']['lpips']}"[:40] in shown


def test_no_number_is_cut_off_on_a_terminal_of_80_columns():
    views = {"n": 12345678, "reasons": {}} | dict.fromkeys(VIEW_METRICS, 0.12345)
    depth = {"n": 12345678, "reasons": {}} | dict.fromkeys(DEPTH_METRICS, 0.12345) | {"sq_rel": 12.3456, "rmse": 12.3456}
    protocol = {"text": "", "psnr": "", "translations": "", "depth_alignment": ""}
    shown = io.StringIO()
    results = {"results": {"10 frames away": {"256": views}, "depth": {"256": depth}}, "protocol": protocol, "notes": []}
    Console(file=shown, width=80).print(table(results))
    assert "…" not in shown.getvalue() and shown.getvalue().count("12345678") == 2 and shown.getvalue().count("12.3456") == 2


def test_what_a_run_was_trained_and_validated_on_is_not_what_it_is_tested_on():
    both, val = {"first_scene": 3, "n_views": 2}, {"first_scene": 7, "n_scenes": 1, "supersample": 1}
    trained = mine_config(data__options=both, data__val_options=val)
    tasks, _, _ = open_test_set("generated", EvaluateConfig(checkpoint="unused"), trained)
    pairs = tasks._dataset
    assert pairs.first_scene >= 1_000_000 and (pairs.n_scenes, pairs.n_views, pairs.supersample) == (20, 2, 1)
    tasks, _, _ = open_test_set("generated", EvaluateConfig(checkpoint="unused", options={"n_scenes": 2}), trained)
    assert tasks._dataset.n_scenes == 2


def test_a_table_of_what_the_checkpoint_was_chosen_on_says_so(run, tmp_path, capsys):
    for name, scene, chosen in (("same", 3, True), ("other", 4, False)):
        assert evaluate(run, tmp_path / name, f"options.first_scene={scene}", "max_pictures=1") == 0
        results, shown = stored(tmp_path / name), " ".join(capsys.readouterr().out.split())
        assert results["checkpoint_chosen_on_what_is_scored"] == chosen
        assert any("best of its run's validations" in note for note in results["notes"]) == chosen
        assert ("best of its run's validations" in shown) == chosen


def test_fixed_planes_give_the_same_scores_again_whatever_the_chunks(run, tmp_path):
    assert evaluate(run, tmp_path / "a", "max_pictures=2") == evaluate(run, tmp_path / "b", "max_pictures=2", "plane_chunk=3") == 0
    first, second = (stored(tmp_path / name)["pictures"] for name in "ab")
    assert list(first) == ["0", "3"]  # evenly spread
    for index, records in first.items():
        for one, other in zip(records, second[index], strict=True):
            for name, value in one.items():
                assert other[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name


def test_ctrl_c_keeps_what_is_scored_and_the_same_command_goes_on(run, tmp_path, monkeypatch, capsys):
    assert evaluate(run, tmp_path / "whole") == 0
    scored = []
    original = evaluation_run.evaluate

    def interrupted_at_third(network, tasks, indices, **how):
        class Tasks:
            def __getitem__(self, index):
                if len(scored) == 2:
                    raise KeyboardInterrupt
                scored.append(index)
                return tasks[index]

        return original(network, Tasks(), indices, **how)

    monkeypatch.setattr(evaluation_run, "evaluate", interrupted_at_third)
    assert evaluate(run, tmp_path / "cut") == 130
    assert "interrupted: the same command goes on" in capsys.readouterr().err
    partial = stored(tmp_path / "cut")
    assert not partial["complete"] and sorted(partial["pictures"]) == ["0", "1"] and partial["results"]["pairs"]["4"]["n"] == 2
    assert not list((tmp_path / "cut").glob("*.tmp*"))
    scored.clear()
    monkeypatch.setattr(
        evaluation_run, "evaluate", lambda network, tasks, indices, **how: original(network, _Seen(tasks, scored), indices, **how)
    )
    assert evaluate(run, tmp_path / "cut") == 0
    assert scored == [2, 3]
    assert stored(tmp_path / "cut") == stored(tmp_path / "whole")


class _Seen:
    def __init__(self, tasks, seen):
        self.tasks, self.seen = tasks, seen

    def __getitem__(self, index):
        self.seen.append(index)
        return self.tasks[index]


def test_results_of_other_settings_are_not_mixed_and_not_lost(run, tmp_path, capsys):
    assert evaluate(run, tmp_path, "max_pictures=1") == 0
    before = (tmp_path / "results.json").read_bytes()
    assert evaluate(run, tmp_path, "max_pictures=1", "planes=[3]", "border=0.1") == 1
    message = capsys.readouterr().err
    assert "planes=[4] there, [3] now" in message and "border=None there, 0.1 now" in message and "restart=true" in message
    assert (tmp_path / "results.json").read_bytes() == before
    assert evaluate(run, tmp_path, "max_pictures=1", "planes=[3]", "restart=true") == 0
    assert list(stored(tmp_path)["results"]["pairs"]) == ["3"]
    (tmp_path / "results.json").write_text("{}")
    assert evaluate(run, tmp_path) == 1
    assert "does not hold results of an evaluation" in capsys.readouterr().err


def test_pictures_of_other_data_are_not_mixed_in(run, tmp_path, capsys):
    first, second = write_drive(tmp_path / "first"), write_drive(tmp_path / "second")
    where = ["dataset=kitti_raw", f"options.sequences=[{NAME}]", "max_pictures=1"]
    assert evaluate(run, tmp_path / "out", *where, f"root={first}") == 0
    assert evaluate(run, tmp_path / "out", *where, f"root={second}") == 1
    assert "holds results of other data (3 pictures of" in capsys.readouterr().err
    first.rename(tmp_path / "moved")
    assert evaluate(run, tmp_path / "out", *where, f"root={tmp_path / 'moved'}") == 0
    for camera in (2, 3):
        pictures = tmp_path / "moved" / NAME[:10] / f"{NAME}_sync" / f"image_0{camera}" / "data"
        shutil.copy(pictures / "0000000001.png", pictures / "0000000009.png")
    assert evaluate(run, tmp_path / "out", *where, f"root={tmp_path / 'moved'}") == 1
    assert "3 pictures of" in (message := capsys.readouterr().err) and "4 of" in message and "restart=true" in message


def test_more_pictures_later_score_only_the_new_ones(run, tmp_path):
    assert evaluate(run, tmp_path, "max_pictures=1") == 0
    assert evaluate(run, tmp_path) == 0
    assert sorted(stored(tmp_path)["pictures"]) == ["0", "1", "2", "3"] and stored(tmp_path)["complete"]


def test_a_run_that_learned_with_fine_planes_is_scored_with_them_unless_told_otherwise(tmp_path, capsys):
    finer = write_run(tmp_path / "finer", model__n_fine_planes=3, **SCENES)
    assert evaluate(finer, tmp_path, "max_pictures=1") == 0
    results = stored(tmp_path)
    assert results["protocol"]["fine_planes"] == results["settings"]["fine_planes"] == 3
    assert evaluate(finer, tmp_path, "max_pictures=1", "fine_planes=0") == 1
    assert "fine_planes=3 there, None now" in capsys.readouterr().err
    assert evaluate(finer, tmp_path, "max_pictures=1", "fine_planes=0", "restart=true") == 0
    without = stored(tmp_path)["results"]["pairs"]["4"]["psnr"]
    assert without != results["results"]["pairs"]["4"]["psnr"]


def test_drawn_planes_are_drawn_from_the_seed(run, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert evaluate(run, tmp_path / name, "max_pictures=1", "sampling=stratified", f"seed={seed}") == 0
    first, again, other = (stored(tmp_path / name)["results"]["pairs"]["4"]["psnr"] for name in "abc")
    assert first == again != other


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("dataset=imagenet", "dataset='imagenet': expected one of null, generated"),
        ("planes=[1]", "planes=[1]: expected different numbers of at least 2"),
        ("planes=[8,8]", "planes=[8, 8]"),
        ("planes=[]", "planes=[]"),
        ("planes=many", "planes"),
        ("fine_planes=-1", "fine_planes=-1: must not be negative"),
        ("colour=red", "colour"),
        ("border=0.5", "border=0.5: must lie in [0, 0.5)"),
        ("scale=maybe", "scale='maybe'"),
        ("lpips=squeeze", "lpips='squeeze'"),
        ("max_pictures=0", "max_pictures=0: must be positive"),
        ("depth_alignment=affine", "depth_alignment='affine'"),
    ],
)
def test_a_wrong_argument_ends_with_2_and_one_line(tmp_path, capsys, argument, told):
    assert evaluate(tmp_path / "run", tmp_path / "out", argument) == 2
    message = capsys.readouterr().err
    assert told in message and message.startswith("error: ") and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_opened_ends_with_1_and_one_line(run, tmp_path, capsys):
    def told(*arguments):
        assert evaluate(run, tmp_path / "out", *arguments) == 1
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1 and not (tmp_path / "out").exists()
        return message

    assert "neither a run directory" in told(f"checkpoint={tmp_path / 'nowhere'}")
    assert "root is missing: realestate10k is read from a folder" in told("dataset=realestate10k")
    assert "generated pictures are read from no folder" in told(f"root={tmp_path}")
    assert "nowhere" in told("dataset=realestate10k", f"root={tmp_path / 'nowhere'}", "options.n_points=0")
    assert "options.colour: GeneratedPairs has" in told("options.colour=red")
    assert "options.n_scenes='few': expected int" in told("options.n_scenes=few")
    assert "only dataset=realestate10k has such lists, not generated" in told("pair_list=pairs.txt")
    elsewhere = ("dataset=realestate10k", f"root={tmp_path / 'nowhere'}")
    assert "options.frame_distance: the protocol chooses the pairs" in told(*elsewhere, "options.frame_distance=5")
    assert "options.clips='a': expected list[str] | None" in told(*elsewhere, "options.clips=a")
    assert "no such file" in told(f"lpips_weights={tmp_path / 'vgg.pth'}")
    assert evaluate_mine.main([]) == 2
    assert "checkpoint" in capsys.readouterr().err


def test_the_results_lie_in_the_run_where_nothing_else_is_said(run):
    assert evaluate_mine.main([f"checkpoint={run / 'checkpoints' / 'best.pt'}", "max_pictures=1", "device=cpu"]) == 0
    assert (run / "evaluation" / "generated" / "results.json").is_file()


def test_help_lists_every_setting(capsys):
    assert evaluate_mine.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {key}={default}\n      {text}\n" in shown for key, default, text in settings_with_help(EvaluateConfig))


# RealEstate10K


def test_realestate10ks_protocol_renders_three_targets_from_each_source(run, tmp_path, capsys):
    for name in ("0a1b", "2c3d"):
        write_clip(tmp_path / "re10k", name, split="test", n=20)
    where = ["dataset=realestate10k", f"root={tmp_path / 're10k'}", "options.n_points=0"]
    assert evaluate(run, tmp_path / "drawn", *where, "pairs_per_clip=3") == 0
    results = stored(tmp_path / "drawn")
    assert list(results["results"]) == ["n=5", "n=10", "random"] and all(by["4"]["n"] == 6 for by in results["results"].values())
    assert "drawn from 2 clips, 3 sources each, seed 0" in results["notes"][0]
    assert "no sparse points" in results["results"]["random"]["4"]["reasons"]["scale"]  # no COLMAP model beside these
    names = {record["name"] for records in results["pictures"].values() for record in records}
    assert len(names) >= 12 and all("->" in name for name in names)
    assert "n=10" in capsys.readouterr().out

    (tmp_path / "pairs.txt").write_text("0a1b 2 7 12 1\ngone 1 2 3 4\n")
    assert evaluate(run, tmp_path / "listed", *where, f"pair_list={tmp_path / 'pairs.txt'}") == 0
    results = stored(tmp_path / "listed")
    assert [record["name"] for record in results["pictures"]["0"]] == [f"0a1b/{timestamp(2)}->{timestamp(i)}" for i in (7, 12, 1)]
    assert "1 of 2" in results["notes"][0]


def test_scale_none_needs_no_points(run, tmp_path):
    write_clip(tmp_path / "re10k", split="test", n=20)
    assert evaluate(run, tmp_path / "out", "dataset=realestate10k", f"root={tmp_path / 're10k'}", "scale=none", "max_pictures=1") == 0
    results = stored(tmp_path / "out")
    assert "scale" not in results["results"]["n=5"]["4"]["reasons"] and results["protocol"]["translations"] == "as the data set has them"


# Other data sets


def test_kitti_goes_from_left_to_right_in_metres_without_the_border(run, tmp_path, capsys):
    write_drive(tmp_path / "kitti")
    assert evaluate(run, tmp_path / "out", "dataset=kitti_raw", f"root={tmp_path / 'kitti'}", f"options.sequences=[{NAME}]") == 0
    results = stored(tmp_path / "out")
    assert list(results["results"]) == ["left to right"] and results["results"]["left to right"]["4"]["n"] == 3
    assert results["protocol"]["border"] == 0.05
    assert "5% of the sides cut off" in capsys.readouterr().out


def test_ibims_gives_a_depth_table_and_no_views(run, tmp_path, capsys):
    scipy_io = pytest.importorskip("scipy.io", reason="iBims-1's files need scipy")
    rng = np.random.default_rng(0)
    depth, ones = rng.uniform(1, 5, (48, 64)), np.ones((48, 64), np.uint8)
    calib = np.array([[50.0, 0, 32], [0, 50, 24], [0, 0, 1]]).T
    data = {"rgb": rng.integers(0, 255, (48, 64, 3), np.uint8), "depth": depth, "calib": calib, "mask_invalid": ones, "mask_transp": ones}
    scipy_io.savemat(tmp_path / "room_01.mat", {"data": data})
    (tmp_path / "imagelist.txt").write_text("room_01\n")
    assert evaluate(run, tmp_path / "out", "dataset=ibims", f"root={tmp_path}", "planes=[4,8]") == 0
    results = stored(tmp_path / "out")
    assert list(results["results"]) == ["depth"] and list(results["results"]["depth"]) == ["4", "8"]
    (record, _) = results["pictures"]["0"]
    assert record["name"] == "ibims1/room_01" and record["scale"] != 1 and results["protocol"]["depth_alignment"] == "median"
    shown = capsys.readouterr().out
    assert "Abs Rel" in shown and "PSNR" not in shown and "depth alignment: median" in shown


def test_the_same_weights_serve_16_to_256_planes(run, tmp_path):
    assert evaluate(run, tmp_path, "planes=[16,32,64,256]", "plane_chunk=32", "max_pictures=1") == 0
    results = stored(tmp_path)["results"]
    assert list(results["pairs"]) == list(results["depth"]) == ["16", "32", "64", "256"]
    assert all(means["psnr"] > 3 and means["ssim"] is not None for means in results["pairs"].values())
    assert all(means["abs_rel"] > 0 for means in results["depth"].values())
