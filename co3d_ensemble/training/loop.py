"""The training loop: drives a :class:`~co3d_ensemble.training.task.Task` from its last good checkpoint to its end.

Use, resuming and budgets included::

    with RunDirectory.open(folder, config, resume=config.training.resume, device=device) as run:
        settings = fit_budget(make_task, run, device)
        seed_default_generators(settings.seed, INITIALISATION)
        result = train(make_task(settings), settings, run, device)
    sys.exit(result.exit_status)

Several processes train together as ``processes.py`` has it: the first one owns the run directory, all step, validate and stop
as one.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from co3d_ensemble.base.signals import EXIT_STATUS, REASONS, Stopped, StopSignals
from co3d_ensemble.fields.weights_file import restoring
from co3d_ensemble.functional.schedules import due
from co3d_ensemble.training.checkpoint import LAST_PARTS, Checkpoints, check_parts, read_checkpoint
from co3d_ensemble.training.extension import with_extensions
from co3d_ensemble.training.processes import ALONE, Processes
from co3d_ensemble.training.records import NoRecords, Records
from co3d_ensemble.training.run_directory import ConfigMismatch, RunDirectory
from co3d_ensemble.training.stepper import Stepper, seed_default_generators
from co3d_ensemble.training.task import Task

logger = logging.getLogger(__name__)

CRITERION = "psnr_masked"  # the validation metric that picks the best checkpoint and stops early, unless the task names one
REPLAN_AT = (0.35, 0.5, 0.65, 0.8, 0.9)  # shares of a run with a budget; a grid has grown and empty space is known by the first
RATED_SHARE = 0.1  # of max_steps: the last steps, by whose speed it is done
NEGLIGIBLE_CHANGE = 0.01  # of max_steps
MAX_GROWTH = 4  # most steps added at once, in max_steps


@dataclass(frozen=True)
class TrainingResult:
    """How a call of :func:`train` ended.

    Attributes:
        steps: updates done since the run began, over all resumes.
        seconds: wall-clock time of the loop, over all resumes.
        best_metric, best_step: the criterion of ``best.pt``, psnr_masked in dB unless the task names another (None: never a
            number), and the updates it had.
        time_shares: of those seconds, by what they went to: ``steps``, ``refinement`` (structure changes), ``validation``, ``checkpoints``.
        stopped: ``max_steps``, ``early_stopping``, ``interrupted`` (Ctrl-C) or ``preempted`` (SIGTERM); a signal counts also where
            it came with the last step or after it.
    """

    steps: int
    seconds: float
    best_metric: float | None
    best_step: int
    stopped: str
    time_shares: dict[str, float] = field(default_factory=dict, compare=False)

    @property
    def exit_status(self) -> int:
        """0 for a finished run, else ``EXIT_INTERRUPTED`` or ``EXIT_PREEMPTED``."""
        return EXIT_STATUS.get(self.stopped, 0)


_LATER_PARTS = ("plans", "replans", "spent", "extensions")  # of the clock, which checkpoints from before them lack


@dataclass
class _Clock:
    """Where a run stands; with (model, EMA, optimizer) all there is to resume."""

    step: int = 0  # updates done, which is also the number of the next step
    validated_step: int = 0
    best_metric: float = -math.inf
    best_step: int = 0
    validations_without_gain: int = 0
    seconds: float = 0.0
    stopped: str = ""
    plans: list[list[int]] = field(default_factory=list)  # [from_step, max_steps]: one, or more where max_steps changed on the way
    replans: int = 0  # how often a budget was looked at again
    extensions: int = 0  # how often the run had been extended
    spent: dict[str, float] = field(default_factory=dict)  # seconds by what they went to, steps left out

    @staticmethod
    def check(saved: dict[str, Any]) -> None:
        """Raises ``KeyError`` or ``TypeError`` where a saved value is missing or of another type: a checkpoint may hold anything."""
        known = asdict(_Clock())
        unknown = [name for name in saved if name not in known]
        if unknown:
            raise TypeError(f"its clock has an entry {unknown[0]!r}")
        for name, default in known.items():
            value = saved.get(name, default) if name in _LATER_PARTS else saved[name]
            if not isinstance(value, (int, float) if isinstance(default, float) else type(default)) or isinstance(value, bool):
                raise TypeError(f"its clock has {name}={value!r}")


def train(task: Task, config: Any, run: RunDirectory | None, device: torch.device | str, processes: Processes = ALONE) -> TrainingResult:
    """Trains until ``max_steps``, early stopping, Ctrl-C or SIGTERM, and leaves checkpoints and records in ``run``.

    Goes on from the last good checkpoint where there is one. On CPU with ``deterministic`` and the same number of threads
    a resumed run equals an uninterrupted one bit for bit. Non-finite losses are found in the step itself on CPU, and on CUDA
    when metrics are logged, before every validation and every checkpoint; in either case no update enters the weights.

    Args:
        config: ``TrainingConfig`` or a node of its shape, ``run.config.training`` as :func:`fit_budget` returns it.
        run: opened with :meth:`RunDirectory.open` in the first process, None in the others, which go on from what it loads.
        device: where the task's tensors are.
        processes: those that train together; all of them call this.

    Raises:
        NonFiniteLoss: names step and term; the last checkpoint stays as it is.
        ValueError: a weight without a loss, a validation without the criterion, a budget that nobody turned into steps.
        CheckpointWriteError: a checkpoint could not be written, for example because the disk is full.
        KeyboardInterrupt: second Ctrl-C.
    """
    device = torch.device(device)
    with _deterministic_algorithms(config.deterministic), StopSignals() as signals:
        saved = processes.from_first(lambda: _load(run, config, device if processes.size == 1 else torch.device("cpu")))
        loop = _Loop(task, config, device, run, processes)
        if saved is not None:
            loop.resume(saved)
        with loop.records() as records:
            reason = loop.run(records, signals)
    reason = signals.reason or reason  # it came while the last checkpoint was written: what follows is not for this process
    clock = loop.clock
    best = clock.best_metric if math.isfinite(clock.best_metric) else None
    shown = (reason, clock.step, clock.seconds, loop.criterion, best, clock.best_step)
    logger.info("%s after %d steps and %.0f s, best %s %s at step %d", *shown)
    shares = loop.time_shares()
    logger.info("time: %s", ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items()))
    return TrainingResult(clock.step, clock.seconds, best, clock.best_step, reason, shares)


def _load(run: RunDirectory, config: Any, device: torch.device) -> dict[str, Any] | None:
    """The last good checkpoint of this configuration, or None; in the process that owns the run."""
    checkpoints = Checkpoints(run.checkpoints)
    checkpoints.prepare()
    path = checkpoints.newest_good()
    if path is None:
        if config.budget_minutes is not None and run.budget is None:
            raise ValueError(f"training.budget_minutes={config.budget_minutes}: call fit_budget before train")
        return None
    saved = read_checkpoint(path, device)
    check_parts(path, saved, LAST_PARTS)
    with restoring(path):
        _Clock.check(saved["clock"])
    if not run.is_own(saved["config_digest"]):
        raise ConfigMismatch(run.path, {"checkpoint": (saved["config_digest"][:12], run.config_digest[:12])})
    if saved["clock"]["best_step"] and not checkpoints.has_good_best():
        saved["clock"] |= {"best_metric": -math.inf, "best_step": 0}
    return {**with_extensions(saved, run.extensions), "path": str(path)}


class _Loop:
    """One process's share of a run."""

    def __init__(self, task: Task, config: Any, device: torch.device, run: RunDirectory | None, processes: Processes) -> None:
        self.task, self.config, self.processes, self._run = task, config, processes, run
        self.checkpoints = None if run is None else Checkpoints(run.checkpoints)
        self._config_digest = None if run is None else run.config_digest
        self.criterion: str = getattr(task, "criterion", CRITERION)
        self.stepper = Stepper(task, config, deferred=device.type == "cuda", processes=processes)
        self.clock = _Clock()
        self._validation_seconds = 0.0
        self._structure_seen = getattr(task, "structure_time", 0.0)
        self._marks: list[tuple[int, float]] = []  # (step, seconds in steps and structure changes so far), for a budget
        self._started = self._saved_at = self._window_start = time.perf_counter()
        self._window_step = 0

    def resume(self, saved: dict[str, Any]) -> None:
        """Takes over a checkpoint of this configuration."""
        with restoring(saved["path"]):
            self.stepper.load_state_dict(saved)
        self.clock = _Clock(**saved["clock"])
        if saved.get("extended"):
            self.stepper.follow_max_steps()
        self._started -= self.clock.seconds
        if self.clock.plans and self.clock.plans[-1][1] != self.config.max_steps:  # stopped between the checkpoint and the budget's file
            self._set_max_steps(self.clock.plans[-1][1])
        logger.info("going on from step %d", self.clock.step)

    def records(self) -> Records | NoRecords:
        """The run's, from where the clock stands; of the process that owns it."""
        if self._run is None:
            return NoRecords()
        return Records(
            self._run.metrics_path,
            self._run.tensorboard,
            max_steps=self.config.max_steps,
            step=self.clock.step,
            validated_step=self.clock.validated_step,
            bar=self.config.progress,
            criterion=self.criterion,
        )

    def run(self, records: Records | NoRecords, signals: StopSignals) -> str:
        """Until the end or a signal to any process; returns which."""
        finished_before = bool(self.clock.stopped)
        self.clock.plans = self.clock.plans or [[0, self.config.max_steps]]
        self._tell_plans()
        self.task.model.train()
        self._open_window()
        reason, _ = self._agreed(signals)
        while not self.clock.stopped and not reason:
            if self._validation_due():
                with suppress(Stopped):  # by a signal: the run that goes on validates
                    self._validate(records, signals)
                    self._decide()
                self._open_window()
            else:
                self.stepper.run(self.clock.step)
                self.clock.step += 1
                records.advance()
                if self.clock.step % self.config.log_every == 0 or self.clock.step == self.config.max_steps:
                    self._log(records)
                if self._replan_due():
                    self._replan(records)
            reason, save = self._agreed(signals)
            if save:
                self._save_last()
        if self.clock.stopped and not self.clock.best_step:
            self._save_best(math.nan)
        if not finished_before:
            self._save_last()
        return reason or self.clock.stopped

    def _agreed(self, signals: StopSignals) -> tuple[str, bool]:
        """Why to stop before the next step, in all processes at the same one, or nothing; and whether a checkpoint is due, by
        the first one's watch."""
        save = self.processes.leads and time.perf_counter() - self._saved_at >= self.config.checkpoint_every_seconds
        reason, due_now = self.processes.largest(REASONS.index(signals.reason), int(save))
        return REASONS[reason], bool(due_now)

    def _validation_due(self) -> bool:
        """True once per due step, also where a signal or a kill came between the step and its validation."""
        step, max_steps = self.clock.step, self.config.max_steps
        return step > self.clock.validated_step and (step == max_steps or due(step, self.config.validate_every, max_steps))

    def _validate(self, records: Records | NoRecords, signals: StopSignals) -> None:
        self.stepper.check()
        start, clock, model = time.perf_counter(), self.clock, self.task.model
        records.validating()
        self.processes.copy_first(model.buffers())  # statistics of batches, for one, are each process's own
        seed_default_generators(self.config.seed, clock.step)
        with self._evaluated_weights():
            model.eval()
            try:
                with torch.no_grad(), signals.at_once(self.processes.size == 1):  # of several, the others would wait
                    own = {name: float(value) for name, value in self.task.validate().items()}
            finally:
                model.train()
            metrics = self.processes.from_first(lambda: own)  # so that all decide alike
            if self.criterion not in metrics:
                raise ValueError(f"the task's validation returned {', '.join(metrics) or 'nothing'}; {self.criterion} is needed")
            if metrics[self.criterion] > clock.best_metric:
                self._save_best(metrics[self.criterion], averaged=True)
                clock.validations_without_gain = 0
            else:
                clock.validations_without_gain += 1
        clock.validated_step = clock.step
        self._validation_seconds = time.perf_counter() - start
        self._spend("validation", self._validation_seconds)
        records.validation(clock.step, metrics, self.task.pictures(), seconds=self._validation_seconds)

    def _decide(self) -> None:
        """Whether the validation just done was the last."""
        patience = self.config.early_stopping_patience
        if self.clock.step == self.config.max_steps:
            self.clock.stopped = "max_steps"
        elif patience is not None and self.clock.validations_without_gain >= patience:
            self.clock.stopped = "early_stopping"

    def _evaluated_weights(self) -> Any:
        return nullcontext() if self.stepper.ema is None else self.stepper.ema.applied(self.task.model)

    def _save_best(self, metric: float, *, averaged: bool = False) -> None:
        """Saves the model with its averaged weights, which ``averaged`` says are in it already."""
        if math.isnan(metric):
            logger.warning("no validation has a best.pt with a number to show: it gets the final weights")
        with nullcontext() if averaged or self.checkpoints is None else self._evaluated_weights():
            if self.checkpoints is not None:
                self.checkpoints.save_best({"model": self.task.model.state_dict(), "step": self.clock.step, "metric": metric})
        self.clock.best_step = self.clock.step
        self.clock.best_metric = -math.inf if math.isnan(metric) else metric

    def _save_last(self) -> None:
        self.stepper.check()
        start = time.perf_counter()
        self._note_structure()
        self.clock.seconds = start - self._started
        if self.checkpoints is not None:
            more = {"clock": asdict(self.clock), "config_digest": self._config_digest}
            self.checkpoints.save_last({**self.stepper.state_dict(), **more})
        self._saved_at = time.perf_counter()
        self._spend("checkpoints", self._saved_at - start)
        self._window_start += self._saved_at - start

    def _spend(self, what: str, seconds: float) -> None:
        self.clock.spent[what] = self.clock.spent.get(what, 0.0) + seconds

    def _note_structure(self) -> None:
        now = getattr(self.task, "structure_time", 0.0)
        self._spend("refinement", now - self._structure_seen)
        self._structure_seen = now

    def time_shares(self) -> dict[str, float]:
        """Of the run's seconds so far, over all resumes, by what they went to."""
        self._note_structure()
        spent = {name: self.clock.spent.get(name, 0.0) for name in ("refinement", "validation", "checkpoints")}
        total = max(self.clock.seconds, sum(spent.values()), 1e-9)
        return {"steps": 1.0 - sum(spent.values()) / total, **{name: seconds / total for name, seconds in spent.items()}}

    def _seconds_in_steps(self) -> float:
        """So far, structure changes included."""
        out = self.clock.spent.get("validation", 0.0) + self.clock.spent.get("checkpoints", 0.0)
        return time.perf_counter() - self._started - out

    def _replan_due(self) -> bool:
        if self.config.get("budget_minutes") is None or self.clock.replans >= len(REPLAN_AT):
            return False
        return self.config.max_steps > self.clock.step >= REPLAN_AT[self.clock.replans] * self.config.max_steps

    def _replan(self, records: Records | NoRecords) -> None:
        """Brings ``max_steps`` to what the speed of the last steps allows in what is left of the budget."""
        self.stepper.check()
        self.clock.replans += 1
        max_steps = self.processes.from_first(self._affordable_steps)
        if abs(max_steps - self.config.max_steps) <= NEGLIGIBLE_CHANGE * self.config.max_steps:
            return
        logger.info("budget: %d steps in place of %d, by the speed of the last ones", max_steps, self.config.max_steps)
        self.clock.plans.append([self.clock.step, max_steps])
        self._set_max_steps(max_steps)
        self._tell_plans()
        records.planned(max_steps)
        self._save_last()
        if self._run is not None:
            self._run.fix_max_steps(max_steps, {key: value for key, value in (self._run.budget or {}).items() if key != "max_steps"})

    def _affordable_steps(self) -> int:
        clock, now = self.clock, self._seconds_in_steps()
        budget = (self._run.budget or {}) if self._run is not None else {}
        elapsed = budget.get("seconds_of_the_probe", 0.0) + time.perf_counter() - self._started
        window = RATED_SHARE * self.config.max_steps
        far_enough = [mark for mark in self._marks if clock.step - mark[0] >= window]
        first, then = [(clock.step, now), *self._marks[:1], *far_enough][-1]
        if first >= clock.step:
            return self.config.max_steps
        per_step = (now - then) / (clock.step - first)
        left = 60.0 * self.config.budget_minutes - elapsed - self._validations_left() * self._validation_seconds
        steps = round(left / per_step * (1.0 - clock.spent.get("checkpoints", 0.0) / max(elapsed, 1e-9)))
        return clock.step + min(max(steps, 1), MAX_GROWTH * self.config.max_steps)

    def _validations_left(self) -> int:
        interval = max(1, round(self.config.validate_every * self.config.max_steps))
        return math.ceil((self.config.max_steps - self.clock.step) / interval)

    def _set_max_steps(self, max_steps: int) -> None:
        """In the settings that task, stepper and loop share."""
        self.config.max_steps = max_steps

    def _tell_plans(self) -> None:
        if hasattr(self.task, "planned"):
            self.task.planned([tuple(plan) for plan in self.clock.plans])

    def _open_window(self) -> None:
        self._window_start, self._window_step = time.perf_counter(), self.clock.step

    def _log(self, records: Records | NoRecords) -> None:
        self.stepper.check()
        step = self.clock.step
        seconds_per_step = (time.perf_counter() - self._window_start) / (step - self._window_step)
        rays = getattr(self.task, "rays_per_step", None)
        steps_left, validations_left = self.config.max_steps - step, self._validations_left()
        self._marks.append((step, self._seconds_in_steps()))
        records.training(
            step,
            self.stepper.take_window(),
            self.stepper.learning_rates,
            seconds_per_step=seconds_per_step,
            rays_per_second=None if rays is None else rays / seconds_per_step,
            seconds_left=steps_left * seconds_per_step + validations_left * self._validation_seconds,
        )
        self._open_window()


@contextmanager
def _deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """torch's deterministic algorithms for the duration of the block, if ``enabled``."""
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to be deterministic without it
    before, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
