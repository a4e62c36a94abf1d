"""How views and depths are scored on each data set, and the test pairs of RealEstate10K.

RealEstate10K (Tucker and Snavely, CVPR 2020; MINE, "Experiments"): a source frame, and as targets the frames 5 and 10 after it
and one drawn from the 30 before and after; whole pictures. The published test pairs (``validation_pairs.json`` of MINE's
repository) can be given as a file; else pairs are drawn from the clips with a fixed seed. The unit of every clip is
arbitrary, so the translation is divided by the scale of the source's sparse points, as in training.

KITTI (Tulsiani et al., ECCV 2018, their test sequences): from the left picture to the right one, in metres, and 5% of the
sides cut off all around before any score, because no left picture shows the right one's border.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from co3d_ensemble.mine.pairs import Pair

AFTER = {"n=5": 5, "n=10": 10}  # frames after the source
RANDOM, RANDOM_RANGE = "random", 30  # frames before and after
CLIP_ROWS = (*AFTER, RANDOM)
PUBLISHED_KEYS = {"n=5": "tgt_img_obj_5_frames", "n=10": "tgt_img_obj_10_frames", RANDOM: "tgt_img_obj_random"}
PAIRS_PER_CLIP = 5  # as in the published list
ROUNDING = 1e-9  # 0.07 * 100 is 7.000000000000001: no reason to cut 8 pixels


@dataclass(frozen=True)
class ScoreRules:
    """What of a view and of a depth map counts.

    Attributes:
        row: the name of a data set's pairs in the table, where it has one kind of pairs only.
        border: share of each side that is cut off all around before views are scored.
        depth_alignment: none | median | scale, of predicted depth, see ``functional.depth_metrics``.
        min_depth, max_depth: in the data set's unit; only truth between them counts.
        text: the rules in a sentence, for the results.
    """

    row: str
    border: float
    depth_alignment: str
    min_depth: float
    max_depth: float
    text: str


_ANY_DEPTH = (0.0, math.inf)
RULES: dict[str, ScoreRules] = {
    "realestate10k": ScoreRules(
        "pairs", 0.0, "median", *_ANY_DEPTH, "targets 5 and 10 frames after the source and one within 30 before or after it; whole pictures"
    ),
    "kitti_raw": ScoreRules("left to right", 0.05, "none", *_ANY_DEPTH, "from left to right, 5% of the sides cut off all around"),
    "nyu_depth": ScoreRules("depth", 0.0, "median", 1e-3, 10.0, "Eigen crop, depth up to 10 m, each picture's median aligned"),
    "ibims": ScoreRules(
        "depth", 0.0, "median", 1e-3, 50.0, "valid depth without transparent surfaces, up to 50 m, each picture's median aligned"
    ),
}
OTHERS = ScoreRules("pairs", 0.0, "none", *_ANY_DEPTH, "the data set's own pairs; whole pictures")


def rules_of(kind: str) -> ScoreRules:
    return RULES.get(kind, OTHERS)


def inner_box(height: int, width: int, border: float) -> tuple[slice, slice]:
    """Rows and columns that are left when ``border`` of each side is cut off at both ends, rounded up."""
    cut_rows, cut_columns = (math.ceil(border * side - ROUNDING) for side in (height, width))
    return slice(cut_rows, height - cut_rows), slice(cut_columns, width - cut_columns)


@dataclass(frozen=True)
class ClipPair:
    """A source frame of a clip and its targets, as indices of the clip's frames in the order of time.

    Attributes:
        targets: by row (``CLIP_ROWS``).
    """

    clip: str
    source: int
    targets: dict[str, int]


def draw_clip_pairs(lengths: Mapping[str, int], *, per_clip: int = PAIRS_PER_CLIP, seed: int = 0) -> list[ClipPair]:
    """Test pairs in the manner of the published list: sources anywhere, targets that the clip has not are its last frame.

    A clip's pairs depend on the seed and its own name and length only, not on what other clips there are.

    Args:
        lengths: frames per clip; clips of fewer than two give no pairs.
        per_clip: sources per clip, without repetition.
    """
    pairs = []
    for clip, length in sorted(lengths.items()):
        if length < 2:
            continue
        digest = hashlib.sha256(f"{seed}/{clip}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        last = length - 1
        for source in torch.randperm(last, generator=generator)[:per_clip].tolist():  # not the last: it has nothing after it
            low, high = max(0, source - RANDOM_RANGE), min(last, source + RANDOM_RANGE)
            other = low + int(torch.randint(high - low, (), generator=generator))
            targets = {row: min(source + after, last) for row, after in AFTER.items()}
            pairs.append(ClipPair(clip, source, {**targets, RANDOM: other + (other >= source)}))
    return pairs


def read_clip_pairs(path: Path | str, timestamps: Mapping[str, Sequence[int]]) -> tuple[list[ClipPair], int]:
    """Test pairs from a file, one per line, in either of the forms in which lists are published.

    MINE's: a JSON object with ``sequence_id`` and ``src_img_obj``, ``tgt_img_obj_5_frames``, ``tgt_img_obj_10_frames``,
    ``tgt_img_obj_random``, each with ``frame_ts`` in microseconds (their cameras are those of the clip's own file, which is
    read instead). Plain: ``<clip> <source> <n=5> <n=10> <random>``, indices of the clip's frames from 0.

    Args:
        timestamps: of all frames of the clips that there are, microseconds, ascending.

    Returns:
        The pairs whose clip and frames there are (videos vanish), and the number of the others.

    Raises:
        FileNotFoundError: naming the file.
        ValueError: naming the line that is of neither form; no pair of a file whose frames are all there is none either.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    indices = {clip: {time: index for index, time in enumerate(times)} for clip, times in timestamps.items()}
    pairs, n_missing = [], 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            clip, frames = _published(line, indices) if line.lstrip().startswith("{") else _plain(line, timestamps)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: not a line of a pair list: {error!r}") from error
        if any(frame is None for frame in frames):
            n_missing += 1
        else:
            pairs.append(ClipPair(clip, frames[0], dict(zip(CLIP_ROWS, frames[1:], strict=True))))
    if not pairs:
        raise ValueError(f"{path}: none of its {n_missing} pairs has its clip and frames in the data set")
    return pairs, n_missing


def _published(line: str, indices: Mapping[str, Mapping[int, int]]) -> tuple[str, list[int | None]]:
    entry = json.loads(line)
    clip = entry["sequence_id"]
    times = [int(entry[key]["frame_ts"]) for key in ("src_img_obj", *(PUBLISHED_KEYS[row] for row in CLIP_ROWS))]
    return clip, [indices.get(clip, {}).get(time) for time in times]


def _plain(line: str, timestamps: Mapping[str, Sequence[int]]) -> tuple[str, list[int | None]]:
    clip, *numbers = line.split()
    frames = [int(number) for number in numbers]
    if len(frames) != 1 + len(CLIP_ROWS) or min(frames) < 0:
        raise ValueError(f"expected a clip and {1 + len(CLIP_ROWS)} indices")
    length = len(timestamps.get(clip, ()))
    return clip, [frame if frame < length else None for frame in frames]


@dataclass(frozen=True)
class SourceTask:
    """One source picture and what is asked of it.

    Attributes:
        name: for messages and results.
        image: colours in [0, 1], shape (3, H, W).
        K: its intrinsics in pixels, shape (3, 3).
        pairs: row and pair of every view; their source is ``image``.
        points: the source's sparse points, as in ``Pair``.
        depth: true z of the source, 0 where unknown, shape (1, h, w), of any size with the source's field of view.
        depth_mask: pixels of it that count, shape (1, h, w); None: all that are known.
    """

    name: str
    image: Tensor
    K: Tensor
    pairs: tuple[tuple[str, Pair], ...] = ()
    points: Tensor | None = None
    depth: Tensor | None = None
    depth_mask: Tensor | None = None


class SourceTasks(Protocol):
    """What is evaluated, one source after another."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> SourceTask: ...


class PairTasks:
    """Every pair of a data set as a task of its own, the same whenever it is asked for.

    Args:
        dataset: of :class:`Pair`; where it draws (target, points) from torch's default generator, that is seeded per pair.
        row: the pairs' name in the table.
    """

    def __init__(self, dataset: Any, *, row: str, seed: int = 0) -> None:
        self._dataset, self._row, self._seed = dataset, row, seed

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> SourceTask:
        with seeded(self._seed, index):
            pair: Pair = self._dataset[index]
        return SourceTask(pair.name, pair.source, pair.K_source, ((self._row, pair),), pair.source_points, pair.source_depth)


class seeded:
    """torch's default generator seeded for one item, and put back as it was (its CPU generator; data sets draw nowhere else)."""

    def __init__(self, seed: int, index: int) -> None:
        self._seed = (seed * 1_000_003 + index) % 2**63

    def __enter__(self) -> None:
        self._before = torch.random.get_rng_state()
        torch.manual_seed(self._seed)

    def __exit__(self, *error: object) -> None:
        torch.random.set_rng_state(self._before)


def evenly_spread(n_items: int, limit: int | None) -> list[int]:
    """Indices of ``limit`` of ``n_items`` items, the first and the last among them; all where there is no limit."""
    if limit is None or limit >= n_items:
        return list(range(n_items))
    if limit == 1:
        return [0]
    return [round(index * (n_items - 1) / (limit - 1)) for index in range(limit)]
