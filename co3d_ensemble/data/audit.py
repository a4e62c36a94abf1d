"""What is wrong with the frames of a subset, and the subset without its broken frames.

CO3D's users report black frames, empty or wrong masks, wrong frame labels and missing depth masks: each is named here with
its file before training starts, instead of surfacing as a crash or a bad score hours later.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageFile

from co3d_ensemble.base import pictures
from co3d_ensemble.base.pictures import Expected, Header, PictureError, exactly
from co3d_ensemble.base.progress import tracked
from co3d_ensemble.data.co3d import KNOWN, SOURCE, TARGET, VAL, CO3DIndex, FrameRecord, ListFault, Subset, relative_path
from co3d_ensemble.functional.cameras import NDC_FORMATS

logger = logging.getLogger(__name__)

MAX_ROTATION_ERROR = 1e-3  # largest |R R^T - I|: 100x what float32 annotations leave, 0.03 degrees of shear
MAX_CAMERA_NUMBER = 1e18  # of any number of a camera: its square is finite in float32
MAX_VALUE, MASK_HALF = 255, 128  # a mask is foreground above 0.5, and 8-bit masks hold probability * 255
SHOWN_FINDINGS = 5


class Problem(StrEnum):
    """Kinds of findings; the value is what reports show."""

    MISSING_FILE = "missing_file"
    UNREADABLE = "unreadable"
    REDACTED = "redacted"
    EMPTY_MASK = "empty_mask"
    WHOLE_MASK = "whole_foreground_mask"
    MASK_VALUES = "mask_values"
    PICTURE_SIZE = "picture_size"
    PICTURE_MODE = "picture_mode"
    EXIF_ORIENTATION = "exif_orientation"
    CAMERA_NOT_FINITE = "camera_not_finite"
    NOT_A_ROTATION = "not_a_rotation"
    FOCAL_NOT_POSITIVE = "focal_not_positive"
    INTRINSICS_FORMAT = "intrinsics_format"
    DEPTH_VALUES = "depth_values"
    LABEL_MISMATCH = "label_mismatch"
    UNKNOWN_FRAME = "unknown_frame"
    DUPLICATE = "duplicate"


FRAME, DEPTH, NOTHING = "frame", "depth", "nothing"  # what a finding makes unusable


@dataclass(frozen=True)
class Finding:
    """One fault of one frame.

    Attributes:
        name: ``<sequence>/<frame number>``.
        path: the file at fault, relative to the root.
        role: known | val | target | source.
        message: names the file and what is wrong with it.
        spoils: what cannot be used because of it: ``frame``, only its ``depth``, or ``nothing`` (a note).
    """

    name: str
    path: str
    role: str
    problem: Problem
    message: str
    spoils: str = FRAME

    @property
    def fatal_for_training(self) -> bool:
        """The frame must not be trained or validated on. Targets are not, so theirs never is."""
        return self.spoils == FRAME and self.role in (KNOWN, VAL)


def audit_subset(index: CO3DIndex | Path | str, subset: Subset, *, decode: bool) -> list[Finding]:
    """Checks lists, cameras and files of every frame of a subset.

    Args:
        index: the index that the subset comes from, or its root.
        decode: also decode every picture, mask and depth map: finds truncated files, black frames and bad masks.
            Otherwise only headers are read, and targets of test sets are taken to be redacted.

    Returns:
        Findings in the order known, val, targets, few-view sources, after those of the lists.
    """
    root = Path(index.root if isinstance(index, CO3DIndex) else index)
    findings = [_list_finding(fault) for fault in subset.list_faults]
    with _strict_decoding():
        frames = list(_frames_with_roles(subset))
        masks: dict[Path, list[str]] = {}
        for _, record in frames:
            if record.mask_path is not None:
                masks.setdefault(record.mask_path, []).append(record.name)
        for role, record in tracked(frames, f"checking {subset.category}/{subset.name}", "frames"):
            check = _FrameCheck(root, record, role, decode)
            check.labels(masks)
            check.camera()
            check.picture_and_mask(expect_redacted=_is_test_set(subset) and role == TARGET)
            check.depth()
            findings.extend(check.findings)
    return findings


def usable_frames(subset: Subset, findings: Sequence[Finding], *, min_known_frames: int = 8) -> Subset:
    """The subset without broken known and val frames, and with the targets that can be scored.

    Every dropped frame and every depth map that is left out is logged as a warning with its file. Targets all stay, for
    they must be rendered.

    Raises:
        ValueError: fewer than ``min_known_frames`` known frames are left; gives the counts and the first findings.
    """
    faults: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        if finding.spoils != NOTHING:
            faults.setdefault((finding.role, finding.name), []).append(finding)
    for (role, _), found in faults.items():
        if role == TARGET and _is_test_set(subset) and any(f.problem is Problem.REDACTED for f in found):
            continue  # what a test set is made of
        if any(f.spoils == FRAME for f in found):
            consequence = {TARGET: "target not scored", SOURCE: "few-view source at fault"}.get(role, f"{role} frame dropped")
            logger.warning("%s: %s", consequence, "; ".join(f.message for f in found))
        else:
            logger.warning("%s depth left out: %s", role, "; ".join(f.message for f in found))

    def spoiled(role: str, record: FrameRecord, what: str) -> bool:
        return any(f.spoils == what for f in faults.get((role, record.name), ()))

    def without_bad_depth(role: str, records: Sequence[FrameRecord]) -> tuple[FrameRecord, ...]:
        return tuple(replace(r, depth_path=None, depth_mask_path=None) if spoiled(role, r, DEPTH) else r for r in records)

    known = without_bad_depth(KNOWN, [r for r in subset.known if not spoiled(KNOWN, r, FRAME)])
    val = without_bad_depth(VAL, [r for r in subset.val if not spoiled(VAL, r, FRAME)])
    if len(known) < min_known_frames:
        fatal = [f for f in findings if f.fatal_for_training]
        more = f" (and {len(fatal) - SHOWN_FINDINGS} more)" if len(fatal) > SHOWN_FINDINGS else ""
        raise ValueError(
            f"{subset.category}/{subset.name}: {len(known)} of {len(subset.known)} known frames are usable, "
            f"need {min_known_frames}. {'; '.join(f.message for f in fatal[:SHOWN_FINDINGS])}{more}"
        )
    scorable = frozenset(record.key for record in subset.targets if not spoiled(TARGET, record, FRAME))
    return replace(subset, known=known, val=val, targets=without_bad_depth(TARGET, subset.targets), scorable=scorable)


def hold_out(subset: Subset, val_share: float, *, max_val_frames: int | None = None) -> Subset:
    """The subset as it is when it has val frames, else with evenly spread known frames held out as val.

    Args:
        val_share: share of the known frames in (0, 1); at least one frame is held out and one stays.
        max_val_frames: hold out no more than this.

    Raises:
        ValueError: a ``val_share`` outside (0, 1), or fewer than two known frames to choose from.
    """
    if not 0 < val_share < 1:
        raise ValueError(f"val_share={val_share}: must lie in (0, 1)")
    if subset.val:
        return subset
    n_known = len(subset.known)
    if n_known < 2:
        raise ValueError(f"{subset.category}/{subset.name}: cannot hold out validation frames of {n_known} known frames")
    n_val = min(max(1, round(val_share * n_known)), n_known - 1)
    if max_val_frames is not None:
        n_val = max(1, min(n_val, max_val_frames))
    in_time = sorted(subset.known, key=lambda record: record.key)
    held_out = {in_time[int((i + 0.5) * n_known / n_val)].key for i in range(n_val)}
    val = tuple(record for record in subset.known if record.key in held_out)
    names = ", ".join(record.name for record in val)
    logger.info("%s/%s has no usable val frames: %d of %d known frames held out: %s", subset.category, subset.name, n_val, n_known, names)
    return replace(subset, known=tuple(r for r in subset.known if r.key not in held_out), val=val)


def camera_faults(record: FrameRecord) -> list[tuple[Problem, str]]:
    """Why a frame's annotated camera cannot be rendered from, as predicates of "camera"; empty for a good one.

    Good: a known intrinsics format, R, T, focal length and principal point finite, also their squares in float32, focal > 0, R a
    rotation within ``MAX_ROTATION_ERROR``.
    """
    faults = []
    if record.intrinsics_format not in NDC_FORMATS:
        faults.append((Problem.INTRINSICS_FORMAT, f"has the unknown intrinsics format {record.intrinsics_format!r}"))
    values = {"R": sum(record.R, ()), "T": record.T, "focal length": record.focal, "principal point": record.principal}
    bad = [name for name, numbers in values.items() if not all(abs(number) <= MAX_CAMERA_NUMBER for number in numbers)]
    if bad:
        faults.append((Problem.CAMERA_NOT_FINITE, f"has no finite {', '.join(bad)}"))
    if "focal length" not in bad and min(record.focal) <= 0:
        faults.append((Problem.FOCAL_NOT_POSITIVE, f"has the focal length {record.focal}"))
    if "R" not in bad:
        error, determinant = _rotation_error(record.R)
        if error > MAX_ROTATION_ERROR or determinant < 0:
            faults.append((Problem.NOT_A_ROTATION, f"has an R that is no rotation: |R R^T - I| {error:.2g}, det {determinant:.2g}"))
    return faults


def mask_fault(values: np.ndarray) -> tuple[Problem, str] | None:
    """Why 8-bit values are no mask, as a predicate of "mask"; None for a good one."""
    low, high = int(values.min()), int(values.max())
    if high == 0:
        return Problem.EMPTY_MASK, "is empty"
    if high < MASK_HALF:
        return Problem.MASK_VALUES, f"values are {low}..{high}, expected 0..255: nothing reaches one half"
    return None


def _frames_with_roles(subset: Subset) -> Iterator[tuple[str, FrameRecord]]:
    seen = set()
    sources = [source for batch in subset.eval_batches for source in batch.sources]
    for role, records in ((KNOWN, subset.known), (VAL, subset.val), (TARGET, subset.targets), (SOURCE, sources)):
        for record in records:
            if record.key not in seen:
                seen.add(record.key)
                yield role, record


def _is_test_set(subset: Subset) -> bool:
    """Whether the targets are withheld by the challenge: ``manyview_test``, ``manyview_test_0``, ``fewview_test``."""
    return "test" in subset.name.split("_")


def _list_finding(fault: ListFault) -> Finding:
    problem = Problem(fault.kind)
    name = f"{fault.key[0]}/{fault.key[1]}"
    return Finding(name, fault.path, fault.role, problem, fault.message, NOTHING if problem is Problem.DUPLICATE else FRAME)


_HeaderCheck = Callable[[Header, Expected], None]
_Reader = Callable[[Path], Any]
_PROBLEM_OF_FAULT = {
    pictures.UNREADABLE: Problem.UNREADABLE,
    pictures.WRONG_SIZE: Problem.PICTURE_SIZE,
    pictures.WRONG_MODE: Problem.PICTURE_MODE,
    pictures.TURNED: Problem.EXIF_ORIENTATION,
}


@dataclass(frozen=True)
class _Opened:
    """A picture's header; ``is_sound`` where it is as it should be."""

    header: Header
    is_sound: bool


class _FrameCheck:
    """Collects the findings of one frame."""

    def __init__(self, root: Path, record: FrameRecord, role: str, decode: bool) -> None:
        self.root, self.record, self.role, self.decode = root, record, role, decode
        self.findings: list[Finding] = []

    def add(self, problem: Problem, path: Path, what: str, spoils: str = FRAME) -> None:
        shown = relative_path(path, self.root)
        message = f"{shown}: {what} (frame {self.record.name})"
        self.findings.append(Finding(self.record.name, shown, self.role, problem, message, spoils))

    def labels(self, masks: Mapping[Path, Sequence[str]]) -> None:
        """``masks``: names of the frames that have a file as their mask."""
        record, path = self.record, self.record.image_path
        if path in masks:
            self.add(Problem.LABEL_MISMATCH, path, f"the picture is also the mask of {masks[path][0]}")
        others = [name for name in masks.get(record.mask_path, ()) if name != record.name] if record.mask_path is not None else []
        if others:
            self.add(Problem.LABEL_MISMATCH, record.mask_path, f"the mask is also that of {others[0]}")
        folders = Path(relative_path(path, self.root)).parts[:-1]
        for kind, label in (("category", record.category), ("sequence", record.sequence_name)):
            if label not in folders:
                self.add(Problem.LABEL_MISMATCH, path, f"the annotation's {kind} {label!r} is not in the picture's path")

    def camera(self) -> None:
        for problem, what in camera_faults(self.record):
            self.add(problem, self.record.image_path, f"camera {what}")

    def picture_and_mask(self, *, expect_redacted: bool) -> None:
        record, annotated = self.record, exactly((self.record.height, self.record.width), "annotated as")
        picture = self._open(record.image_path, "picture", pictures.check_photo, annotated)
        if expect_redacted and not self.decode:
            self.add(Problem.REDACTED, record.image_path, "target of a test set, taken to be redacted (pixels were not read)")
        if picture is not None:
            self._photo(picture, expect_redacted)
        if record.mask_path is None:
            self.add(Problem.MISSING_FILE, record.image_path, "the annotation names no mask for this picture")
            return
        expected = annotated if picture is None or picture.is_sound else exactly(picture.header.size, "its picture")
        mask = self._open(record.mask_path, "mask", pictures.check_mask, expected)
        if mask is not None and mask.is_sound and self.decode:
            values = self._pixels(record.mask_path, "mask", pictures.read_mask)
            fault = None if values is None else mask_fault(values)
            if fault is not None:
                self.add(fault[0], record.mask_path, f"mask {fault[1]}")
            elif values is not None and values.min() == MAX_VALUE:
                self.add(Problem.WHOLE_MASK, record.mask_path, "mask calls the whole picture foreground", NOTHING)

    def _photo(self, picture: _Opened, expect_redacted: bool) -> None:
        path, header = self.record.image_path, picture.header
        if picture.is_sound and header.is_16_bit_gray:
            self.add(Problem.PICTURE_MODE, path, "picture is 16-bit gray, which is scaled to 8 bits", NOTHING)
        if picture.is_sound and header.has_alpha:
            self.add(Problem.PICTURE_MODE, path, "picture has transparent pixels, whose alpha is left out", NOTHING)
        if picture.is_sound and self.decode:
            expected = exactly((self.record.height, self.record.width))
            pixels = self._pixels(path, "picture", lambda path: pictures.read_photo(path, expected))
            if pixels is not None and not pixels.any():
                expected_so = " as in every test set" if expect_redacted else ""
                self.add(Problem.REDACTED, path, f"all pixels are black: redacted{expected_so}")

    def depth(self) -> None:
        record = self.record
        if record.depth_path is None:
            return
        if not 0 < record.depth_scale_adjustment <= MAX_CAMERA_NUMBER:
            self.add(Problem.DEPTH_VALUES, record.depth_path, f"depth has scale_adjustment {record.depth_scale_adjustment}", DEPTH)
        annotated = exactly((record.height, record.width), "annotated as")
        known: list[np.ndarray] = []
        kinds: tuple[tuple[Path | None, str, _HeaderCheck, _Reader], ...] = (
            (record.depth_path, "depth", pictures.check_depth, pictures.read_depth),
            (record.depth_mask_path, "depth mask", pictures.check_depth_mask, pictures.read_depth_mask),
        )
        for path, kind, check, read in kinds:
            picture = self._open(path, kind, check, annotated, DEPTH) if path is not None else None
            if picture is not None and picture.is_sound and self.decode:
                values = self._pixels(path, kind, read, DEPTH)
                known += [] if values is None else [values > 0]
        is_sound = len(known) == len([path for path, *_ in kinds if path is not None])
        if is_sound and not np.logical_and.reduce(known).any():
            self.add(Problem.DEPTH_VALUES, record.depth_path, "depth has no value above 0 that its mask calls valid", DEPTH)

    def _open(self, path: Path, kind: str, check: _HeaderCheck, expected: Expected, spoils: str = FRAME) -> _Opened | None:
        """The file's header, or None after noting why there is none; ``check``'s complaint is noted as well."""
        try:
            header = pictures.read_header(path)
        except FileNotFoundError:
            self.add(Problem.MISSING_FILE, path, f"{kind} file is missing", spoils)
            return None
        except PictureError as error:
            self._fault(path, kind, error, spoils)
            return None
        try:
            check(header, expected)
        except PictureError as error:
            self._fault(path, kind, error, spoils)
            return _Opened(header, is_sound=False)
        return _Opened(header, is_sound=True)

    def _pixels(self, path: Path, kind: str, read: _Reader, spoils: str = FRAME) -> np.ndarray | None:
        try:
            return np.asarray(read(path))
        except PictureError as error:
            self._fault(path, kind, error, spoils)
            return None

    def _fault(self, path: Path, kind: str, error: PictureError, spoils: str) -> None:
        problem = _PROBLEM_OF_FAULT[error.fault]
        if problem is Problem.PICTURE_MODE and kind != "picture":
            problem = Problem.MASK_VALUES if kind == "mask" else Problem.DEPTH_VALUES
        self.add(problem, path, f"{kind} {error.what}", spoils)


@contextlib.contextmanager
def _strict_decoding() -> Iterator[None]:
    """PIL pads truncated files in silence where some library has set its global switch; not during the audit."""
    previous = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = previous


def _rotation_error(R: Sequence[Sequence[float]]) -> tuple[float, float]:
    """max |R R^T - I| and det R; plain floats, for an audit of 10,000 frames spends its time on files instead."""
    gram = ((i, j, sum(a * b for a, b in zip(R[i], R[j], strict=True))) for i in range(3) for j in range(i, 3))
    error = max(abs(value - (i == j)) for i, j, value in gram)
    (a, b, c), (d, e, f), (g, h, i) = R
    return error, a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
