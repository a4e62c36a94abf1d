"""Checks of every subset's lists, annotations, cameras and files, in parallel, before anything is trained."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch

from co3d_ensemble.data.agreement import JUDGES, agreement_of_records
from co3d_ensemble.data.audit import Problem, audit_subset, camera_faults, usable_frames
from co3d_ensemble.data.co3d import FRAME_ANNOTATIONS_FILE, TARGET, CO3DIndex, Subset
from co3d_ensemble.files import write_json_atomic
from co3d_ensemble.fleet.disk import fleet_folder, read_json, stamp_of
from co3d_ensemble.fleet.jobs import digest

REDACTED = (Problem.REDACTED, Problem.EMPTY_MASK)  # what targets of test sets are meant to be
Pair = tuple[str, str]  # category, subset name
Report = dict[str, Any]  # known, targets, pixels, errors, warnings


def check_all(
    root: Path | str,
    output_dir: Path | str,
    subsets: Sequence[Pair],
    *,
    decode: bool,
    min_known_frames: int,
    agreement: str = "error",
    workers: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[Pair, Report]:
    """A report per subset: counts, ``errors`` that would end its training or its export, ``warnings`` that would not.

    What was decoded is remembered in ``<output_dir>/fleet/audit.json`` and not decoded again while the subset's files have the
    same sizes and times.

    Args:
        decode: also decode every picture.
        agreement: ``data.check_agreement`` of the trainings: what it refuses is an error, what it warns of a warning.
        workers: processes; None: one per core.
        progress: called with the number of subsets that are checked.
    """
    cache_path = fleet_folder(output_dir) / "audit.json"
    cache = read_json(cache_path) or {}
    by_category: dict[str, list[str]] = {}
    for category, subset in subsets:
        by_category.setdefault(category, []).append(subset)
    # forked, for a new interpreter would import for seconds; nothing here has computed with torch's threads yet
    pool = ProcessPoolExecutor(workers or os.cpu_count(), mp_context=multiprocessing.get_context("fork"))
    check = partial(check_category, root, decode=decode, min_known_frames=min_known_frames, agreement=agreement, cache=cache)
    reports: dict[Pair, Report] = {}
    with pool:
        futures = [pool.submit(check, category, names) for category, names in by_category.items()]
        for future in as_completed(futures):
            reports |= future.result()
            progress(len(reports))
    if decode:
        fresh = {"/".join(pair): report for pair, report in reports.items() if report["stamp"] is not None}
        write_json_atomic(cache_path, {**cache, **fresh})
    return {pair: reports[pair] for pair in subsets}


def check_category(
    root: Path | str,
    category: str,
    names: Sequence[str],
    *,
    decode: bool,
    min_known_frames: int,
    agreement: str,
    cache: Mapping[str, Report],
) -> dict[Pair, Report]:
    """Of one category: its annotations, which may be large, are read once."""
    logging.getLogger("co3d_ensemble").setLevel(logging.ERROR)  # findings are in the reports
    torch.set_num_threads(1)  # one process per core, and a forked one must not wait for its parent's threads
    index, found = CO3DIndex(root), {}
    settings = {"min_known_frames": min_known_frames, "agreement": agreement}
    for name in names:
        try:
            subset = index.subset(category, name)
            known = cache.get(f"{category}/{name}")
            stamp = stamp_of_subset(index.root, subset) if decode or known else None
            if known and known["stamp"] == stamp and known.get("settings") == settings:
                found[category, name] = known
            else:
                found[category, name] = check_subset(index, subset, decode=decode, **settings)
                found[category, name] |= {"settings": settings, "stamp": stamp if decode else None}
        except (ValueError, OSError) as error:
            found[category, name] = {"known": 0, "targets": 0, "pixels": 0, "errors": [str(error)], "warnings": [], "stamp": None}
    return found


def check_subset(index: CO3DIndex, subset: Subset, *, decode: bool, min_known_frames: int, agreement: str) -> Report:
    _ = subset.sequence_name  # raises where the subset is no single sequence
    findings = audit_subset(index, subset, decode=decode)
    errors = [f"target {record.name}: camera {what}" for record in subset.targets for _, what in camera_faults(record)]
    usable, disagreements = len(subset.known), []
    try:
        known = usable_frames(subset, findings, min_known_frames=min_known_frames).known
        usable = len(known)
        refusal, disagreements = agreement_of_records(known, mode=agreement, most=None if decode else JUDGES)
        errors += [] if refusal is None else [refusal]
    except ValueError as error:
        errors.append(str(error))
    redacted = REDACTED if "test" in subset.name.split("_") else ()
    warnings = [f"{f.role}: {f.message}" for f in findings if not (f.role == TARGET and f.problem in redacted)]
    pixels = sum(record.height * record.width for record in subset.targets)
    counts = {"known": usable, "targets": len(subset.targets), "pixels": pixels}
    return {**counts, "errors": errors, "warnings": [*disagreements, *warnings]}


def stamp_of_subset(root: Path, subset: Subset) -> str:
    """Changes when a file of the subset does, by name, size or time."""
    records = [*subset.known, *subset.val, *subset.targets, *(source for batch in subset.eval_batches for source in batch.sources)]
    paths = {path for r in records for path in (r.image_path, r.mask_path, r.depth_path, r.depth_mask_path) if path is not None}
    folder = root / subset.category
    lists = (FRAME_ANNOTATIONS_FILE, f"set_lists/set_lists_{subset.name}.json", f"eval_batches/eval_batches_{subset.name}.json")
    return digest([[str(path), stamp_of(path)] for path in sorted([*paths, *(folder / name for name in lists)])])
