"""A training run of the comparison: its folder, its curve, and going on where it was interrupted."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from benchmarks.common import PeakMemory, make_stepper
from co3d_ensemble.assembly import Scene
from co3d_ensemble.files import write_json_atomic
from co3d_ensemble.functional.metrics import iou, psnr_masked
from co3d_ensemble.functional.types import Frame
from co3d_ensemble.training.checkpoint import read_checkpoint, write_checkpoint
from co3d_ensemble.training.precision import used_precision
from co3d_ensemble.training.stepper import Stepper
from co3d_ensemble.training.validation import mean_scores, score_frame

logger = logging.getLogger("time_to_quality")

FIRST_SHARE = 0.02  # of max_steps: the first evaluation; the others follow geometrically
PROBE_STEPS, PROBE_SECONDS, PROBE_WARM_UP = 5, 5.0, 3  # at least so many steps and seconds are timed
SAVE_SECONDS = 120.0  # a checkpoint at least this often
NOT_RESULT = ("dataset_root", "output_dir", "device")  # keys that a resumed cell may differ in


@dataclass(frozen=True)
class Cell:
    """One training run of the comparison.

    Attributes:
        name: its folder.
        overrides: Hydra overrides of its experiment.
        minutes: budget of training time.
        evaluations: points on its curve.
        steps: its max_steps, in place of the budget.
    """

    name: str
    overrides: tuple[str, ...]
    minutes: float
    evaluations: int
    steps: int | None = None


@dataclass
class Clock:
    """Where a cell stands."""

    step: int = 0
    seconds: float = 0.0
    peak_memory_mb: float = 0.0


def evaluation_steps(max_steps: int, count: int) -> list[int]:
    """At most ``count`` steps, from ``FIRST_SHARE`` of ``max_steps`` to ``max_steps``, in equal ratios."""
    if count == 1:
        return [max_steps]
    steps = {round(max_steps * FIRST_SHARE ** (1 - i / (count - 1))) for i in range(count)}
    return sorted(max(1, step) for step in steps | {max_steps} if step > 0)


@torch.no_grad()
def evaluate(stepper: Stepper, frames: Sequence[Frame], config: DictConfig, device: torch.device, *, full: bool) -> dict[str, float]:
    """Mean scores of the averaged weights, where there are such: psnr_masked and iou, or with ``full`` all metrics."""
    model = stepper.task.model
    per_frame = []
    with nullcontext() if stepper.ema is None else stepper.ema.applied(model):
        for frame in frames:
            view = model.render_view(frame.camera.to(device), config.rendering.chunk_rays).cpu()
            if full:
                per_frame.append(score_frame(view, frame))
            else:
                rgb, mask = frame.rgb.float() / 255, frame.mask.float() / 255
                per_frame.append({"psnr_masked": float(psnr_masked(view.rgb, rgb, mask)), "iou": float(iou(view.mask, mask))})
    return mean_scores(per_frame)


def seconds_per_step(config: DictConfig, scene: Scene, device: torch.device) -> float:
    """Of a run's beginning, on a task that is thrown away."""
    config = OmegaConf.create(OmegaConf.to_container(config))
    config.training.max_steps = 10**6  # no refinement falls due
    stepper = make_stepper(config, scene, device)
    for step in range(PROBE_WARM_UP):
        stepper.run(step)
    stepper.check()
    start, timed = time.perf_counter(), 0
    while timed < PROBE_STEPS or time.perf_counter() - start < PROBE_SECONDS:
        for _ in range(PROBE_STEPS):
            stepper.run(PROBE_WARM_UP + timed)
            timed += 1
        stepper.check()
    return (time.perf_counter() - start) / timed


class CellRun:
    """A cell's folder: ``cell.json`` (what it is), ``points.jsonl`` (its curve), ``state.pt``, ``result.json`` (finished)."""

    def __init__(self, folder: Path, cell: Cell, config: DictConfig, *, stride: int) -> None:
        self.folder, self.cell, self.config = folder, cell, config
        self._identity = {
            "cell": {**asdict(cell), "overrides": list(cell.overrides)},
            "stride": stride,
            "config": {key: value for key, value in OmegaConf.to_container(config).items() if key not in NOT_RESULT},
        }

    @staticmethod
    def begun_with(folder: Path) -> dict[str, Any] | None:
        """The configuration of the cell that was begun in the folder, or None."""
        path = folder / "cell.json"
        return json.loads(path.read_text())["config"] if path.exists() else None

    @property
    def result(self) -> dict[str, Any] | None:
        """Of the finished cell, else None.

        Raises:
            ValueError: the folder holds a cell of other settings.
        """
        path = self.folder / "result.json"
        self._plan()
        return json.loads(path.read_text()) if path.exists() else None

    def max_steps(self, scene: Scene, device: torch.device) -> int:
        """Fixed when the cell is first run."""
        plan = self._plan()
        if plan is None:
            probed = seconds_per_step(self.config, scene, device)
            steps = self.cell.steps or max(1, int(60 * self.cell.minutes / probed))
            plan = {**self._identity, "seconds_per_step": probed, "max_steps": steps}
            write_json_atomic(self.folder / "cell.json", plan)
        return plan["max_steps"]

    def _plan(self) -> dict[str, Any] | None:
        path = self.folder / "cell.json"
        if not path.exists():
            return None
        plan = json.loads(path.read_text())
        wanted = json.loads(json.dumps(self._identity))
        differing = [key for key, value in wanted.items() if plan.get(key) != value]
        if differing:
            raise ValueError(f"{self.folder} holds a cell of other settings ({', '.join(differing)}): use another --output or remove it")
        return plan

    def points(self, up_to: int) -> list[dict[str, Any]]:
        """The curve as far as step ``up_to``; a half-written last line does not count."""
        path = self.folder / "points.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [point for point in found if point["step"] <= up_to]

    def rewrite(self, points: Sequence[Mapping[str, Any]]) -> None:
        (self.folder / "points.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))

    def append(self, point: Mapping[str, Any]) -> None:
        with open(self.folder / "points.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")

    def save(self, stepper: Stepper, clock: Clock) -> None:
        write_checkpoint(self.folder / "state.pt", {**stepper.state_dict(), "clock": asdict(clock)})

    def load(self, stepper: Stepper, device: torch.device) -> Clock:
        path = self.folder / "state.pt"
        if not path.exists():
            return Clock()
        saved = read_checkpoint(path, device)
        stepper.load_state_dict(saved)
        return Clock(**saved["clock"])

    def finish(self, result: Mapping[str, Any]) -> None:
        write_json_atomic(self.folder / "result.json", result)


def run_cell(
    run: CellRun, scene: Scene, targets: Sequence[Frame], device: torch.device, *, stride: int, full_final: bool
) -> dict[str, Any]:
    """Trains a cell to its end, from where it stands; returns its result, at once if it is finished."""
    if run.result is not None:
        return run.result
    run.folder.mkdir(parents=True, exist_ok=True)
    config = run.config
    config.training.max_steps = max_steps = run.max_steps(scene, device)
    few = [replace(frame, depth=None, depth_mask=None).strided(stride) for frame in targets]
    peak = PeakMemory(device)
    peak.start()
    stepper = make_stepper(config, scene, device)
    clock = run.load(stepper, device)
    points = run.points(clock.step)
    run.rewrite(points)
    done = points[-1]["step"] if points else 0
    logger.info("%s: %d of %d steps done", run.cell.name, clock.step, max_steps)
    for step in [step for step in evaluation_steps(max_steps, run.cell.evaluations) if step > done]:
        _train_until(step, stepper, clock, run, peak)
        start = time.perf_counter()
        scores = evaluate(stepper, few, config, device, full=False)
        points.append({"step": step, "seconds": clock.seconds, **scores, "evaluation_seconds": time.perf_counter() - start})
        run.append(points[-1])
        logger.info("%s: step %d, %.1f s, psnr_masked %.2f, iou %.3f", run.cell.name, step, clock.seconds, *scores.values())
        peak.set_back()  # what rendering took is not training's
    result = {
        "name": run.cell.name,
        "max_steps": max_steps,
        "minutes": run.cell.minutes,
        "seconds": clock.seconds,
        "points": points,
        "peak_memory_mb": clock.peak_memory_mb,
        "precision": used_precision(config),
        "learning_rate": config.training.lr,
        "final": evaluate(stepper, targets, config, device, full=True) if full_final else None,
    }
    run.finish(result)
    return result


def _train_until(stop: int, stepper: Stepper, clock: Clock, run: CellRun, peak: PeakMemory) -> None:
    """Steps up to ``stop``, with a checkpoint at least every ``SAVE_SECONDS`` and at the end; only steps are on the clock."""
    while clock.step < stop:
        stepper.task.model.train()
        start = time.perf_counter()
        while clock.step < stop and time.perf_counter() - start < SAVE_SECONDS:
            stepper.run(clock.step)
            clock.step += 1
        stepper.check()  # waits for the device
        clock.seconds += time.perf_counter() - start
        clock.peak_memory_mb = max(clock.peak_memory_mb, peak.mebibytes())
        run.save(stepper, clock)
