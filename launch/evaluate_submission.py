"""Checks a submission archive and scores it against the data set, as the CO3D challenge does.

    python launch/evaluate_submission.py submission_manyview_dev.hdf5 dataset_root=/data/co3d
    python launch/evaluate_submission.py submission_manyview_dev.hdf5 dataset_root=/data/co3d output=results.json workers=8
    python launch/evaluate_submission.py submission_manyview_dev.hdf5 dataset_root=/data/co3d allow_missing=true
    python launch/evaluate_submission.py submission_manyview_test.hdf5 dataset_root=/data/co3d check_only=true

Frames without usable ground truth are left out of the scores and listed.

Exit codes: 0 fine, 1 another error that the message explains, 2 wrong arguments, 3 broken or unsafe archive, 4 frames missing,
5 data set missing or broken or no frame of it with ground truth, 130 Ctrl-C.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from co3d_ensemble.base.quoting import override
from co3d_ensemble.challenge.archive import ArchiveError, MissingTargets, check_archive, check_structure
from co3d_ensemble.challenge.scoring import GroundTruthError, format_table, score_archive
from co3d_ensemble.challenge.targets import SEQUENCE_SETS, TASKS, targets_with_records
from co3d_ensemble.data.co3d import CO3DIndex
from co3d_ensemble.files import write_json_atomic
from co3d_ensemble.scripts import WRONG_ARGUMENTS, run_script, run_with_settings
from co3d_ensemble.settings import setting

BAD_ARCHIVE, MISSING_FRAMES, BAD_DATASET = 3, 4, 5


@dataclass
class Arguments:
    archive: str = setting(MISSING, "the submission: the argument without a setting's name", literal=True)
    dataset_root: str = setting(MISSING, "CO3Dv2 root folder", literal=True)
    allow_missing: bool = False  # score what is there, and list the rest
    check_only: bool = False  # check every frame of the archive without scoring it
    apply_scale_adjustment: bool = False  # depth in world units; the challenge takes the depth maps as they are
    workers: int | None = None  # threads; null: one per core, at most 8
    output: str | None = setting(None, "JSON file for the scores", literal=True)
    task: str | None = None  # manyview | fewview; null: from the archive's name
    sequence_set: str | None = None  # dev | test; null: from the archive's name

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers={self.workers}: must be positive")
        named = re.fullmatch(rf"submission_({'|'.join(TASKS)})_({'|'.join(SEQUENCE_SETS)})\.hdf5", Path(self.archive).name)
        self.task = self.task or (named and named[1])
        self.sequence_set = self.sequence_set or (named and named[2])
        if self.task not in TASKS or self.sequence_set not in SEQUENCE_SETS:
            found = f"task={self.task!r}, sequence_set={self.sequence_set!r}"
            raise ValueError(f"{found} from the arguments or the archive's name: expected one of {TASKS} and one of {SEQUENCE_SETS}")


def evaluate(arguments: Arguments) -> None:
    archive = Path(arguments.archive)
    try:
        records = targets_with_records(CO3DIndex(arguments.dataset_root), task=arguments.task, sequence_set=arguments.sequence_set)
    except ValueError as error:
        raise GroundTruthError(str(error)) from error
    check = check_archive if arguments.check_only else check_structure  # scoring decodes every picture anyway
    missing = check(archive, records, allow_missing=arguments.allow_missing)
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


def exit_code(arguments: Arguments) -> int:
    """Evaluates; of the errors those that have a code of their own end here, as one line."""
    try:
        evaluate(arguments)
    except (ArchiveError, GroundTruthError) as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, GroundTruthError):
            return BAD_DATASET
        return MISSING_FRAMES if isinstance(error, MissingTargets) else BAD_ARCHIVE
    return 0


def is_setting(argument: str) -> bool:
    """``KEY=VALUE``, and not an archive in whose path an equals sign stands."""
    key, sign, _ = argument.partition("=")
    return key in Arguments.__dataclass_fields__ or bool(sign) and key.isidentifier() and not Path(argument).exists()


def main(argv: list[str]) -> int:
    archives = [argument for argument in argv if not is_setting(argument) and argument not in ("-h", "--help")]
    settings = [argument for argument in argv if argument not in archives]
    if len(archives) != 1 and not {"-h", "--help"} & set(argv):
        print(f"error: expected one archive, got {', '.join(archives) or 'none'} (--help lists the settings)", file=sys.stderr)
        return WRONG_ARGUMENTS
    return run_with_settings([*(override("archive", path) for path in archives), *settings], Arguments, __doc__, exit_code)


if __name__ == "__main__":
    run_script(main)
