"""A TensoRF run as users start it: killed before, in and after every change of its grid, it ends like one that was not."""

from __future__ import annotations

import json
import signal

import torch

from co3d_ensemble.training.checkpoint import Checkpoints
from tests.test_launch import assert_everything_is_whole, same
from tests.tiny import Launched, export, train, train_arguments

DEV = "manyview_dev_0"
RECIPE = {
    "experiment": "tensorf_laptop",
    "training__deterministic": "true",
    "training__max_steps": 20,
    "training__validate_every": 0.25,
    "model__tensorf__resolution": 6,
    "model__tensorf__precision": "float32",
    "model__tensorf__n_density": 2,
    "model__tensorf__n_appearance": 3,
    "model__tensorf__n_hidden": 8,
    "model__tensorf__density_shift": -3,
    "model__grid__final_resolution": 10,
    "model__grid__shrink_at": "[0.2,0.5]",  # steps 4 and 10
    "model__grid__upsample_at": "[0.3,0.7]",  # steps 6 and 14
    "model__occupancy__resolution": 40,
    "model__occupancy__refine_from": 0.1,
    "model__occupancy__refine_every": 0.1,
    "model__renderer__n_pts_per_ray_coarse": 12,
    "model__camera_jitter__mode": "extrinsics",
}


def run_of(output):
    return output / "mug" / DEV / "tensorf"


def test_a_run_killed_before_in_and_after_each_change_of_the_grid_ends_like_an_uninterrupted_one(root, tmp_path):
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    uninterrupted = Launched(train_arguments(root, whole, **RECIPE), tmp_path / "whole.log")
    arguments = train_arguments(root, killed, training__checkpoint_every_seconds=0, **RECIPE)
    # a checkpoint after every step: the n-th time from where the run goes on is that step
    deaths = [
        ("shrink", 0),  # step 4
        ("step", 1),  # step 5, just after it
        ("upsampling", 0),  # step 6, in it
        ("step", 0),  # step 6 again, with the larger grid
        ("rename", 3),  # a checkpoint that follows an upsampling
        ("shrink", 0),
        ("upsampling", 0),
        ("step", 2),
    ]
    for moment in deaths:
        assert Launched(arguments, log, dies_at=moment).exit_code() == -signal.SIGKILL, moment
    assert Launched(arguments, log).exit_code() == 0, log.read_text()
    assert uninterrupted.exit_code() == 0, uninterrupted.log.read_text()
    assert "going on from step" in log.read_text() and "Traceback" not in log.read_text()
    assert_everything_is_whole(run_of(killed))
    ends = [Checkpoints(run_of(output) / "checkpoints").load_last() for output in (whole, killed)]
    for end in ends:
        del end["clock"]["seconds"], end["clock"]["spent"]  # of wall-clock time
    for part in ("model", "ema", "optimizer", "clock"):
        assert same(ends[0][part], ends[1][part]), part
    assert same(*(Checkpoints(run_of(output) / "checkpoints").load_best() for output in (whole, killed)))
    model = ends[0]["model"]
    assert model["functions.0.field.density_lines.0"].shape[0] > 6
    assert not torch.equal(model["box"], model["functions.0.box"])  # it was cropped


def test_a_trained_run_is_scored_and_exported(root, tmp_path):
    assert train(root, tmp_path, **RECIPE) == 0
    results = json.loads((run_of(tmp_path) / "results.json").read_text())
    assert results["steps"] == 20 and results["metrics"]["psnr_masked"] > 5
    assert export(root, tmp_path, "models=[tensorf]") == 0
    assert (tmp_path / "submission" / "submission_manyview_dev.hdf5").stat().st_size > 0
