"""One optimisation step, a function of (state, step)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from co3d_ensemble.functional.schedules import ema_decay, implicitron_steps, milestone_steps, ramp, warmup_cosine
from co3d_ensemble.training.ema import EMA
from co3d_ensemble.training.finite_guard import FiniteGuard
from co3d_ensemble.training.optimizer import (
    build_adam,
    clip_gradients,
    load_adam,
    load_moments,
    moments_by_name,
    parameters_of,
    set_learning_rates,
)
from co3d_ensemble.training.processes import ALONE, Processes
from co3d_ensemble.training.task import Task

INITIALISATION = -1  # the "step" whose seed a model is initialised with
TOTAL, GRADIENT_NORM = "total", "gradient_norm"
_MASK64 = (1 << 64) - 1


def splitmix64(value: int) -> int:
    """The finaliser of SplitMix64 (Steele et al., 2014): neighbouring inputs give unrelated 64-bit outputs."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def derived_seed(seed: int, *numbers: int) -> int:
    """63 bits that follow from all the numbers; others give unrelated ones."""
    value = splitmix64(seed & _MASK64)
    for number in numbers:
        value = splitmix64(value ^ (number & _MASK64))
    return value >> 1


def seed_default_generators(seed: int, step: int, rank: int = 0) -> None:
    """Seeds torch's default generators, on every device, from (seed, step): resuming needs no saved random state.

    Args:
        rank: of a process among several, each of which draws its own numbers; the first draws those of a process alone.
    """
    torch.manual_seed(derived_seed(seed, step, *([rank] if rank else [])))  # manual_seed takes 63 bits


class Stepper:
    """A task with its optimizer, EMA and guard.

    Within a step the order is: seed, ``structure(step)``, ``batch(step)``, ``losses``, backward, penalties of the task's own,
    average over the processes, guard, clip, lr, Adam, EMA.
    A structure change thus precedes the step it is asked for, and a checkpoint "before step s" never contains it.
    ``torch.profiler`` shows the parts under the names batch, losses, backward, penalties, reduce, clip, adam and ema.

    Of several processes each draws its own numbers from ``batch`` on (``structure`` sees the same in all). Losses and gradients
    are averaged over them, so that weights, what is logged and what stops a run are the same in all, and a loss that is not
    finite in one of them stops all at the same step under its name.

    After a change, moments and averages of parameters that kept name and shape stay, the others start anew, unless the
    task has ``remap_moments(ema, moments) -> (ema, moments)``: both by parameter name, ``moments`` holding Adam's
    ``step``, ``exp_avg`` and ``exp_avg_sq``, to be brought to the new structure.

    A task with its own ``loss_weights`` (an Implicitron model brings them) is trained with those instead of
    ``config.loss_weights``. A weight of None drops a name that a default configuration lists.

    Args:
        config: a ``TrainingConfig`` or a node of its shape.
        deferred: leave non-finite values to the device and :meth:`check` (no synchronisation within a step) instead of
            raising in the step itself.
        processes: those that train the model together. Its parameters and buffers become the first one's.
    """

    def __init__(self, task: Task, config: Any, *, deferred: bool, processes: Processes = ALONE) -> None:
        self.task, self.config, self.deferred, self.processes = task, config, deferred, processes
        processes.copy_first([*task.model.parameters(), *task.model.buffers()])
        weights = getattr(task, "loss_weights", config.loss_weights)
        self.weights = {str(name): float(weight) for name, weight in weights.items() if weight is not None}
        self._penalties = tuple(name for name in getattr(task, "penalty_names", ()) if name in self.weights)
        self.optimizer = self._build_optimizer()
        self.ema = EMA(task.model, ema_decay(config.max_steps, config.ema_horizon)) if config.ema else None
        self.guard = FiniteGuard()
        self.learning_rates: dict[str, float] = {}
        self._names: tuple[str, ...] = ()
        self._window: Tensor | None = None
        self._window_steps = 0
        self._reduced: list[Tensor] | None = None  # parameters that get a gradient in any process; None: not known yet

    def run(self, step: int) -> None:
        """Step number ``step``, 0-based.

        Raises:
            ValueError: the configuration names a loss that the task does not return, or a loss is not a scalar.
            NonFiniteLoss: not deferred, and a weighted loss, the total or the gradient is not finite.
        """
        seed_default_generators(self.config.seed, step)
        if self.task.structure(step):
            self._rebuild()
        if self.processes.rank:
            seed_default_generators(self.config.seed, step, self.processes.rank)
        with record_function("batch"):
            batch = self.task.batch(step)
        with record_function("losses"):
            losses = self.task.losses(batch)
            self._check_losses(losses)
            total = self._total(losses, step)
        self.optimizer.zero_grad(set_to_none=True)
        with record_function("backward"):
            total.backward()
        if self._penalties:
            with record_function("penalties"):
                added = self.task.add_penalties({name: self._weight(name, step) for name in self._penalties})
                losses, total = {**losses, **added}, total.detach() + self._total(added, step)
        if self.processes.size > 1:
            with record_function("reduce"):
                losses, total = self._average(losses, total)
        with record_function("clip"):
            norm = clip_gradients(parameters_of(self.optimizer), self.config.clip_grad_norm)
            self._observe(step, losses, total, norm)
        self.learning_rates = set_learning_rates(self.optimizer, self.lr_multiplier(step))
        with record_function("adam"):
            self.optimizer.step()
        if self.ema is not None:
            with record_function("ema"):
                self.ema.update(self.task.model)

    def lr_multiplier(self, step: int) -> float:
        if self.config.schedule == "steps":
            return implicitron_steps(step, self.config.max_steps)
        if self.config.schedule == "milestones":
            return milestone_steps(step, self.config.max_steps, self.config.milestones)
        if self.config.schedule == "warmup_cosine":
            return warmup_cosine(step, self.config.max_steps, self.config.warmup, self.config.lr_final)
        raise ValueError(f"training.schedule={self.config.schedule!r}: expected warmup_cosine, steps or milestones")

    def check(self) -> None:
        """Raises ``NonFiniteLoss`` if any step so far was not finite; waits for the device."""
        self.guard.check()

    def take_window(self) -> dict[str, float]:
        """Means of every loss, ``total`` and ``gradient_norm`` since the last call; waits for the device."""
        if self._window is None:
            return {}
        means = (self._window / self._window_steps).tolist()
        self._window, self._window_steps = None, 0
        return dict(zip(self._names, means, strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.task.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores model, optimizer and EMA; a model may change its structure in ``load_state_dict``."""
        self.task.model.load_state_dict(state["model"])
        self.optimizer = self._build_optimizer()
        load_adam(self.optimizer, state["optimizer"])
        if self.ema is not None:
            self.ema.rebuild(self.task.model)
            self.ema.load_state_dict(state["ema"])

    def follow_max_steps(self) -> None:
        """Gives the average the horizon of ``max_steps`` as they are now, for the run was extended; all else asks for them anyway."""
        if self.ema is not None:
            self.ema.decay = ema_decay(self.config.max_steps, self.config.ema_horizon)

    def _build_optimizer(self) -> torch.optim.Adam:
        self._reduced = None
        groups = self.task.parameter_groups()
        return build_adam(groups, self.task.model, betas=self.config.betas, eps=self.config.adam_eps)

    def _rebuild(self) -> None:
        averages = {} if self.ema is None else dict(self.ema.weights)
        moments = moments_by_name(self.optimizer)
        remap = getattr(self.task, "remap_moments", None)
        if remap is not None:
            averages, moments = remap(averages, moments)
        self.optimizer = self._build_optimizer()
        load_moments(self.optimizer, moments)
        if self.ema is not None:
            self.ema.rebuild(self.task.model, averages)

    def _average(self, losses: Mapping[str, Tensor], total: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Averages the gradients over the processes, and returns the averages of the losses and their total, all at once.

        Which parameters take part is agreed on once per structure: a gradient that a process lacks counts as 0 there.
        """
        parameters = parameters_of(self.optimizer)
        if self._reduced is None:
            by_process = self.processes.gather([parameter.grad is not None for parameter in parameters])
            found = [any(flags) for flags in zip(*by_process, strict=True)]
            self._reduced = [parameter for parameter, there in zip(parameters, found, strict=True) if there]
        for parameter in self._reduced:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        values = torch.stack([value.detach().reshape(()).to(total) for value in (total, *losses.values())])
        self.processes.average([*(parameter.grad for parameter in self._reduced), values])
        total, *own = values.unbind()
        return dict(zip(losses, own, strict=True)), total

    def _check_losses(self, losses: Mapping[str, Tensor]) -> None:
        known = [*losses, *self._penalties]
        unknown = sorted((self.weights.keys() | set(self.config.ramped_losses)) - set(known))
        if unknown:
            raise ValueError(f"loss_weights or ramped_losses name {', '.join(unknown)}; the task returns {', '.join(known)}")
        for name, loss in losses.items():
            if loss.numel() != 1:
                raise ValueError(f"loss {name} has shape {tuple(loss.shape)}: expected a scalar")
        if not self.weights.keys() & losses.keys():
            raise ValueError("loss_weights is empty: nothing to optimise")

    def _total(self, losses: Mapping[str, Tensor], step: int) -> Tensor:
        """Weighted sum of those that have a weight."""
        return torch.stack([self._weight(name, step) * losses[name].reshape(()) for name in self.weights if name in losses]).sum()

    def _weight(self, name: str, step: int) -> float:
        if name not in self.config.ramped_losses:
            return self.weights[name]
        return self.weights[name] * ramp(step, self.config.max_steps, self.config.warmup, self.config.ramp)

    def _observe(self, step: int, losses: Mapping[str, Tensor], total: Tensor, norm: Tensor) -> None:
        """Guards what reaches the weights; losses without a weight are only logged."""
        guarded = {**{name: losses[name] for name in self.weights}, TOTAL: total, GRADIENT_NORM: norm}
        watched = {**guarded, **{name: loss for name, loss in losses.items() if name not in guarded}}
        values = torch.stack([value.detach().reshape(()).to(total) for value in watched.values()])
        found = self.guard.observe(step, tuple(guarded), values[: len(guarded)])
        if self.deferred:
            self.optimizer.found_inf = found  # the fused kernel leaves weights and moments alone where this is 1
        else:
            self.guard.check()
        if tuple(watched) != self._names or self._window is None:
            self._names, self._window, self._window_steps = tuple(watched), torch.zeros_like(values), 0
        self._window += values
        self._window_steps += 1
