"""One member on one sequence: a configuration to a trained and scored run, and the views that the run can show."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from co3d_ensemble.assembly import load_frame, load_scene, make_task, model_of_state
from co3d_ensemble.base.paths import plain_part
from co3d_ensemble.base.progress import tracked
from co3d_ensemble.base.spread import evenly_spread
from co3d_ensemble.challenge.lpips import load_lpips, lpips_masked
from co3d_ensemble.data.agreement import JUDGES, readable_silhouettes
from co3d_ensemble.data.audit import camera_faults
from co3d_ensemble.data.co3d import CO3DIndex, FrameRecord, Subset
from co3d_ensemble.fields.weights_file import restoring
from co3d_ensemble.files import remove_temporaries, write_json_atomic
from co3d_ensemble.functional.types import Frame, PinholeCamera, RenderedView
from co3d_ensemble.plugin.implicitron_model import ImplicitronModel
from co3d_ensemble.plugin.model import ObjectModel
from co3d_ensemble.rendering import Pictures, read_view, resolve_device, view_name, write_view
from co3d_ensemble.report.pictures import comparison_sheet, save_picture, training_curve
from co3d_ensemble.training.budget import fit_budget
from co3d_ensemble.training.checkpoint import Checkpoints
from co3d_ensemble.training.emptiness import empty_model
from co3d_ensemble.training.lock import FolderLock, RunDirectoryBusy
from co3d_ensemble.training.loop import TrainingResult, train
from co3d_ensemble.training.precision import automatic_precision, settle_precision, show_precision, tell_precision
from co3d_ensemble.training.records import read_metrics
from co3d_ensemble.training.run_directory import RunDirectory
from co3d_ensemble.training.stepper import INITIALISATION, seed_default_generators
from co3d_ensemble.training.validation import mean_scores, score_frame

logger = logging.getLogger(__name__)

METRICS = ("psnr_masked", "psnr_fg", "psnr_full_image", "depth_abs_fg", "iou", "ssim", "lpips")
SHOWN_TARGETS = 8  # rows of targets.png
NO_DEPTH = "no ground-truth depth"


def run_directory(output_dir: Path | str, category: str, subset_name: str, member: str) -> Path:
    """Where a run lies: below ``output_dir`` whatever the names, each of which must be one plain part of a path (else ValueError)."""
    names = {"category": category, "subset_name": subset_name, "member": member}
    return Path(output_dir, *(plain_part(name, what) for what, name in names.items()))


def train_sequence(config: DictConfig) -> TrainingResult:
    """Walk 1: trains one member on one sequence, then renders and scores its targets.

    Goes on where an earlier run of the same configuration stopped, and does nothing where one is finished. Leaves the run
    directory of ARCHITECTURE's walk: configuration, environment, metrics, events, checkpoints, ``results.json`` and
    ``targets.png``.

    Raises:
        ValueError and its subclasses: bad input, naming the file or key; RunDirectoryBusy; NonFiniteLoss.
    """
    device = resolve_device(config.device)
    path = run_directory(config.output_dir, config.category, config.subset_name, config.member)
    CO3DIndex(config.dataset_root).subset(config.category, config.subset_name)  # a wrong name leaves no folder behind
    automatic = automatic_precision(config, device)
    with RunDirectory.open(path, config, resume=config.training.resume, device=device, precision=automatic) as run:
        finished = _finished(run)
        if finished is not None:
            return finished
        tell_precision(config, run.config, path, device)
        config = config.copy()
        settle_precision(config, automatic, run.config)
        scene = load_scene(config)
        training = fit_budget(lambda settings: make_task(config, settings, scene, device), run, device)
        seed_default_generators(training.seed, INITIALISATION)
        result = train(make_task(config, training, scene, device), training, run, device)
        if result.exit_status == 0:
            evaluate_run(run, scene.subset, device, result)
    return result


def _finished(run: RunDirectory) -> TrainingResult | None:
    """How a run ended that was trained to its end and scored, or None where anything is left to do."""
    checkpoints = Checkpoints(run.checkpoints)
    if not run.results_path.exists() or not checkpoints.has_good_best():
        return None
    if run.results_path.stat().st_mtime_ns < checkpoints.best.stat().st_mtime_ns:
        return None
    results, best = json.loads(run.results_path.read_text()), checkpoints.load_best()
    logger.info("%s is finished: %s after %d steps", run.path, results["stopped"], results["steps"])
    told = "to score it again, delete %s; training.resume=extend with more training.max_steps goes on, training.resume=restart starts anew"
    logger.info(told, run.results_path)
    metric = best["metric"] if math.isfinite(best["metric"]) else None
    shares = results.get("time_shares", {})
    return TrainingResult(results["steps"], results["seconds"], metric, results["best_step"], results["stopped"], shares)


def load_trained(run: RunDirectory, device: torch.device) -> tuple[ObjectModel | ImplicitronModel, DictConfig]:
    """The best checkpoint's model (EMA weights in place) without reading the data set again; its precision: ``show_precision``."""
    config = run.config
    show_precision(config)
    checkpoints = Checkpoints(run.checkpoints)
    saved = checkpoints.load_best("cpu")
    with restoring(checkpoints.best):
        model = model_of_state(config, saved["model"])
        model.load_state_dict(saved["model"])
    return model.to(device).eval(), config


def evaluate_run(run: RunDirectory, subset: Subset, device: torch.device, result: TrainingResult) -> dict[str, Any]:
    """Scores the best checkpoint on the targets with ground truth, at the run's resolution: ``results.json``, ``targets.png``.

    With ``rendering.all_targets`` also renders every target at its original size, for exports to find.
    ``empty`` says why a model shows nothing, and is null for one that shows the object.
    What cannot be computed is null with its reason under ``reasons``. ``depth_abs_fg`` is in world units (``depth_units``:
    "world"), as Implicitron loads depth: the PNG's values times the annotation's ``scale_adjustment``. The archive's
    ``results.json`` has it in the PNG's own units, as the challenge's evaluation does: the two agree only where that factor is 1.
    """
    config, renders, scorer = run.config, Renders(run, device), TargetScorer(device, load_lpips(device=device))
    scorable = scorable_targets(subset)
    shown = {record.key for record in evenly_spread(scorable, SHOWN_TARGETS)}
    rows = []
    for record in tracked(scorable, "rendering and scoring", "target frames"):
        frame = load_frame(config, record)
        view = renders.view(record, frame.camera)
        renders.show(view, record)
        scorer.add(view, frame)
        if record.key in shown:  # a sequence may have hundreds of targets: only these stay in memory
            rows.append((frame.name, frame.rgb, view, frame.mask))
    results = {
        **scorer.results(),
        "seconds": result.seconds,
        "time_shares": result.time_shares,
        "steps": result.steps,
        "best_step": result.best_step,
        "stopped": result.stopped,
    }
    results["empty"] = why_empty(run, subset, results)
    if rows:
        save_picture(run.path / "targets.png", comparison_sheet(rows))
    _plot_run(run)
    if config.rendering.all_targets:
        for record in tracked(subset.targets, "rendering at the original size", "target frames"):
            if not camera_faults(record):  # the export names those
                renders.show_original(renders.view(record), record)
    write_json_atomic(run.results_path, results)
    logger.info("%s: %s", run.path, ", ".join(f"{name} {value:.3f}" for name, value in results["metrics"].items() if value is not None))
    return results


def why_empty(run: RunDirectory, subset: Subset, results: dict[str, Any]) -> str | None:
    """Why the run's model shows nothing where the object is, also as a warning; None where it shows it."""
    config = run.config
    found = empty_model(
        iou=results["metrics"]["iou"],
        validations=read_metrics(run.metrics_path, "validation"),
        bounds=config.data.bounds,
        kind=config.model.kind,
        loss_weights=config.training.loss_weights,
        steps=results["steps"],
    )
    if found is None:
        return None
    told = found.told(readable_silhouettes(subset.known, most=JUDGES))
    logger.warning("%s: %s", run.path, told)
    return told


def scorable_targets(subset: Subset) -> list[FrameRecord]:
    """The target frames that have ground truth."""
    return [record for record in subset.targets if subset.scorable is None or record.key in subset.scorable]


class TargetScorer:
    """Collects the scores of target frames: the challenge's metrics, SSIM and, where its weights are on disk, LPIPS.

    Args:
        lpips: the network or None, and why there is none, as ``load_lpips`` returns them.
    """

    def __init__(self, device: torch.device, lpips: tuple[Any, str | None]) -> None:
        self._network, self._why_no_lpips = lpips
        self._device = device
        self.per_frame: dict[str, dict[str, float | None]] = {}

    def add(self, view: RenderedView, frame: Frame) -> None:
        scores = score_frame(view, frame)
        rgb, mask = (plane.float().to(self._device) / 255 for plane in (frame.rgb, frame.mask))
        scores["lpips"] = None if self._network is None else lpips_masked(self._network, view.rgb.to(self._device), rgb, mask)
        self.per_frame[frame.name] = scores

    def results(self) -> dict[str, Any]:
        """``{"metrics": {name: mean}, "reasons": {name: why null}, "depth_units": "world", "frames": {frame: scores}}``."""
        means, missing = mean_scores(self.per_frame.values()), {"depth_abs_fg": NO_DEPTH, "lpips": self._why_no_lpips}
        reasons = {name: why for name, why in missing.items() if name not in means}
        if not self.per_frame:
            reasons = {name: "no target has ground truth" for name in METRICS}
        metrics = {name: means.get(name) for name in METRICS}
        return {"metrics": metrics, "reasons": reasons, "depth_units": "world", "frames": self.per_frame}


def _plot_run(run: RunDirectory) -> None:
    """``training_curve.png``: validation PSNRs and training losses over the steps."""

    def curves(kind: str, group: str, wanted: str) -> dict[str, list[tuple[float, float | None]]]:
        found: dict[str, list[tuple[float, float | None]]] = {}
        for record in read_metrics(run.metrics_path, kind):
            for name, value in record[group].items():
                if name.startswith(wanted):
                    found.setdefault(name, []).append((record["step"], value))
        return found

    training_curve(curves("validation", "metrics", "psnr"), curves("train", "losses", "loss"), run.path / "training_curve.png")


class Renders:
    """The views of a run's best checkpoint: rendered once, then read from ``views/``. For use under the run's lock.

    Renders of an older checkpoint are discarded. Views at the frame's original size lie in ``views/`` itself, those of other sizes in
    ``views/<height>x<width>/``. Pictures of the targets lie in ``renders/``, see :class:`Pictures`.

    Args:
        chunk_rays: rays rendered at once; None: as the run's configuration has it.
    """

    def __init__(self, run: RunDirectory, device: torch.device, chunk_rays: int | None = None) -> None:
        self._run, self._device, self._chunk_rays = run, device, chunk_rays
        self._model: ObjectModel | ImplicitronModel | None = None
        self._pictures = Pictures(run.renders)
        for folder in (run.views, run.renders):
            remove_temporaries(folder)  # of a process that was killed
        keep_if_made_from(run.views, run.renders, checkpoint_stamp(run))
        self.show, self.show_original = self._pictures.show, self._pictures.show_original

    def view(self, record: FrameRecord, camera: PinholeCamera | None = None) -> RenderedView:
        """The model at ``camera``, or at the record's own; on the CPU, colour and mask in steps of float16."""
        camera = record.camera() if camera is None else camera
        path = view_path(self._run.views, record, camera)
        if not path.exists():
            if self._model is None:
                self._model, config = load_trained(self._run, self._device)
                self._chunk_rays = self._chunk_rays or config.rendering.chunk_rays
            write_view(path, self._model.render_view(camera.to(self._device), self._chunk_rays).cpu())
        return read_view(path)


def view_path(folder: Path, record: FrameRecord, camera: PinholeCamera) -> Path:
    """Where a frame's view at a camera of some size lies in a folder of views."""
    if (camera.height, camera.width) != (record.height, record.width):
        folder = folder / f"{camera.height}x{camera.width}"
    return folder / f"{view_name(record)}.npz"


def checkpoint_stamp(run: RunDirectory) -> dict[str, Any]:
    """What tells one best checkpoint of a run from another without reading it."""
    best = Checkpoints(run.checkpoints).best
    stat = best.stat()
    return {"checkpoint": best.name, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}


def keep_if_made_from(views: Path, pictures: Path, stamp: dict[str, Any]) -> None:
    """Deletes views and pictures unless they were made from what ``stamp`` describes, and leaves the stamp with the views."""
    path = views / "made_from.json"
    if path.exists() and json.loads(path.read_text()) == stamp:
        return
    for old in (*views.rglob("*.npz"), *pictures.rglob("*.png"), *pictures.rglob("*.npz")):  # before, arrays lay among the pictures
        old.unlink()
    (pictures / "made_from.json").unlink(missing_ok=True)
    write_json_atomic(path, stamp)


def render_targets(
    run: RunDirectory, records: Sequence[FrameRecord], device: torch.device, chunk_rays: int | None = None
) -> Iterator[tuple[FrameRecord, RenderedView]]:
    """The run's best checkpoint at target cameras, at the original frame sizes, see :class:`Renders`.

    The run is locked until the last frame is consumed: a training that starts meanwhile would delete the temporary files, and
    with ``resume=restart`` the renders.

    Raises:
        RunDirectoryBusy: the run is being trained, or exported by another process.
    """
    with locked_for_rendering(run):
        renders = Renders(run, device, chunk_rays)
        for record in records:
            view = renders.view(record)
            renders.show_original(view, record)
            yield record, view


@contextmanager
def locked_for_rendering(run: RunDirectory) -> Iterator[None]:
    with ExitStack() as held:
        try:
            held.enter_context(FolderLock(run.path))
        except RunDirectoryBusy as error:
            raise RunDirectoryBusy(f"{error}: its targets can be exported once that has ended or been stopped") from error
        yield
