"""An ensemble from photographs to a submission, through the launch scripts."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from co3d_ensemble import ensemble, fusing
from co3d_ensemble.challenge.archive import read_archive
from co3d_ensemble.challenge.targets import targets_with_records
from co3d_ensemble.composition import compose_ensemble
from co3d_ensemble.data.co3d import CO3DIndex
from co3d_ensemble.ensemble import fuse_sequence
from co3d_ensemble.functional.fusion import fuse_views
from co3d_ensemble.fusing import Fusion, recorded_fusion
from co3d_ensemble.pipeline import METRICS
from co3d_ensemble.plugin.model import ObjectModel
from co3d_ensemble.rendering import read_view
from co3d_ensemble.training import lock
from co3d_ensemble.training.checkpoint import Checkpoints
from tests.tiny import Launched, export, generated, train, train_arguments

DEV, TEST = "manyview_dev_0", "manyview_test_0"
MEMBERS = ("nerf", "tensorf", "nerf_seed1")
SEED1 = {"+members__nerf_seed1__experiment": "nerf_laptop", "members__nerf_seed1__overrides__training__seed": 1}
THREE = {"experiment": "ensemble_laptop", "training__max_steps": 12, **SEED1}
TWO_NERFS = {"experiment": "ensemble_laptop", "~members__tensorf": "null", **SEED1}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return generated(tmp_path_factory.mktemp("root"), {"mug": [DEV, TEST]}, n_val=4)


@pytest.fixture(scope="module")
def output(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("output")
    assert train(root, folder, **THREE) == 0
    return folder


@pytest.fixture
def own_output(output, tmp_path):
    return Path(shutil.copytree(output, tmp_path / "output", ignore=shutil.ignore_patterns("submission", "tensorboard")))


def folder_of(output, name="ensemble", subset_name=DEV):
    return output / "mug" / subset_name / name


def results_of(output, name="ensemble", **where):
    return json.loads((folder_of(output, name, **where) / "results.json").read_text())


def known(metrics):
    return {name: value for name, value in metrics.items() if value is not None}  # no LPIPS where its weights are not on disk


def config_of(root, output, **settings):
    return compose_ensemble(train_arguments(root, output, **{**THREE, **settings}))[0]


def target_files(folder, root):
    targets = CO3DIndex(root).subset("mug", DEV).targets
    return [folder / "views" / "18x24" / f"{record.sequence_name}_{record.frame_number}.npz" for record in targets]


def never(monkeypatch, *places):
    for owner, name in places:
        monkeypatch.setattr(owner, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))


# What one command leaves


def test_one_command_trains_all_members_and_leaves_their_fusion_beside_them(output, root):
    assert {path.name for path in folder_of(output).parent.iterdir()} == {*MEMBERS, "ensemble"}
    assert all((folder_of(output, name) / "results.json").exists() for name in MEMBERS)
    folder = folder_of(output)
    renders = {str(path.relative_to(folder)) for path in target_files(folder, root)}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        ".lock", "config.yaml", "fusion.json", "results.json", "targets.png", "views/made_from.json",
        *(f"renders/{Path(name).stem}_{kind}.png" for name in renders for kind in ("rgb", "mask", "depth")),
        *renders, *(name.replace(".npz", "_uncertainty.npz") for name in renders),
    }  # fmt: skip
    with Image.open(folder / "targets.png") as picture:
        assert np.asarray(picture).std() > 0


def test_results_have_members_and_ensemble_side_by_side_as_each_run_scored_itself(output):
    results = results_of(output)
    assert tuple(results["metrics"]) == METRICS and list(results["members"]) == list(MEMBERS)
    for name in MEMBERS:
        own, beside = results_of(output, name), results["members"][name]
        assert known(beside["metrics"]) == pytest.approx(known(own["metrics"])) and set(beside["frames"]) == set(results["frames"])
        assert (beside["steps"], beside["stopped"]) == (own["steps"], own["stopped"]) == (12, "max_steps")


def test_the_table_shows_every_member_and_the_ensemble(own_output, root, capsys):
    assert train(root, own_output, **THREE) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["psnr_masked", *MEMBERS, "ensemble", "fused"]
    assert f"{results_of(own_output)['metrics']['psnr_masked']:.3f}" in lines[4]


def test_the_fused_views_are_the_recorded_fusion_of_the_members_views(output, root):
    fusion = recorded_fusion(folder_of(output))
    assert fusion.members == MEMBERS
    for paths in zip(*(target_files(folder_of(output, name), root) for name in ("ensemble", *MEMBERS))):
        fused, *views = (read_view(path) for path in paths)
        expected = fusion(views)
        torch.testing.assert_close(fused.rgb, expected.rgb, rtol=1e-3, atol=1e-3)  # float16 on disk
        torch.testing.assert_close(fused.depth, expected.depth)
        with np.load(paths[0].with_name(f"{paths[0].stem}_uncertainty.npz")) as arrays:
            deviation = np.stack([view.rgb for view in views]).std(axis=0)
            np.testing.assert_allclose(arrays["rgb"][0], np.sqrt((deviation**2).mean(axis=0)), atol=1e-3)
            assert arrays["depth"].shape == arrays["surfaces"].shape == (1, 18, 24) and arrays["surfaces"].max() <= 3


def test_the_choice_and_all_that_it_rests_on_is_recorded(output, root):
    record = json.loads((folder_of(output) / "fusion.json").read_text())
    names = {"mean", "opacity", "confidence", "agreement", "fitted", "fitted_zones", *(f"only_{name}" for name in MEMBERS)}
    assert set(record["candidates"]) == names and set(record["chosen"].values()) <= names
    assert record["validation_frames"] == [frame.name for frame in CO3DIndex(root).subset("mug", DEV).val]
    for part, metric in (("color", "psnr_masked"), ("mask", "iou")):
        told = {name: entry[metric] for name, entry in record["candidates"].items()}
        passing = [name for name in names if told[name]["passes"]]
        assert record["chosen"][part] == max(passing, key=lambda name: told[name]["mean"], default="mean")
    results = results_of(output)
    assert set(results["methods"]) == names and results["fusion"]["chosen"] == record["chosen"]
    chosen = results["methods"][record["chosen"]["color"]]
    assert chosen["psnr_masked"] == pytest.approx(results["metrics"]["psnr_masked"])
    for name in MEMBERS:  # every method has all scores that a member has
        own = {key: value for key, value in results["members"][name]["metrics"].items() if key != "lpips" and value is not None}
        assert results["methods"][f"only_{name}"] == pytest.approx(own) and "ssim" in own
    assert all(set(scores) == set(own) for scores in results["methods"].values())


def test_the_disagreement_is_compared_with_the_true_errors(output):
    uncertainty = results_of(output)["uncertainty"]
    for plane in ("rgb", "depth"):
        assert -1 <= uncertainty[plane]["spearman"] <= 1 and uncertainty[plane]["ause"] >= 0
    assert uncertainty["reasons"] == {}


def test_identical_members_are_an_ensemble_equal_to_them_without_uncertainty(output, root, tmp_path):
    shutil.copytree(folder_of(output, "nerf"), folder_of(tmp_path, "nerf"))
    shutil.copytree(folder_of(output, "nerf"), folder_of(tmp_path, "nerf_seed1"))
    results = fuse_sequence(config_of(root, tmp_path, **TWO_NERFS))
    assert known(results["metrics"]) == pytest.approx(known(results["members"]["nerf"]["metrics"]), rel=1e-5)
    assert results["fusion"]["chosen"] == {"color": "mean", "mask": "mean"}
    assert results["uncertainty"]["rgb"]["spearman"] is None and set(results["uncertainty"]["reasons"]) == {"rgb", "depth"}
    for path in folder_of(tmp_path).rglob("*_uncertainty.npz"):
        with np.load(path) as arrays:
            assert arrays["rgb"].max() == arrays["depth"].max() == 0


def test_targets_without_ground_truth_are_fused_in_the_export_and_not_scored(root, tmp_path):
    assert train(root, tmp_path, **{**TWO_NERFS, "subset_name": TEST, "training__max_steps": 2, "fusion__method": "mean"}) == 0
    results = results_of(tmp_path, subset_name=TEST)
    assert set(results["metrics"].values()) == {None} and results["reasons"]["iou"] == "no target has ground truth"
    assert results["fusion"]["chosen"] == {"color": "mean", "mask": "mean"} and recorded_fusion(folder_of(tmp_path, subset_name=TEST))
    assert export(root, tmp_path, "models=[ensemble]", "sequence_set=test") == 0
    assert len(list(folder_of(tmp_path, subset_name=TEST).rglob("*_uncertainty.npz"))) == 2


# Going on, and doing nothing twice


def test_a_finished_ensemble_is_left_as_it_is(own_output, root, monkeypatch):
    never(monkeypatch, (ObjectModel, "render_view"), (ObjectModel, "losses"), (ensemble, "usable_subset"), (ensemble, "choose_fusion"))
    before = {path: path.stat().st_mtime_ns for path in folder_of(own_output).rglob("*") if path.is_file() and path.name != ".lock"}
    assert train(root, own_output, **THREE) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_fusion_of_the_same_members_renders_nothing(own_output, root, monkeypatch):
    never(monkeypatch, (ObjectModel, "render_view"))
    assert train(root, own_output, fusion__method="mean", **THREE) == 0
    results = results_of(own_output)
    assert results["fusion"]["chosen"] == {"color": "mean", "mask": "mean"}
    paths = zip(*(target_files(folder_of(own_output, name), root) for name in ("ensemble", *MEMBERS)))
    for fused, *members in paths:  # the renders of the former fusion are gone
        torch.testing.assert_close(read_view(fused).depth, fuse_views([read_view(path) for path in members]).depth)


def test_weights_by_hand_and_the_best_member_can_be_asked_for(own_output, root):
    weights = {"nerf": 2, "tensorf": 0, "nerf_seed1": 6}
    config = config_of(root, own_output, fusion__method="weights", **{"+fusion__weights": str(weights).replace("'", "").replace(" ", "")})
    assert fuse_sequence(config)["fusion"]["color"] == {"method": "weights", "weights": [[0.25, 0.0, 0.75]]}
    results = fuse_sequence(config_of(root, own_output, fusion__method="best_member"))
    record = json.loads((folder_of(own_output) / "fusion.json").read_text())["candidates"]
    best = max(MEMBERS, key=lambda name: record[f"only_{name}"]["metrics"]["psnr_masked"])
    assert known(results["metrics"]) == pytest.approx(known(results["members"][best]["metrics"]))


def test_a_member_that_was_trained_on_is_rendered_and_fused_anew(own_output, root, monkeypatch):
    rendered = []
    original = ObjectModel.render_view
    monkeypatch.setattr(ObjectModel, "render_view", lambda self, *args: rendered.append(1) or original(self, *args))
    checkpoints = Checkpoints(folder_of(own_output, "nerf") / "checkpoints")
    best = checkpoints.load_best()
    emptied = {name: value - 9.0 if name.endswith("bias") else value for name, value in best["model"].items()}
    checkpoints.save_best({**best, "model": emptied})
    before = results_of(own_output)
    after = fuse_sequence(config_of(root, own_output))
    assert len(rendered) == 6  # four validation and two target frames of one member
    assert after["members"]["nerf"]["metrics"] != before["members"]["nerf"]["metrics"]
    assert after["members"]["tensorf"]["metrics"] == before["members"]["tensorf"]["metrics"]


def test_an_ensemble_that_is_killed_again_and_again_ends_like_one_that_is_not(root, tmp_path):
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    settings = {**TWO_NERFS, "training__deterministic": "true", "model__nerf__precision": "float32", "fusion__method": "mean"}
    uninterrupted = Launched(train_arguments(root, whole, **settings), tmp_path / "whole.log")
    arguments = train_arguments(root, killed, training__checkpoint_every_seconds=0, **settings)
    # two validations of four frames and two targets per member; then four validation frames of each
    for moment in (("step", 5), ("rendering", 9), ("rendering", 8), ("rendering", 5)):
        assert Launched(arguments, log, dies_at=moment).exit_code() in (-signal.SIGKILL, 0), moment
    assert Launched(arguments, log).exit_code() == 0, log.read_text()
    assert uninterrupted.exit_code() == 0, uninterrupted.log.read_text()
    assert "Traceback" not in log.read_text() and not list(killed.rglob("*.tmp*"))
    first, second = results_of(whole), results_of(killed)
    assert first["frames"].keys() == second["frames"].keys() and first["fusion"] == second["fusion"]
    # not bit for bit: the box of the second member's hull depends, in its last bit, on what the process did before
    for one, other in ((first, second), *((first["members"][name], second["members"][name]) for name in ("nerf", "nerf_seed1"))):
        assert known(one["metrics"]) == pytest.approx(known(other["metrics"]), rel=1e-3)


def test_a_member_that_is_interrupted_ends_the_ensemble_with_its_code(root, tmp_path, monkeypatch):
    class Interrupted:
        exit_status = 143

    monkeypatch.setattr(ensemble, "train_sequence", lambda config: Interrupted)
    never(monkeypatch, (ensemble, "fuse_sequence"))
    assert train(root, tmp_path, **THREE) == 143


# What cannot be fused


def test_members_that_are_not_trained_are_listed_and_nothing_is_left(own_output, root):
    for name in ("nerf", "tensorf"):
        shutil.rmtree(folder_of(own_output, name))
    shutil.rmtree(folder_of(own_output))
    with pytest.raises(ValueError, match="no trained nerf, tensorf to fuse"):
        fuse_sequence(config_of(root, own_output))
    assert not folder_of(own_output).exists()


def test_a_member_s_run_is_no_place_for_an_ensemble(own_output, root):
    before = (folder_of(own_output, "nerf") / "results.json").read_bytes()
    with pytest.raises(ValueError, match="holds the run of a member"):
        fuse_sequence(config_of(root, own_output, name="nerf", **{"~members__nerf": "null"}))
    assert (folder_of(own_output, "nerf") / "results.json").read_bytes() == before


def test_a_member_that_is_being_trained_is_named(own_output, root, monkeypatch, capsys):
    monkeypatch.setattr(lock, "GRACE_SECONDS", 0.0)
    with lock.FolderLock(folder_of(own_output, "tensorf")):
        assert train(root, own_output, **THREE) == 1
    assert f"{folder_of(own_output, 'tensorf')} is in use by process {os.getpid()}" in capsys.readouterr().err


def test_members_without_a_validation_frame_in_common_are_refused(own_output, root, monkeypatch):
    (folder_of(own_output) / "results.json").unlink()
    (folder_of(own_output) / "fusion.json").unlink()
    path = folder_of(own_output, "tensorf") / "config.yaml"
    path.write_text(path.read_text().replace("val_share: 0.05", "val_share: 0.06"))
    original = ensemble.usable_subset

    def other_frames(settings):
        subset = original(settings)
        return replace(subset, val=subset.val[:2] if settings.data.val_share == 0.05 else subset.val[2:])

    monkeypatch.setattr(ensemble, "usable_subset", other_frames)
    with pytest.raises(ValueError, match="nerf, tensorf, nerf_seed1 have no validation frame in common"):
        fuse_sequence(config_of(root, own_output))


def test_members_of_different_resolution_are_fused_at_the_highest(root, tmp_path):
    settings = {**TWO_NERFS, "training__max_steps": 2, "members__nerf_seed1__overrides__data__longest_side": 16}
    assert train(root, tmp_path, **settings) == 0
    sizes = {tuple(read_view(path).rgb.shape) for path in folder_of(tmp_path).rglob("*.npz") if "uncertainty" not in path.name}
    assert sizes == {(3, 18, 24)}


def test_a_damaged_record_is_named(own_output, root):
    path = folder_of(own_output) / "fusion.json"
    path.write_text(path.read_text()[:40])
    (folder_of(own_output) / "results.json").unlink()
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        fuse_sequence(config_of(root, own_output))
    with pytest.raises(ValueError, match=f"{path}: not a record"):
        recorded_fusion(folder_of(own_output))


# Export


def archived(output, root):
    records = targets_with_records(CO3DIndex(root), task="manyview", sequence_set="dev")
    return [view for _, view in read_archive(output / "submission" / "submission_manyview_dev.hdf5", records)]


def same_views(first, second):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for a, b in zip(first, second) for name in ("rgb", "depth", "mask"))


def test_the_ensemble_and_its_members_in_any_order_export_the_recorded_fusion(own_output, root, monkeypatch):
    assert fuse_sequence(config_of(root, own_output, fusion__method="fitted_zones"))
    assert export(root, own_output, "models=[ensemble]") == 0
    by_name = archived(own_output, root)
    never(monkeypatch, (ObjectModel, "render_view"))  # the members' views are there
    assert export(root, own_output, "models=[tensorf,nerf_seed1,nerf]") == 0
    assert same_views(archived(own_output, root), by_name)
    assert export(root, own_output, "models=[nerf,tensorf,nerf_seed1]", "fusion=mean") == 0
    assert not same_views(archived(own_output, root), by_name)
    fusion = recorded_fusion(folder_of(own_output))
    views = [[read_view(path) for path in sorted((folder_of(own_output, name) / "views").glob("*.npz"))] for name in fusion.members]
    fused = [fusion(frame) for frame in zip(*views)]
    for view, expected in zip(by_name, fused):
        assert view.rgb.shape == expected.rgb.shape == (3, 24, 32)
        assert (view.rgb - expected.rgb).abs().max() < 0.5 / 255 + 1e-6


def test_members_without_a_recorded_fusion_are_averaged_plainly_and_it_is_said(own_output, root, caplog):
    caplog.set_level(logging.WARNING)
    assert export(root, own_output, "models=[nerf,nerf_seed1]") == 0  # the ensemble has three
    assert "no ensemble of nerf, nerf_seed1 is recorded, they are averaged plainly" in caplog.text
    plain = archived(own_output, root)
    assert export(root, own_output, "models=[nerf,nerf_seed1]", "fusion=mean") == 0
    assert same_views(plain, archived(own_output, root))


def test_one_member_is_exported_as_it_is(own_output, root):
    assert export(root, own_output, "models=[tensorf]") == 0
    alone = archived(own_output, root)
    expected = [read_view(path) for path in sorted((folder_of(own_output, "tensorf") / "views").glob("*.npz"))]
    assert all((a.rgb - b.rgb).abs().max() < 0.5 / 255 + 1e-6 for a, b in zip(alone, expected))


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["models=[nerf,more,tensorf,others]"], 1, "(no trained more, others)"),
        (["models=[ensemble,nerf]"], 1, "ensemble is an ensemble, which is exported by itself"),
        (["models=[nerf,nerf]"], 1, "each named once"),
        (["models=[]"], 1, "at least one member"),
        (["models=[nerf,tensorf]", "fusion=fitted"], 2, "fusion='fitted'"),
    ],
)
def test_what_cannot_be_exported_is_named(own_output, root, capsys, arguments, code, told):
    assert export(root, own_output, *arguments) == code
    message = capsys.readouterr().err
    assert told in message and "Traceback" not in message and not (own_output / "submission").exists()


def test_an_ensemble_whose_member_was_deleted_cannot_be_exported(own_output, root, capsys):
    shutil.rmtree(folder_of(own_output, "tensorf"))
    assert export(root, own_output, "models=[ensemble]") == 1
    assert "(no trained tensorf)" in capsys.readouterr().err


def test_a_fusion_survives_json():
    fusion = Fusion(("a", "b"), fusing.FusionRule("fitted", ((0.25, 0.75),)), fusing.FusionRule("opacity"))
    assert Fusion.from_json(json.loads(json.dumps(fusion.as_json()))) == fusion
