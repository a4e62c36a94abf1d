"""Annotations and lists of a CO3Dv2 root, damaged: read by the index, the audit, Implicitron's data set, MINE and the fleet's dry run."""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import logging
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.fuzzing import ALWAYS_FAULTS, Outcome, Target, outcome_of_error
from co3d_ensemble.assembly import load_frame, usable_subset
from co3d_ensemble.challenge.targets import targets_with_records
from co3d_ensemble.config import ExperimentConfig
from co3d_ensemble.data.co3d import CO3DIndex
from co3d_ensemble.data.synthetic import SyntheticConfig, generate_dataset
from co3d_ensemble.fleet.checks import check_all
from co3d_ensemble.fleet.jobs import chosen_subsets
from co3d_ensemble.mine.co3d_pairs import CO3DPairs

CATEGORY, SUBSET = "mug", "manyview_dev_0"
FILES = (
    "category_to_subset_name_list.json",
    f"{CATEGORY}/frame_annotations.jgz",
    f"{CATEGORY}/sequence_annotations.jgz",
    f"{CATEGORY}/set_lists/set_lists_{SUBSET}.json",
    f"{CATEGORY}/eval_batches/eval_batches_{SUBSET}.json",
)
HEIGHT, WIDTH = 24, 32
MIN_KNOWN_FRAMES = 4
CLOUD = "pointcloud.ply"
# what stands where something else is expected; a float that JSON has no word for is written as Python writes it, NaN or Infinity
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3.7, 1e30, 1e308, math.inf, -math.inf, math.nan, 10**30, 10**400, 2**31, 2**63),
    *("", " ", ".", "..", "../x", "../../../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "a\0b", "a\nb", "\ud800", "x" * 300, "3", "é"),
    *([], [[]], {}, {"a": 1}, [None], [1, 2], [1, 2, 3], ["s", 1, "x"]),
)


class Annotations(Target):
    """The result of a root is what each of its readers makes of it; ``UNFORESEEN``: a training ends where the dry run saw nothing."""

    name = "annotations"
    faults = ALWAYS_FAULTS

    def prepare(self, folder: Path) -> None:
        settings = SyntheticConfig(n_known=8, n_val=2, n_unseen=2, height=HEIGHT, width=WIDTH, supersample=1)
        generate_dataset(folder, {CATEGORY: [SUBSET]}, settings)
        self._add_cloud(folder)
        self.sound = self._read(folder)

    def mutate(self, generator: random.Random, folder: Path) -> str:
        relative = generator.choice(FILES)
        path = folder / relative
        damage = generator.choices(list(DAMAGES), weights=[weight for weight, _ in DAMAGES.values()])[0]
        return f"{damage}: {relative}, {DAMAGES[damage][1](generator, path)}"

    def judge(self, folder: Path) -> tuple[Outcome, str]:
        logging.disable(logging.ERROR)  # in a child of its own: warnings of frames that are left out
        names = [Path(file).name for file in FILES] + [f"{CATEGORY}/", f"{folder}/"]
        foreseen = self._foreseen(folder)
        worst, told = Outcome.SAME, ""
        for reader, read in self._readers(folder).items():
            try:
                changed = read() != self.sound[reader]
            except Exception as error:  # the class of every error counts
                outcome, line = outcome_of_error(error, names), f"{reader}: {type(error).__name__}: {error}"
                if reader == "training" and outcome is Outcome.NAMED and not foreseen:
                    outcome = Outcome.UNFORESEEN
                if outcome is Outcome.TRACEBACK:
                    raise
            else:
                outcome, line = (Outcome.OTHER, reader) if changed else (Outcome.SAME, "")
            if SEVERITY.index(outcome) > SEVERITY.index(worst):
                worst, told = outcome, line
        return worst, told

    def _read(self, folder: Path) -> dict[str, Any]:
        return {reader: read() for reader, read in self._readers(folder).items()}

    def _readers(self, folder: Path) -> dict[str, Callable[[], Any]]:
        return {
            "training": lambda: self._train(folder),
            "submission": lambda: [str(target) for target in targets_with_records(CO3DIndex(folder), task="manyview", sequence_set="dev")],
            "mine": lambda: self._pairs(folder),
        }

    def _foreseen(self, folder: Path) -> bool:
        """Whether the fleet's dry run says that the sequence cannot be trained."""
        try:
            chosen_subsets(CO3DIndex(folder).all_subsets(["dev"]), categories=[CATEGORY], subsets=[SUBSET])
        except ValueError:
            return True
        pairs = [(CATEGORY, SUBSET)]
        reports = check_all(folder, folder / "output", pairs, decode=False, min_known_frames=MIN_KNOWN_FRAMES, workers=1)
        return any(report["errors"] for report in reports.values())

    def _train(self, folder: Path) -> Any:
        """What a training does with a root before its first step, and at its end."""
        config = ExperimentConfig(dataset_root=str(folder), category=CATEGORY, subset_name=SUBSET)
        config.data.min_known_frames = MIN_KNOWN_FRAMES
        subset = usable_subset(config)
        scorable = [record for record in subset.targets if record.key in (subset.scorable or ())]
        frames = [load_frame(config, record) for record in (*subset.known, *subset.val, *scorable)]
        roles = [[record.key for record in records] for records in (subset.known, subset.val, subset.targets, scorable)]
        return roles, [_digest(frame.rgb, frame.mask, frame.depth, frame.camera.R, frame.camera.T, frame.camera.focal) for frame in frames]

    def _pairs(self, folder: Path) -> Any:
        pairs = CO3DPairs(folder, height=HEIGHT, width=WIDTH, n_points=16, max_frame_distance=8, points="cloud", random_target=False)
        first = pairs[0]
        return len(pairs), first.name, _digest(first.source, first.target, first.K_source, first.R, first.t)

    def _add_cloud(self, folder: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        points = (torch.rand(2000, 3, generator=generator) - 0.5).tolist()
        lines = ["ply", "format ascii 1.0", f"element vertex {len(points)}", *(f"property float {axis}" for axis in "xyz"), "end_header"]
        (folder / CATEGORY / CLOUD).write_text("\n".join([*lines, *(" ".join(map(str, point)) for point in points)]) + "\n")
        path = folder / FILES[2]
        sequences = json.loads(gzip.decompress(path.read_bytes()))
        for sequence in sequences:
            sequence["point_cloud"] = {"path": f"{CATEGORY}/{CLOUD}", "quality_score": 1.0, "n_points": len(points)}
        path.write_bytes(gzip.compress(json.dumps(sequences).encode()))


SEVERITY = list(dict.fromkeys((Outcome.SAME, Outcome.OTHER, Outcome.NAMED, Outcome.UNFORESEEN, Outcome.UNNAMED, *Outcome)))


def _digest(*tensors: torch.Tensor | None) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(b"none" if tensor is None else tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _bytes_damage(damage: Callable[[random.Random, bytearray], str]) -> Callable[[random.Random, Path], str]:
    """Of the packed bytes, or of the text in them."""

    def apply(generator: random.Random, path: Path) -> str:
        data, inner = path.read_bytes(), path.suffix == ".jgz" and generator.random() < 0.7
        content = bytearray(gzip.decompress(data) if inner else data)
        told = damage(generator, content)
        path.write_bytes(gzip.compress(bytes(content)) if inner else bytes(content))
        return f"{'unpacked ' if inner else ''}{told}"

    return apply


def _flip(generator: random.Random, content: bytearray) -> str:
    places = sorted(generator.randrange(len(content)) for _ in range(generator.choice((1, 1, 3))))
    for place in places:
        content[place] ^= 1 << generator.randrange(8)
    return f"bits at {places}"


def _cut(generator: random.Random, content: bytearray) -> str:
    place = generator.randrange(len(content))
    del content[place:]
    return f"after {place}"


def _remove(generator: random.Random, content: bytearray) -> str:
    place, n = generator.randrange(len(content)), generator.choice((1, 4, 64))
    del content[place : place + n]
    return f"{n} at {place}"


def _repeat(generator: random.Random, content: bytearray) -> str:
    place, n = generator.randrange(len(content)), generator.choice((1, 4, 64))
    content[place:place] = content[place : place + n]
    return f"{n} at {place}"


def _tree_damage(damage: Callable[[random.Random, Any, Any], str]) -> Callable[[random.Random, Path], str]:
    """Of one value in the JSON: ``damage`` gets its container and its key or index there."""

    def apply(generator: random.Random, path: Path) -> str:
        data = path.read_bytes()
        content = [json.loads(gzip.decompress(data) if path.suffix == ".jgz" else data)]  # a list, so that the root is a value as well
        places = list(_places(content, ()))
        # each depth as often as the others: the many numbers of cameras lie deepest
        depth = generator.choice(sorted({len(place) for place in places}))
        place = generator.choice([place for place in places if len(place) == depth])
        container = content
        for key in place[:-1]:
            container = container[key]
        told = damage(generator, container, place[-1])
        text = json.dumps(content[0] if content else None).encode()
        path.write_bytes(gzip.compress(text, 1) if path.suffix == ".jgz" else text)
        return f"{'.'.join(map(str, place[1:])) or 'all'} {told}"

    return apply


def _places(value: Any, prefix: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    for key in value if isinstance(value, dict) else range(len(value)):
        yield (*prefix, key)
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key], (*prefix, key))


def _replace(generator: random.Random, container: Any, key: Any) -> str:
    container[key] = copy.deepcopy(generator.choice(ODD_VALUES))
    return f"is {ascii(container[key])[:60]}"


def _delete(generator: random.Random, container: Any, key: Any) -> str:
    del container[key]
    return "is gone"


def _double(generator: random.Random, container: Any, key: Any) -> str:
    if isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
        return "stands twice"
    container[f"{key}_"] = container.pop(key)
    return "is called otherwise"


def _wrap(generator: random.Random, container: Any, key: Any) -> str:
    levels = generator.choice((1, 50, 400, 900))
    for _ in range(levels):
        container[key] = [container[key]]
    return f"in {levels} lists"


def _swap(generator: random.Random, container: Any, key: Any) -> str:
    keys = list(container) if isinstance(container, dict) else range(len(container))
    other = generator.choice(list(keys))
    container[key], container[other] = container[other], container[key]
    return f"swapped with {other}"


def _stretch(generator: random.Random, container: Any, key: Any) -> str:
    value = container[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _replace(generator, container, key)
    container[key] = value * generator.choice((-1, 0.5, 1e-9, 1e9, 1e20, 1e300, 1.0000001))
    return f"is {container[key]}"


def _other_file(generator: random.Random, path: Path) -> str:
    kind = generator.choice(("gone", "empty", "folder", "byte order mark", "UTF-16", "deep", "bomb", "full bomb", "null", "digits", "text"))
    data = path.read_bytes()
    packed = path.suffix == ".jgz"
    text = gzip.decompress(data) if packed else data
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind in ("bomb", "full bomb"):  # as text it is a list of lists; in a gzip file it unpacks to a gigabyte
        member = b" " * (16 * 2**20) if kind == "bomb" else b"[" + b"[]," * 5_000_000
        path.write_bytes(gzip.compress(member, 6) * 64 if packed else member[: 2**20] + b"[]]")
    elif kind != "gone":
        content = {
            "empty": b"",
            "byte order mark": b"\xef\xbb\xbf" + text,
            "UTF-16": text.decode().encode("utf-16"),
            "deep": b"[" * generator.choice((900, 5000, 200_000)) + b"]" * 900,
            "null": b"null",
            "digits": b"[" + b"1" * 10_000 + b"]",
            "text": b"version https://git-lfs.github.com/spec/v1\n",
        }[kind]
        path.write_bytes(gzip.compress(content) if packed and kind != "empty" else content)
    return kind


# how often, and how
DAMAGES: dict[str, tuple[int, Callable[[random.Random, Path], str]]] = {
    "bits": (10, _bytes_damage(_flip)),
    "cut": (5, _bytes_damage(_cut)),
    "removed": (5, _bytes_damage(_remove)),
    "repeated": (5, _bytes_damage(_repeat)),
    "replaced": (40, _tree_damage(_replace)),
    "deleted": (10, _tree_damage(_delete)),
    "doubled": (6, _tree_damage(_double)),
    "wrapped": (4, _tree_damage(_wrap)),
    "swapped": (6, _tree_damage(_swap)),
    "stretched": (6, _tree_damage(_stretch)),
    "file": (8, _other_file),
}
