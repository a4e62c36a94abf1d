"""From photographs to a scored submission, through the launch scripts: what a run leaves, what goes in, what comes out."""

from __future__ import annotations

import errno
import gzip
import json
import math
import os
import shutil
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from co3d_ensemble import assembly, pipeline
from co3d_ensemble.assembly import compose_experiment, load_scene
from co3d_ensemble.challenge.archive import read_archive
from co3d_ensemble.challenge.targets import targets_with_records
from co3d_ensemble.data.co3d import CO3DIndex
from co3d_ensemble.data.ray_bank import RayBank
from co3d_ensemble.data.synthetic import SyntheticConfig, plan_sequence, render_view
from co3d_ensemble.functional.schedules import ema_decay
from co3d_ensemble.functional.types import RenderedView
from co3d_ensemble.pipeline import METRICS
from co3d_ensemble.plugin.model import ObjectModel
from co3d_ensemble.rendering import read_view
from co3d_ensemble.training import budget, lock
from co3d_ensemble.training.checkpoint import Checkpoints
from co3d_ensemble.training.records import read_metrics
from tests.tiny import HEIGHT, SIZES, TRAINING, WIDTH, evaluate, export, generated, train, train_arguments

DEV, TEST = "manyview_dev_0", "manyview_test_0"
MAGENTA = (255, 0, 255)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return generated(tmp_path_factory.mktemp("root"), {"mug": [DEV, TEST], "bear": [DEV]})


@pytest.fixture(scope="module")
def output(root, tmp_path_factory):
    """One finished run per subset."""
    folder = tmp_path_factory.mktemp("output")
    for category, subset_name in (("mug", DEV), ("bear", DEV), ("mug", TEST)):
        assert train(root, folder, category=category, subset_name=subset_name) == 0
    return folder


@pytest.fixture
def own_output(output, tmp_path):
    """The finished runs, for tests that change them."""
    return Path(shutil.copytree(output, tmp_path / "output", ignore=shutil.ignore_patterns("submission", "renders", "views")))


@pytest.fixture
def own_root(tmp_path):
    """A root to damage, with one sequence."""
    return generated(tmp_path / "own_root", {"mug": [DEV]})


def run_of(output, category="mug", subset_name=DEV):
    return output / category / subset_name / "nerf"


def scores_of(output, **where):
    return json.loads((run_of(output, **where) / "results.json").read_text())


def settings_of(output):
    return OmegaConf.load(run_of(output) / "config.yaml")


def scene_of(root, output, **settings):
    return load_scene(compose_experiment(train_arguments(root, output, **settings)))


def annotate(root, records, change):
    """Applies ``change`` to the annotations of some frames."""
    path = root / "mug" / "frame_annotations.jgz"
    entries = json.loads(gzip.decompress(path.read_bytes()))
    keys = {record.key for record in records}
    for entry in entries:
        if (entry["sequence_name"], entry["frame_number"]) in keys:
            change(entry)
    path.write_bytes(gzip.compress(json.dumps(entries).encode()))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def target_names(root):
    return [f"{record.sequence_name}_{record.frame_number}" for record in CO3DIndex(root).subset("mug", DEV).targets]


# What a run leaves


def test_renders_are_pictures_of_the_scored_views_and_the_original_size_has_a_folder_of_its_own(own_output, root):
    run = run_of(own_output)
    assert train(root, own_output) == 0
    assert not run.joinpath("renders").exists()  # the copy has none, and scoring is not repeated for their sake
    (run / "results.json").unlink()
    assert train(root, own_output) == 0
    assert export(root, own_output) == 0
    scored, original = ("renders", "views/18x24", (18, 24)), ("renders/original_size", "views", (24, 32))
    for folder, arrays, size in ((run / pictures, run / views, size) for pictures, views, size in (scored, original)):
        for name in target_names(root):
            view = read_view(arrays / f"{name}.npz")
            shown = {kind: np.asarray(Image.open(folder / f"{name}_{kind}.png")) for kind in ("rgb", "mask", "depth")}
            assert shown["rgb"].shape == (*size, 3) and shown["mask"].shape == shown["depth"].shape == size
            assert np.abs(shown["rgb"].transpose(2, 0, 1) / 255 - view.rgb.numpy()).max() <= 0.501 / 255
            assert np.abs(shown["mask"] / 255 - view.mask[0].numpy()).max() <= 0.501 / 255
            depth = shown["depth"].astype(np.uint16).view(np.float16)
            np.testing.assert_allclose(depth, view.depth[0].numpy(), rtol=1e-3)


def test_one_command_leaves_a_run_that_describes_itself(output, root):
    run = run_of(output)
    assert {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and "events" not in path.name} == {
        ".lock",
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "checkpoints/last.pt",
        "checkpoints/best.pt",
        "results.json",
        "targets.png",
        "training_curve.png",
        "views/made_from.json",
        *(f"views/18x24/{name}.npz" for name in target_names(root)),
        *(f"renders/{name}_{kind}.png" for name in target_names(root) for kind in ("rgb", "mask", "depth")),
    }
    assert [path.stat().st_size > 0 for path in (run / "tensorboard").iterdir()] == [True]
    config = settings_of(output)
    assert (config.dataset_root, config.category, config.training.max_steps) == (str(root), "mug", TRAINING["training.max_steps"])
    assert json.loads((run / "environment.json").read_text())["packages"]["torch"] == torch.__version__
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl", "train")] == [2, 4, 6, 8]
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl", "validation")] == [4, 8]
    with Image.open(run / "targets.png") as picture:
        assert np.asarray(picture).std() > 0


def test_results_hold_the_seven_metrics_of_the_targets(output, root):
    results = scores_of(output)
    told = {"seconds", "steps", "best_step", "stopped", "empty", "time_shares"}
    assert set(results) == {"metrics", "reasons", "depth_units", "frames"} | told
    assert results["empty"] is None
    assert tuple(results["metrics"]) == METRICS == (
        "psnr_masked", "psnr_fg", "psnr_full_image", "depth_abs_fg", "iou", "ssim", "lpips",
    )  # fmt: skip
    assert set(results["frames"]) == {record.name for record in CO3DIndex(root).subset("mug", DEV).targets}
    assert (results["steps"], results["stopped"]) == (8, "max_steps") and results["best_step"] in (4, 8)
    for name in METRICS:
        values = [frame[name] for frame in results["frames"].values()]
        if name == "lpips" and None in values:
            assert results["metrics"][name] is None and "vgg16" in results["reasons"][name]
        else:
            assert results["metrics"][name] == pytest.approx(sum(values) / len(values))
    assert 0 < results["metrics"]["iou"] < 1 and results["metrics"]["psnr_masked"] > 5


def test_targets_without_ground_truth_are_not_scored_and_the_results_say_so(output):
    results = scores_of(output, subset_name=TEST)
    assert set(results["metrics"].values()) == {None} and results["frames"] == {}
    assert results["reasons"] == {name: "no target has ground truth" for name in METRICS}


# Going on, starting over, refusing


def test_a_finished_run_is_left_as_it_is(own_output, root, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(pipeline, "load_scene", lambda config: pytest.fail("the photographs were read again"))
    run = run_of(own_output)
    before = {name: content for name, content in contents(run).items() if name.name != "environment.json"}
    assert train(root, own_output, training__checkpoint_every_seconds=7, training__log_every=1, rendering__chunk_rays=64) == 0
    after = contents(run)
    # settings that cannot change a result are noted; nothing else is touched
    assert {str(name) for name in before if after[name] != before[name]} == {"config.yaml"}
    assert f"{run} is finished: max_steps after 8 steps" in caplog.text and "training.resume=restart" in caplog.text


def test_scores_that_were_deleted_are_computed_again_without_training(own_output, root, monkeypatch):
    monkeypatch.setattr(ObjectModel, "losses", lambda *_: pytest.fail("trained again"))
    before = scores_of(own_output)
    (run_of(own_output) / "results.json").unlink()
    assert train(root, own_output) == 0
    after = scores_of(own_output)
    assert after["metrics"] == pytest.approx(before["metrics"]) and after["steps"] == before["steps"]


def test_a_finished_run_whose_best_checkpoint_is_damaged_is_scored_anew(own_output, root, caplog):
    truncate(run_of(own_output) / "checkpoints" / "best.pt")
    assert train(root, own_output) == 0
    assert "best.pt is damaged" in caplog.text
    assert scores_of(own_output)["best_step"] == 8


def test_another_configuration_is_refused_with_the_keys_that_differ(own_output, root, capsys):
    before = contents(run_of(own_output))
    assert train(root, own_output, training__lr=0.25, model__nerf__n_hidden=24, training__log_every=1) == 1
    message = capsys.readouterr().err
    assert "training.lr: 0.005 in the run, 0.25 now" in message and "model.nerf.n_hidden: 16 in the run, 24 now" in message
    assert "log_every" not in message and "training.resume=restart" in message and str(run_of(own_output)) in message
    assert contents(run_of(own_output)) == before


def test_resume_never_refuses_a_run_and_restart_discards_it(own_output, root, capsys):
    assert train(root, own_output, training__resume="never") == 1
    assert f"{run_of(own_output)} holds a run already" in capsys.readouterr().err
    assert train(root, own_output, training__resume="restart", training__max_steps=2) == 0
    assert scores_of(own_output)["steps"] == 2


def test_a_time_budget_fixes_the_steps_once(root, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "MIN_TIMED_STEPS", 1)
    monkeypatch.setattr(budget, "time", types.SimpleNamespace(perf_counter=time.process_time))  # others may be keeping the cores busy
    given = {"training__budget_minutes": 0.02, "training__validate_every": 1.0}
    assert train(root, tmp_path, **given) == 0
    steps = settings_of(tmp_path).training.max_steps
    assert steps > 0 and json.loads((run_of(tmp_path) / "budget.json").read_text())["max_steps"] == steps
    assert scores_of(tmp_path)["steps"] == steps
    monkeypatch.setattr(budget, "measure_speed", lambda *_: pytest.fail("probed again"))
    (run_of(tmp_path) / "results.json").unlink()
    assert train(root, tmp_path, **given) == 0
    assert settings_of(tmp_path).training.max_steps == scores_of(tmp_path)["steps"] == steps


# Damaged photographs and full disks


def test_broken_known_frames_are_named_and_training_goes_on_with_the_others(own_root, tmp_path, caplog, capsys):
    known = CO3DIndex(own_root).subset("mug", DEV).known
    cut_mask, cut_picture, no_picture, black, empty_mask, lost, skewed, cut_depth, *_ = known
    truncate(cut_mask.mask_path)
    truncate(cut_picture.image_path)
    no_picture.image_path.unlink()
    Image.new("RGB", (WIDTH, HEIGHT)).save(black.image_path)
    Image.new("L", (WIDTH, HEIGHT)).save(empty_mask.mask_path)
    annotate(own_root, [lost], lambda entry: entry["viewpoint"].update(T=[math.nan, 0.0, 4.0]))
    annotate(own_root, [skewed], lambda entry: entry["viewpoint"].update(R=[[1, 0, 0], [0, 1, 0], [0, 0, 2]]))
    truncate(cut_depth.depth_path)  # costs the depth, not the frame

    assert train(own_root, tmp_path) == 1
    message = capsys.readouterr().err
    assert "3 of 10 known frames are usable, need 8" in message and cut_mask.mask_path.name in message
    assert "Traceback" not in message

    caplog.clear()
    assert train(own_root, tmp_path / "fewer", data__min_known_frames=3) == 0
    broken = {
        cut_mask.mask_path: "truncated",
        cut_picture.image_path: "truncated",
        no_picture.image_path: "missing",
        black.image_path: "black",
        empty_mask.mask_path: "empty",
        lost.image_path: "no finite T",
        skewed.image_path: "no rotation",
        cut_depth.depth_path: "truncated",
    }
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for path, what in broken.items():
        assert any(str(path.relative_to(own_root)) in text and what in text for text in warnings), (path, warnings)
    assert scores_of(tmp_path / "fewer")["metrics"]["depth_abs_fg"] is not None


def test_a_target_with_a_broken_mask_is_rendered_but_not_scored(own_root, tmp_path, capsys):
    broken, whole = CO3DIndex(own_root).subset("mug", DEV).targets
    truncate(broken.mask_path)
    assert train(own_root, tmp_path, training__max_steps=2) == 0
    assert set(scores_of(tmp_path)["frames"]) == {whole.name}
    assert export(own_root, tmp_path) == 0
    assert f"mug/{DEV}: not scored: {broken.mask_path}" in capsys.readouterr().out
    exported = json.loads((tmp_path / "submission" / "results.json").read_text())["subsets"][f"mug/{DEV}"]
    assert (exported["n_frames"], exported["n_missing"], exported["n_without_truth"]) == (1, 0, 1)
    archive = tmp_path / "submission" / "submission_manyview_dev.hdf5"
    assert evaluate(archive, own_root, "check_only=true") == 0  # both targets are in it


def test_targets_with_a_broken_camera_are_not_scored_and_all_listed_before_an_export_renders(own_root, tmp_path, capsys, monkeypatch):
    lost, flat = CO3DIndex(own_root).subset("mug", DEV).targets
    annotate(own_root, [lost], lambda entry: entry["viewpoint"].update(T=[math.nan, 0.0, 4.0]))
    assert train(own_root, tmp_path, training__max_steps=2) == 0
    assert set(scores_of(tmp_path)["frames"]) == {flat.name}
    annotate(own_root, [flat], lambda entry: entry["viewpoint"].update(R=[[1, 0, 0], [0, 1, 0], [0, 0, 2]]))
    capsys.readouterr()
    monkeypatch.setattr(ObjectModel, "render_view", lambda *_: pytest.fail("rendered"))
    assert export(own_root, tmp_path) == 1
    message = capsys.readouterr().err
    annotations = own_root / "mug" / "frame_annotations.jgz"
    assert f"frame {lost.name} of {annotations}: camera has no finite T" in message
    assert f"frame {flat.name} of {annotations}: camera has an R that is no rotation" in message
    assert "Traceback" not in message and not (tmp_path / "submission").exists()


def test_a_run_s_depth_is_in_world_units_and_the_archive_s_in_those_of_the_png(own_output, root):
    assert export(root, own_output) == 0
    assert scores_of(own_output)["depth_units"] == "world"
    assert json.loads((own_output / "submission" / "results.json").read_text())["depth_units"] == "png"


def test_all_targets_are_scored_but_only_the_shown_ones_pictures_kept(own_output, root, monkeypatch):
    monkeypatch.setattr(pipeline, "SHOWN_TARGETS", 1)
    kept = []
    original = pipeline.comparison_sheet
    monkeypatch.setattr(pipeline, "comparison_sheet", lambda rows: kept.append([name for name, *_ in rows]) or original(rows))
    (run_of(own_output) / "results.json").unlink()
    assert train(root, own_output) == 0
    targets = CO3DIndex(root).subset("mug", DEV).targets
    assert kept == [[record.name for record in pipeline.evenly_spread(list(targets), 1)]]
    assert set(scores_of(own_output)["frames"]) == {record.name for record in targets}  # all are scored


def test_depth_without_ground_truth_is_null_with_its_reason(own_root, tmp_path):
    for path in (own_root / "mug").rglob("depth_masks/*"):
        path.unlink()
    assert train(own_root, tmp_path, training__max_steps=2) == 0
    results = scores_of(tmp_path)
    assert results["metrics"]["depth_abs_fg"] is None and results["reasons"]["depth_abs_fg"] == "no ground-truth depth"
    assert results["metrics"]["iou"] is not None


def full_disk(monkeypatch, part):
    """Every file with ``part`` in its path meets a full disk when it is synchronised."""
    original = os.fsync

    def fsync(descriptor):
        if part in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to tell files by their descriptors")
def test_a_full_disk_is_named_with_its_file_and_costs_no_file_that_was_there(own_output, root, monkeypatch, capsys):
    run = run_of(own_output)
    (run / "results.json").unlink()
    best = run / "checkpoints" / "best.pt"
    best.unlink()
    last = (run / "checkpoints" / "last.pt").read_bytes()
    with monkeypatch.context() as patch:
        full_disk(patch, "checkpoints/best.pt")
        assert train(root, own_output) == 1
    message = capsys.readouterr().err
    assert "the disk is full" in message and str(best) in message and "Traceback" not in message
    assert (run / "checkpoints" / "last.pt").read_bytes() == last and not list(run.rglob("*.tmp*"))
    assert train(root, own_output) == 0 and best.exists()


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_that_cannot_be_written_is_named(root, tmp_path, capsys):
    sealed = tmp_path / "sealed"
    sealed.mkdir(mode=0o500)
    assert train(root, sealed) == 1
    assert str(sealed) in capsys.readouterr().err


def test_an_output_folder_that_is_a_file_is_named(root, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert train(root, tmp_path / "file") == 1
    assert str(tmp_path / "file") in capsys.readouterr().err and (tmp_path / "file").read_text() == "mine"


# What is trained on


def test_no_pixel_of_a_target_or_validation_frame_reaches_the_ray_bank(own_root, tmp_path, monkeypatch):
    subset = CO3DIndex(own_root).subset("mug", DEV)
    for record in (*subset.targets, *subset.val):
        Image.new("RGB", (WIDTH, HEIGHT), MAGENTA).save(record.image_path, quality=100)
    Image.new("RGB", (WIDTH, HEIGHT)).save(subset.known[3].image_path)  # redacted
    banks = []

    class Recorded(RayBank):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            banks.append(self)

    monkeypatch.setattr(assembly, "RayBank", Recorded)
    assert train(own_root, tmp_path, training__max_steps=1, data__longest_side=WIDTH) == 0
    (bank,) = banks
    known = [record.name for record in subset.known if record != subset.known[3]]
    assert bank.names == known and len(bank.pixels) == len(known) * HEIGHT * WIDTH
    magenta = (bank.pixels[:, :3].int() - torch.tensor(MAGENTA)).abs().amax(dim=1) < 40
    assert not magenta.any()
    assert not (bank.pixels[:, :3] == 0).all(dim=1).reshape(len(known), -1).all(dim=1).any()


def test_known_frames_are_held_out_where_the_set_list_has_no_validation_frames(tmp_path, caplog):
    caplog.set_level("INFO")
    root = generated(tmp_path / "root", {"mug": [DEV]}, n_val=0)
    scene = scene_of(root, tmp_path, data__val_share=0.2)
    train_names, val_names = ({frame.name for frame in frames} for frames in (scene.train, scene.val))
    assert len(val_names) == 2 and len(train_names) == 8 and not train_names & val_names
    targets = {record.name for record in scene.subset.targets}
    assert not targets & (train_names | val_names)
    assert all(name in caplog.text for name in val_names)


def test_frames_keep_their_shape_at_a_lower_resolution(root, tmp_path):
    scene = scene_of(root, tmp_path)
    assert {frame.rgb.shape for frame in scene.train} == {(3, 18, 24)}
    assert {(frame.camera.height, frame.camera.width) for frame in scene.val} == {(18, 24)}


def test_results_do_not_depend_on_the_scene_s_scale(tmp_path):
    results = {}
    for scale in (0.1, 1.0, 10.0):
        root = generated(tmp_path / f"root{scale}", {"mug": [DEV]}, scene_scale=scale, image_format="png")
        assert train(root, tmp_path / f"out{scale}") == 0
        results[scale] = scores_of(tmp_path / f"out{scale}")["metrics"]
    for scale in (0.1, 10.0):
        for name in ("psnr_masked", "psnr_fg", "psnr_full_image", "iou", "ssim"):
            assert results[scale][name] == pytest.approx(results[1.0][name], rel=2e-3), (scale, name)
        assert results[scale]["depth_abs_fg"] == pytest.approx(scale * results[1.0]["depth_abs_fg"], rel=2e-2)


def test_fixed_distances_hold_for_all_and_an_override_for_one_subset(root, tmp_path):
    fixed = {"data__bounds__mode": "near_far", "data__bounds__near": 2.0, "data__bounds__far": 6.0}
    override = {"+data__bounds__overrides": "{mug/manyview_dev_0:[2.5,5.5]}"}  # Hydra adds new keys with a plus sign
    plain = scene_of(root, tmp_path, category="bear", **fixed, **override)
    special = scene_of(root, tmp_path, **fixed, **override)
    assert plain.near_far == (2.0, 6.0) and special.near_far == (2.5, 5.5)
    assert train(root, tmp_path, **fixed, **override) == 0
    best = Checkpoints(run_of(tmp_path) / "checkpoints").load_best()
    assert best["model"]["near_far"].tolist() == [2.5, 5.5]
    assert export(root, tmp_path, "allow_missing=true") == 0


# Export


def test_the_archive_has_every_target_at_the_photographs_own_size(own_output, root, capsys):
    assert export(root, own_output) == 0
    folder = own_output / "submission"
    archive = folder / "submission_manyview_dev.hdf5"
    records = targets_with_records(CO3DIndex(root), task="manyview", sequence_set="dev")
    shapes = {target: tuple(view.rgb.shape) for target, view in read_archive(archive, records)}
    assert shapes == {target: (3, HEIGHT, WIDTH) for target in records} and len(shapes) == 4
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == {"mean", "subsets", "depth_units"} and set(results["subsets"]) == {f"mug/{DEV}", f"bear/{DEV}"}
    for name in ("psnr_masked", "depth_abs_fg", "iou"):
        values = [subset[name] for subset in results["subsets"].values()]
        assert results["mean"][name] == pytest.approx(sum(values) / 2)
    shown = capsys.readouterr().out
    assert f"mug/{DEV}" in shown and "MEAN" in shown and str(archive) in shown
    assert not list(folder.glob("*.tmp*"))

    assert evaluate(archive, root, f"output={folder / 'again.json'}") == 0
    assert json.loads((folder / "again.json").read_text()) == results


def test_renders_are_reused_until_there_is_a_better_checkpoint(own_output, root, monkeypatch):
    rendered = []
    original = ObjectModel.render_view
    monkeypatch.setattr(ObjectModel, "render_view", lambda self, *args: rendered.append(1) or original(self, *args))
    archive = own_output / "submission" / "submission_manyview_dev.hdf5"
    assert export(root, own_output) == 0 and len(rendered) == 4
    assert export(root, own_output) == 0 and len(rendered) == 4
    checkpoints = Checkpoints(run_of(own_output) / "checkpoints")
    best = checkpoints.load_best()
    emptied = {name: value - 9.0 if name.endswith("bias") else value for name, value in best["model"].items()}
    checkpoints.save_best({**best, "model": emptied})
    before = archive.read_bytes()
    assert export(root, own_output) == 0 and len(rendered) == 6  # the mug's two, not the bear's
    assert archive.read_bytes() != before


def test_an_export_s_chunk_size_is_the_run_s_unless_given(own_output, root, monkeypatch):
    asked = []
    original = ObjectModel.render_view
    monkeypatch.setattr(ObjectModel, "render_view", lambda self, camera, n: asked.append(n) or original(self, camera, n))
    assert export(root, own_output, "chunk_rays=100") == 0 and asked == [100] * 4
    for category in ("mug", "bear"):
        shutil.rmtree(run_of(own_output, category=category) / "views")
    assert export(root, own_output) == 0 and asked[4:] == [settings_of(own_output).rendering.chunk_rays] * 4


def test_a_run_is_locked_while_its_targets_are_rendered(own_output, root, monkeypatch, capsys):
    monkeypatch.setattr(lock, "GRACE_SECONDS", 0.0)
    original, codes = pipeline.write_view, []

    def train_meanwhile(path, view):
        if not codes:
            left = path.with_name(f"{path.name}.tmp-1")  # as the render has it at this moment
            left.write_bytes(b"half")
            codes.append(train(root, own_output, category=path.parents[3].name))
            assert left.exists()
        original(path, view)

    monkeypatch.setattr(pipeline, "write_view", train_meanwhile)
    assert export(root, own_output) == 0 and codes == [1]
    assert "is in use by process" in capsys.readouterr().err
    assert train(root, own_output) == 0  # the lock is given back


def test_a_run_that_is_being_trained_is_not_exported_and_the_message_says_why(own_output, root, monkeypatch, capsys):
    monkeypatch.setattr(lock, "GRACE_SECONDS", 0.0)
    with lock.FolderLock(run_of(own_output)):
        assert export(root, own_output) == 1
    message = capsys.readouterr().err
    assert f"{run_of(own_output)} is in use by process {os.getpid()}" in message and "once that has ended" in message
    assert export(root, own_output) == 0


def test_an_export_goes_on_after_a_killed_one(own_output, root):
    (own_output / "submission").mkdir()
    for left in (own_output / "submission" / "submission_manyview_dev.hdf5.tmp-1", run_of(own_output) / "renders" / "x.npz.tmp-1"):
        left.parent.mkdir(exist_ok=True)
        left.write_bytes(b"half")
    assert export(root, own_output) == 0
    assert not list(own_output.rglob("*.tmp*"))


def test_subsets_without_a_run_are_an_error_that_lists_their_frames_unless_allowed(own_output, root, capsys):
    shutil.rmtree(own_output / "bear")
    assert export(root, own_output) == 1
    message = capsys.readouterr().err
    lost = CO3DIndex(root).subset("bear", DEV).targets
    assert all(f"bear_{record.sequence_name}_{record.frame_number}_" in message for record in lost)
    assert f"1 subsets cannot be exported from {own_output}: bear/{DEV} (no trained nerf)" in message and "allow_missing=true" in message
    assert not (own_output / "submission").exists()
    assert export(root, own_output, "allow_missing=true") == 0
    assert f"left out, no trained run: bear/{DEV}" in capsys.readouterr().out
    assert set(json.loads((own_output / "submission" / "results.json").read_text())["subsets"]) == {f"mug/{DEV}"}


def test_an_unfinished_run_is_exported_with_a_warning(own_output, root, caplog):
    (run_of(own_output) / "results.json").unlink()
    assert export(root, own_output) == 0
    assert f"mug/{DEV}: the training of {run_of(own_output)} has not ended" in caplog.text


def test_a_test_set_is_exported_without_scores(own_output, root, capsys):
    assert export(root, own_output, "sequence_set=test") == 0
    archive = own_output / "submission" / "submission_manyview_test.hdf5"
    assert archive.exists() and not (archive.parent / "results.json").exists()
    assert "MEAN" not in capsys.readouterr().out
    assert evaluate(archive, root, "check_only=true") == 0
    assert evaluate(archive, root) == 5
    assert "redacted" in capsys.readouterr().out


def test_a_perfect_model_scores_perfectly_so_cameras_depth_and_files_agree(tmp_path, monkeypatch):
    """The generated scene itself in the place of the trained model: z depth, original size and cameras through the archive."""
    settings = {"image_format": "png", "scene_scale": 2.0}
    root = generated(tmp_path / "root", {"mug": [DEV]}, **settings)
    assert train(root, tmp_path, training__max_steps=1) == 0
    plan = plan_sequence("mug", f"synthetic_{DEV}", SyntheticConfig(**SIZES, **settings))

    class Scene:
        def render_view(self, camera, chunk_rays):
            view = render_view(plan.scene, camera, supersample=1)
            return RenderedView(rgb=(view.rgb * view.mask).float(), depth=(view.depth * view.mask).float(), mask=view.mask.float())

    monkeypatch.setattr(pipeline, "load_trained", lambda run, device: (Scene(), run.config))
    assert export(root, tmp_path) == 0
    mean = json.loads((tmp_path / "submission" / "results.json").read_text())["mean"]
    assert mean["iou"] > 0.99 and mean["psnr_masked"] > 40 and mean["psnr_fg"] > 40
    assert mean["depth_abs_fg"] < 0.01  # of 8; the distance along the ray would be 0.1 off


# Experiments


def test_implicitron_s_own_model_goes_the_same_way(root, tmp_path):
    arguments = "model.implicitron.args.{}".format
    toy = {
        arguments("implicit_function_NeuralRadianceFieldImplicitFunction_args.n_hidden_neurons_xyz"): 16,
        arguments("implicit_function_NeuralRadianceFieldImplicitFunction_args.n_hidden_neurons_dir"): 8,
        arguments("implicit_function_NeuralRadianceFieldImplicitFunction_args.n_layers_xyz"): 2,
        arguments("implicit_function_NeuralRadianceFieldImplicitFunction_args.append_xyz"): "[1]",
        arguments("raysampler_AdaptiveRaySampler_args.n_pts_per_ray_training"): 8,
        arguments("raysampler_AdaptiveRaySampler_args.n_pts_per_ray_evaluation"): 8,
        arguments("renderer_MultiPassEmissionAbsorptionRenderer_args.n_pts_per_ray_fine_training"): 8,
        arguments("renderer_MultiPassEmissionAbsorptionRenderer_args.n_pts_per_ray_fine_evaluation"): 8,
    }
    assert train(root, tmp_path, experiment="implicitron_nerf_laptop", training__max_steps=2, **toy) == 0
    results = scores_of(tmp_path)
    assert results["steps"] == 2 and results["metrics"]["psnr_masked"] > 0
    assert export(root, tmp_path, "allow_missing=true") == 0
    exported = json.loads((tmp_path / "submission" / "results.json").read_text())
    assert exported["subsets"][f"mug/{DEV}"]["n_frames"] == 2


def test_the_published_experiment_has_the_recipe_s_figures():
    config = compose_experiment(["experiment=nerf_published", "dataset_root=x", "category=mouse"])
    training, model, bounds = config.training, config.model, config.data.bounds
    assert (training.n_rays, model.renderer.n_pts_per_ray_coarse, model.renderer.n_pts_per_ray_fine) == (1024, 96, 96)
    assert (bounds.mode, bounds.near, bounds.far) == ("near_far", 3.0, 24.0)
    assert dict(bounds.overrides) == {"mouse/manyview_test_0": [12.0, 32.0]}
    assert (training.lr, training.schedule, training.max_steps) == (5e-4, "warmup_cosine", 350_000)
    assert model.nerf.density_noise_std == 0.05
    assert training.ema and ema_decay(training.max_steps, training.ema_horizon) == pytest.approx(0.9999, abs=1e-12)
    weights = dict(training.loss_weights)
    assert 1e-5 <= weights.pop("loss_sample_entropy") <= 5e-5
    assert weights == dict.fromkeys(("loss_roi_rgb", "loss_prev_stage_roi_rgb", "loss_alpha_bce", "loss_prev_stage_alpha_bce"), 1.0)
    assert model.camera_jitter.mode == "fixed_gauge" and model.camera_jitter.angle_std == pytest.approx(math.pi * 0.0625)
    assert training.clip_grad_norm == 1.0 and training.early_stopping_patience is not None
    nerf = model.nerf
    assert (nerf.n_layers, nerf.n_hidden, list(nerf.skip_layers), nerf.n_hidden_color) == (8, 256, [5], 128)
    assert (nerf.n_harmonics_xyz, nerf.n_harmonics_dir) == (10, 4) and not model.coarse_overrides
    assert config.data.longest_side is None


def test_a_fleet_s_jobs_leave_all_targets_at_their_original_size_also_those_that_nobody_can_score(root, tmp_path):
    assert train(root, tmp_path, subset_name=TEST, rendering__all_targets="true", data__longest_side=16) == 0
    targets = {f"{record.sequence_name}_{record.frame_number}.npz" for record in CO3DIndex(root).subset("mug", TEST).targets}
    assert {path.name for path in (run_of(tmp_path, subset_name=TEST) / "views").glob("*.npz")} == targets
