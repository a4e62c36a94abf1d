"""Few-view: the targets of CO3D's eval batches, each from the source frames of its own batch, and their submission."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from co3d_ensemble.base.progress import tracked
from co3d_ensemble.challenge.archive import check_archive, write_archive
from co3d_ensemble.challenge.scoring import score_archive
from co3d_ensemble.challenge.targets import archive_name, targets_with_records
from co3d_ensemble.data.co3d import CO3DIndex, EvalBatch, FrameRecord, Subset
from co3d_ensemble.files import remove_temporaries, write_json_atomic
from co3d_ensemble.functional.types import RenderedView
from co3d_ensemble.mine.assembly import load_trained_mine
from co3d_ensemble.mine.co3d_points import SequenceClouds, points_of_frames
from co3d_ensemble.mine.member import settings_of_run
from co3d_ensemble.plugin.frames import load_frames
from co3d_ensemble.plugin.mine_model import MINEModel, build_mine_model
from co3d_ensemble.training.lock import FolderLock

TASK = "fewview"


def model_of_run(run: Path | str, preset: str | None = None, **settings: Any) -> MINEModel:
    """The network of a MINE run's best checkpoint in a ``MINEModel``, in evaluation mode.

    Args:
        run, preset: see ``load_trained_mine``.
        settings: of ``MINEModel``, over those of the run (``n_planes``, ``n_sources``, ``scene_scale``, ...). Photographs are
            averaged down to the longest side of the run's training pictures unless ``longest_side`` says otherwise. Without
            ``scene_scale`` the unit of each sequence is fitted to the points of its source frames, unless the run was trained on
            CO3D in the sequences' own units.

    Raises:
        ValueError, FileNotFoundError: as ``load_trained_mine``; an unknown setting.
    """
    network, config = load_trained_mine(run, "cpu", preset)
    own = {**settings_of_run(config), "precision": config.model.precision, "compile": config.model.compile}
    model = build_mine_model(**{**own, **settings})
    model.network.load_state_dict(network.state_dict())
    return model.eval()


def batches_to_render(subset: Subset) -> dict[tuple[str, int], EvalBatch]:
    """One eval batch per target, by its key: few-view repeats a target per number of sources, and a submission holds it once,
    so the batch with the most sources counts, the first one of several.

    Raises:
        ValueError: a target without any source.
    """
    chosen: dict[tuple[str, int], EvalBatch] = {}
    for batch in subset.eval_batches:
        known = chosen.get(batch.target.key)
        if known is None or len(batch.sources) > len(known.sources):
            chosen[batch.target.key] = batch
    alone = [batch.target.name for batch in chosen.values() if not batch.sources]
    if alone:
        raise ValueError(
            f"{subset.category}/{subset.name}: no source frames in the eval batches of {', '.join(alone[:3])} ({len(alone)} in all)"
        )
    return chosen


def render_eval_batches(
    model: MINEModel, dataset_root: Path | str, subset: Subset, *, device: torch.device
) -> Iterator[tuple[FrameRecord, RenderedView]]:
    """Every target once, at its original size, on the CPU, from the photographs of its batch and no others.

    The unit of length, where the model has no ``scene_scale``, is that of the points of these photographs (depth maps, else the
    sequence's point cloud), too.

    Args:
        model: on ``device``; its photographs are replaced.

    Raises:
        ValueError: a target without sources, or a source that cannot be read, naming it.
    """
    shown: tuple[Any, ...] | None = None
    clouds = SequenceClouds(dataset_root)
    for batch in batches_to_render(subset).values():
        keys = tuple(source.key for source in batch.sources)
        if keys != shown:  # neighbouring batches often share their sources, and with them the network's pass
            frames = load_frames(str(dataset_root), subset.category, subset.name, keys, load_depths=False)
            points = points_of_frames(frames, batch.sources, clouds) if model.scene_scale is None else None
            model.set_sources(frames, points=points)
            shown = keys
        yield batch.target, model.render_view(batch.target.camera().to(device)).cpu()


def export_fewview(
    model: MINEModel, dataset_root: Path | str, output_dir: Path | str, *, sequence_set: str, device: torch.device
) -> dict[str, Any]:
    """Renders, writes and checks ``<output_dir>/submission/submission_fewview_<set>.hdf5``; scores it where the set is dev.

    Returns:
        ``{"archive": path, "results": scores or None}``; the scores also go to ``results_fewview.json`` beside it.

    Raises:
        ValueError: no few-view subset, a target without sources, or an archive that is not as it should be.
        RunDirectoryBusy: another process is exporting to the same folder.
    """
    index, model = CO3DIndex(dataset_root), model.to(device)
    records = targets_with_records(index, task=TASK, sequence_set=sequence_set)
    subsets = [index.subset(*folder.split("/")) for folder in dict.fromkeys(target.folder for target in records)]
    for subset in subsets:
        batches_to_render(subset)  # before hours of rendering
    folder = Path(output_dir) / "submission"
    folder.mkdir(parents=True, exist_ok=True)
    archive, scores = folder / archive_name(TASK, sequence_set), folder / f"results_{TASK}.json"

    def views() -> Iterator[tuple[Any, RenderedView]]:
        for subset in subsets:
            own = {record.key: target for target, record in records.items() if target.folder == f"{subset.category}/{subset.name}"}
            for record, view in render_eval_batches(model, dataset_root, subset, device=device):
                yield own[record.key], view

    with FolderLock(folder):
        remove_temporaries(folder)  # of an export that was killed
        write_archive(archive, tracked(views(), "rendering and packing", "frames", total=len(records)))
        results = None
        if sequence_set != "dev":
            check_archive(archive, records)
        else:
            results = score_archive(archive, records)  # which checks every picture as well
            write_json_atomic(scores, results)
    return {"archive": archive, "results": results}
