"""What the types of ``config.py`` cannot check of an experiment's or an ensemble's settings."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from omegaconf import MISSING, OmegaConf

from co3d_ensemble.base.paths import plain_part
from co3d_ensemble.base.precision import PRECISION_CHOICES
from co3d_ensemble.config import FUSION_METHODS, RESUME_MODES, BoundsConfig, NeRFConfig, TrainingConfig
from co3d_ensemble.settings import check_betas, check_choices, check_positive, check_ranges, check_shares

logger = logging.getLogger(__name__)

MIN_COARSE_SAMPLES = 3  # importance sampling drops the first and the last

PUBLISHED_OVERRIDES = {"mouse/manyview_test_0": [12.0, 32.0]}  # near and far that nerf_published and tensorf_published have

_CHOICES = {
    "model.kind": ("nerf", "tensorf", "implicitron"),
    "model.tensorf.precision": PRECISION_CHOICES,
    "model.tensorf.tv_normalization": ("content", "reference"),
    "model.grid.moments": ("map", "reset"),
    "model.nerf.density_activation": ("relu", "softplus"),
    "model.nerf.precision": PRECISION_CHOICES,
    "model.implicitron.precision": PRECISION_CHOICES,
    "model.camera_jitter.mode": ("off", "view_direction", "fixed_gauge", "extrinsics"),
    "data.bounds.mode": ("visual_hull", "near_far"),
    "data.check_agreement": ("error", "warn", "off"),
    "training.schedule": ("warmup_cosine", "steps"),
    "training.resume": RESUME_MODES,
}
_POSITIVE = (
    "training.max_steps",
    "training.n_rays",
    "training.lr",
    "training.log_every",
    "rendering.chunk_rays",
    "model.occupancy.resolution",
    "model.nerf.n_layers",
    "model.nerf.n_hidden",
    "model.nerf.n_hidden_color",
    "model.nerf.density_scale",
    "model.tensorf.n_density",
    "model.tensorf.n_appearance",
    "model.tensorf.n_features",
    "model.tensorf.n_hidden",
    "model.tensorf.distance_scale",
    "model.tensorf.init_std",
)

# allowed interval as people write it; where the type allows null, null is allowed as well
LOOP_RANGES = {
    "training.adam_eps": "(0, inf)",
    "training.budget_minutes": "(0, inf)",
    "training.lr_final": "[0, 1]",
    "training.warmup": "[0, 1)",
    "training.ramp": "[0, 1]",
    "training.clip_grad_norm": "(0, inf)",
    "training.ema_horizon": "(0, inf)",
    "training.validate_every": "(0, 1]",
    "training.early_stopping_patience": "[1, inf)",
    "training.checkpoint_every_seconds": "[0, inf)",
}
_RANGES = {
    "data.val_share": "(0, 1)",
    "data.min_known_frames": "[2, inf)",  # where there are no val frames, one is held out and one stays
    "data.longest_side": "[8, inf)",
    "data.max_val_frames": "[1, inf)",
    "data.bounds.hull_tolerance": "[0, 1)",
    "data.bounds.hull_margin": "[0, inf)",
    "model.occupancy.refine_from": "[0, 1]",
    "model.occupancy.refine_every": "(0, 1]",
    "model.occupancy.decay": "[0, 1)",
    "model.occupancy.opacity_threshold": "(0, 1)",
    "model.renderer.n_pts_per_ray_coarse": f"[{MIN_COARSE_SAMPLES}, inf)",
    "model.renderer.n_pts_per_ray_fine": "[1, inf)",
    "model.renderer.occupied_floor": "(0, inf)",
    "model.implicitron.frames_per_step": "[1, inf)",
    "model.implicitron.source_views": "[1, inf)",
    "model.implicitron.min_source_views": "[1, inf)",
    "model.implicitron.kept_photographs": "[1, inf)",
    "model.tensorf.resolution": "[2, inf)",
    "model.tensorf.color_threshold": "[0, 1)",
    "model.tensorf.n_harmonics_features": "[0, inf)",
    "model.tensorf.n_harmonics_dir": "[0, inf)",
    "model.tensorf.density_shift": "(-inf, inf)",
    "model.nerf.n_harmonics_xyz": "[0, inf)",
    "model.nerf.n_harmonics_dir": "[0, inf)",
    "model.nerf.density_bias": "(-inf, inf)",
    "model.nerf.density_noise_std": "[0, inf)",
    "model.camera_jitter.angle_std": "[0, inf)",
    "model.camera_jitter.extrinsics_angle_std": "[0, inf)",
    "model.camera_jitter.extrinsics_shift_std": "[0, inf)",
    "model.grid.final_resolution": "[2, inf)",
    "training.lr_network": "(0, inf)",
    **LOOP_RANGES,
}
_FUSION_RANGES = {
    "fusion.max_val_frames": "[1, inf)",
    "fusion.min_gain_psnr": "[0, inf)",
    "fusion.min_gain_iou": "[0, inf)",
    "fusion.min_standard_errors": "[0, inf)",
}
_MEMBER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def validate(config: Any) -> None:
    """Checks values that types cannot.

    Args:
        config: an ``ExperimentConfig`` or an omegaconf node of that shape.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    _check_names(config, ("category", "subset_name", "member"))
    check_choices(config, _CHOICES)
    check_positive(config, _POSITIVE)
    _check_distances(config.data.bounds)
    _warn_of_unused_distances(config)
    check_ranges(config, _RANGES)
    check_shares(config, ("model.grid.upsample_at", "model.grid.shrink_at"))
    check_betas(config, "training.betas")
    _check_loss_weights(config.training)
    _check_networks(config.model)
    _check_growth(config.model)
    if config.model.kind == "implicitron":
        _check_not_ignored(config)
        _check_source_views(config.model.implicitron)


def validate_ensemble(config: Any) -> None:
    """Checks an ``EnsembleConfig``, or an omegaconf node of that shape, as :func:`validate` does an experiment."""
    _check_names(config, ("category", "subset_name", "name"))
    if len(config.members) < 2:
        raise ValueError(f"members={list(config.members)}: an ensemble needs at least two (+members.NAME.experiment=... adds one)")
    for name in (config.name, *config.members):
        if not _MEMBER_NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be the name of a member's or an ensemble's folder: letters, digits, '_', '.' and '-'")
    if config.name in config.members:
        raise ValueError(f"name={config.name}: a member has that name; the fusion needs a folder of its own")
    check_choices(config, {"fusion.method": FUSION_METHODS})
    check_ranges(config, _FUSION_RANGES)
    check_fusion_weights(config.fusion, list(config.members))


def _check_names(config: Any, keys: Sequence[str]) -> None:
    """That what names the folders of a run is one plain part of a path; a missing one is told where it is needed."""
    for key in keys:
        if not (OmegaConf.is_config(config) and OmegaConf.is_missing(config, key)) and getattr(config, key) != MISSING:
            plain_part(getattr(config, key), key)


def check_fusion_weights(fusion: Any, members: Sequence[str]) -> None:
    """That method ``weights`` has a weight for every member, and no other method has any."""
    weights = dict(fusion.weights)
    if fusion.method != "weights":
        if weights:
            raise ValueError(f"fusion.weights={weights}: only fusion.method=weights takes weights, not {fusion.method}")
        return
    if set(weights) != set(members):
        raise ValueError(f"fusion.weights={weights}: expected a weight for each of {', '.join(members)}")
    if not all(weight >= 0 for weight in weights.values()) or not 0 < sum(weights.values()) < math.inf:
        raise ValueError(f"fusion.weights={weights}: must not be negative, and one of them positive")


def _check_distances(bounds: Any) -> None:
    """Near and far distances, of all sequences and of some."""
    pairs = {"data.bounds.near, far": (bounds.near, bounds.far)}
    pairs |= {f"data.bounds.overrides.{name}": pair for name, pair in bounds.overrides.items()}
    for name, pair in pairs.items():
        numbers = [value for value in pair if isinstance(value, (int, float))] if isinstance(pair, Sequence) else []
        if len(numbers) != 2 or len(pair) != 2 or not 0 < numbers[0] < numbers[1] < math.inf:
            raise ValueError(f"{name}={pair}: expected two finite distances with 0 < near < far")


def _warn_of_unused_distances(config: Any) -> None:
    """A warning, as an ensemble's settings go to its NeRF and its TensoRF alike; the published distances may stand in any preset."""
    bounds, kind = config.data.bounds, config.model.kind
    if kind == "nerf" and bounds.mode == "near_far":
        return
    given = {f"data.bounds.{name}": getattr(bounds, name) for name in ("near", "far")}
    unused = [f"{key}={value}" for key, value in given.items() if value != getattr(BoundsConfig, key.rpartition(".")[2])]
    unused += [f"data.bounds.overrides.{name}={pair}" for name, pair in bounds.overrides.items() if PUBLISHED_OVERRIDES.get(name) != pair]
    if unused:
        told = "a model of kind nerf with data.bounds.mode=near_far"
        logger.warning("%s: without effect, only %s reads it; here model.kind=%s, mode=%s", ", ".join(unused), told, kind, bounds.mode)


def _check_loss_weights(training: Any) -> None:
    """That the weights of the losses are numbers; null drops a loss."""
    for name, weight in training.loss_weights.items():
        if weight is not None and not math.isfinite(weight):
            raise ValueError(f"training.loss_weights.{name}={weight}: must be finite")


def _check_networks(model: Any) -> None:
    """The skip layers of both networks, and that the overrides of the coarse one are settings of a network."""
    known = {entry.name for entry in fields(NeRFConfig)}
    overrides = model.coarse_overrides
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(f"model.coarse_overrides has no {', '.join(unknown)}: expected keys among {', '.join(sorted(known))}")
    coarse = OmegaConf.merge(OmegaConf.structured(NeRFConfig), model.nerf, overrides)  # a wrong type is an error here
    for name, network in (("model.nerf", model.nerf), ("model.coarse_overrides over model.nerf", coarse)):
        skip_layers = list(network.skip_layers)
        if not all(1 <= layer < network.n_layers for layer in skip_layers):
            raise ValueError(f"{name}: skip_layers={skip_layers}: must be trunk layers from 1 to n_layers - 1 = {network.n_layers - 1}")
        if network.precision not in PRECISION_CHOICES:
            raise ValueError(f"{name}: precision={network.precision!r}: expected one of {', '.join(PRECISION_CHOICES)}")


def _check_growth(model: Any) -> None:
    """That the grid of a VM field is refined by its upsamplings, not coarsened."""
    first, last = model.tensorf.resolution, model.grid.final_resolution
    if model.kind == "tensorf" and len(model.grid.upsample_at) > 0 and last < first:
        raise ValueError(
            f"model.grid.final_resolution={last}: must be at least model.tensorf.resolution={first}, which the grid starts with "
            "(model.grid.upsample_at=[] leaves it there)"
        )


def _check_source_views(spec: Any) -> None:
    """Fewer source views in training than at rendering, and enough photographs to render from."""
    views = spec.source_views
    if spec.min_source_views > views:
        raise ValueError(f"model.implicitron.min_source_views={spec.min_source_views}: must be at most source_views={views}")
    if spec.kept_photographs < views:
        raise ValueError(f"model.implicitron.kept_photographs={spec.kept_photographs}: must be at least source_views={views}")


def _check_not_ignored(config: Any) -> None:
    """Settings that an Implicitron model would ignore, because it brings its own."""
    weights = dict(config.training.loss_weights)
    if weights != TrainingConfig().loss_weights and any(weight is not None for weight in weights.values()):
        raise ValueError(
            f"training.loss_weights={weights}: a model of kind implicitron is trained with its own, model.implicitron.args.loss_weights; "
            "leave training.loss_weights out or null"
        )
    if config.data.bounds.mode == "near_far":
        raise ValueError(
            "data.bounds.mode=near_far: a model of kind implicitron takes its distances from model.implicitron.args "
            "(raysampler_class_type=NearFarRaySampler with raysampler_NearFarRaySampler_args.min_depth and max_depth); "
            "use data.bounds.mode=visual_hull"
        )
