"""The rows of the ablation as data: a new one is a line here.

A row is the preset's recipe of one member without some of its parts (``SWITCHES``) and with further overrides. It is
compared with the row that it builds on: the slides' rows add a part to the one before, the leave-one-out rows take one
part away from the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_WEIGHT = "training.loss_weights"

# what taking a part of the recipe away means, as Hydra overrides
SWITCHES = {
    "ema": ("training.ema=false",),
    "warmup": ("training.warmup=0.0",),
    "entropy": (f"{_WEIGHT}.loss_sample_entropy=null",),
    "jitter": ("model.camera_jitter.mode=off",),
    "occupancy": ("model.occupancy.enabled=false",),
    "bce": (f"{_WEIGHT}.loss_alpha_bce=null", f"{_WEIGHT}.loss_prev_stage_alpha_bce=null"),
    "tv": (f"{_WEIGHT}.loss_tv_density=null", f"{_WEIGHT}.loss_tv_appearance=null"),
    "l1": (f"{_WEIGHT}.loss_l1_density=null", f"{_WEIGHT}.loss_l1_appearance=null"),
    "l1_appearance": (f"{_WEIGHT}.loss_l1_appearance=null",),
    "distance_scale": ("model.tensorf.distance_scale=1.0",),
}

_NERF_FULL_RGB = (
    f"{_WEIGHT}.loss_roi_rgb=null",
    f"{_WEIGHT}.loss_prev_stage_roi_rgb=null",
    f"++{_WEIGHT}.loss_rgb=1.0",
    f"++{_WEIGHT}.loss_prev_stage_rgb=1.0",
)
_TENSORF_FULL_RGB = (f"{_WEIGHT}.loss_roi_rgb=null", f"++{_WEIGHT}.loss_rgb=1.0")
_NERF_BOTH_RGB = _NERF_FULL_RGB[2:]
_TENSORF_BOTH_RGB = (f"++{_WEIGHT}.loss_rgb=1.0",)


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: of its runs' folders and in the table.
        kind: ``nerf`` or ``tensorf``: trained from that recipe of the preset; ``choice``: the one of
            ``members`` that validates best, over the whole table; ``ensemble``: ``members`` fused. The last two train nothing.
        builds_on: the row that the differences are against, or None.
        what: the change, in a few words.
        without: parts taken from the preset's recipe, keys of ``SWITCHES``.
        overrides: further Hydra overrides.
        members: rows that are chosen from or fused.
        method: of the fusion, see ``co3d_ensemble/config.py``.
        optional: only in a table that names it.
    """

    name: str
    kind: str
    builds_on: str | None
    what: str
    without: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    method: str = "auto"
    optional: bool = False

    @property
    def is_trained(self) -> bool:
        return self.kind in ("nerf", "tensorf")

    def recipe(self) -> list[str]:
        """Overrides on top of the preset's recipe."""
        return [*(override for part in self.without for override in SWITCHES[part]), *self.overrides]


def _factor_weights(loss: str, weight: float) -> tuple[str, ...]:
    return tuple(f"{_WEIGHT}.loss_{loss}_{factor}={weight}" for factor in ("density", "appearance"))


def _jitter(mode: str) -> tuple[str, ...]:
    return (f"model.camera_jitter.mode={mode}",)


_NERF_ROWS = (
    Row("nerf_baseline", "nerf", None, "NeRF without EMA, warm-up, entropy, jitter", without=("ema", "warmup", "entropy", "jitter")),
    Row("nerf_ema_warmup", "nerf", "nerf_baseline", "+ EMA and warm-up", without=("entropy", "jitter")),
    Row("nerf_entropy", "nerf", "nerf_ema_warmup", "+ sample entropy", without=("jitter",)),
    Row("nerf_jitter_view_direction", "nerf", "nerf_entropy", "+ camera jitter: view direction", overrides=_jitter("view_direction")),
    Row("nerf_jitter_fixed_gauge", "nerf", "nerf_entropy", "+ camera jitter: fixed gauge", overrides=_jitter("fixed_gauge")),
    Row("nerf_jitter_extrinsics", "nerf", "nerf_entropy", "+ camera jitter: extrinsics", overrides=_jitter("extrinsics")),
)
_FUSED = ("nerf_best", "tensorf")

ROWS = (
    *_NERF_ROWS,
    Row("tensorf", "tensorf", None, "TensoRF, whole recipe"),
    Row("nerf_best", "choice", None, "the NeRF row above that validates best", members=tuple(row.name for row in _NERF_ROWS)),
    Row("ensemble", "ensemble", "nerf_best", "+ ensemble: plain average with TensoRF", members=_FUSED, method="mean"),
    Row("ensemble_over_tensorf", "ensemble", "tensorf", "the same against TensoRF alone", members=_FUSED, method="mean"),
    Row("ensemble_auto", "ensemble", "ensemble", "fusion that wins on validation, not the plain average", members=_FUSED),
    Row("tensorf_no_tv", "tensorf", "tensorf", "- TV", without=("tv",)),
    Row("tensorf_tv_lines", "tensorf", "tensorf", "+ TV on lines", overrides=("model.tensorf.tv_lines=true",)),
    Row("tensorf_no_l1", "tensorf", "tensorf", "- L1", without=("l1",)),
    Row("tensorf_l1_density_only", "tensorf", "tensorf", "L1 on density only", without=("l1_appearance",)),
    Row("tensorf_no_distance_scale", "tensorf", "tensorf", "- distance scale (1 in place of 25)", without=("distance_scale",)),
    Row("tensorf_no_occupancy", "tensorf", "tensorf", "- occupancy skipping, box shrink", without=("occupancy",)),
    Row("tensorf_full_rgb", "tensorf", "tensorf", "RGB of whole pictures, not of the ROI", overrides=_TENSORF_FULL_RGB),
    Row("tensorf_both_rgb", "tensorf", "tensorf", "RGB of the ROI and of whole pictures", overrides=_TENSORF_BOTH_RGB),
    Row("tensorf_no_bce", "tensorf", "tensorf", "- BCE", without=("bce",)),
    Row("nerf_no_occupancy", "nerf", "nerf_entropy", "- occupancy skipping", without=("jitter", "occupancy")),
    Row("nerf_full_rgb", "nerf", "nerf_entropy", "RGB of whole pictures, not of the ROI", without=("jitter",), overrides=_NERF_FULL_RGB),
    Row(
        "nerf_both_rgb",
        "nerf",
        "nerf_entropy",
        "RGB of the ROI and of whole pictures",
        without=("jitter",),
        overrides=_NERF_BOTH_RGB,
    ),
    Row("nerf_no_bce", "nerf", "nerf_entropy", "- BCE", without=("jitter", "bce")),
    # other readings, for when a row above surprises
    Row(
        "nerf_full_rgb_no_bce",
        "nerf",
        "nerf_full_rgb",
        "- BCE",
        without=("jitter", "bce"),
        overrides=_NERF_FULL_RGB,
        optional=True,
    ),
    Row(
        "nerf_entropy_x100",
        "nerf",
        "nerf_entropy",
        "sample entropy, weight x 100",
        without=("jitter",),
        overrides=(f"{_WEIGHT}.loss_sample_entropy=1e-3",),
        optional=True,
    ),
    Row("tensorf_tv_x10", "tensorf", "tensorf", "TV, weights x 10", overrides=_factor_weights("tv", 10.0), optional=True),
    Row("tensorf_l1_x10", "tensorf", "tensorf", "L1, weights x 10", overrides=_factor_weights("l1", 5e-4), optional=True),
    Row("tensorf_no_bce_no_l1", "tensorf", "tensorf_no_bce", "- L1 as well", without=("bce", "l1"), optional=True),
    Row("tensorf_no_entropy", "tensorf", "tensorf", "- sample entropy", without=("entropy",), optional=True),
    Row("tensorf_no_ema_warmup", "tensorf", "tensorf", "- EMA and warm-up", without=("ema", "warmup"), optional=True),
    Row(
        "tensorf_reset_moments",
        "tensorf",
        "tensorf",
        "Adam's moments start anew at grid changes",
        overrides=("model.grid.moments=reset",),
        optional=True,
    ),
    Row(
        "tensorf_jitter_fixed_gauge",
        "tensorf",
        "tensorf",
        "+ camera jitter: fixed gauge",
        overrides=_jitter("fixed_gauge"),
        optional=True,
    ),
)


def rows_named(names: Sequence[str]) -> tuple[Row, ...]:
    """The rows of these names in the table's order, with those that they choose from or fuse.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    known = {row.name: row for row in ROWS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"rows={unknown}: no such rows; there are {', '.join(known)}")
    wanted, left = set(), list(names)
    while left:
        row = known[left.pop()]
        if row.name not in wanted:
            wanted.add(row.name)
            left.extend(row.members)
    return tuple(row for row in ROWS if row.name in wanted)
