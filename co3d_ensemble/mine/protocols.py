"""How views and depths are scored on each data set, and what is asked of a source picture.

RealEstate10K (Tucker and Snavely, CVPR 2020; MINE, "Experiments"): whole pictures, targets as ``clip_pairs.py`` has them. The unit
of every clip is arbitrary, so the translation is divided by the scale of the source's sparse points, as in training.

KITTI (Tulsiani et al., ECCV 2018, their test sequences): from the left picture to the right one, in metres, and 5% of the
sides cut off all around before any score, because no left picture shows the right one's border.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from co3d_ensemble.mine.clip_pairs import ClipPair
from co3d_ensemble.mine.pairs import Pair
from co3d_ensemble.mine.views import View, make_pair

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
