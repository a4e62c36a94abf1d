"""Whole checkpoints of another content: what stands in ``last.pt`` and ``best.pt`` is exchanged, and their checksums are right."""

from __future__ import annotations

import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from benchmarks.fuzzing import ALWAYS_FAULTS, Outcome, Target, outcome_of_error
from co3d_ensemble.fields.weights_file import restoring
from co3d_ensemble.training.checkpoint import Checkpoints as Files
from co3d_ensemble.training.checkpoint import read_checkpoint, write_checkpoint
from co3d_ensemble.training.run_directory import ConfigMismatch
from tests.training.toy_task import run_toy

STEPS, STOPPED_AT = 12, 6


class Interrupted(Exception):
    pass


class Checkpoints(Target):
    """A run of a tiny network that was killed half-way and goes on. Damage that training does not use may go unseen."""

    name = "checkpoints"
    faults = ALWAYS_FAULTS

    def prepare(self, folder: Path) -> None:
        from tests.training.toy_task import ToyTask

        class Dying(ToyTask):
            def batch(self, step: int) -> torch.Tensor:
                if step == STOPPED_AT:
                    raise Interrupted
                return super().batch(step)

        try:
            run_toy(folder / "run", make_task=Dying, max_steps=STEPS, checkpoint_every_seconds=0.0)
        except Interrupted:
            pass

    def mutate(self, generator: random.Random, folder: Path) -> str:
        files = Files(folder / "run" / "checkpoints")
        path = generator.choice((files.last, files.last, files.best))
        content = read_checkpoint(path)
        changed, told = _changed(generator, content)
        write_checkpoint(path, changed)  # type: ignore[arg-type]
        files.previous.unlink(missing_ok=True)
        return f"{path.stem} {told}"

    def judge(self, folder: Path) -> tuple[Outcome, str]:
        files = Files(folder / "run" / "checkpoints")
        try:
            _, task = run_toy(folder / "run", max_steps=STEPS, checkpoint_every_seconds=0.0)
            saved = files.load_best()
            with restoring(files.best):
                task.model.load_state_dict(saved["model"])
        except ConfigMismatch as error:  # lists every setting that differs, a line each
            return Outcome.NAMED, str(error)
        except ValueError as error:
            return outcome_of_error(error, ["is no checkpoint of this run"]), str(error)
        return Outcome.SAME, "went on"


def _changed(generator: random.Random, value: Any) -> tuple[Any, str]:
    """``value`` with one entry, at some depth, taken away or exchanged."""
    if isinstance(value, (dict, OrderedDict)) and value and generator.random() < 0.9:
        key = generator.choice(list(value))
        if generator.random() < 0.2:
            return {name: entry for name, entry in value.items() if name != key}, f"without: {key}"
        if generator.random() < 0.1:
            return {
                generator.choice((7, "another", None)) if name == key else name: entry for name, entry in value.items()
            }, f"renamed: {key}"
        inner, told = _changed(generator, value[key])
        kind, _, place = told.partition(": ")
        return {**value, key: inner}, f"{kind}: {key}.{place}"
    if isinstance(value, list) and value and generator.random() < 0.8:
        i = generator.randrange(len(value))
        inner, told = _changed(generator, value[i])
        kind, _, place = told.partition(": ")
        return [*value[:i], inner, *value[i + 1 :]], f"{kind}: {i}.{place}"
    others = (None, 3, -1, 2.5, "text", [], {}, [1, 2], {"a": 1}, True, torch.zeros(3), torch.zeros(0), torch.ones(2, 2, dtype=torch.int64))
    other = generator.choice(others)
    return other, f"{type(other).__name__}: "
