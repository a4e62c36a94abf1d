"""Two processes train one model: over Gloo on the CPU, each in a process forked from a server that has torch imported."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

from co3d_ensemble.training.budget import fit_budget
from co3d_ensemble.training.checkpoint import Checkpoints
from co3d_ensemble.training.processes import ALONE, joined
from co3d_ensemble.training.records import read_metrics
from co3d_ensemble.training.run_directory import RunDirectory, opened_by_first
from tests.children import environment_of_child
from tests.training import toy_task
from tests.training.toy_task import ToyTask, run_toy, settings

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.training.toy_task", "torch.distributed", "torch._dynamo", "tensorboard"])  # all that a run imports


STEPS = 12


class Failed(NamedTuple):
    kind: str
    text: str


def in_two(scenario, *arguments, size=2):
    """What ``scenario(processes, *arguments)`` returns in every process, or how it failed, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = CONTEXT.Queue()
    started = [CONTEXT.Process(target=_child, args=(rank, size, port, answers, scenario, arguments)) for rank in range(size)]
    for process in started:
        process.start()
    found = dict(answers.get(timeout=120) for _ in range(size))
    for process in started:
        process.join(30)
    return [pickle.loads(found[rank]) for rank in range(size)]


def _child(rank, size, port, answers, scenario, arguments):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with joined("cpu") as (processes, _):
            answer = scenario(processes, *arguments)
            processes.largest(0)  # nobody leaves before all are done
    except Exception as error:
        answer = Failed(type(error).__name__, str(error))
    answers.put((rank, pickle.dumps(answer)))  # not the queue's own way with tensors, which needs the sender to stay
    answers.close()
    answers.join_thread()


class HalfTask(ToyTask):
    """Every process takes its own half of one batch, and buffers that differ; no dropout, which would draw per process."""

    rank, size = 0, 1

    def __init__(self, config):
        super().__init__(config)
        self.model[2].p = 0.0
        self.seen = []

    def batch(self, step):
        whole = torch.rand(16, 2, generator=torch.Generator().manual_seed(step))
        self.seen.append(torch.rand(()).item())
        return whole[self.rank :: self.size]


def trained(processes, folder, options=(), *, make_task=HalfTask):
    task_class = type("Own", (make_task,), {"rank": processes.rank, "size": processes.size})
    result, task = run_toy(folder, make_task=task_class, processes=processes, **{"max_steps": STEPS, "log_every": 4, **dict(options)})
    return result, {name: value.clone() for name, value in task.model.state_dict().items()}, task


def weights_and_draws(processes, folder, options):
    result, state, task = trained(processes, folder, options)
    return result, state, task.seen


def test_two_halves_of_a_batch_train_like_the_whole(tmp_path):
    options = {"ema": True, "clip_grad_norm": 0.05}
    first, second = in_two(weights_and_draws, tmp_path / "two", options)
    result, state, draws = weights_and_draws(ALONE, tmp_path / "one", options)
    for name, value in state.items():
        torch.testing.assert_close(first[1][name], value, rtol=1e-4, atol=1e-6)
        assert torch.equal(first[1][name], second[1][name])
    assert first[0].steps == second[0].steps == result.steps == STEPS
    assert (first[0].best_metric, first[0].best_step) == (second[0].best_metric, second[0].best_step)
    assert first[2] == draws and not set(first[2]) & set(second[2])  # the first draws what one alone would
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl", "train") for name in ("one", "two"))
    assert [record["step"] for record in two] == [record["step"] for record in one]  # and nothing twice
    for ours, theirs in zip(two, one, strict=True):
        for name in theirs["losses"]:
            assert ours["losses"][name] == pytest.approx(theirs["losses"][name], rel=1e-4, abs=1e-6)


def stopped_by_the_second(processes, folder):
    class Stopping(HalfTask):
        def losses(self, batch):
            if self.rank == 1 and len(self.seen) == 5:
                signal.raise_signal(signal.SIGTERM)
            return super().losses(batch)

    result, state, _ = trained(processes, folder, make_task=Stopping)
    return result, state


def test_a_signal_to_one_stops_all_at_the_same_step_and_any_number_goes_on(tmp_path):
    first, second = in_two(stopped_by_the_second, tmp_path)
    assert first[0].stopped == second[0].stopped == "preempted" and first[0].exit_status == 143
    assert first[0].steps == second[0].steps == 5
    result, state, _ = trained(ALONE, tmp_path)
    assert result.steps == STEPS
    _, whole, _ = trained(ALONE, tmp_path / "whole")
    for name, value in whole.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)


def test_two_go_on_from_what_one_began(tmp_path):
    class Killed(Exception):
        pass

    class Dying(HalfTask):
        def batch(self, step):
            if step == 7:
                raise Killed
            return super().batch(step)

    with pytest.raises(Killed):
        trained(ALONE, tmp_path, {"checkpoint_every_seconds": 0.0}, make_task=Dying)
    first, second = in_two(weights_and_draws, tmp_path, {})
    assert len(second[2]) == 5  # the steps that were left
    _, whole, _ = trained(ALONE, tmp_path / "whole")
    for name, value in whole.items():
        torch.testing.assert_close(second[1][name], value, rtol=1e-4, atol=1e-6)


def diverging_in_the_second(processes, folder):
    class Diverging(HalfTask):
        def losses(self, batch):
            losses = super().losses(batch)
            if self.rank == 1 and len(self.seen) == 7:
                losses["loss_size"] = losses["loss_size"] * math.nan
            return losses

    return trained(processes, folder, make_task=Diverging)


def test_a_loss_that_is_not_finite_in_one_stops_all_under_its_name(tmp_path):
    for failed in in_two(diverging_in_the_second, tmp_path):
        assert failed.kind == "NonFiniteLoss" and "step 6: loss_size is not finite" in failed.text
    assert not (tmp_path / "checkpoints" / "last.pt").exists()


def with_a_budget(processes, folder):
    config = settings(budget_minutes=0.5, validate_every=1.0)
    with opened_by_first(processes, folder, config) as run:
        return (run is None), fit_budget(ToyTask, run, "cpu", processes).max_steps


def test_a_budget_is_measured_together_and_fixed_by_the_first(tmp_path):
    first, second = in_two(with_a_budget, tmp_path)
    steps = RunDirectory(tmp_path).config.training.max_steps
    assert first == (False, steps) and second == (True, steps)


def mismatch(processes, folder):
    return trained(processes, folder, {"lr": 0.5})[0]


def test_an_error_in_the_first_reaches_the_others(tmp_path):
    trained(ALONE, tmp_path)
    first, second = in_two(mismatch, tmp_path)
    assert first.kind == "ConfigMismatch"
    assert second.kind == "FirstProcessFailed" and "training.lr: 0.01 in the run, 0.5 now" in second.text


def test_one_gpu_cannot_be_shared(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("co3d_ensemble.training.processes.resolve_device", torch.device)
    with pytest.raises(ValueError, match="device=cuda:0: several processes cannot share one GPU"):
        with joined("cuda:0"):
            pass


def test_torchrun_ends_all_when_one_is_killed_and_one_alone_goes_on(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", toy_task.__file__, str(tmp_path)]
    options = ["checkpoint_every_seconds=0", "max_steps=20"]
    done = subprocess.run(
        [*command, "dies=1", *options],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment_of_child(),
    )
    assert done.returncode != 0 and "ProcessLost: another process of this run has ended" in done.stderr
    step = Checkpoints(tmp_path / "checkpoints").load_last()["clock"]["step"]
    assert step == 10, done.stderr
    result, _ = run_toy(tmp_path, checkpoint_every_seconds=0, max_steps=20)
    assert result.steps == 20
