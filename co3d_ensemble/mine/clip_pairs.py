"""RealEstate10K's test pairs (Tucker and Snavely, CVPR 2020; MINE, "Experiments"), from a published list or drawn.

A source frame, and as targets the frames 5 and 10 after it and one drawn from the 30 before and after. The list that MINE's tables
are made on is ``validation_pairs.json`` of its repository; without a list pairs are drawn from the clips with a fixed seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from co3d_ensemble.base.text import read_text

AFTER = {"n=5": 5, "n=10": 10}  # frames after the source
RANDOM, RANDOM_RANGE = "random", 30  # frames before and after
CLIP_ROWS = (*AFTER, RANDOM)
PUBLISHED_KEYS = {"n=5": "tgt_img_obj_5_frames", "n=10": "tgt_img_obj_10_frames", RANDOM: "tgt_img_obj_random"}
PAIRS_PER_CLIP = 5  # as in the published list


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
    for number, line in enumerate(read_text(path, strict=False).splitlines(), start=1):
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
