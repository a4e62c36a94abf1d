"""Runs to a scored submission: the target frames of members, or of their fusion, in a checked archive."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from co3d_ensemble.base.paths import plain_part
from co3d_ensemble.base.progress import tracked
from co3d_ensemble.challenge.archive import check_archive, write_archive
from co3d_ensemble.challenge.scoring import score_archive
from co3d_ensemble.challenge.targets import Target, archive_name, targets_with_records
from co3d_ensemble.data.audit import camera_faults
from co3d_ensemble.data.co3d import FRAME_ANNOTATIONS_FILE, CO3DIndex, FrameRecord
from co3d_ensemble.files import remove_temporaries, write_json_atomic
from co3d_ensemble.functional.fusion import PIXEL_METHODS, FusionRule
from co3d_ensemble.functional.types import RenderedView
from co3d_ensemble.fusing import FusedRenders, Fusion, MemberRenders, recorded_fusion, trained_runs
from co3d_ensemble.pipeline import render_targets, run_directory
from co3d_ensemble.rendering import resolve_device
from co3d_ensemble.training.lock import FolderLock
from co3d_ensemble.training.run_directory import RunDirectory

logger = logging.getLogger(__name__)

ENSEMBLE = "ensemble"  # the folder whose record several models are fused by
FUSIONS = ("auto", "mean", *PIXEL_METHODS)  # fitted weights belong to the sequence that they were fitted on


@dataclass(frozen=True)
class Source:
    """Where the views of a subset come from: one run, or several and their fusion.

    Attributes:
        runs: by member name.
        fusion: None for one run.
        folder: of the ensemble whose fusion it is, where the fused views are kept; else None.
    """

    runs: dict[str, RunDirectory]
    fusion: Fusion | None = None
    folder: Path | None = None


class NotTrained(ValueError):
    """A subset lacks what is to be exported; the message names it."""


def export_submission(
    dataset_root: Path | str,
    output_dir: Path | str,
    *,
    sequence_set: str,
    models: Sequence[str],
    fusion: str = "auto",
    allow_missing: bool = False,
    only: Collection[tuple[str, str]] | None = None,
    device: str = "auto",
    chunk_rays: int | None = None,
) -> dict[str, Any]:
    """Walk 2: renders what is missing, fuses, writes and checks the archive, scores its bytes where there is ground truth.

    Args:
        models: member names, fused if several; or one ensemble's name, for its recorded members and fusion.
        fusion: of several members: ``auto`` takes the one that the sequence's ``ensemble`` records for the same members, else
            the plain average; ``mean``, ``opacity``, ``confidence`` or ``agreement``.
        allow_missing: leave out subsets that lack a trained run instead of refusing.
        only: (category, subset name) of the subsets to export; None: all of the set. The annotations of others are not read.
        chunk_rays: rays rendered at once, fewer for less memory; None: each run's own ``rendering.chunk_rays``.

    Returns:
        ``{"archive": path, "missing": [...], "results": {...} or None}``; the results also go to ``results.json`` beside it.
        Depth there is in the PNG's units (``depth_units``: "png") as in the challenge, unlike a run's, see ``evaluate_run``.
        Targets without usable ground truth are in the archive and have no scores, see ``score_archive``.

    Raises:
        ValueError: a subset lacks a run or a target its camera (all are listed), or the archive is not as it should be.
        RunDirectoryBusy: another process is exporting to the same folder, or training one of the runs.
    """
    if chunk_rays is not None and chunk_rays < 1:
        raise ValueError(f"chunk_rays={chunk_rays}: must be positive")
    if not models or len(set(models)) < len(models):
        raise ValueError(f"models={list(models)}: exporting needs at least one member, each named once")
    for name in models:
        plain_part(name, "models")
    if fusion not in FUSIONS:
        raise ValueError(f"fusion={fusion!r}: expected one of {', '.join(FUSIONS)}")
    index = CO3DIndex(dataset_root)
    records = targets_with_records(index, task="manyview", sequence_set=sequence_set, only=only)
    sources, missing = _sources(records, output_dir, models, fusion, allow_missing=allow_missing, sequence_set=sequence_set)
    for name, source in sources.items():
        for run in source.runs.values():
            if not run.results_path.exists():
                logger.warning("%s: the training of %s has not ended; the best checkpoint so far is exported", name, run.path)
    present = {target: record for target, record in records.items() if target.folder in sources}
    _require_cameras(index.root, present)
    folder = Path(output_dir) / "submission"
    folder.mkdir(parents=True, exist_ok=True)
    archive, scores = folder / archive_name("manyview", sequence_set), folder / "results.json"
    with FolderLock(folder):
        remove_temporaries(folder)  # of an export that was killed
        if sequence_set == "dev":
            scores.unlink(missing_ok=True)  # of the archive that is replaced now
        rendered = _rendered(sources, present, resolve_device(device), chunk_rays)
        write_archive(archive, tracked(rendered, "rendering and packing", "frames", total=len(present)))
        results = None
        if sequence_set != "dev":
            check_archive(archive, records, allow_missing=allow_missing)
        else:
            results = score_archive(archive, present)  # which checks every picture as well
            write_json_atomic(scores, results)
    return {"archive": archive, "missing": missing, "results": results}


def _sources(
    records: Mapping[Target, FrameRecord],
    output_dir: Path | str,
    models: Sequence[str],
    fusion: str,
    *,
    allow_missing: bool,
    sequence_set: str,
) -> tuple[dict[str, Source], list[str]]:
    """The source of every subset, and the subsets that have none (an error unless ``allow_missing``)."""
    sources: dict[str, Source] = {}
    missing: dict[str, str] = {}
    for folder in dict.fromkeys(target.folder for target in records):
        try:
            sources[folder] = find_source(output_dir, *folder.split("/"), models, fusion)
        except NotTrained as error:
            missing[folder] = str(error)
    told = ", ".join(f"{folder} ({why})" for folder, why in missing.items())
    if missing and not allow_missing:
        lost = [target.path("*") for target in records if target.folder in missing]
        raise ValueError(
            f"{len(missing)} subsets cannot be exported from {output_dir}: {told}; "
            f"{len(lost)} targets would be missing (allow_missing=true leaves them out):\n  " + "\n  ".join(lost)
        )
    if not sources:
        raise ValueError(f"no subset of {sequence_set} can be exported from {output_dir}: {told}")
    return sources, list(missing)


def find_source(output_dir: Path | str, category: str, subset_name: str, models: Sequence[str], fusion: str) -> Source:
    """What to export of one subset, see :func:`export_submission`.

    Raises:
        NotTrained: members without a trained run, listed.
        ValueError: an ensemble among several models.
    """
    recorded = {name: recorded_fusion(run_directory(output_dir, category, subset_name, name)) for name in models}
    ensembles = [name for name in models if recorded[name] is not None]
    if ensembles and len(models) > 1:
        raise ValueError(f"models={list(models)}: {ensembles[0]} is an ensemble, which is exported by itself")
    members = recorded[ensembles[0]].members if ensembles else tuple(models)
    runs = trained_runs(output_dir, category, subset_name, members)
    untrained = [member for member, run in runs.items() if run is None]
    if untrained:
        raise NotTrained(f"no trained {', '.join(untrained)}")
    if len(members) == 1:
        return Source(runs)
    folder = run_directory(output_dir, category, subset_name, ensembles[0] if ensembles else ENSEMBLE)
    known = recorded_fusion(folder)
    if fusion == "auto" and known is not None and set(known.members) == set(members):
        return Source({member: runs[member] for member in known.members}, known, folder)
    rule = FusionRule("mean" if fusion == "auto" else fusion)
    if fusion == "auto":
        logger.warning("%s/%s: no ensemble of %s is recorded, they are averaged plainly", category, subset_name, ", ".join(members))
    return Source(runs, Fusion(members, rule, rule))


def _require_cameras(root: Path, records: Mapping[Target, FrameRecord]) -> None:
    """A ``ValueError`` that lists the targets whose annotated camera cannot be rendered from, before hours of rendering."""
    faults = [
        f"{target.path('*')}: frame {record.name} of {root / target.category / FRAME_ANNOTATIONS_FILE}: camera {what}"
        for target, record in records.items()
        for _, what in camera_faults(record)
    ]
    if faults:
        raise ValueError("targets cannot be rendered:\n  " + "\n  ".join(faults))


def _rendered(
    sources: Mapping[str, Source], records: Mapping[Target, FrameRecord], device: torch.device, chunk_rays: int | None
) -> Iterator[tuple[Target, RenderedView]]:
    for folder, source in sources.items():
        targets = {record.key: target for target, record in records.items() if target.folder == folder}
        wanted = [record for target, record in records.items() if target.folder == folder]
        for record, view in render_source(source, wanted, device, chunk_rays):
            yield targets[record.key], view


def render_source(
    source: Source, records: Sequence[FrameRecord], device: torch.device, chunk_rays: int | None = None
) -> Iterator[tuple[FrameRecord, RenderedView]]:
    """The source's views at target cameras, at the original frame sizes; every run is locked until the last one is consumed."""
    if source.fusion is None:
        (run,) = source.runs.values()
        yield from render_targets(run, records, device, chunk_rays)
        return
    with ExitStack() as held:
        if source.folder is not None:
            held.enter_context(FolderLock(source.folder))
        members = held.enter_context(MemberRenders.locked(source.runs, device, chunk_rays))
        kept = None if source.folder is None else FusedRenders(source.folder, source.fusion, members)
        for record in records:
            views = members.views(record)
            if kept is None:
                yield record, source.fusion(views)
                continue
            view = kept.view(views, record)
            kept.show_original(view, record)
            yield record, view
