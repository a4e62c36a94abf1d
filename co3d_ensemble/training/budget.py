"""Turns ``training.budget_minutes`` into ``max_steps`` by timing real steps on a task that is then thrown away."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from co3d_ensemble.base.paths import listed
from co3d_ensemble.training.processes import ALONE, Processes
from co3d_ensemble.training.run_directory import RunDirectory
from co3d_ensemble.training.stepper import INITIALISATION, Stepper, seed_default_generators
from co3d_ensemble.training.task import Task

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 3  # compilation, first allocations
MIN_TIMED_STEPS = 5
PROBE_SHARE = 0.03  # of the budget spent on timing steps
MAX_PROBE_SECONDS = 20.0


def fit_budget(
    make_task: Callable[[Any], Task], run: RunDirectory | None, device: torch.device | str, processes: Processes = ALONE
) -> DictConfig:
    """Fixes ``max_steps`` of a new run from its budget; does nothing where there is none or it is fixed already.

    The steps run on a task of their own, freshly initialised; it is dropped afterwards, so the run itself starts from its
    seed as if nothing had happened. The result goes to ``config.yaml`` and ``budget.json``, from where every resume takes
    it. What the probe took counts against the budget, and so do validations (one measured) as often as ``validate_every``
    says and structure changes (one measured, where the task has ``structure_seconds``) as often as the task says: they are
    due at shares of ``max_steps``, so the few timed steps hold none. Speed is that of a run's beginning, or of the state
    that ``settle`` brings the task to where it has that: a model that learns to skip empty space, or starts with a small
    grid, ends early. Checkpoints are not counted.

    Args:
        make_task: builds the task from the training settings; called with torch's generators seeded for initialisation.
        run: None in a process that does not own it.
        processes: those that train together: all of them step, by the first one's watch.

    Returns:
        The training settings to build the real task from.

    Raises:
        ValueError: the budget does not allow one step.
    """
    config, fitting = processes.from_first(lambda: _plan(run))
    if not fitting:
        return config
    seconds = 60.0 * config.budget_minutes
    start = time.perf_counter()
    probe_seconds = min(MAX_PROBE_SECONDS, PROBE_SHARE * seconds)
    rough = measure_speed(make_task, config, torch.device(device), probe_seconds / 4, processes, steps_only=True)
    guess = OmegaConf.merge(config, {"max_steps": max(1, int(seconds / rough.step_seconds))})  # validations and refinements follow it
    probe = measure_speed(make_task, guess, torch.device(device), probe_seconds, processes)
    return processes.from_first(lambda: _fix_steps(run, config, probe, seconds, time.perf_counter() - start))


def _plan(run: RunDirectory) -> tuple[DictConfig, bool]:
    """The training settings, and whether a budget still has to give them their steps."""
    config = run.config.training
    if config.get("budget_minutes") is None or run.fixed_max_steps is not None:
        return config, False
    if listed(run.checkpoints, "*.pt"):
        logger.info("training.budget_minutes is ignored: the run started without it, for %d steps", config.max_steps)
        return config, False
    return config, True


def _fix_steps(run: RunDirectory, config: DictConfig, probe: Speed, seconds: float, spent: float) -> DictConfig:
    """``max_steps`` that the measured speed allows in what is left of the budget's seconds; written to the run."""
    n_validations = math.ceil(1.0 / config.validate_every)
    left = seconds - spent - n_validations * probe.validation_seconds
    max_steps = int((left - probe.n_changes * probe.change_seconds) / probe.step_seconds)
    if max_steps < probe.n_changes:  # fewer steps than changes: each step makes at most one
        max_steps = int(left / (probe.step_seconds + probe.change_seconds))
    if max_steps < 1:
        raise ValueError(
            f"training.budget_minutes={config.budget_minutes} does not allow one step: {n_validations} validations of "
            f"{probe.validation_seconds:.2f} s, {probe.n_changes} structure changes of {probe.change_seconds:.2f} s, steps of "
            f"{probe.step_seconds:.3f} s"
        )
    found = {
        "budget_minutes": config.budget_minutes,
        "seconds_per_step": probe.step_seconds,
        "seconds_per_validation": probe.validation_seconds,
        "structure_changes": probe.n_changes,
        "seconds_per_structure_change": probe.change_seconds,
        "seconds_of_the_probe": spent,
    }
    logger.info("a budget of %g minutes allows %d steps: %s", config.budget_minutes, max_steps, found)
    run.fix_max_steps(max_steps, found)
    return run.config.training


@dataclass(frozen=True)
class Speed:
    """Seconds of a step, a validation and a structure change, and how many changes a run makes."""

    step_seconds: float
    validation_seconds: float
    n_changes: int
    change_seconds: float

    def run_seconds(self, max_steps: int, validate_every: float) -> float:
        """Of a whole run's loop."""
        n_validations = math.ceil(1.0 / validate_every)
        return max_steps * self.step_seconds + n_validations * self.validation_seconds + self.n_changes * self.change_seconds


def measure_speed(
    make_task: Callable[[Any], Task],
    config: DictConfig,
    device: torch.device,
    seconds: float,
    processes: Processes = ALONE,
    *,
    steps_only: bool = False,
) -> Speed:
    """Times steps for about ``seconds``, then a validation and a structure change, on a task that is thrown away.

    Args:
        steps_only: leave out the latter two, which then count as free.
    """
    seed_default_generators(config.seed, INITIALISATION)
    task = make_task(config)
    if hasattr(task, "settle"):
        task.settle()
    task.model.train()
    stepper = Stepper(task, config, deferred=device.type == "cuda", processes=processes)
    for step in range(WARM_UP_STEPS):
        stepper.run(step)
    stepper.check()  # waits for the device
    start, step = time.perf_counter(), WARM_UP_STEPS
    while step - WARM_UP_STEPS < MIN_TIMED_STEPS or processes.from_first(lambda: time.perf_counter() - start < seconds):
        for _ in range(MIN_TIMED_STEPS):
            stepper.run(step)
            step += 1
        stepper.check()
    step_seconds = (time.perf_counter() - start) / (step - WARM_UP_STEPS)
    if steps_only:
        return Speed(step_seconds, 0.0, 0, 0.0)
    start = time.perf_counter()
    task.model.eval()
    with torch.no_grad():
        task.validate()
    validation_seconds = time.perf_counter() - start
    measure = getattr(task, "structure_seconds", None)  # last: it may change the model
    n_changes, change_seconds = (0, 0.0) if measure is None else measure()
    return Speed(step_seconds, validation_seconds, n_changes, change_seconds)
