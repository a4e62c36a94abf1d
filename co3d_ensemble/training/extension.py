"""``training.resume=extend``: a run, finished or not, goes on to more steps than it was made for, with all that it has learned.

Everything scheduled is a function of step / max_steps. Under the new max_steps that share is smaller again: the learning rate rises
along the new cosine (a run that ended at 0 and is made twice as long goes on at half its rate; where the new warm-up is longer than
the steps that were made, it is a warm-up), the average of the weights gets the longer horizon, and ramped losses stand where the new
schedule has them. What changes a model's structure is different: a change that was made is not made again, and one that was due later
comes at its share of the new max_steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from co3d_ensemble.training.checkpoint import Checkpoints, read_checkpoint

MAX_STEPS, BUDGET = "training.max_steps", "training.budget_minutes"
LENGTH_KEYS = (MAX_STEPS, "training.epochs")  # in which an extended run may differ from what it was


def extended_steps(path: Path, config: DictConfig, *, before: int, known_minutes: float | None) -> int:
    """The ``max_steps`` that a run is to go on to; ``before`` where it was extended to them already.

    A budget is of the whole run, what it took so far included; further steps are taken to last as long as its own did.

    Args:
        path: of the run.
        config: what is asked for.
        before: the run's present ``max_steps``.
        known_minutes: the budget that these follow from, if one.

    Raises:
        ValueError: that would not be more.
    """
    minutes = OmegaConf.select(config, BUDGET)
    if minutes is None:
        steps = int(OmegaConf.select(config, MAX_STEPS))
        if steps < before:
            raise ValueError(f"{MAX_STEPS}={steps}: {path} was made for {before}, and training.resume=extend takes more of them")
        return steps
    if minutes == known_minutes:
        return before
    clock = _clock(path)
    steps = steps_within(minutes, clock)
    if steps <= before:
        told = f"it took {clock['seconds'] / 60:.2f} minutes for {clock['step']} steps"
        raise ValueError(f"{BUDGET}={minutes:g}: {path} was made for {before} steps, and {told}: that budget would not allow more")
    return steps


def steps_within(minutes: float, clock: Mapping[str, Any]) -> int:
    """Steps of a whole run of so many minutes, where those so far took what its clock says; at least those."""
    if not clock["step"] or not clock["seconds"]:
        return int(clock["step"])
    return int(clock["step"]) + max(0, int((60.0 * minutes - clock["seconds"]) * clock["step"] / clock["seconds"]))


def _clock(path: Path) -> dict[str, Any]:
    newest = Checkpoints(path / "checkpoints").newest_good()
    if newest is None:
        return {"step": 0, "seconds": 0.0}
    return read_checkpoint(newest)["clock"]


def with_extensions(saved: dict[str, Any], extensions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A checkpoint as one of the run that was extended; unchanged where it knows of all ``extensions``.

    Its clock gets a new plan from its step on (see ``first_step_of`` of the schedules), and runs again; ``extended`` is set.
    """
    clock = saved["clock"]
    known = clock.get("extensions", 0)
    if known == len(extensions):
        return saved
    plans = [*(clock.get("plans") or [[0, extensions[known]["from_max_steps"]]]), [clock["step"], extensions[-1]["max_steps"]]]
    news = {"plans": plans, "extensions": len(extensions), "replans": 0, "stopped": "", "validations_without_gain": 0}
    return {**saved, "clock": {**clock, **news}, "extended": True}
