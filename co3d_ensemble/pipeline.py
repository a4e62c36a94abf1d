"""The top: what the scripts call. A configuration to a trained and scored run, and runs to a scored submission."""

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
from co3d_ensemble.challenge.archive import check_archive, write_archive
from co3d_ensemble.challenge.lpips import load_lpips, lpips_masked
from co3d_ensemble.challenge.scoring import score_archive
from co3d_ensemble.challenge.targets import Target, archive_name, targets_with_records
from co3d_ensemble.data.audit import camera_faults
from co3d_ensemble.data.co3d import FRAME_ANNOTATIONS_FILE, CO3DIndex, FrameRecord, Subset
from co3d_ensemble.files import remove_temporaries, write_json_atomic
from co3d_ensemble.functional.types import RenderedView
from co3d_ensemble.plugin.implicitron_model import ImplicitronModel
from co3d_ensemble.plugin.model import ObjectModel
from co3d_ensemble.rendering import read_view, resolve_device, write_view
from co3d_ensemble.report.pictures import comparison_sheet, save_picture, training_curve
from co3d_ensemble.training.budget import fit_budget
from co3d_ensemble.training.checkpoint import Checkpoints
from co3d_ensemble.training.lock import FolderLock, RunDirectoryBusy
from co3d_ensemble.training.loop import TrainingResult, train
from co3d_ensemble.training.ray_bank_task import evenly_spread
from co3d_ensemble.training.records import read_metrics
from co3d_ensemble.training.run_directory import RunDirectory
from co3d_ensemble.training.stepper import INITIALISATION, seed_default_generators
from co3d_ensemble.training.validation import mean_scores, score_frame

logger = logging.getLogger(__name__)

METRICS = ("psnr_masked", "psnr_fg", "psnr_full_image", "depth_abs_fg", "iou", "ssim", "lpips")
SHOWN_TARGETS = 8  # rows of targets.png
NO_DEPTH = "no ground-truth depth"


def run_directory(output_dir: Path | str, category: str, subset_name: str, member: str) -> Path:
    return Path(output_dir) / category / subset_name / member


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
    with RunDirectory.open(path, config, resume=config.training.resume, device=device) as run:
        finished = _finished(run)
        if finished is not None:
            return finished
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
    logger.info("to score it again, delete %s; to train it again, set training.resume=restart", run.results_path)
    metric = best["metric"] if math.isfinite(best["metric"]) else None
    return TrainingResult(results["steps"], results["seconds"], metric, results["best_step"], results["stopped"])


def load_trained(run: RunDirectory, device: torch.device) -> tuple[ObjectModel | ImplicitronModel, DictConfig]:
    """The best checkpoint's model (EMA weights in place) without reading the data set again."""
    config = run.config
    saved = Checkpoints(run.checkpoints).load_best("cpu")
    model = model_of_state(config, saved["model"])
    model.load_state_dict(saved["model"])
    return model.to(device).eval(), config


def evaluate_run(run: RunDirectory, subset: Subset, device: torch.device, result: TrainingResult) -> dict[str, Any]:
    """Scores the best checkpoint on the targets with ground truth, at the run's resolution: ``results.json``, ``targets.png``.

    What cannot be computed is null with its reason under ``reasons``. ``depth_abs_fg`` is in world units (``depth_units``:
    "world"), as Implicitron loads depth: the PNG's values times the annotation's ``scale_adjustment``. The archive's
    ``results.json`` has it in the PNG's own units, as the challenge's evaluation does: the two agree only where that factor is 1.
    """
    model, config = load_trained(run, device)
    scorable = [record for record in subset.targets if subset.scorable is None or record.key in subset.scorable]
    network, why_no_lpips = load_lpips(device=device)
    per_frame: dict[str, dict[str, float | None]] = {}
    shown = {record.key for record in evenly_spread(scorable, SHOWN_TARGETS)}
    rows = []
    for record in scorable:
        frame = load_frame(config, record)
        view = model.render_view(frame.camera.to(device), config.rendering.chunk_rays).cpu()
        scores = score_frame(view, frame)
        rgb, mask = frame.rgb.float() / 255, frame.mask.float() / 255
        scores["lpips"] = None if network is None else lpips_masked(network, view.rgb.to(device), rgb.to(device), mask.to(device))
        per_frame[frame.name] = scores
        if record.key in shown:  # a sequence may have hundreds of targets: only these stay in memory
            rows.append((frame.name, rgb, view, mask))
    means = mean_scores(per_frame.values())
    reasons = {name: NO_DEPTH if name == "depth_abs_fg" else why_no_lpips for name in ("depth_abs_fg", "lpips") if name not in means}
    if not scorable:
        reasons = {name: "no target has ground truth" for name in METRICS}
    results = {
        "metrics": {name: means.get(name) for name in METRICS},
        "reasons": reasons,
        "depth_units": "world",
        "frames": per_frame,
        "seconds": result.seconds,
        "steps": result.steps,
        "best_step": result.best_step,
        "stopped": result.stopped,
    }
    if rows:
        save_picture(run.path / "targets.png", comparison_sheet(rows))
    _plot_run(run)
    write_json_atomic(run.results_path, results)
    logger.info("%s: %s", run.path, ", ".join(f"{name} {value:.3f}" for name, value in results["metrics"].items() if value is not None))
    return results


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


def render_targets(
    run: RunDirectory, records: Sequence[FrameRecord], device: torch.device, chunk_rays: int | None = None
) -> Iterator[tuple[FrameRecord, RenderedView]]:
    """The run's best checkpoint at target cameras, at the original frame sizes; rendered once, then read from ``renders/``.

    Renders of an older checkpoint are discarded. The run is locked until the last frame is consumed: a training that starts
    meanwhile would delete the temporary files, and with ``resume=restart`` the renders.

    Args:
        chunk_rays: rays rendered at once; None: as the run's configuration has it.

    Raises:
        RunDirectoryBusy: the run is being trained, or exported by another process.
    """
    with _locked_for_export(run):
        remove_temporaries(run.renders)  # of an export that was killed
        stamp_path = run.renders / "checkpoint.json"
        best = Checkpoints(run.checkpoints).best
        stat = best.stat()
        stamp = {"checkpoint": best.name, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}
        if not stamp_path.exists() or json.loads(stamp_path.read_text()) != stamp:
            for old in run.renders.glob("*.npz"):
                old.unlink()
            run.renders.mkdir(exist_ok=True)
            write_json_atomic(stamp_path, stamp)
        model = None
        for record in records:
            path = run.renders / f"{record.sequence_name}_{record.frame_number}.npz"
            if not path.exists():
                if model is None:
                    model, config = load_trained(run, device)
                view = model.render_view(record.camera().to(device), chunk_rays or config.rendering.chunk_rays).cpu()
                write_view(path, view)
            yield record, read_view(path)


@contextmanager
def _locked_for_export(run: RunDirectory) -> Iterator[None]:
    with ExitStack() as held:
        try:
            held.enter_context(FolderLock(run.path))
        except RunDirectoryBusy as error:
            raise RunDirectoryBusy(f"{error}: its targets can be exported once that has ended or been stopped") from error
        yield


def export_submission(
    dataset_root: Path | str,
    output_dir: Path | str,
    *,
    sequence_set: str,
    models: Sequence[str],
    allow_missing: bool = False,
    device: str = "auto",
    chunk_rays: int | None = None,
) -> dict[str, Any]:
    """Walk 2: renders what is missing, writes and checks the archive, scores its bytes where there is ground truth.

    Args:
        models: member names; one for now.
        allow_missing: leave out subsets that have no trained run instead of refusing.
        chunk_rays: rays rendered at once, fewer for less memory; None: each run's own ``rendering.chunk_rays``.

    Returns:
        ``{"archive": path, "missing": [...], "results": {...} or None}``; the results also go to ``results.json`` beside it.
        Depth there is in the PNG's units (``depth_units``: "png") as in the challenge, unlike a run's, see ``evaluate_run``.
        Targets without usable ground truth are in the archive and have no scores, see ``score_archive``.

    Raises:
        ValueError: a subset lacks its run or a target its camera (all are listed), or the archive is not as it should be.
        RunDirectoryBusy: another process is exporting to the same folder, or training one of the runs.
    """
    if chunk_rays is not None and chunk_rays < 1:
        raise ValueError(f"chunk_rays={chunk_rays}: must be positive")
    if len(models) != 1:
        raise ValueError(f"models={list(models)}: exporting needs exactly one member")
    index = CO3DIndex(dataset_root)
    records = targets_with_records(index, task="manyview", sequence_set=sequence_set)
    runs: dict[str, RunDirectory] = {}
    missing = []
    for folder in dict.fromkeys(target.folder for target in records):
        run = RunDirectory(run_directory(output_dir, *folder.split("/"), models[0]))
        if Checkpoints(run.checkpoints).best.exists():
            runs[folder] = run
        else:
            missing.append(folder)
    if missing and not allow_missing:
        lost = [target.path("*") for target in records if target.folder in missing]
        raise ValueError(
            f"{len(missing)} subsets have no trained {models[0]} under {output_dir}: {', '.join(missing)}; "
            f"{len(lost)} targets would be missing (allow_missing=true leaves them out):\n  " + "\n  ".join(lost)
        )
    if not runs:
        raise ValueError(f"no subset of {sequence_set} has a trained {models[0]} under {output_dir}")
    for name, run in runs.items():
        if not run.results_path.exists():
            logger.warning("%s: its training has not ended (%s); the best checkpoint so far is exported", name, run.path)
    present = {target: record for target, record in records.items() if target.folder in runs}
    _require_cameras(index.root, present)
    folder = Path(output_dir) / "submission"
    folder.mkdir(parents=True, exist_ok=True)
    archive, scores = folder / archive_name("manyview", sequence_set), folder / "results.json"
    with FolderLock(folder):
        remove_temporaries(folder)  # of an export that was killed
        if sequence_set == "dev":
            scores.unlink(missing_ok=True)  # of the archive that is replaced now
        write_archive(archive, _rendered(runs, present, resolve_device(device), chunk_rays))
        check_archive(archive, records, allow_missing=allow_missing)
        results = None
        if sequence_set == "dev":
            results = score_archive(archive, present)
            write_json_atomic(scores, results)
    return {"archive": archive, "missing": missing, "results": results}


def _require_cameras(root: Path, records: dict[Target, FrameRecord]) -> None:
    """A ``ValueError`` that lists the targets whose annotated camera cannot be rendered from, before hours of rendering."""
    faults = [
        f"{target.path('*')}: frame {record.name} of {root / target.category / FRAME_ANNOTATIONS_FILE}: camera {what}"
        for target, record in records.items()
        for _, what in camera_faults(record)
    ]
    if faults:
        raise ValueError("targets cannot be rendered:\n  " + "\n  ".join(faults))


def _rendered(
    runs: dict[str, RunDirectory], records: dict[Target, FrameRecord], device: torch.device, chunk_rays: int | None
) -> Iterator[tuple[Target, RenderedView]]:
    for folder, run in runs.items():
        targets = {record.key: target for target, record in records.items() if target.folder == folder}
        wanted = [record for target, record in records.items() if target.folder == folder]
        for record, view in render_targets(run, wanted, device, chunk_rays):
            yield targets[record.key], view
