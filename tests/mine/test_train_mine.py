"""launch/train_mine.py on tiny generated scenes: runs that end, are stopped, go on, and are loaded again."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import signal
import sys

import pytest
import torch

from co3d_ensemble.fields.mpi_network import MPINetwork
from co3d_ensemble.mine import run as run_module
from co3d_ensemble.mine import task as task_module
from co3d_ensemble.mine.assembly import compose_mine, load_trained_mine
from co3d_ensemble.mine.evaluation import score_source
from co3d_ensemble.mine.objective import Objective
from co3d_ensemble.mine.run import train_together
from co3d_ensemble.mine.task import MINETask, mean_scores
from co3d_ensemble.mine.training_data import open_pairs
from co3d_ensemble.training.checkpoint import Checkpoints
from co3d_ensemble.training.records import read_metrics
from launch import train_mine
from tests.tiny import Launched
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
        "model.precision": "float32",
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


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, whole, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
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
    assert f"{run}: {STEPS} steps, " in caplog.text and "on cpu" in caplog.text  # said before the first step, which takes a while
    assert train(tmp_path) == 0 and same_weights(run, whole)


class LaunchedMine(Launched):
    """launch/train_mine.py in a process of its own, which may be killed at the ``count``-th time (from 0) of a moment."""

    def __init__(self, arguments, log, *, dies_at=None):
        context = multiprocessing.get_context("forkserver")
        self.log = log
        settings = (list(map(str, arguments)), str(log), dies_at, torch.get_num_threads())  # with others, sums are rounded otherwise
        self.process = context.Process(target=_train_in_child, args=settings)
        self.process.start()


def _train_in_child(arguments, log, dies_at, threads):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
    if dies_at is not None:
        method, count = dies_at
        original, calls = getattr(MINETask, method), iter(range(count))

        def dying(*own):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*own)

        setattr(MINETask, method, dying)
    sys.exit(train_mine.main(arguments))


def test_a_run_killed_in_a_step_and_before_a_validation_ends_like_one_that_was_not(tmp_path, whole):
    arguments, log = overrides(tmp_path, training__checkpoint_every_seconds=0), tmp_path / "log"
    for moment in (("losses", 1), ("validate", 0)):
        assert LaunchedMine(arguments, log, dies_at=moment).exit_code(120) == -signal.SIGKILL, log.read_text()
    run = tmp_path / "mine" / "mine_generated"
    assert Checkpoints(run / "checkpoints").load_last()["clock"]["step"] == 2 and not (run / "checkpoints" / "best.pt").exists()
    assert train(tmp_path) == 0 and same_weights(run, whole)
    best = [Checkpoints(folder / "checkpoints").load_best() for folder in (run, whole)]
    assert best[0]["step"] == best[1]["step"] and best[0]["metric"] == best[1]["metric"]
    assert "going on from step 1" in log.read_text() and "Traceback" not in log.read_text() and not list(run.rglob("*.tmp*"))


def test_ctrl_c_leaves_a_checkpoint_and_a_second_process_is_refused(tmp_path, capsys):
    long = {"training__max_steps": 100_000, "training__validate_every": 1.0}
    metrics = tmp_path / "mine" / "mine_generated" / "metrics.jsonl"
    process = LaunchedMine(overrides(tmp_path, **long), tmp_path / "log")
    process.wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 1, 120)
    assert train(tmp_path, **long) == 1
    assert f"is in use by process {process.pid} on " in capsys.readouterr().err
    process.signal(signal.SIGINT)
    assert process.exit_code(120) == 130
    log = process.log.read_text()
    assert "interrupted after" in log and "Traceback" not in log
    assert Checkpoints(metrics.parent / "checkpoints").load_last()["clock"]["step"] > 1 and not (metrics.parent / "results.json").exists()


def test_ctrl_c_before_the_training_is_no_traceback(tmp_path, monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "open_pairs", interrupted)
    assert train(tmp_path) == 130
    assert "interrupted: the same command goes on" in capsys.readouterr().err


def test_planes_in_chunks_train_as_planes_at_once(tmp_path, whole, monkeypatch):
    """In the first step, that is: Adam makes much of rounding."""
    seen, decode = [], MPINetwork.decode
    monkeypatch.setattr(MPINetwork, "decode", lambda *own, **how: seen.append(how["plane_chunk"]) or decode(*own, **how))
    assert train(tmp_path, training__plane_chunk=2) == 0
    chunked, at_once = (read_metrics(run / "metrics.jsonl", "train")[0]["losses"] for run in (tmp_path / "mine" / "mine_generated", whole))
    assert chunked == pytest.approx(at_once, rel=2e-3) and seen[0] == 2


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("training.lr_decoder", 0.5, "0.001 in the run, 0.5 now"),
        ("evaluation.n_planes", 5, "16 in the run, 5 now"),  # best.pt was chosen by scores at other planes
        ("evaluation.sampling", "stratified", "'fixed' in the run, 'stratified' now"),
    ],
)
def test_another_setting_does_not_go_on_with_a_run(whole, capsys, key, value, told):
    assert train(whole.parent.parent, **{key.replace(".", "__"): value}) == 1
    assert f"{key}: {told}" in capsys.readouterr().err


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


def test_every_step_draws_a_plane_in_each_interval_of_disparity_for_each_picture(monkeypatch):
    config, seen = compose_mine(overrides("unused", training__multi_scale="false")), []
    monkeypatch.setattr(Objective, "losses", lambda self, planes, disparity, pair: seen.append(disparity) or {})
    task = MINETask(config, config.training, *open_pairs(config), device=torch.device("cpu"))
    for step in (0, 1):
        task.losses(task.batch(step))
    drawn = torch.cat(seen).double()
    edges = torch.linspace(config.model.near_disparity, config.model.far_disparity, 4, dtype=torch.float64)
    assert drawn.shape == (4, 3) and ((drawn <= edges[:-1] + 1e-6) & (drawn >= edges[1:] - 1e-6)).all()
    assert drawn.unique().numel() == 12


def test_a_score_that_is_no_number_is_named_and_makes_no_checkpoint_the_best(tmp_path, monkeypatch, caplog):
    validations = []

    def scored(network, task, index, **how):
        for record in score_source(network, task, index, **how):
            validations.append(task.name)
            if "psnr_valid" in record and len(validations) > 4:  # of two pairs, their views and their depths: the second validation
                record["psnr_valid"] = math.nan if index == 0 else 99.0
            yield record

    monkeypatch.setattr(task_module, "score_source", scored)
    assert train(tmp_path) == 0
    run = tmp_path / "mine" / "mine_generated"
    first, second = read_metrics(run / "metrics.jsonl", "validation")
    assert second["metrics"]["psnr_valid"] is None and second["metrics"]["psnr"] > 0
    results = json.loads((run / "results.json").read_text())
    assert (results["best_step"], results["best_metric"]) == (2, first["metrics"]["psnr_valid"])
    assert f"psnr_valid of {validations[0]} is nan" in caplog.text


def test_a_metric_without_ground_truth_is_left_out_and_a_criterion_that_no_pair_has_is_no_number(monkeypatch, caplog):
    def blind(network, task, index, **how):
        for record in score_source(network, task, index, **how):
            yield {**record, "psnr_valid": None} if "psnr_valid" in record else record

    records = [{"name": "a", "psnr": 20.0, "abs_rel": None, "scale": 2.0}, {"name": "b", "psnr": 30.0, "abs_rel": 0.5}]
    assert mean_scores(records) == {"psnr": 25.0, "abs_rel": 0.5}
    assert math.isnan(mean_scores([*records, {"name": "c", "psnr": math.inf}])["psnr"])
    monkeypatch.setattr(task_module, "score_source", blind)
    config = compose_mine(overrides("unused"))
    scores = MINETask(config, config.training, *open_pairs(config), device=torch.device("cpu")).validate()
    assert math.isnan(scores["psnr_valid"]) and scores["psnr"] > 0 and "no validation pair has a psnr_valid" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__train_options": "{n_rooms: 3}"}, "data.train_options.n_rooms: GeneratedPairs has n_scenes"),
        ({"data__options": "{height: 3}"}, "data.options.height: is data.height"),
        ({"data__root": "somewhere"}, "data.root=somewhere: data.kind=generated is read from no folder"),
        ({"data__options": "{n_views: 7}"}, "n_views=7"),
        ({"data__options": "{n_views: two}"}, "data.options.n_views='two': expected int"),
        ({"data__val_options": "{n_scenes: 2.5}"}, "data.val_options.n_scenes=2.5: expected int"),
        ({"data__train_options": "{shuffle_looks: 1}"}, "data.train_options.shuffle_looks=1: expected bool"),
        ({"data__options": "{first_scene: 5}"}, "data.options.first_scene: would be that of both splits"),
        ({"data__val_options": "{first_scene: 3}"}, "data.train_options and data.val_options: both have the generated scenes 3 to 3"),
    ],
)
def test_options_that_cannot_be_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        open_pairs(compose_mine(overrides("unused", **changes)))
