"""Ensembles: several members trained on one sequence, fused, and scored side by side."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from co3d_ensemble.assembly import load_frame, usable_subset
from co3d_ensemble.base.progress import tracked
from co3d_ensemble.base.quoting import escaped
from co3d_ensemble.base.spread import evenly_spread
from co3d_ensemble.challenge.lpips import load_lpips
from co3d_ensemble.data.co3d import FrameRecord, Subset
from co3d_ensemble.files import remove_temporaries, write_json_atomic, write_text_atomic
from co3d_ensemble.functional.fusion import fuse
from co3d_ensemble.functional.uncertainty import color_disagreement, score_uncertainty
from co3d_ensemble.fusing import FUSION_FILE, FusedRenders, Fusion, MemberRenders, choose_fusion, trained_runs
from co3d_ensemble.pipeline import METRICS, NO_DEPTH, SHOWN_TARGETS, TargetScorer, run_directory, scorable_targets, train_sequence
from co3d_ensemble.rendering import resolve_device
from co3d_ensemble.report.pictures import ensemble_sheet, save_picture
from co3d_ensemble.training.lock import FolderLock
from co3d_ensemble.training.run_directory import RunDirectory
from co3d_ensemble.training.validation import mean_scores, score_frame

logger = logging.getLogger(__name__)

FROM_THE_RUN = ("seconds", "steps", "best_step", "stopped")  # of a member's own results


def train_ensemble(config: DictConfig, members: Mapping[str, DictConfig]) -> tuple[int, dict[str, Any] | None]:
    """Trains every member that is not finished, then fuses them.

    Args:
        config, members: as ``compose_ensemble`` returns them.

    Returns:
        Exit status and, where it is 0, the ensemble's results (see :func:`fuse_sequence`). A member that is interrupted ends it.
    """
    for experiment in members.values():
        status = train_sequence(experiment).exit_status
        if status:
            return status, None
    return 0, fuse_sequence(config)


def fuse_sequence(config: DictConfig) -> dict[str, Any]:
    """Fuses the trained members of one sequence and scores the fusion; what is finished is left as it is.

    Leaves, in ``<output_dir>/<category>/<subset_name>/<name>/``: ``config.yaml``; ``fusion.json`` (the fusion, and what its
    choice rests on); ``views/`` with the fused views and the members' disagreement; ``renders/`` with pictures;
    ``results.json`` as a run's, with each member's own scores at the same frames and resolution under ``members``, all candidate
    fusions' under ``methods`` (for the record: targets have no say in the choice) and the disagreement's rank correlation and AUSE
    with the true errors under ``uncertainty``; ``targets.png``. Members of different resolution are rendered at the highest.

    Args:
        config: an ``EnsembleConfig``; only the names of its members count.

    Raises:
        ValueError: members that are not trained (listed), or that have no validation frame in common.
        RunDirectoryBusy: another process is fusing, or training or exporting a member.
    """
    place, names = (config.output_dir, config.category, config.subset_name), list(config.members)
    runs = trained_runs(*place, names)
    untrained = [name for name, run in runs.items() if run is None]
    folder = run_directory(*place, config.name)
    if untrained:
        raise ValueError(f"{folder.parent}: no trained {', '.join(untrained)} to fuse")
    if (folder / "checkpoints").exists():
        raise ValueError(f"{folder} holds the run of a member; give the ensemble another name=")
    folder.mkdir(exist_ok=True)
    device = resolve_device(config.device)
    with FolderLock(folder), MemberRenders.locked(runs, device) as renders:
        remove_temporaries(folder)
        made_from = {"members": renders.stamp, "fusion": OmegaConf.to_container(OmegaConf.create(config.fusion))}
        finished = _made_from(folder / "results.json", made_from)
        if finished is not None:
            logger.info("%s is finished; to fuse and score it again, delete %s", folder, folder / "results.json")
            return finished
        write_text_atomic(folder / "config.yaml", OmegaConf.to_yaml(config))
        settings, validation, targets = _common_frames(config, runs)
        choice = _made_from(folder / FUSION_FILE, made_from)
        if choice is None:
            frames = [(record, load_frame(settings, record)) for record in validation]
            fusion, report = choose_fusion(frames, renders.views, names, config.fusion)
            choice = {**fusion.as_json(), **report, "made_from": made_from}
            write_json_atomic(folder / FUSION_FILE, choice)
        logger.info("%s: colour fused by %s, mask by %s", folder, choice["chosen"]["color"], choice["chosen"]["mask"])
        results = _evaluate(folder, choice, renders, settings, targets, device)
        results["members"] = {name: {**scores, **_of_the_run(runs[name])} for name, scores in results["members"].items()}
        results["made_from"] = made_from
        write_json_atomic(folder / "results.json", results)
    return results


def _made_from(path: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """What the file holds if it was made from the same checkpoints and settings."""
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to make it again") from error
    return content if content.get("made_from") == made_from else None


def _of_the_run(run: RunDirectory) -> dict[str, Any]:
    own = json.loads(run.results_path.read_text()) if run.results_path.exists() else {}
    return {key: own.get(key) for key in FROM_THE_RUN}


def _common_frames(config: DictConfig, runs: Mapping[str, RunDirectory]) -> tuple[DictConfig, list[FrameRecord], list[FrameRecord]]:
    """Settings to load frames with, and the validation and target frames: held out by every member."""
    stored = {name: OmegaConf.merge(run.config, {"dataset_root": escaped(config.dataset_root)}) for name, run in runs.items()}
    subsets: dict[tuple[float, int], Subset] = {}  # the audit reads every file: once per way to hold frames out
    for settings in stored.values():
        key = (settings.data.val_share, settings.data.min_known_frames)
        if key not in subsets:
            subsets[key] = usable_subset(settings)
    first, *others = subsets.values()
    held_out = set.intersection(*({record.key for record in subset.val} for subset in (first, *others)))
    common = [record for record in first.val if record.key in held_out]
    if not common:
        raise ValueError(f"{', '.join(runs)} have no validation frame in common: their data.val_share differs")
    sides = [settings.data.longest_side for settings in stored.values()]
    settings = next(iter(stored.values()))
    settings.data.longest_side = None if None in sides else max(sides)
    return settings, evenly_spread(common, config.fusion.max_val_frames), scorable_targets(first)


def _evaluate(
    folder: Path,
    choice: Mapping[str, Any],
    renders: MemberRenders,
    settings: DictConfig,
    targets: Sequence[FrameRecord],
    device: torch.device,
) -> dict[str, Any]:
    """Scores of the ensemble, its members and the other candidates on the targets; renders and ``targets.png`` on the way."""
    rules = {name: Fusion.from_json({"members": renders.names, **entry}) for name, entry in choice["candidates"].items()}
    fused, lpips = FusedRenders(folder, Fusion.from_json(choice), renders), load_lpips(device=device)
    scorer, *of_members = (TargetScorer(device, lpips) for _ in range(1 + len(renders.names)))
    methods: dict[str, list[dict[str, float | None]]] = {name: [] for name in rules}
    certainty: list[dict[str, dict[str, float | None]]] = []
    shown, rows = {record.key for record in evenly_spread(list(targets), SHOWN_TARGETS)}, []
    for record in tracked(targets, "fusing and scoring", "target frames"):
        frame = load_frame(settings, record)
        views = renders.views(record, frame.camera)
        view = fused.view(views, record, frame.camera)
        fused.show(view, record)
        scorer.add(view, frame)
        for member, member_view in zip(of_members, views, strict=True):
            member.add(member_view, frame)
        for name, rule in rules.items():
            methods[name].append(score_frame(fuse(views, rule.color, rule.mask), frame))
        certainty.append(score_uncertainty(views, view, frame))
        if record.key in shown:
            rows.append((frame.name, frame.rgb, frame.mask, views, view, color_disagreement(views)))
    if rows:
        save_picture(folder / "targets.png", ensemble_sheet(renders.names, rows))
    return {
        **scorer.results(),
        "members": {name: member.results() for name, member in zip(renders.names, of_members, strict=True)},
        "fusion": {key: choice[key] for key in ("method", "chosen", "color", "mask")},
        "methods": {name: mean_scores(scores) for name, scores in methods.items()},
        "uncertainty": _mean_certainty(certainty),
    }


def _mean_certainty(per_frame: Sequence[Mapping[str, Mapping[str, float | None]]]) -> dict[str, Any]:
    """Mean over the frames of each plane's rank correlation and AUSE, null with a reason where no frame has one."""
    found: dict[str, Any] = {"reasons": {}}
    for plane in ("rgb", "depth"):
        means = mean_scores([frame[plane] for frame in per_frame])
        found[plane] = {name: means.get(name) for name in ("spearman", "ause")}
        if None in found[plane].values():
            found["reasons"][plane] = NO_DEPTH if plane == "depth" else "no target has ground truth, or the members agree everywhere"
    return found


def format_members(results: Mapping[str, Any], name: str) -> str:
    """Plain text: a row of scores per member and one of the ensemble, ``-`` where there is no value."""
    rows = [["", *METRICS]]
    for label, scores in [*results["members"].items(), (name, results)]:
        rows.append([label, *("-" if scores["metrics"][metric] is None else f"{scores['metrics'][metric]:.3f}" for metric in METRICS)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]) for row in rows]
    chosen = results["fusion"]["chosen"]
    return "\n".join([*lines, f"fused by {chosen['color']} (colour and depth) and {chosen['mask']} (mask), {results['fusion']['method']}"])
