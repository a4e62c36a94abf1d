"""launch/train_mine.py on tiny generated scenes: runs that end, are stopped, go on, and are loaded again."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

from co3d_ensemble.fields.mpi_network import MPINetwork
from co3d_ensemble.mine.assembly import compose_mine, load_trained_mine
from co3d_ensemble.mine.objective import Objective
from co3d_ensemble.mine.run import train_together
from co3d_ensemble.mine.training_data import open_pairs
from co3d_ensemble.training.checkpoint import Checkpoints
from co3d_ensemble.training.records import read_metrics
from launch import train_mine
from tests.training.test_processes import in_two

STEPS = 4


def overrides(folder, **changes):
    chosen = {
        "output_dir": folder,
        "device": "cpu",
        "data.height": 32,
        "data.width": 48,
        "+data.options": "{supersample: 1, n_views: 2}",
        "data.train_options.n_scenes": 4,
        "+data.val_options.n_scenes": 1,
        "model.n_planes": 3,
        "training.max_steps": STEPS,
        "training.batch_size": 2,
        "training.validate_every": 0.5,
        "training.log_every": 1,
        "training.progress": "false",
        "training.deterministic": "true",
    }
    given = {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{'+' if key in given and 'options' in key else ''}{key}={value}" for key, value in {**chosen, **given}.items()]


def train(folder, **changes):
    return train_mine.main(overrides(folder, **changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder) == 0
    return folder / "mine" / "mine_generated"


def test_a_run_ends_with_scores_and_a_network_to_load(whole, caplog):
    results = json.loads((whole / "results.json").read_text())
    assert results["stopped"] == "max_steps" and results["steps"] == STEPS
    validations = read_metrics(whole / "metrics.jsonl", "validation")
    assert [record["step"] for record in validations] == [2, 4]
    best = max(record["metrics"]["psnr_valid"] for record in validations)
    assert results["best_metric"] == results["validation"]["psnr_valid"] == best
    assert {"psnr", "ssim", "abs_rel"} <= results["validation"].keys()
    losses = read_metrics(whole / "metrics.jsonl", "train")[0]["losses"]
    assert {"loss_rgb_target", "loss_ssim_target", "loss_disparity_source", "loss_disparity_target", "total"} <= losses.keys()
    assert (whole / "training_curve.png").exists()
    network, config = load_trained_mine(whole)
    rgb, sigma = network(torch.rand(1, 3, 32, 48), torch.tensor([[0.9, 0.5, 0.2, 0.1, 0.05]]))[0]
    assert rgb.shape == (1, 5, 3, 32, 48) and config.training.max_steps == STEPS
    assert train(whole.parent.parent) == 0  # and is left alone
    assert [record["step"] for record in read_metrics(whole / "metrics.jsonl", "validation")] == [2, 4]


def same_weights(first, second):
    left, right = (Checkpoints(folder / "checkpoints").load_last() for folder in (first, second))
    for part in ("model", "optimizer", "ema"):
        flat = [torch.utils._pytree.tree_leaves(state[part]) for state in (left, right)]
        assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(*flat, strict=True)), part
    return True


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, whole, monkeypatch):
    original, calls = Objective.losses, []

    def stopping(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Objective, "losses", stopping)
        assert train(tmp_path, data__workers=1) == 143  # read by a worker, gone on with without
    run = tmp_path / "mine" / "mine_generated"
    assert Checkpoints(run / "checkpoints").load_last()["clock"]["step"] == 3 and not (run / "results.json").exists()
    assert train(tmp_path) == 0 and same_weights(run, whole)


def test_planes_in_chunks_train_as_planes_at_once(tmp_path, whole, monkeypatch):
    """In the first step, that is: Adam makes much of rounding."""
    seen, decode = [], MPINetwork.decode
    monkeypatch.setattr(MPINetwork, "decode", lambda *own, **how: seen.append(how["plane_chunk"]) or decode(*own, **how))
    assert train(tmp_path, training__plane_chunk=2) == 0
    chunked, at_once = (read_metrics(run / "metrics.jsonl", "train")[0]["losses"] for run in (tmp_path / "mine" / "mine_generated", whole))
    assert chunked == pytest.approx(at_once, rel=2e-3) and seen[0] == 2


def test_another_setting_does_not_go_on_with_a_run(whole, capsys):
    assert train(whole.parent.parent, training__lr_decoder=0.5) == 1
    assert "training.lr_decoder: 0.001 in the run, 0.5 now" in capsys.readouterr().err


def two_processes(processes, folder):
    config = compose_mine(overrides(folder))
    result = train_together(config, torch.device("cpu"), processes)
    assert result.steps == STEPS
    return result.best_metric, os.getpid()


def test_two_processes_share_batch_and_validation(tmp_path):
    first, second = in_two(two_processes, tmp_path)
    run = tmp_path / "mine" / "mine_generated"
    assert first[0] == second[0] == json.loads((run / "results.json").read_text())["best_metric"] and first[1] != second[1]
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl", "train")] == [1, 2, 3, 4]
    load_trained_mine(run)


def test_a_batch_for_a_process_each_at_least():
    class Three:
        rank, size, leads = 0, 3, True

    with pytest.raises(ValueError, match="training.batch_size=2: must be a multiple of the 3 processes"):
        train_together(compose_mine(overrides("unused")), torch.device("cpu"), Three())


def test_finer_planes_alpha_and_the_references_schedule_train(tmp_path):
    options = {"model__n_fine_planes": 2, "model__mode": "alpha", "training__schedule": "milestones", "training__milestones": "[0.5]"}
    options |= {"training__ema": "false", "training__loss_weights__loss_smooth_v1_target": 0.5, "training__calibrate_scale": "true"}
    assert train(tmp_path, training__max_steps=2, **options) == 0
    lines = read_metrics(tmp_path / "mine" / "mine_generated" / "metrics.jsonl", "train")
    assert [line["lr"]["encoder"] for line in lines] == pytest.approx([1e-3, 1e-4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__train_options": "{n_rooms: 3}"}, "data.train_options.n_rooms: GeneratedPairs has n_scenes"),
        ({"data__options": "{height: 3}"}, "data.options.height: is data.height"),
        ({"data__options": "{n_views: 7}"}, "n_views=7"),
        ({"data__options": "{first_scene: 5}"}, "data.options.first_scene: would be that of both splits"),
        ({"data__val_options": "{first_scene: 3}"}, "data.train_options and data.val_options: both have the generated scenes 3 to 3"),
    ],
)
def test_options_that_cannot_be_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        open_pairs(compose_mine(overrides("unused", **changes)))
