"""Runs that go on to more steps than they were made for."""

from __future__ import annotations

import json
import random

import pytest
import torch
from omegaconf import OmegaConf

from co3d_ensemble.config import GridScheduleConfig
from co3d_ensemble.functional.schedules import ema_decay, warmup_cosine
from co3d_ensemble.training import loop
from co3d_ensemble.training.checkpoint import Checkpoints
from co3d_ensemble.training.extension import steps_within
from co3d_ensemble.training.grid_schedule import Shrink, grid_changes
from co3d_ensemble.training.records import read_metrics
from co3d_ensemble.training.run_directory import ConfigMismatch, RunDirectory
from tests.training.test_resume import Killed, assert_same_runs, dying_at, same
from tests.training.toy_task import ToyTask, run_toy, settings

LONGER = {"max_steps": 80, "resume": "extend"}


class Watching(ToyTask):
    """Keeps the model and the learning rates of its first step."""

    def batch(self, step):
        if not hasattr(self, "first"):
            self.first = (step, {name: value.clone() for name, value in self.model.state_dict().items()})
        return super().batch(step)

    def planned(self, plans):
        self.plans = plans


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A finished run, what it had learned, and the task that went on with it."""
    folder = tmp_path_factory.mktemp("extended")
    run_toy(folder)
    before = Checkpoints(folder / "checkpoints").load_last()
    result, task = run_toy(folder, make_task=Watching, **LONGER)
    assert (result.steps, result.stopped) == (80, "max_steps")
    return folder, before, task


def test_weights_average_and_moments_go_on_and_the_schedules_are_those_of_the_new_length(extended):
    folder, before, task = extended
    step, model = task.first
    assert step == 40 and same(model, dict(before["model"])) and task.plans == [(0, 40), (40, 80)]
    after = Checkpoints(folder / "checkpoints").load_last()
    assert after["ema"]["n_updates"] == 80 and after["ema"]["decay"] == ema_decay(80, 4.0)
    steps = [state["step"] for state in after["optimizer"]["state"].values()]
    assert all(float(step) == 80 for step in steps) and after["clock"]["extensions"] == 1
    rates = {record["step"]: record["lr"]["trunk"] for record in read_metrics(folder / "metrics.jsonl", "train")}
    warmup = settings().training.warmup
    assert rates[40] == pytest.approx(0.01 * warmup_cosine(39, 40, warmup))
    assert rates[45] == pytest.approx(0.01 * warmup_cosine(44, 80, warmup))
    assert rates[45] > 10 * rates[40]  # it rises again
    assert list(rates) == list(range(5, 81, 5))


def test_the_same_command_again_and_any_resume_of_the_new_length_change_nothing(extended):
    folder, _, _ = extended
    for mode in ("extend", "auto"):
        result, task = run_toy(folder, **{**LONGER, "resume": mode})
        assert result.steps == 80 and task.validations == 0
    with pytest.raises(ConfigMismatch, match="training.max_steps: 80 in the run, 40 now"):
        run_toy(folder)


def test_an_extended_run_that_is_killed_goes_on_bit_for_bit(tmp_path, extended):
    run_toy(tmp_path)
    with pytest.raises(Killed):
        run_toy(tmp_path, make_task=dying_at(40), **LONGER)  # before its first checkpoint
    with pytest.raises(Killed):
        run_toy(tmp_path, make_task=dying_at(53), checkpoint_every_seconds=0.0, **LONGER)
    run_toy(tmp_path, **{**LONGER, "resume": "auto"})
    assert_same_runs(tmp_path, extended[0])


def test_an_unfinished_run_can_be_extended_twice(tmp_path):
    with pytest.raises(Killed):
        run_toy(tmp_path, make_task=dying_at(23), checkpoint_every_seconds=0.0)
    with pytest.raises(Killed):
        run_toy(tmp_path, make_task=dying_at(31), checkpoint_every_seconds=0.0, max_steps=60, resume="extend")
    result, task = run_toy(tmp_path, make_task=Watching, max_steps=70, resume="extend")
    assert result.steps == 70 and task.plans == [(0, 40), (23, 60), (31, 70)]


def test_a_run_that_stopped_early_goes_on(tmp_path):
    class Worse(ToyTask):
        def validate(self):
            return {"psnr_masked": -float(self.config.max_steps)}

    assert run_toy(tmp_path, make_task=Worse, early_stopping_patience=2)[0].stopped == "early_stopping"
    assert run_toy(tmp_path, max_steps=80, early_stopping_patience=2, resume="extend")[0].steps > 40


def test_what_cannot_be_extended_is_refused_and_nothing_is_touched(tmp_path):
    run_toy(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ConfigMismatch, match=r"extend goes on to more steps[\s\S]*max_steps: 40 in the run, 80 now"):
        run_toy(tmp_path, max_steps=80)
    with pytest.raises(ValueError, match="training.max_steps=30: .* was made for 40"):
        run_toy(tmp_path, max_steps=30, resume="extend")
    with pytest.raises(ConfigMismatch, match=r"\(training.resume=restart discards it\):\n  training.lr: 0.01 in the run, 0.5 now$"):
        run_toy(tmp_path, lr=0.5, **LONGER)
    assert (tmp_path / "results.json").exists() and not (tmp_path / "extensions.json").exists()


@pytest.mark.parametrize("lost", ["config.yaml", "results.json"])
def test_a_kill_between_the_files_of_an_extension_leaves_it_made_or_not_made(tmp_path, lost):
    run_toy(tmp_path)
    stored = (tmp_path / "config.yaml").read_text()
    with RunDirectory.open(tmp_path, settings(**LONGER), resume="extend"):
        pass
    if lost == "config.yaml":
        (tmp_path / "config.yaml").write_text(stored)  # killed before it was written anew
    else:
        (tmp_path / "extensions.json").unlink()
        (tmp_path / "config.yaml").write_text(stored)
    result, task = run_toy(tmp_path, make_task=Watching, **LONGER)
    assert result.steps == 80 and task.plans == [(0, 40), (40, 80)]


def budgeted(folder, minutes, **more):
    """The settings of a run that was opened with a budget."""
    with RunDirectory.open(folder, settings(budget_minutes=minutes, **more), resume=more.get("resume", "auto")) as run:
        return run.config.training.max_steps, run.config_digest


def test_a_raised_budget_allows_as_many_more_steps_as_the_run_s_own_speed_says(tmp_path, monkeypatch):
    run_toy(tmp_path)
    (tmp_path / "budget.json").write_text(json.dumps({"max_steps": 40, "budget_minutes": 2.0}))
    last = Checkpoints(tmp_path / "checkpoints")
    state = last.load_last()
    state["clock"]["seconds"] = 100.0  # 2.5 seconds a step
    last.save_last(state)
    assert budgeted(tmp_path, 3.0)[0] == 40  # only resume=extend raises it
    assert budgeted(tmp_path, 2.0, resume="extend")[0] == 40
    with pytest.raises(ValueError, match="budget_minutes=1.6: .* was made for 40 steps, and it took 1.67 minutes for 40 steps"):
        budgeted(tmp_path, 1.6, resume="extend")
    steps, digest = budgeted(tmp_path, 4.0, resume="extend")
    assert steps == 40 + 140 / 2.5
    assert budgeted(tmp_path, 4.0, resume="extend") == (steps, digest) == budgeted(tmp_path, 4.0)
    assert len(json.loads((tmp_path / "extensions.json").read_text())) == 1
    monkeypatch.setattr(loop, "REPLAN_AT", ())  # it would follow the real speed, for minutes
    _, task = run_toy(tmp_path, make_task=Watching, budget_minutes=4.0)
    assert task.plans == [(0, 40), (40, steps)]


def test_a_budget_that_is_used_up_allows_the_steps_that_are_made():
    assert steps_within(1.0, {"step": 40, "seconds": 100.0}) == 40
    assert steps_within(1.0, {"step": 0, "seconds": 0.0}) == 0


@pytest.mark.parametrize("seed", range(20))
def test_every_change_of_a_grid_is_made_once_and_in_order_however_often_a_run_is_extended(seed):
    rng = random.Random(seed)
    shares = [sorted(rng.sample([i / 20 for i in range(1, 20)], count)) for count in (rng.randint(0, 3), rng.randint(1, 4))]
    schedule = OmegaConf.merge(OmegaConf.structured(GridScheduleConfig), {"shrink_at": shares[0], "upsample_at": shares[1]})
    step, max_steps, made = 0, rng.randint(40, 90), []
    plans = [(0, max_steps)]
    for left in (2, 1, 0):
        until = max_steps if left == 0 else rng.randint(step, max_steps)
        for now in range(step, until):
            made += grid_changes(now, max_steps, resolution=64, schedule=schedule, plans=plans)
        step = until
        if left:
            max_steps += rng.randint(1, 100)
            plans.append((step, max_steps))
    crops = [change.number for change in made if isinstance(change, Shrink)]
    counts = [change.n_voxels for change in made if not isinstance(change, Shrink)]
    assert crops == list(range(len(shares[0])))
    assert counts == sorted(set(counts)) and counts[-1] == schedule.final_resolution**3 and len(counts) == len(shares[1])
    assert torch.tensor(counts).min() > 64**3
