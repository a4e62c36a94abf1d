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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from co3d_ensemble.mine.pairs import Pair
from co3d_ensemble.mine.views import View, make_pair

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
    "ibims": ScoreRules("depth", 0.0, "median", *_ANY_DEPTH, "valid depth, no transparent surfaces, each picture's median aligned"),
}
OTHERS = ScoreRules("pairs", 0.0, "none", *_ANY_DEPTH, "the data set's own pairs; whole pictures")


def rules_of(kind: str) -> ScoreRules:
    return RULES.get(kind, OTHERS)


def inner_box(height: int, width: int, border: float) -> tuple[slice, slice]:
    """Rows and columns that are left when ``border`` of each side is cut off at both ends, rounded up."""
    cut_rows, cut_columns = (math.ceil(border * side - ROUNDING) for side in (height, width))
    return slice(cut_rows, height - cut_rows), slice(cut_columns, width - cut_columns)


class ClipFrames(NamedTuple):
    """Frames of a clip that are there, in the order of time.

    Attributes:
        numbers: lines of the camera file, from 0, that they are; ascending.
        timestamps: microseconds.
    """

    numbers: Sequence[int]
    timestamps: Sequence[int]


@dataclass(frozen=True)
class ClipPair:
    """A source frame of a clip and its targets, as positions in :class:`ClipFrames`.

    Attributes:
        targets: by row (``CLIP_ROWS``).
    """

    clip: str
    source: int
    targets: dict[str, int]


def draw_clip_pairs(clips: Mapping[str, ClipFrames], *, per_clip: int = PAIRS_PER_CLIP, seed: int = 0) -> list[ClipPair]:
    """Test pairs in the manner of the published list: sources anywhere; near a clip's end its last frame stands for later ones.

    A clip's pairs depend on the seed and on its own name and frames only, not on what other clips there are.

    Args:
        per_clip: sources per clip, without repetition.
    """
    pairs = []
    for clip, frames in sorted(clips.items()):
        digest = hashlib.sha256(f"{seed}/{clip}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        drawn = 0
        for source in torch.randperm(len(frames.numbers), generator=generator).tolist():
            if drawn == per_clip:
                break
            targets = {row: _last_within(frames.numbers, source, after) for row, after in AFTER.items()}
            if any(target is None for target in targets.values()):
                continue
            near = [i for i, number in enumerate(frames.numbers) if i != source and abs(number - frames.numbers[source]) <= RANDOM_RANGE]
            other = near[int(torch.randint(len(near), (), generator=generator))]
            pairs.append(ClipPair(clip, source, {**targets, RANDOM: other}))  # type: ignore[dict-item]
            drawn += 1
    return pairs


def _last_within(numbers: Sequence[int], source: int, after: int) -> int | None:
    """Position of the last frame that is 1 to ``after`` lines later than the source; None where there is none."""
    later = [position for position in range(source + 1, len(numbers)) if numbers[position] - numbers[source] <= after]
    return later[-1] if later else None


def read_clip_pairs(path: Path | str, clips: Mapping[str, ClipFrames]) -> tuple[list[ClipPair], int]:
    """Test pairs from a file, one per line, in either of the forms in which lists are published.

    MINE's: a JSON object with ``sequence_id`` and ``src_img_obj``, ``tgt_img_obj_5_frames``, ``tgt_img_obj_10_frames``,
    ``tgt_img_obj_random``, each with ``frame_ts`` in microseconds (their cameras are those of the clip's own file, which is
    read instead). Plain: ``<clip> <source> <n=5> <n=10> <random>``, lines of the clip's camera file from 0.

    Returns:
        The pairs whose clip and frames there are (videos vanish), and the number of the others.

    Raises:
        FileNotFoundError: naming the file.
        ValueError: naming the line that is of neither form; or no pair of the file has its frames here.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    pairs, n_missing = [], 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            clip, attribute, wanted = _published(line) if line.lstrip().startswith("{") else _plain(line)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: not a line of a pair list: {error!r}") from error
        there = {value: position for position, value in enumerate(getattr(clips[clip], attribute))} if clip in clips else {}
        if all(value in there for value in wanted):
            source, *targets = (there[value] for value in wanted)
            pairs.append(ClipPair(clip, source, dict(zip(CLIP_ROWS, targets, strict=True))))
        else:
            n_missing += 1
    if not pairs:
        raise ValueError(f"{path}: none of its {n_missing} pairs has its clip and frames in the data set")
    return pairs, n_missing


def _published(line: str) -> tuple[str, str, list[int]]:
    entry = json.loads(line)
    times = [int(entry[key]["frame_ts"]) for key in ("src_img_obj", *(PUBLISHED_KEYS[row] for row in CLIP_ROWS))]
    return entry["sequence_id"], "timestamps", times


def _plain(line: str) -> tuple[str, str, list[int]]:
    clip, *words = line.split()
    lines = [int(word) for word in words]
    if len(lines) != 1 + len(CLIP_ROWS) or min(lines) < 0:
        raise ValueError(f"expected a clip and {1 + len(CLIP_ROWS)} lines of its camera file, from 0")
    return clip, "numbers", lines


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
        row: the pairs' name in the table; None: no views, depth only.
    """

    def __init__(self, dataset: Any, *, row: str | None, seed: int = 0) -> None:
        self._dataset, self._row, self._seed = dataset, row, seed

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> SourceTask:
        with seeded(self._seed, index):
            pair: Pair = self._dataset[index]
        views = () if self._row is None else ((self._row, pair),)
        return SourceTask(pair.name, pair.source, pair.K_source, views, pair.source_points, pair.source_depth)


class ClipTasks:
    """Sources of clips, each with all of its targets.

    Args:
        view: takes (clip, position of the frame) to its :class:`View`.
        n_points: sparse points per picture, 0: none.
    """

    def __init__(self, view: Callable[[str, int], View], pairs: Sequence[ClipPair], *, n_points: int, seed: int = 0) -> None:
        self._view, self._pairs, self._n_points, self._seed = view, pairs, n_points, seed

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> SourceTask:
        wanted = self._pairs[index]
        source = self._view(wanted.clip, wanted.source)
        pairs = []
        for row, target in wanted.targets.items():
            with seeded(self._seed, index):  # the source's points are the same for all of its targets
                pairs.append((row, make_pair(source, self._view(wanted.clip, target), n_points=self._n_points)))
        first = pairs[0][1]
        return SourceTask(
            f"{source.scene}/{source.name}", first.source, first.K_source, tuple(pairs), first.source_points, first.source_depth
        )


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
