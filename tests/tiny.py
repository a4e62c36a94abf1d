"""Runs of a second for the integration tests: a tiny generated root, a tiny model, and the launch scripts in this process
or in processes of their own, which can be killed at a chosen moment."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import co3d_ensemble.files
import co3d_ensemble.training.checkpoint
from co3d_ensemble.data.synthetic import SyntheticConfig, generate_dataset
from co3d_ensemble.plugin.model import ObjectModel
from co3d_ensemble.plugin.tensorf_model import TensoRFModel
from co3d_ensemble.training.ray_bank_task import RayBankTask
from launch import evaluate_submission, export_submission, train_sequence

HEIGHT, WIDTH = 24, 32  # of the photographs
SIZES = {"n_known": 10, "n_val": 2, "n_unseen": 2, "height": HEIGHT, "width": WIDTH, "supersample": 1}
MODEL = {
    "model.nerf.n_layers": 2,
    "model.nerf.n_hidden": 16,
    "model.nerf.skip_layers": "[]",
    "model.nerf.n_hidden_color": 8,
    "model.nerf.precision": "float32",  # the same numbers on every machine, in child processes as well
    "model.renderer.n_pts_per_ray_coarse": 8,
    "model.renderer.n_pts_per_ray_fine": 8,
    "model.occupancy.resolution": 16,
}
TENSORF = {
    "model.tensorf.resolution": 8,
    "model.tensorf.n_density": 2,
    "model.tensorf.n_appearance": 4,
    "model.tensorf.n_features": 6,
    "model.tensorf.n_hidden": 8,
    "model.tensorf.precision": "float32",
    "model.grid.final_resolution": 12,
}
TRAINING = {
    "data.longest_side": 24,
    "training.n_rays": 32,
    "training.max_steps": 8,
    "training.validate_every": 0.5,
    "training.log_every": 2,
    "training.progress": "false",
}


def generated(root: Path, subsets: dict[str, list[str]], **settings: Any) -> Path:
    return generate_dataset(root, subsets, SyntheticConfig(**{**SIZES, **settings}))


def train_arguments(root: Path, output: Path, **settings: Any) -> list[str]:
    """Arguments of ``train_sequence``; ``__`` in a setting's name stands for its dot."""
    chosen = {"experiment": "nerf_laptop", "dataset_root": root, "output_dir": output, "category": "mug", "device": "cpu"}
    if not str(settings.get("experiment", "nerf")).startswith("implicitron"):
        chosen |= MODEL | TENSORF
    else:
        chosen |= {"member": "nerf", "model.occupancy.resolution": MODEL["model.occupancy.resolution"]}
    chosen |= TRAINING | {key.replace("__", "."): value for key, value in settings.items()}
    return [f"{key}={value}" for key, value in chosen.items() if value is not None]


def train(root: Path, output: Path, **settings: Any) -> int:
    return train_sequence.main(train_arguments(root, output, **settings))


def export(root: Path, output: Path, *more: str) -> int:
    return export_submission.main([f"dataset_root={root}", f"output_dir={output}", "device=cpu", *more])


def evaluate(archive: Path, root: Path, *more: str) -> int:
    return evaluate_submission.main([str(archive), f"dataset_root={root}", *more])


class Launched:
    """A launch script in a process of its own, forked from a server that has everything imported."""

    def __init__(self, arguments: Sequence[str], log: Path, *, dies_at: tuple[str, int] | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.tiny"])
        self.log = log
        self.process = context.Process(target=_train_in_child, args=(list(arguments), str(log), dies_at))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.kill(self.pid, number)

    def exit_code(self, seconds: float = 60.0) -> int:
        """The exit code, or minus the number of the signal that killed it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"still running after {seconds} s:\n{self.log.read_text()}")
        return self.process.exitcode

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive() and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)


def _train_in_child(arguments: list[str], log: str, dies_at: tuple[str, int] | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if dies_at is not None:
        die_at(*dies_at)
    sys.exit(train_sequence.main(arguments))


def die_at(moment: str, count: int) -> None:
    """SIGKILL to this very process at the ``count``-th time (from 0) of a moment in a run."""
    owner, name = {
        "step": (RayBankTask, "losses"),
        "refinement": (RayBankTask, "structure"),
        "shrink": (TensoRFModel, "shrink"),
        "upsampling": (TensoRFModel, "upsample"),
        "bytes of a checkpoint": (co3d_ensemble.training.checkpoint._HashingWriter, "write"),
        "rename": (os, "replace"),
        "sync": (os, "fsync"),
        "rendering": (ObjectModel, "render_view"),
    }[moment]
    original, calls = getattr(owner, name), iter(range(count))

    def dying(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, dying)
