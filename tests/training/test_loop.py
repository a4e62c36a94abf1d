import json
import logging
import math
import types

import pytest
import torch
from torch import nn

from co3d_ensemble.training import budget as budgets
from co3d_ensemble.training import loop as loops
from co3d_ensemble.training.checkpoint import Checkpoints
from co3d_ensemble.training.finite_guard import NonFiniteLoss
from co3d_ensemble.training.loop import TrainingResult, train
from co3d_ensemble.training.records import read_metrics
from co3d_ensemble.training.run_directory import RunDirectory
from co3d_ensemble.training.stepper import Stepper, seed_default_generators, splitmix64
from tests.training import toy_task
from tests.training.toy_task import ToyTask, run_toy, settings


def scripted(scores):
    def make(config):
        task = ToyTask(config)
        task.scores = list(scores)
        return task

    return make


class DivergingTask(ToyTask):
    """``loss_size`` is NaN at steps 6 and 8, ``loss_watched`` always."""

    def losses(self, batch):
        losses = super().losses(batch)
        if self.step in (6, 8):
            losses["loss_size"] = losses["loss_size"] * math.nan
        losses["loss_watched"] = losses["loss_watched"] * math.nan
        return losses

    def batch(self, step):
        self.step = step
        return super().batch(step)


def stepped(make, n, *, deferred=False):
    """A task after n steps of the default settings, its stepper attached."""
    config = settings().training
    seed_default_generators(config.seed, -1)
    task = make(config)
    task.model.train()
    stepper = Stepper(task, config, deferred=deferred)
    for step in range(n):
        stepper.run(step)
    task.stepper = stepper
    return task


def test_a_run_learns_and_describes_itself(tmp_path):
    result, _ = run_toy(tmp_path, max_steps=200)
    assert result.stopped == "max_steps" and result.steps == 200 and result.exit_status == 0
    validations = read_metrics(tmp_path / "metrics.jsonl", "validation")
    scores = [record["metrics"]["psnr_masked"] for record in validations]
    assert [record["step"] for record in validations] == [50, 100, 150, 200]
    assert result.best_metric == max(scores) > 13.5  # the best constant has a mean squared error of 7/144: 13.1 dB
    lines = read_metrics(tmp_path / "metrics.jsonl", "train")
    assert [record["step"] for record in lines] == list(range(5, 201, 5))
    assert set(lines[0]["losses"]) == {"loss_fit", "loss_size", "loss_watched", "total", "gradient_norm"}
    assert lines[0]["rays_per_second"] == pytest.approx(16 / lines[0]["seconds_per_step"])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best.pt", "last.pt"]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_best_holds_the_averaged_weights_of_the_best_validation(tmp_path):
    result, _ = run_toy(tmp_path, make_task=scripted([1.0, 3.0, 2.0, 2.5]))
    assert (result.best_metric, result.best_step) == (3.0, 20)
    best = Checkpoints(tmp_path / "checkpoints").load_best()
    assert (best["metric"], best["step"]) == (3.0, 20)
    reference = stepped(ToyTask, n=20)
    assert all(torch.equal(best["model"][name], value) for name, value in reference.stepper.ema.weights.items())
    assert torch.equal(best["model"]["occupancy"], reference.model.occupancy)
    assert not torch.equal(best["model"]["0.weight"], reference.model[0].weight)


def test_best_without_ema_holds_the_weights_themselves(tmp_path):
    _, task = run_toy(tmp_path, make_task=scripted([1.0, 2.0, 3.0, 4.0]), ema=False)
    best = Checkpoints(tmp_path / "checkpoints").load_best()["model"]
    assert all(torch.equal(best[name], value) for name, value in task.model.state_dict().items())


def test_early_stopping_counts_validations_without_a_gain_and_stays_stopped(tmp_path):
    scores = [5.0, 4.0, 6.0, 6.0, 5.9, 9.0]
    options = {"validate_every": 0.1, "early_stopping_patience": 2}
    result, _ = run_toy(tmp_path, make_task=scripted(scores), **options)
    assert result.stopped == "early_stopping" and result.steps == 20 and result.best_step == 12
    again, task = run_toy(tmp_path, make_task=scripted([99.0]), **options)
    assert again == result and task.validations == 0


def test_a_finished_run_is_left_alone(tmp_path):
    result, _ = run_toy(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    again, task = run_toy(tmp_path)
    assert again == result and task.validations == 0
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before


def test_a_finished_run_that_lost_its_best_gets_one_from_its_last(tmp_path, caplog):
    run_toy(tmp_path)
    best = tmp_path / "checkpoints" / "best.pt"
    best.write_bytes(best.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        run_toy(tmp_path)
    assert "best.pt is damaged" in caplog.text
    last = Checkpoints(best.parent).load_last()
    assert all(torch.equal(Checkpoints(best.parent).load_best()["model"][k], v) for k, v in last["ema"]["weights"].items())


def test_a_validation_that_is_never_a_number_still_leaves_weights_to_render(tmp_path, caplog):
    result, _ = run_toy(tmp_path, make_task=scripted([math.nan] * 4))
    assert result.best_metric is None
    assert Checkpoints(tmp_path / "checkpoints").load_best()["step"] == 40
    assert "a number" in caplog.text
    assert read_metrics(tmp_path / "metrics.jsonl", "validation")[0]["metrics"] == {"psnr_masked": None}


def test_a_validation_without_the_criterion_is_an_error(tmp_path):
    class Silent(ToyTask):
        def validate(self):
            return {"iou": 1.0}

    with pytest.raises(ValueError, match="returned iou; psnr_masked is needed"):
        run_toy(tmp_path, make_task=Silent)


@pytest.mark.parametrize(
    "options", [{"loss_weights": {"loss_fit": 1.0, "loss_fitt": 1.0}}, {"ramped_losses": ["loss_fitt"]}], ids=["weight", "ramp"]
)
def test_a_loss_that_the_task_does_not_return_is_an_error_at_the_first_step(tmp_path, options):
    with pytest.raises(ValueError, match="loss_fitt; the task returns loss_fit, loss_size, loss_watched"):
        run_toy(tmp_path, **options)


def test_the_tasks_own_weights_replace_the_configured_ones(tmp_path):
    class Own(ToyTask):
        loss_weights = {"loss_fit": 2.0}

    run_toy(tmp_path, make_task=Own, ramped_losses=[])
    losses = read_metrics(tmp_path / "metrics.jsonl", "train")[0]["losses"]
    assert losses["total"] == pytest.approx(2 * losses["loss_fit"])


def test_total_is_the_weighted_sum_with_its_ramp(tmp_path):
    run_toy(tmp_path, log_every=1, warmup=0.25)
    for step, record in enumerate(read_metrics(tmp_path / "metrics.jsonl", "train")):
        losses, factor = record["losses"], min(1.0, max(0.0, (step - 10) / 8))
        assert losses["total"] == pytest.approx(losses["loss_fit"] + 0.1 * factor * losses["loss_size"], rel=1e-5)
        assert record["lr"]["head"] == pytest.approx(record["lr"]["trunk"] / 2)


def test_a_non_finite_loss_names_step_and_term_and_keeps_the_weights_of_the_step_before(tmp_path):
    kept = []

    def make(config):
        kept.append(DivergingTask(config))
        return kept[0]

    with pytest.raises(NonFiniteLoss, match="step 6: loss_size") as raised:
        run_toy(tmp_path, make_task=make)
    assert (raised.value.step, raised.value.term) == (6, "loss_size")
    expected = stepped(ToyTask, n=6).model.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in kept[0].model.state_dict().items())
    assert not list((tmp_path / "checkpoints").iterdir())


def test_deferred_checks_freeze_weights_and_moments_until_someone_looks():
    task = stepped(DivergingTask, n=12, deferred=True)
    expected = stepped(ToyTask, n=6)
    parameters = dict(expected.model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in task.model.named_parameters())
    moments, frozen = expected.stepper.optimizer.state_dict()["state"], task.stepper.optimizer.state_dict()["state"]
    assert all(torch.equal(moments[i][key], frozen[i][key]) for i in moments for key in moments[i])
    with pytest.raises(NonFiniteLoss, match="step 6: loss_size"):
        task.stepper.check()


def test_a_non_finite_gradient_of_a_finite_loss_is_found(tmp_path):
    class Kink(ToyTask):
        def losses(self, batch):
            losses = super().losses(batch)
            return {**losses, "loss_fit": losses["loss_fit"] + (self.model[0].weight * 0).square().sum().sqrt()}

    with pytest.raises(NonFiniteLoss, match="step 0: gradient_norm"):
        run_toy(tmp_path, make_task=Kink)


def test_a_change_of_structure_rebuilds_optimizer_and_average(tmp_path):
    class Growing(ToyTask):
        def structure(self, step):
            if step != 20:
                return False
            self.model[3] = nn.Linear(8, 2)
            return True

    _, task = run_toy(tmp_path, make_task=Growing)
    last = Checkpoints(tmp_path / "checkpoints").load_last()
    steps = [int(state["step"]) for state in last["optimizer"]["state"].values()]
    assert steps == [40, 40, 20, 20]
    saved = last["model"]["3.weight"]
    assert torch.equal(saved, task.model[3].weight) and not torch.equal(saved, last["ema"]["weights"]["3.weight"])


def test_a_task_maps_averages_and_moments_itself_where_it_can(tmp_path):
    class Widening(ToyTask):
        def structure(self, step):
            if step != 20:
                return False
            wide = nn.Linear(8, 2)
            with torch.no_grad():
                wide.weight.copy_(self.model[3].weight.expand(2, -1))
            self.model[3] = wide
            return True

        def remap_moments(self, ema, moments):
            twice = lambda value: value if value.dim() == 0 else torch.cat([value, value])
            for name in ("3.weight", "3.bias"):
                ema[name] = twice(ema[name])
                moments[name] = {key: twice(value) for key, value in moments[name].items()}
            return ema, moments

    run_toy(tmp_path, make_task=Widening)
    last = Checkpoints(tmp_path / "checkpoints").load_last()
    assert [int(state["step"]) for state in last["optimizer"]["state"].values()] == [40, 40, 40, 40]


@pytest.fixture
def clock(monkeypatch):
    """Time passes for budgets while a task sleeps, and then only: what else keeps the cores busy costs none."""
    now = 0.0

    def sleep(seconds):
        nonlocal now
        now += seconds

    stopped = types.SimpleNamespace(perf_counter=lambda: now, sleep=sleep)
    for module in (budgets, loops, toy_task):
        monkeypatch.setattr(module, "time", stopped)


def test_a_budget_sets_the_steps_once_and_resumes_keep_them(tmp_path, clock):
    make = lambda config: ToyTask(config, sleep=0.002)
    result, task = run_toy(tmp_path, make_task=make, budget_minutes=0.01, max_steps=100_000)
    budget = json.loads((tmp_path / "budget.json").read_text())
    assert RunDirectory(tmp_path).config.training.max_steps == budget["max_steps"] == result.steps == task.config.max_steps
    assert 0.9 * 0.6 / 0.002 < result.steps <= 0.6 / 0.002  # the probe took the rest
    again, _ = run_toy(tmp_path, make_task=make, budget_minutes=5, max_steps=100_000)
    assert again.steps == result.steps


class Refining(ToyTask):
    """Its structure changes take time, at some shares of the run."""

    changes, seconds = 8, 0.06

    def structure(self, step):
        interval = max(1, self.config.max_steps // self.changes)
        if step and step % interval == 0:
            time_of_tasks().sleep(self.seconds)
        return super().structure(step)

    def structure_seconds(self):
        return self.changes, self.seconds


def time_of_tasks():
    return toy_task.time


def test_a_budget_leaves_room_for_the_structure_changes_that_the_probe_did_not_meet(tmp_path, clock):
    free, _ = run_toy(tmp_path / "free", make_task=lambda config: ToyTask(config, sleep=0.004), budget_minutes=0.02)
    paid, _ = run_toy(tmp_path / "paid", make_task=lambda config: Refining(config, sleep=0.004), budget_minutes=0.02)
    budget = json.loads((tmp_path / "paid" / "budget.json").read_text())
    assert (budget["structure_changes"], budget["seconds_per_structure_change"]) == (8, 0.06)
    assert 8 < paid.steps < free.steps
    assert 0.9 * 1.2 < paid.seconds + budget["seconds_of_the_probe"] < 1.1 * 1.2


def test_a_budget_with_fewer_steps_than_structure_changes_pays_one_change_a_step(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(loops, "REPLAN_AT", ())  # the first plan is meant

    class Often(ToyTask):
        def structure_seconds(self):
            return 1000, 0.05

    result, _ = run_toy(tmp_path, make_task=lambda config: Often(config, sleep=0.004), budget_minutes=0.02)
    assert 5 < result.steps < 1.2 / 0.054


@pytest.mark.parametrize("factor", [0.4, 1.0, 2.5])
def test_a_budget_is_kept_where_the_speed_changes_on_the_way(tmp_path, clock, factor):
    class Changing(ToyTask):
        def structure(self, step):
            self.sleep = 0.004 * (factor if step > 0.2 * first[0] else 1.0)
            first[0] = first[0] or self.config.max_steps
            return super().structure(step)

    first = [0]
    result, task = run_toy(tmp_path, make_task=lambda config: Changing(config, sleep=0.004), budget_minutes=0.05, max_steps=10)
    budget = json.loads((tmp_path / "budget.json").read_text())
    assert 0.9 * 3 < result.seconds + budget["seconds_of_the_probe"] < 1.1 * 3
    assert result.steps == task.config.max_steps == budget["max_steps"] == RunDirectory(tmp_path).config.training.max_steps


def test_a_run_whose_budget_was_planned_anew_goes_on_from_there(tmp_path, clock):
    class Slowing(ToyTask):
        def structure(self, step):
            self.sleep = 0.002 if step < 60 else 0.004
            if step == dies_at:
                raise KeyboardInterrupt
            return super().structure(step)

    dies_at, options = 130, {"budget_minutes": 0.01, "make_task": lambda config: Slowing(config, sleep=0.002)}
    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path, **options)
    planned = json.loads((tmp_path / "budget.json").read_text())["max_steps"]
    saved = Checkpoints(tmp_path / "checkpoints").load_last()["clock"]
    assert saved["plans"][-1][1] == planned < saved["plans"][0][1]
    dies_at = None
    budget = json.loads((tmp_path / "budget.json").read_text())
    (tmp_path / "budget.json").write_text(json.dumps(budget | {"max_steps": saved["plans"][0][1]}))  # killed between the two files
    result, task = run_toy(tmp_path, **options)
    assert result.steps == task.config.max_steps and result.stopped == "max_steps"
    assert 0.9 * 0.6 < result.seconds + budget["seconds_of_the_probe"] < 1.1 * 0.6 + 0.3  # what the killed one had done is lost


def test_the_probe_leaves_no_trace_in_the_weights(tmp_path, clock):
    make = lambda config: ToyTask(config, sleep=0.002)
    result, probed = run_toy(tmp_path / "a", make_task=make, budget_minutes=0.005)
    _, plain = run_toy(tmp_path / "b", make_task=make, max_steps=result.steps)
    expected = plain.model.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in probed.model.state_dict().items())


def test_a_budget_too_small_for_one_step_says_what_takes_so_long(tmp_path):
    with pytest.raises(ValueError, match="budget_minutes=1e-05 does not allow one step: 4 validations"):
        run_toy(tmp_path, budget_minutes=1e-5)


def test_a_budget_that_nobody_turned_into_steps_is_an_error(tmp_path):
    config = settings(budget_minutes=1.0)
    with RunDirectory.open(tmp_path, config) as run, pytest.raises(ValueError, match="fit_budget"):
        train(ToyTask(config.training), config.training, run, "cpu")


def test_seeds_of_neighbouring_steps_and_seeds_are_unrelated():
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the reference implementation's first output from state 0
    draws = set()
    for seed in range(20):
        for step in range(-1, 20):
            seed_default_generators(seed, step)
            draws.add(torch.rand(()).item())
    assert len(draws) == 20 * 21


@pytest.mark.parametrize(("stopped", "status"), [("max_steps", 0), ("early_stopping", 0), ("interrupted", 130), ("preempted", 143)])
def test_exit_status_tells_how_a_run_ended(stopped, status):
    assert TrainingResult(1, 1.0, None, 0, stopped).exit_status == status


@pytest.mark.cuda
def test_a_step_never_waits_for_the_device(never_waits):
    config = settings(deterministic=False).training
    task = ToyTask(config, device="cuda")
    stepper = Stepper(task, config, deferred=True)
    for step in range(3):
        stepper.run(step)
    with never_waits():
        for step in range(3, 10):
            stepper.run(step)
    stepper.check()
