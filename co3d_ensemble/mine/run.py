"""A configuration to a trained run of MINE, by one process or by several under torchrun."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import torch
from omegaconf import DictConfig

from co3d_ensemble.files import write_json_atomic
from co3d_ensemble.mine.assembly import run_directory
from co3d_ensemble.mine.config import FREE_KEYS, resolve_steps
from co3d_ensemble.mine.task import MINETask
from co3d_ensemble.mine.training_data import open_pairs
from co3d_ensemble.report.pictures import training_curve
from co3d_ensemble.training.budget import fit_budget
from co3d_ensemble.training.checkpoint import Checkpoints
from co3d_ensemble.training.loop import TrainingResult, train
from co3d_ensemble.training.precision import automatic_precision, settle_precision, tell_precision
from co3d_ensemble.training.processes import Processes, joined
from co3d_ensemble.training.records import read_metrics
from co3d_ensemble.training.run_directory import RunDirectory, opened_by_first
from co3d_ensemble.training.stepper import INITIALISATION, seed_default_generators

logger = logging.getLogger(__name__)


def train_mine(config: DictConfig) -> TrainingResult:
    """Trains a run up to its end, or on from where it was stopped; a finished one is left alone.

    Leaves the run directory of every training: configuration, environment, metrics, events, checkpoints; at the end
    ``training_curve.png`` and ``results.json`` with the validation scores of the best checkpoint.

    Raises:
        ValueError and its subclasses: bad input, naming the file or key; RunDirectoryBusy; NonFiniteLoss.
    """
    with joined(config.device) as (processes, device):
        return train_together(config, device, processes)


def train_together(config: DictConfig, device: torch.device, processes: Processes) -> TrainingResult:
    """:func:`train_mine` as one of some processes."""
    pairs = open_pairs(config)
    config = config.copy()
    resolve_steps(config, len(pairs[0]))  # type: ignore[arg-type]
    if config.training.batch_size % processes.size:
        raise ValueError(f"training.batch_size={config.training.batch_size}: must be a multiple of the {processes.size} processes")
    if processes.size > 1 and device.type != "cuda" and config.training.sync_batchnorm:
        logger.warning("training.sync_batchnorm: torch synchronises batch norm on CUDA only; here each process normalises its own share")
    automatic = automatic_precision(config, device)
    options: dict[str, Any] = {"resume": config.training.resume, "device": device, "free_keys": FREE_KEYS, "precision": automatic}
    with opened_by_first(processes, run_directory(config), config, **options) as run:
        finished = processes.from_first(lambda: _finished(run))
        if finished is not None:
            return finished
        if run is not None:
            tell_precision(config, run.config, run.path, device)
        settle_precision(config, {"model.precision": processes.from_first(lambda: run.config.model.precision)})  # type: ignore[union-attr]

        def make_task(training: Any) -> MINETask:
            return MINETask(config, training, *pairs, device=device, processes=processes)

        training = fit_budget(make_task, run, device, processes)
        if run is not None:
            logger.info("%s: %d steps, %d pairs to train on, on %s", run.path, training.max_steps, len(pairs[0]), device)  # type: ignore[arg-type]
        seed_default_generators(training.seed, INITIALISATION)
        result = train(make_task(training), training, run, device, processes)
        if run is not None and result.exit_status == 0:
            _conclude(run, result)
    return result


def _finished(run: RunDirectory) -> TrainingResult | None:
    """How a run ended that was trained to its end, or None where anything is left to do."""
    if not run.results_path.exists() or not Checkpoints(run.checkpoints).has_good_best():
        return None
    results = json.loads(run.results_path.read_text())
    logger.info(
        "%s is finished: %s after %d steps (training.resume=extend goes on, restart trains it again)",
        run.path,
        results["stopped"],
        results["steps"],
    )
    return TrainingResult(results["steps"], results["seconds"], results["best_metric"], results["best_step"], results["stopped"])


def _conclude(run: RunDirectory, result: TrainingResult) -> None:
    """``training_curve.png``, then ``results.json``, which says that the run is finished."""
    quality: dict[str, list[tuple[float, float | None]]] = {}
    losses: dict[str, list[tuple[float, float | None]]] = {}
    validations = read_metrics(run.metrics_path, "validation")
    for record in validations:
        for name in ("psnr_valid", "psnr"):
            quality.setdefault(name, []).append((record["step"], record["metrics"].get(name)))
    for record in read_metrics(run.metrics_path, "train"):
        for name, value in record["losses"].items():
            losses.setdefault(name, []).append((record["step"], value))
    training_curve(quality, losses, run.path / "training_curve.png")
    best = next((record["metrics"] for record in validations if record["step"] == result.best_step), {})
    finite = {name: value for name, value in best.items() if value is not None and math.isfinite(value)}
    outcome = {"stopped": result.stopped, "steps": result.steps, "seconds": result.seconds}
    write_json_atomic(run.results_path, {**outcome, "best_step": result.best_step, "best_metric": result.best_metric, "validation": finite})
