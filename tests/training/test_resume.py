"""Runs that are stopped in every way and go on: the result is the uninterrupted run's, bit for bit."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from co3d_ensemble.base.signals import StopSignals
from co3d_ensemble.training.checkpoint import Checkpoints
from co3d_ensemble.training.records import read_metrics
from co3d_ensemble.training.run_directory import ConfigMismatch, RunDirectory
from tests.children import environment_of_child
from tests.training import toy_task
from tests.training.toy_task import ToyTask, run_toy

EVERY_STEP = {"checkpoint_every_seconds": 0.0}


class Killed(Exception):
    pass


def dying_at(step, *, with_signal=None):
    """A task that is killed, or gets a signal, in the middle of ``step``."""

    class Dying(ToyTask):
        def losses(self, batch):
            if self.step == step:
                if with_signal is None:
                    raise Killed
                signal.raise_signal(with_signal)
            return super().losses(batch)

        def batch(self, step):
            self.step = step
            return super().batch(step)

    return Dying


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def assert_same_runs(interrupted: Path, whole: Path):
    """Model, EMA, optimizer, clock and best checkpoint are bitwise equal, and no step is recorded twice."""
    left, right = (Checkpoints(folder / "checkpoints").load_last() for folder in (interrupted, whole))
    for clock in (left["clock"], right["clock"]):
        del clock["seconds"], clock["spent"]  # of wall-clock time
    assert left.keys() == right.keys()
    for part in left:
        assert same(left[part], right[part]), part
    assert same(*(Checkpoints(folder / "checkpoints").load_best() for folder in (interrupted, whole)))
    for kind in ("train", "validation"):
        steps = [[record["step"] for record in read_metrics(folder / "metrics.jsonl", kind)] for folder in (interrupted, whole)]
        assert steps[0] == steps[1]
    assert not list(interrupted.rglob("*.tmp*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_toy(folder)
    return folder


@pytest.mark.parametrize("step", [0, 1, 10, 20, 23, 39])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, whole, step):
    with pytest.raises(Killed):
        run_toy(tmp_path, make_task=dying_at(step), **EVERY_STEP)
    result, _ = run_toy(tmp_path)
    assert result.steps == 40
    assert_same_runs(tmp_path, whole)


def test_a_run_killed_at_every_third_step_goes_on_bit_for_bit(tmp_path, whole):
    for step in range(2, 40, 3):
        with pytest.raises(Killed):
            run_toy(tmp_path, make_task=dying_at(step), **EVERY_STEP)
    run_toy(tmp_path)
    assert_same_runs(tmp_path, whole)


def test_a_truncated_last_is_reported_and_the_one_before_gives_the_same_run(tmp_path, whole, caplog):
    with pytest.raises(Killed):
        run_toy(tmp_path, make_task=dying_at(23), **EVERY_STEP)
    last = tmp_path / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:-1])
    run_toy(tmp_path)
    assert f"{last} is damaged" in caplog.text
    assert_same_runs(tmp_path, whole)


@pytest.mark.parametrize(("number", "stopped"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "preempted")])
@pytest.mark.parametrize("step", [9, 13, 39])  # 9 and 39: just before a validation, which the resumed run makes up for
def test_a_signal_finishes_the_step_and_saves(tmp_path, whole, number, stopped, step):
    before = signal.getsignal(number)
    result, _ = run_toy(tmp_path, make_task=dying_at(step, with_signal=number))
    assert (result.stopped, result.steps) == (stopped, step + 1)
    assert signal.getsignal(number) is before
    assert Checkpoints(tmp_path / "checkpoints").load_last()["clock"]["step"] == step + 1
    run_toy(tmp_path)
    assert_same_runs(tmp_path, whole)


def validating_at(step, number):
    """A task that gets a signal in the middle of its validation at ``step``."""

    class Validating(ToyTask):
        def batch(self, step):
            self.steps = step + 1
            return super().batch(step)

        def validate(self):
            if self.steps == step:
                signal.raise_signal(number)
                raise AssertionError("the validation went on")
            return super().validate()

    return Validating


@pytest.mark.parametrize(("number", "stopped"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "preempted")])
@pytest.mark.parametrize("step", [10, 40])
def test_a_signal_ends_a_validation_at_once_the_last_one_too_and_it_is_made_up_for(tmp_path, whole, number, stopped, step):
    result, _ = run_toy(tmp_path, make_task=validating_at(step, number))
    assert (result.stopped, result.steps) == (stopped, step) and result.exit_status == {"interrupted": 130, "preempted": 143}[stopped]
    clock = Checkpoints(tmp_path / "checkpoints").load_last()["clock"]
    assert clock["step"] == step and clock["validated_step"] < step and not clock["stopped"]
    assert run_toy(tmp_path)[0].exit_status == 0
    assert_same_runs(tmp_path, whole)


@pytest.mark.parametrize("name", ["save_best", "save_last"])
def test_a_signal_after_the_last_step_is_not_lost(tmp_path, whole, monkeypatch, name):
    """While the best, or the last, checkpoint is written, when nothing is left to be trained."""
    save, at_the_end = getattr(Checkpoints, name), []

    def saving(self, state):
        save(self, state)
        if state.get("step", state.get("clock", {}).get("step")) == 40:
            at_the_end.append(state)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, name, saving)
    result, _ = run_toy(tmp_path)
    assert (result.stopped, result.exit_status) == ("preempted", 143) and at_the_end
    monkeypatch.undo()
    finished, task = run_toy(tmp_path)
    assert finished.exit_status == 0 and task.validations == 0
    assert_same_runs(tmp_path, whole)


def test_a_second_interrupt_aborts_at_once():
    before = signal.getsignal(signal.SIGINT)  # ignored where the tests run in a shell's background
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.reason == "interrupted"
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_signals_are_left_alone_outside_the_main_thread():
    handlers = []

    def work():
        with StopSignals():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


def start_process(folder, *options):
    environment = environment_of_child(threads=torch.get_num_threads())
    process = subprocess.Popen([sys.executable, toy_task.__file__, str(folder), *options], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (folder / "checkpoints" / "last.previous.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_kill_9_releases_the_run_and_it_goes_on_bit_for_bit(tmp_path, whole):
    process = start_process(tmp_path, "sleep=0.2", "checkpoint_every_seconds=0")
    (tmp_path / "checkpoints" / "last.pt.tmp-1").write_bytes(b"of an earlier kill")
    process.kill()
    process.wait()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # a line that a kill cut
    result, _ = run_toy(tmp_path)
    assert result.steps == 40
    assert_same_runs(tmp_path, whole)


def test_sigterm_ends_a_process_with_its_own_code_and_a_checkpoint(tmp_path):
    process = start_process(tmp_path, "sleep=0.2", "checkpoint_every_seconds=0")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert 0 < Checkpoints(tmp_path / "checkpoints").load_last()["clock"]["step"] < 40


def test_resume_restart_begins_anew(tmp_path, whole):
    run_toy(tmp_path, lr=0.5)
    with pytest.raises(ConfigMismatch, match="training.lr: 0.5 in the run, 0.01 now"):
        run_toy(tmp_path)
    run_toy(tmp_path, resume="restart")
    assert_same_runs(tmp_path, whole)


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    run_toy(tmp_path)
    config = RunDirectory(tmp_path).config_path
    config.write_text(config.read_text().replace("lr: 0.01", "lr: 0.02"))
    with pytest.raises(ConfigMismatch, match="checkpoint"):
        run_toy(tmp_path, lr=0.02)
