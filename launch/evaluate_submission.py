"""Checks a submission archive and scores it against the data set, as the CO3D challenge does.

    python launch/evaluate_submission.py submission_manyview_dev.hdf5 dataset_root=/data/co3d
    python launch/evaluate_submission.py submission_manyview_dev.hdf5 dataset_root=/data/co3d output=results.json workers=8
    python launch/evaluate_submission.py submission_manyview_dev.hdf5 dataset_root=/data/co3d allow_missing=true
    python launch/evaluate_submission.py submission_manyview_test.hdf5 dataset_root=/data/co3d check_only=true

Exit codes: 0 fine, 2 wrong arguments, 3 broken or unsafe archive, 4 frames missing, 5 data set or its ground truth missing.
"""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from co3d_ensemble.challenge.archive import ArchiveError, MissingTargets, check_archive
from co3d_ensemble.challenge.scoring import GroundTruthError, format_table, score_archive
from co3d_ensemble.challenge.targets import SEQUENCE_SETS, TASKS, targets_with_records
from co3d_ensemble.data.co3d import CO3DIndex
from co3d_ensemble.files import write_json_atomic

BAD_ARGUMENTS, BAD_ARCHIVE, MISSING_FRAMES, BAD_DATASET = 2, 3, 4, 5


@dataclass
class Arguments:
    dataset_root: str = MISSING  # CO3Dv2 root folder
    allow_missing: bool = False  # score what is there, and list the rest
    check_only: bool = False  # check every frame of the archive without scoring it
    apply_scale_adjustment: bool = False  # depth in world units; the challenge takes the depth maps as they are
    workers: int = 1  # threads
    output: str | None = None  # JSON file for the scores
    task: str | None = None  # manyview | fewview; null: from the archive's name
    sequence_set: str | None = None  # dev | test; null: from the archive's name


def parse(argv: list[str]) -> tuple[Path, Arguments]:
    """Archive and settings; ValueError names what is wrong."""
    archives = [argument for argument in argv if "=" not in argument]
    if len(archives) != 1:
        raise ValueError(f"expected one archive, got {archives}")
    given = OmegaConf.from_cli([argument for argument in argv if "=" in argument])
    try:
        arguments = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Arguments), given))
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {error}") from error
    if arguments.workers < 1:
        raise ValueError(f"workers={arguments.workers}: must be positive")
    named = re.fullmatch(rf"submission_({'|'.join(TASKS)})_({'|'.join(SEQUENCE_SETS)})\.hdf5", Path(archives[0]).name)
    arguments.task = arguments.task or (named and named[1])
    arguments.sequence_set = arguments.sequence_set or (named and named[2])
    if arguments.task not in TASKS or arguments.sequence_set not in SEQUENCE_SETS:
        found = f"task={arguments.task!r}, sequence_set={arguments.sequence_set!r}"
        raise ValueError(f"{found} from the arguments or the archive's name: expected one of {TASKS} and one of {SEQUENCE_SETS}")
    return Path(archives[0]), arguments


def evaluate(archive: Path, arguments: Arguments) -> None:
    records = targets_with_records(CO3DIndex(arguments.dataset_root), task=arguments.task, sequence_set=arguments.sequence_set)
    missing = check_archive(archive, records, allow_missing=arguments.allow_missing)
    for target in missing:
        print(f"missing: {target.path('*')}")
    print(f"{archive}: {len(records) - len(missing)} of {len(records)} frames, {archive.stat().st_size:,} bytes")
    if arguments.check_only:
        return
    result = score_archive(
        archive,
        records,
        allow_missing=arguments.allow_missing,
        apply_scale_adjustment=arguments.apply_scale_adjustment,
        workers=arguments.workers,
    )
    print(format_table(result))
    if arguments.output is not None:
        write_json_atomic(Path(arguments.output), result)
    counts = {key: sum(subset[key] for subset in result["subsets"].values()) for key in ("n_frames", "n_without_truth")}
    if counts["n_without_truth"] and not counts["n_frames"]:
        raise GroundTruthError(f"{arguments.dataset_root}: no frame with ground truth among the {counts['n_without_truth']} of the archive")


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else BAD_ARGUMENTS
    code = BAD_ARGUMENTS
    try:
        archive, arguments = parse(argv)
        code = BAD_DATASET
        evaluate(archive, arguments)
    except ValueError as error:
        if isinstance(error, ArchiveError):
            code = MISSING_FRAMES if isinstance(error, MissingTargets) else BAD_ARCHIVE
        print(f"error: {error}", file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
