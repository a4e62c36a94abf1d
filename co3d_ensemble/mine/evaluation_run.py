"""An evaluation as a command: its settings, and a results file that an interrupted one goes on from."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from co3d_ensemble.base.progress import tracked
from co3d_ensemble.challenge.lpips import BACKBONES, load_lpips
from co3d_ensemble.files import write_json_atomic
from co3d_ensemble.functional.depth_metrics import ALIGNMENTS
from co3d_ensemble.mine.assembly import load_trained_mine, run_of
from co3d_ensemble.mine.clip_pairs import PAIRS_PER_CLIP
from co3d_ensemble.mine.config import planes_to_show
from co3d_ensemble.mine.evaluation import SCALES, PlaneSampling, Record, Scoring, evaluate, summarise
from co3d_ensemble.mine.evaluation_data import TEST_SETS, open_test_set, test_options, test_root
from co3d_ensemble.mine.protocols import ScoreRules, evenly_spread
from co3d_ensemble.mine.selection import chosen_on_what_is_scored
from co3d_ensemble.rendering import resolve_device
from co3d_ensemble.settings import setting
from co3d_ensemble.training.run_directory import RunDirectory

logger = logging.getLogger(__name__)

RESULTS = "results.json"
SECONDS_BETWEEN_SAVES = 10.0
# what cannot change the result of a picture, so that a resumed evaluation may differ in it
_FREE = ("checkpoint", "root", "output_dir", "device", "plane_chunk", "restart", "max_pictures")
_TRANSLATIONS = {
    "auto": "divided by the scale of the source's sparse points where there are any",
    "points": "divided by the scale of the source's sparse points",
    "none": "as the data set has them",
}


@dataclass
class EvaluateConfig:
    checkpoint: str = setting(
        MISSING, "run directory of launch/train_mine.py, one of its checkpoints/*.pt, or a checkpoint file of MINE's authors", literal=True
    )
    preset: str | None = setting(None, "file of configs/mine that the authors' checkpoint goes with; null: its params.yaml beside it tells")
    dataset: str | None = setting(None, " | ".join(TEST_SETS) + "; null: the one that it was trained on")
    root: str | None = setting(None, "folder of the data set; null: the training's, where that is the data set", literal=True)
    options: dict[str, Any] = setting({}, "arguments of the data set, over the training's")
    planes: list[int] | None = setting(None, "numbers of planes, a row of the table each; null: as in the run's validations")
    fine_planes: int | None = setting(None, "planes added to them where a first pass finds surfaces (coarse to fine); null: as in training")
    sampling: str = setting("fixed", "fixed: centres of the intervals | stratified: drawn, as the reference does")
    seed: int = setting(0, "of everything drawn: pairs, points, stratified planes")
    pair_list: str | None = setting(None, "RealEstate10K: file with the published test pairs; null: drawn from the clips", literal=True)
    pairs_per_clip: int = setting(PAIRS_PER_CLIP, "RealEstate10K: sources per clip where pairs are drawn")
    max_pictures: int | None = setting(None, "source pictures, evenly spread; null: all")
    border: float | None = setting(None, "share of each side cut off before views are scored; null: the protocol's (KITTI 0.05, else 0)")
    scale: str = setting(
        "auto", "auto | points | none: translations are divided by the scale of the source's sparse points; auto: unless trained without"
    )
    depth_alignment: str | None = setting(None, "none | median | scale, of predicted depth; null: the protocol's")
    max_depth: float | None = setting(None, "largest true depth that counts, the data's unit; null: the protocol's")
    lpips: str | None = setting("vgg", "vgg | alex: backbone of LPIPS; null: off")
    lpips_weights: str | None = setting(None, "file with torchvision's weights of the backbone; null: torch hub's cache", literal=True)
    plane_chunk: int | None = setting(None, "planes decoded and warped at once, to fit a small card; null: all")
    output_dir: str | None = setting(
        None, "folder of results.json; null: <run, or folder of the authors' file>/evaluation/<dataset>", literal=True
    )
    restart: bool = setting(False, "discard the results that are there")
    device: str = setting("auto", "auto | cpu | cuda | cuda:N")

    def __post_init__(self) -> None:
        choices: dict[str, Sequence[Any]] = {
            "dataset": (None, *TEST_SETS),
            "sampling": ("fixed", "stratified"),
            "scale": SCALES,
            "depth_alignment": (None, *ALIGNMENTS),
            "lpips": (None, *BACKBONES),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                told = ", ".join("null" if choice is None else str(choice) for choice in allowed)
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {told}")
        if self.planes is not None and (not self.planes or min(self.planes) < 2 or len(set(self.planes)) < len(self.planes)):
            raise ValueError(f"planes={list(self.planes)}: expected different numbers of at least 2")
        if self.fine_planes is not None and self.fine_planes < 0:
            raise ValueError(f"fine_planes={self.fine_planes}: must not be negative")
        if self.border is not None and not 0 <= self.border < 0.5:
            raise ValueError(f"border={self.border}: must lie in [0, 0.5)")
        for name in ("pairs_per_clip", "max_pictures", "max_depth", "plane_chunk"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: must be positive")


def run_evaluation(settings: EvaluateConfig) -> dict[str, Any]:
    """Scores what is not in the results file yet, and returns all that it then has.

    ``checkpoint_chosen_on_what_is_scored`` says whether the weights were chosen by scores on the same split, and so does a note.
    The file appears while the evaluation runs and is whole at any time, with ``complete`` false until all pictures are scored.

    Raises:
        ValueError: the file holds results of other settings or weights, naming what differs; or as the checkpoint, the data set
            and the settings demand.
    """
    device = resolve_device(settings.device)
    network, run = load_trained_mine(settings.checkpoint, device, settings.preset)
    dataset = settings.dataset or run.data.kind
    settings = replace(settings, scale=_scale(settings, run, dataset))
    tasks, rules, notes = open_test_set(dataset, settings, run)
    chosen = chosen_on_what_is_scored(settings, dataset, test_options(dataset, settings, run), run)
    rules = _with_settings(rules, settings)
    lpips, no_lpips = (None, "lpips=null")
    if settings.lpips is not None:
        lpips, no_lpips = load_lpips(settings.lpips, weights_path=settings.lpips_weights, device=device)
    planes = PlaneSampling(
        tuple(settings.planes or (planes_to_show(run),)),
        run.model.near_disparity,
        run.model.far_disparity,
        kind=settings.sampling,
        seed=settings.seed,
        chunk=settings.plane_chunk,
        blend=run.model.blend_source,
        fine=run.model.n_fine_planes if settings.fine_planes is None else settings.fine_planes,
    )
    asked = {name: value for name, value in asdict(settings).items() if name not in _FREE}
    decisive = {**asked, "dataset": dataset, "planes": list(planes.counts), "lpips": settings.lpips if lpips else None}
    decisive["fine_planes"] = planes.fine or None
    decisive["weights_sha256"] = _weights_digest(Path(settings.checkpoint))
    path = _output_folder(settings, dataset) / RESULTS
    root = test_root(dataset, settings, run)
    data = {"root": None if root is None else str(Path(root).resolve()), "sources": len(tasks)}
    known = {} if settings.restart else _known(path, decisive, data)
    indices = evenly_spread(len(tasks), settings.max_pictures)
    height, width = run.data.height, run.data.width
    head = {
        "checkpoint": settings.checkpoint,
        "settings": decisive,
        "data": data,
        "size": [height, width],
        "protocol": _protocol(rules, planes, settings),
        "checkpoint_chosen_on_what_is_scored": chosen is not None,
        "notes": [*notes, *([chosen] if chosen else [])],
    }
    if known:
        logger.info("%s has %d of %d pictures", path, len(known.keys() & set(indices)), len(indices))
    scoring = Scoring(rules, settings.scale, lpips, no_lpips)
    with _kept(path, head, indices, known) as keep:
        evaluate(network, tasks, tracked(indices, "scoring", "pictures"), planes=planes, scoring=scoring, known=known, keep=keep)
    return {**json.loads(path.read_text()), "path": str(path)}


def _scale(settings: EvaluateConfig, run: Any, dataset: str) -> str:
    """``auto`` is ``none`` where the network was trained on this data set's own unit: then its scale is part of what is scored."""
    own_unit = run.data.kind == dataset and not run.training.calibrate_scale
    return "none" if settings.scale == "auto" and own_unit else settings.scale


def _with_settings(rules: ScoreRules, settings: EvaluateConfig) -> ScoreRules:
    given = {"border": settings.border, "depth_alignment": settings.depth_alignment, "max_depth": settings.max_depth}
    return ScoreRules(**{**asdict(rules), **{name: value for name, value in given.items() if value is not None}})


def _protocol(rules: ScoreRules, planes: PlaneSampling, settings: EvaluateConfig) -> dict[str, Any]:
    """What a reader has to know to compare the figures."""
    return {
        "text": rules.text,
        "border": rules.border,
        "psnr": "all pixels inside the border, those that no plane covers are black; psnr_valid: those that two planes cover",
        "lpips": "inputs in [-1, 1]",
        "translations": _TRANSLATIONS[settings.scale],
        "depth_alignment": rules.depth_alignment,
        "depth_range": [rules.min_depth, rules.max_depth],
        "disparities": [planes.near, planes.far, planes.kind],
        "fine_planes": planes.fine,
    }


def _weights_digest(checkpoint: Path) -> str:
    path = checkpoint / "checkpoints" / "best.pt" if checkpoint.is_dir() else checkpoint
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _output_folder(settings: EvaluateConfig, dataset: str) -> Path:
    if settings.output_dir is not None:
        return Path(settings.output_dir)
    run = run_of(Path(settings.checkpoint))
    folder = run if RunDirectory(run).config_path.is_file() else Path(settings.checkpoint).parent
    return folder / "evaluation" / dataset


def _known(path: Path, decisive: Mapping[str, Any], data: Mapping[str, Any]) -> dict[int, list[Record]]:
    """Records of the results file by picture; none where there is no file.

    A picture is known by its number, so the data must be those of before: as many sources, in the same folder (one that is gone may
    have been moved).
    """
    if not path.exists():
        return {}
    advice = "restart=true discards them, output_dir=... keeps both"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        before, pictures = stored["settings"], {int(index): records for index, records in stored["pictures"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold results of an evaluation ({error!r}); {advice}") from error
    wanted = json.loads(json.dumps(decisive))
    different = [name for name in wanted if before.get(name) != wanted[name]]
    if different:
        told = ", ".join(f"{name}={before.get(name)!r} there, {wanted[name]!r} now" for name in different)
        raise ValueError(f"{path} holds other results ({told}); {advice}")
    scored = {**data, **stored.get("data", {})}  # files of before have none
    moved = scored["root"] is not None and scored["root"] != data["root"] and Path(scored["root"]).exists()
    if moved or scored["sources"] != data["sources"]:
        told = f"{scored['sources']} pictures of {scored['root']} there, {data['sources']} of {data['root']} now"
        raise ValueError(f"{path} holds results of other data ({told}); {advice}")
    return pictures


@contextmanager
def _kept(path: Path, head: Mapping[str, Any], indices: Sequence[int], known: Mapping[int, list[Record]]) -> Iterator[Any]:
    """A function that takes a picture's records; the file is written now and then, at the end, and when something goes wrong."""
    pictures = dict(known)
    saved = time.monotonic()

    def save() -> None:
        records = [record for index in indices if index in pictures for record in pictures[index]]
        complete = all(index in pictures for index in indices)
        body = {"complete": complete, **head, "results": summarise(records)}
        write_json_atomic(path, {**body, "pictures": {str(index): pictures[index] for index in sorted(pictures)}})

    def keep(index: int, records: list[Record]) -> None:
        nonlocal saved
        pictures[index] = records
        if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
            save()
            saved = time.monotonic()

    try:
        yield keep
    finally:
        if pictures:
            save()
