"""Whether a sequence's cameras and masks agree, and if not, which usual mistake would explain it: told before hours of training.

The measure is the median over frames of the share of a mask's outline that fits the other masks (``functional/silhouettes.py``).
What was seen (the four generated objects with the mask and pose errors of ``configs/ablation/ablation_laptop.yaml``, at 24x32 to
200x150 pixels, ``cape`` at 60 to 400 and ``apple``; 8 to 90 frames; reduced to 64 pixels; median over frames):

==================================================  ==============  =====================================
cameras and masks                                   agreement       remarks
==================================================  ==============  =====================================
sound, whole, small, cut off or thin objects        0.95 to 1.00    0.95 only at 24 pixels
pose errors of 0.01, twice the ablation's           0.77 to 0.86    trained with a warning
pose errors of 0.02 / 0.04                          0.49 - 0.64 / 0.22 - 0.43
mask errors of 0.04 / 0.08, the ablation's is 0.02  0.85 - 0.92 / 0.56 - 0.77
OpenCV's axes                                       0.00 to 0.89    every one named
transposed rotations                                0.39 to 0.97    one missed: mug, 10 frames (0.97)
OpenGL's axes, camera-to-world poses                0.00 to 0.29    mostly no common point to look at
masks of other frames                               0.00 to 0.74    nothing explains them
inverted masks                                      0.00 to 1.00    see below
==================================================  ==============  =====================================

What surrounds an object is itself something that inverted masks can agree on, so it is the share of foreground along the borders and
in the middles of the pictures that tells them. Outlines do not show wrong cameras where most pictures cut the object off (from a
zoom of 1.8 on), where there are fewer than eight frames, nor for balls and bodies of rotation.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from co3d_ensemble.base.pictures import PictureError, read_mask
from co3d_ensemble.data.co3d import FrameRecord
from co3d_ensemble.functional.conventions import camera_mistakes
from co3d_ensemble.functional.silhouettes import Coherence, Silhouette, coherence

logger = logging.getLogger(__name__)

MODES = ("error", "warn", "off")
JUDGES = 24  # frames that decide, evenly spread
WORK_SIDE, MAX_WORK_SIDE = 64, 160  # pixels: longest side worked at, and where small objects need more
WORK_EXTENT = 36  # pixels that the object should measure at least
SOUND = 0.95  # agreement from which nothing is wrong
POOR = 0.4  # agreement below which training is refused even where no usual mistake explains it
EXPLAINED = 0.5  # a mistake explains a disagreement when undoing it leaves at most this share of it
PLAUSIBLE = 0.75  # and to this agreement at least
NEARLY_AS_GOOD = 0.02  # a simpler explanation wins over one that is better by less
STRAY_SHARE = 0.6  # of the median agreement: a frame below it disagrees with the rest
STRAY_EXCLUDED = 0.15  # a frame whose mask excludes more of what the others see disagrees with the rest
SHOWN_STRAYS = 10
_BORDER = 0.5  # more foreground than this along the borders of most pictures, and less in the middle: no mask of an object


@dataclass(frozen=True)
class Agreement:
    """What was found.

    Attributes:
        share: agreement of masks and cameras as they are, in [0, 1]; 0 where the cameras do not look at a common point, None
            where the masks have no outlines to judge by.
        inverted: the masks are foreground along the borders rather than in the middle.
        mistake: what would make them agree, in words; None where they agree or nothing explains it.
        mended: agreement with that mistake undone.
        strays: a line for every frame that disagrees with the rest.
    """

    share: float | None
    inverted: bool = False
    mistake: str | None = None
    mended: float | None = None
    strays: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        return not self.inverted and (self.share is None or self.share >= SOUND)

    @property
    def refused(self) -> bool:
        """Whether training would be in vain: a mistake explains it, or hardly anything fits."""
        return not self.sound and (self.mistake is not None or self.share < POOR)

    def told(self) -> str:
        """One line; empty where cameras and masks agree."""
        if self.sound:
            return ""
        if self.inverted:
            text = "the masks are foreground along the pictures' borders rather than in their middles"
        elif self.share == 0:
            text = "the masks and cameras contradict each other: nothing in space fits the masks' outlines"
        else:
            text = f"masks and cameras disagree: {_percent(self.share)} of the masks' outlines fit the other masks, not {_percent(SOUND)}"
        if self.mistake is not None:
            return f"{text}. {_percent(self.mended)} of the outlines fit if {self.mistake}"
        return f"{text}. None of the usual mistakes explains it; poses or masks may be inaccurate, or masks belong to other pictures"

    def verdict(self, mode: str) -> tuple[str | None, list[str]]:
        """Why training is refused, or None, and what it is warned of."""
        if self.refused and mode == "error":
            return f"{self.told()} (data.check_agreement=warn trains all the same)", []
        more = len(self.strays) - SHOWN_STRAYS
        shown = [*self.strays[:SHOWN_STRAYS], *([f"and {more} more frames disagree with the rest"] if more > 0 else [])]
        return None, shown if self.sound else [self.told(), *shown]


def strictest(modes: Iterable[str]) -> str:
    return min(modes, key=MODES.index)


def check_agreement(frames: Sequence[Silhouette], *, mode: str, place: str) -> None:
    """Ends a training that would be in vain, and warns of what is doubtful.

    Args:
        frames: to train on, at any size.
        mode: ``error`` | ``warn`` | ``off``.
        place: names the sequence in messages.

    Raises:
        ValueError: mode ``error``, and masks and cameras contradict each other; says which mistake would explain it.
    """
    if mode == "off":
        return
    found = judge_agreement(frames)
    refusal, warnings = found.verdict(mode)
    if refusal is not None:
        raise ValueError(f"{place}: {refusal}")
    if found.share is None:
        logger.info("%s: the masks have no outlines by which the cameras could be checked", place)
    elif found.sound:
        logger.info("%s: masks and cameras agree, %s of the masks' outlines fit", place, _percent(found.share))
    for warning in warnings:
        logger.warning("%s: %s", place, warning)


def agreement_of_records(records: Sequence[FrameRecord], *, mode: str, most: int | None = None) -> tuple[str | None, list[str]]:
    """The same from the files: why training would be refused, or None, and what it would be warned of.

    Args:
        most: read no more masks than this, evenly spread; only these are named where they disagree with the rest.
    """
    if mode == "off":
        return None, []
    readable = readable_silhouettes(records, most=most)
    return judge_agreement(readable).verdict(mode) if readable else (None, [])


def readable_silhouettes(records: Sequence[FrameRecord], *, most: int | None = None) -> list[Silhouette]:
    """Masks and cameras from the files at their original size, without masks that cannot be read: the audit names those."""
    found = []
    for record in (records[i] for i in _evenly_spread(len(records), most)):
        if record.mask_path is not None:
            with contextlib.suppress(PictureError, OSError):
                pixels = torch.from_numpy(np.array(read_mask(record.mask_path)))
                found.append(Silhouette(record.name, pixels[None], record.camera().resized(*pixels.shape)))
    return found


def judge_agreement(frames: Sequence[Silhouette]) -> Agreement:
    """Compares masks and cameras and looks for an explanation where they disagree; a second or two.

    Args:
        frames: known frames of one sequence, at any size.
    """
    side = _work_side(frames)
    small = [frame.reduced(side) for frame in frames]
    chosen = _evenly_spread(len(small), JUDGES)
    judges = [small[i] for i in chosen]
    others = [frame for i, frame in enumerate(small) if i not in chosen]
    inverted = _seem_inverted(judges)
    given = _coherence(judges, () if inverted else others)
    share = 0.0 if given is None else given.median
    upright = [frame.inverted() for frame in judges]
    if inverted:
        return _explained(share, upright, inverted=True)
    if share is None or share >= SOUND:
        return Agreement(share, strays=_strays([*judges, *others], given))
    if _seem_inverted(judges, least=0.0) and _share(_coherence(upright)) >= SOUND:  # of objects that the pictures cut off
        return _explained(share, upright, inverted=True)
    found = _explained(share, judges, inverted=False)
    if found.mistake is None and given is not None:  # bad frames, more than the tolerated share?
        return _without_the_worst(found, judges, others, given)
    return found


def _evenly_spread(n: int, most: int | None) -> list[int]:
    return list(range(n)) if most is None else sorted({int((i + 0.5) * n / most) for i in range(most)})


def _coherence(judges: Sequence[Silhouette], others: Sequence[Silhouette] = ()) -> Coherence | None:
    """None where the cameras do not look at a common point."""
    try:
        return coherence(judges, others)
    except ValueError as error:
        logger.debug("agreement: %s", error)
        return None


def _explained(share: float | None, judges: Sequence[Silhouette], *, inverted: bool) -> Agreement:
    """The mistake that explains a disagreement best, if one does; ``judges`` have their masks the right way round."""
    mended: list[tuple[float, str | None]] = []
    if inverted:
        mended.append((_share(_coherence(judges)), None))
    if not inverted or mended[0][0] < SOUND:
        for mistake in camera_mistakes(judges[0].camera):
            found = _coherence([replace(frame, camera=mistake.undone(frame.camera)) for frame in judges])
            mended.append((_share(found), mistake.told))
            if mended[-1][0] >= 1 - NEARLY_AS_GOOD:  # nothing that is less simple could win
                break
    best = max(figure for figure, _ in mended)
    figure, told = next(entry for entry in mended if entry[0] >= best - NEARLY_AS_GOOD)  # the simplest come first
    if inverted:
        told = "they are inverted" + ("" if told is None else f", and {told}")
        return Agreement(share, True, told, figure)
    if figure >= PLAUSIBLE and 1 - figure <= EXPLAINED * (1 - share):
        return Agreement(share, False, told, figure)
    return Agreement(share)


def _share(found: Coherence | None) -> float:
    return 0.0 if found is None or found.median is None else found.median


def _without_the_worst(found: Agreement, judges: list[Silhouette], others: list[Silhouette], given: Coherence) -> Agreement:
    """The same without the quarter of the judges that fits worst: as they are sound, the others are strays."""
    fit = (given.covered - given.excluded.nan_to_num(0.0))[: len(judges)].nan_to_num(1.0)
    kept = set(fit.argsort(descending=True)[: max(1, round(0.75 * len(judges)))].tolist())
    good = [frame for i, frame in enumerate(judges) if i in kept]
    rest = [frame for i, frame in enumerate(judges) if i not in kept] + others
    again = _coherence(good, rest)
    if again is None or again.median is None or again.median < SOUND:
        return found
    return Agreement(again.median, strays=_strays([*good, *rest], again))


def _strays(frames: Sequence[Silhouette], found: Coherence | None) -> tuple[str, ...]:
    """A line for every frame whose mask or camera does not fit the others."""
    if found is None or found.median is None:
        return ()
    lines = []
    for frame, covered, excluded in zip(frames, found.covered.tolist(), found.excluded.tolist(), strict=True):
        if covered < STRAY_SHARE * found.median or excluded > STRAY_EXCLUDED:
            fits = "its mask has no outline" if covered != covered else f"{_percent(covered)} of its outline fit the other masks"
            lines.append(
                f"frame {frame.name} disagrees with the rest: {fits} (most frames: {_percent(found.median)}), its mask excludes "
                f"{_percent(excluded)} of what they show; its mask or its camera is wrong"
            )
    return tuple(lines)


def _seem_inverted(frames: Sequence[Silhouette], *, least: float = _BORDER) -> bool:
    """Whether most masks cover more than ``least`` of their picture's border, and more of it than of its middle half."""
    votes = []
    for frame in frames:
        inside = (frame.mask[0] > 127).float()
        height, width = inside.shape
        border = torch.cat((inside[0], inside[-1], inside[1:-1, 0], inside[1:-1, -1])).mean()
        middle = inside[height // 4 : height - height // 4, width // 4 : width - width // 4].mean()
        votes.append(bool(border > least and border > middle))
    return 2 * sum(votes) > len(votes)


def _work_side(frames: Sequence[Silhouette]) -> int:
    """The longest side to work at: more than ``WORK_SIDE`` where the objects are small in their pictures."""
    shares = [share for frame in frames if (share := _extent(frame.mask[0] > 127)) > 0]
    if not shares:
        return WORK_SIDE
    share = float(torch.tensor(shares).median())
    return min(MAX_WORK_SIDE, max(WORK_SIDE, round(WORK_EXTENT / share)))


def _extent(inside: Tensor) -> float:
    """Longest side of the foreground's bounding box, as a share of the picture's longest side."""
    spans = [int(line[-1] - line[0]) + 1 for axis in (0, 1) if len(line := inside.any(dim=axis).nonzero()[:, 0])]
    return max(spans, default=0) / max(inside.shape)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
