"""The launch scripts as their users meet them: arguments, exit codes, messages, signals, kills."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from co3d_ensemble import pipeline
from co3d_ensemble.config import ExperimentConfig
from co3d_ensemble.data.co3d import CO3DIndex
from co3d_ensemble.settings import settings_with_help
from co3d_ensemble.training.checkpoint import Checkpoints
from co3d_ensemble.training.records import read_metrics
from launch import evaluate_submission, export_submission, train_sequence
from tests.children import environment_of_child
from tests.conftest import REPOSITORY
from tests.tiny import MODEL, Launched, export, generated, train, train_arguments

DEV = "manyview_dev_0"
# everything that is random or changes while training: jitter, density noise, stratified samples, occupancy, EMA
RECIPE = {
    "training__deterministic": "true",
    "model__camera_jitter__mode": "extrinsics",
    "model__camera_jitter__extrinsics_angle_std": 0.01,
    "model__nerf__density_noise_std": 0.5,
    "model__nerf__precision": "float32",
    "model__occupancy__refine_from": 0.1,
    "model__occupancy__refine_every": 0.1,
    "training__max_steps": 20,
    "training__validate_every": 0.25,
}


def run_of(output):
    return output / "mug" / DEV / "nerf"


def same(first, second):
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and first.numpy().tobytes() == second.numpy().tobytes()
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def assert_everything_is_whole(run):
    """Every file of a run can be read, and none is temporary."""
    assert not list(run.rglob("*.tmp*"))
    for path in run.rglob("*.pt"):
        torch.load(path, weights_only=True)
    for path in run.rglob("*.json"):
        json.loads(path.read_text())
    for path in run.rglob("*.png"):
        with Image.open(path) as picture:
            assert np.asarray(picture).size
    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    for path in run.rglob("events.out*"):
        for _ in EventFileLoader(str(path)).Load():
            pass


# Kills


def test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(root, tmp_path):
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    uninterrupted = Launched(train_arguments(root, whole, **RECIPE), tmp_path / "whole.log")
    arguments = train_arguments(root, killed, training__checkpoint_every_seconds=0, **RECIPE)
    deaths = [
        ("sync", 1),  # while the run's own files are first written
        ("step", 0),
        ("bytes of a checkpoint", 9),
        ("rename", 7),  # of checkpoints: between the old one's move and the new one's, or just after
        ("rename", 8),
        ("refinement", 3),
        ("rendering", 2),
    ]
    for moment in deaths:
        assert Launched(arguments, log, dies_at=moment).exit_code() == -signal.SIGKILL, moment
    rng = random.Random(time.time_ns())
    for _ in range(2):
        run = Launched(arguments, log)
        time.sleep(delay := rng.uniform(0.2, 1.2))
        run.signal(signal.SIGKILL)
        assert run.exit_code() in (-signal.SIGKILL, 0), (delay, log.read_text())  # 0: it was faster
    assert Launched(arguments, log).exit_code() == 0, log.read_text()
    assert uninterrupted.exit_code() == 0, uninterrupted.log.read_text()
    assert "going on from step" in log.read_text() and "Traceback" not in log.read_text()
    assert_everything_is_whole(run_of(killed))

    ends = [Checkpoints(run_of(output) / "checkpoints").load_last() for output in (whole, killed)]
    for end in ends:
        for measured in ("seconds", "spent"):
            end["clock"].pop(measured)
    for part in ("model", "ema", "optimizer", "clock"):
        assert same(ends[0][part], ends[1][part]), part
    assert same(*(Checkpoints(run_of(output) / "checkpoints").load_best() for output in (whole, killed)))
    results = [json.loads((run_of(output) / "results.json").read_text()) for output in (whole, killed)]
    assert results[0]["frames"] == results[1]["frames"]
    density = ends[0]["model"]["renderer.occupancy.density"]
    assert density.isfinite().any()  # the density did refine the grid, so its state was part of this


def test_signals_leave_a_checkpoint_and_a_second_process_is_refused(root, tmp_path, capsys):
    long = {"training__max_steps": 1_000_000, "training__log_every": 1, "training__validate_every": 1.0}
    arguments, run = train_arguments(root, tmp_path, **long), run_of(tmp_path)

    def steps():
        return [record["step"] for record in read_metrics(run / "metrics.jsonl", "train")] if (run / "metrics.jsonl").exists() else []

    first = Launched(arguments, tmp_path / "first.log")
    first.wait_for(lambda: len(steps()) > 2)
    assert train(root, tmp_path, **long) == 1
    message = capsys.readouterr().err
    assert f"{run} is in use by process {first.pid} on " in message and "Traceback" not in message
    first.signal(signal.SIGTERM)
    assert first.exit_code() == 143
    reached = Checkpoints(run / "checkpoints").load_last()["clock"]["step"]
    assert reached > 2 and not (run / "results.json").exists()

    second = Launched(arguments, tmp_path / "second.log")
    second.wait_for(lambda: steps()[-1] > reached + 2)
    second.signal(signal.SIGINT)
    assert second.exit_code() == 130
    assert f"going on from step {reached}" in second.log.read_text() and "Traceback" not in second.log.read_text()
    assert Checkpoints(run / "checkpoints").load_last()["clock"]["step"] > reached + 2
    assert_everything_is_whole(run)


def test_ctrl_c_outside_of_training_is_no_traceback(root, tmp_path, monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "load_scene", interrupted)
    assert train(root, tmp_path) == 130
    assert "interrupted" in capsys.readouterr().err


# Arguments


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("training.learning_rate=1", ["training.learning_rate", "not in 'TrainingConfig'"]),
        ("+training.learning_rate=1", ["training.learning_rate"]),  # Hydra alone would accept and ignore it
        ("colour=red", ["colour"]),
        ("training.max_steps=many", ["training.max_steps", "'many'"]),
        ("training.n_rays=0", ["training.n_rays=0", "positive"]),
        ("model.camera_jitter.mode=wild", ["model.camera_jitter.mode='wild'", "fixed_gauge"]),
        ("data.longest_side=3", ["data.longest_side=3", "8"]),
        ("data.bounds.far=1.0", ["data.bounds", "near < far"]),
        ("experiment=nope", ["experiment/nope", "nerf_laptop"]),
        ("training.lr", ["training.lr", "EQUAL"]),
    ],
)
def test_a_wrong_argument_ends_with_2_and_is_named(argument, told, tmp_path, capsys):
    assert train_sequence.main(["dataset_root=x", "category=mug", f"output_dir={tmp_path}", argument]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in told), message
    assert message.startswith("error: ") and message.count("\n") == 1 and "--help" in message
    assert not any(noise in message for noise in ("object_type", "reference_type", "Config search path"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("given", "missing"), [(["category=mug"], "dataset_root"), (["dataset_root=x"], "category")])
def test_a_missing_mandatory_setting_is_named(given, missing, capsys):
    assert train_sequence.main(given) == 2
    assert missing in capsys.readouterr().err


def test_a_loss_that_nobody_computes_is_named(root, tmp_path, capsys):
    assert train(root, tmp_path, **{"+training__loss_weights__loss_rbg": 1.0}) == 1
    message = capsys.readouterr().err
    assert "loss_rbg" in message and "loss_roi_rgb" in message


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"dataset_root": "{root}/nowhere"}, ["{root}/nowhere", "no such folder"]),
        ({"dataset_root": "{root}/mug"}, ["{root}/mug", "too deep, use {root}"]),
        ({"dataset_root": "{root}/.."}, ["is not a CO3Dv2 root"]),
        ({"category": "cup"}, ["'cup'", "available: mug"]),
        ({"subset_name": "manyview_dev_7"}, ["'manyview_dev_7'", f"available: {DEV}"]),
        pytest.param(
            {"device": "cuda"},
            ["device=cuda", "device=cpu or auto"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: asking for it is no mistake"),
        ),
    ],
)
def test_a_wrong_name_or_place_ends_with_1_and_leaves_nothing(root, tmp_path, capsys, settings, told):
    given = {key: value.format(root=root) for key, value in settings.items()}
    assert train(root, tmp_path / "output", **given) == 1
    message = capsys.readouterr().err
    assert all(part.format(root=root) in message for part in told), message
    assert message.startswith("error: ") and "Traceback" not in message
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ([], 2, "dataset_root"),
        (["dataset_root=x", "colour=red"], 2, "colour"),
        (["dataset_root=x", "allow_missing=perhaps"], 2, "allow_missing"),
        (["dataset_root=x", "sequence_set=train"], 2, "sequence_set='train'"),
        (["dataset_root=x", "chunk_rays=0"], 2, "chunk_rays=0"),
        (["dataset_root=/nowhere"], 1, "/nowhere is not a CO3Dv2 root"),
    ],
)
def test_export_names_a_wrong_argument(arguments, code, told, capsys):
    assert export_submission.main(arguments) == code
    message = capsys.readouterr().err
    assert told in message and message.startswith("error: ") and message.count("\n") == 1


def test_export_without_any_run_lists_the_frames_that_would_be_missing(root, tmp_path, capsys):
    assert export(root, tmp_path, "models=[other]") == 1
    message = capsys.readouterr().err
    assert "no trained other" in message
    assert all(f"mug_{record.sequence_name}_{record.frame_number}_" in message for record in CO3DIndex(root).subset("mug", DEV).targets)
    assert export(root, tmp_path, "models=[other]", "allow_missing=true") == 1
    assert "no subset of dev can be exported" in capsys.readouterr().err


def test_evaluation_tells_its_failures_apart_by_exit_codes(root, tmp_path, capsys):
    archive = tmp_path / "submission_manyview_dev.hdf5"
    assert evaluate_submission.main([str(archive), "workers=0", f"dataset_root={root}"]) == 2
    assert evaluate_submission.main([str(archive), f"dataset_root={root}"]) == 3
    assert evaluate_submission.main([str(archive), f"dataset_root={root}/nowhere"]) == 5
    message = capsys.readouterr().err
    assert "workers=0" in message and f"{archive}: no such file" in message and "nowhere" in message


def test_help_lists_every_setting_with_its_line(capsys):
    assert train_sequence.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for key, default, text in settings_with_help(ExperimentConfig):
        assert f"  {key}={default}\n      {text}\n" in shown
    assert all(experiment in shown for experiment in ("nerf_published", "nerf_laptop", "implicitron_nerf_laptop"))
    assert all(code in shown for code in ("130", "143"))
    for script in (export_submission, evaluate_submission):
        assert script.main(["-h"]) == 0
        assert "dataset_root" in capsys.readouterr().out


def test_cfg_prints_the_composed_configuration_without_running(tmp_path, capsys):
    arguments = ["--cfg", "experiment=nerf_laptop", "training.lr=0.125", f"output_dir={tmp_path}"]
    assert train_sequence.main(arguments) == 0  # mandatory settings may still be missing
    shown = capsys.readouterr().out
    assert "lr: 0.125" in shown and "dataset_root: ???" in shown and "n_hidden: 128" in shown
    assert not list(tmp_path.iterdir())


def test_the_script_itself_runs_from_anywhere(tmp_path):
    script = [sys.executable, str(REPOSITORY / "launch" / "train_sequence.py"), "training.learning_rate=1"]
    environment = environment_of_child()
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "training.learning_rate" in done.stderr and "Traceback" not in done.stderr


def test_the_documented_commands_train_into_the_member_that_the_export_takes(tmp_path):
    root, output = generated(tmp_path / "root", {"mug": ["manyview_dev_0"]}), tmp_path / "OUT"
    where = f"dataset_root={root} category=mug subset_name=manyview_dev_0 output_dir={output}"
    small = [f"{key}={value}" for key, value in MODEL.items()]
    assert train_sequence.main(["experiment=nerf_laptop", *where.split(), "training.max_steps=2", "device=cpu", *small]) == 0
    assert (output / "mug" / "manyview_dev_0" / "nerf" / "results.json").exists()
    assert export_submission.main(f"dataset_root={root} output_dir={output} sequence_set=dev models=[nerf] device=cpu".split()) == 0
    assert (output / "submission" / "submission_manyview_dev.hdf5").exists()
