"""Every setting of an experiment, with its default and one line of help: the schema behind ``configs/`` and ``--help``.

Plain dataclasses, so that Hydra rejects unknown keys and wrong types by name. The defaults are the published recipe
(CO3D many-view solution, "Training Parameters") where the slides give a figure; files in ``configs/experiment`` hold
only what differs. ``validate`` checks what types cannot.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Iterator

from omegaconf import MISSING, OmegaConf


def setting(default: Any, help: str) -> Any:
    """A dataclass field with a line of help; mutable defaults are copied per instance."""
    metadata = {"help": help}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(eq=False)  # its component is a module, and modules hash by identity
class NeRFConfig:
    """The radiance MLP (Mildenhall et al., ECCV 2020); also the arguments of the component ``NeRFImplicitFunction``."""

    n_layers: int = setting(8, "hidden layers of the trunk")
    n_hidden: int = setting(256, "width of the trunk")
    skip_layers: tuple[int, ...] = setting((5,), "0-based trunk layers that see the encoded point again")
    n_hidden_color: int = setting(128, "width of the colour head")
    n_harmonics_xyz: int = setting(10, "octaves of the point encoding")
    n_harmonics_dir: int = setting(4, "octaves of the direction encoding")
    density_scale: float = setting(10.0, "density per box unit that a raw output of 1 stands for")
    density_bias: float = setting(0.0, "added to the raw density before its activation")
    density_activation: str = setting("softplus", "relu | softplus")
    density_noise_std: float = setting(0.05, "std of the noise on the raw density while training")
    precision: str = setting("float32", "float32 | bfloat16: autocast of the MLP")
    compile: bool = setting(False, "torch.compile the MLP")


@dataclass(eq=False)  # its component is a module, and modules hash by identity
class RendererConfig:
    """Also the arguments of the component ``OccupancyAwareRenderer``."""

    n_pts_per_ray_coarse: int = setting(96, "stratified samples per ray of the coarse pass")
    n_pts_per_ray_fine: int = setting(96, "importance samples that the fine pass adds to the coarse ones")
    occupied_floor: float = setting(0.01, "weight that every occupied coarse sample keeps in importance sampling")


@dataclass(eq=False)  # its component is a module, and modules hash by identity
class TensoRFConfig:
    """The VM-factorized field (Chen et al., ECCV 2022); also the arguments of the component ``TensoRFImplicitFunction``."""

    resolution: int = setting(128, "cube root of the number of voxels that the grid starts with")
    n_density: int = setting(16, "density components per mode")
    n_appearance: int = setting(48, "appearance components per mode")
    n_features: int = setting(27, "appearance features, the input of the colour network")
    n_hidden: int = setting(128, "width of the colour network")
    n_harmonics_features: int = setting(2, "octaves of the encoding of the features")
    n_harmonics_dir: int = setting(2, "octaves of the direction encoding")
    density_shift: float = setting(-10.0, "added to the raw density before its softplus")
    distance_scale: float = setting(25.0, "density per unit of a box whose longest side is 3, that a softplus of 1 stands for")
    init_std: float = setting(0.1, "std of the factors at the start")
    color_threshold: float = setting(1e-4, "samples of a smaller weight get no colour; 0: all occupied samples get one")
    tv_normalization: str = setting("content", "content: the same content costs the same at any resolution | reference: TensoRF's")
    tv_lines: bool = setting(False, "total variation of the lines as well as of the planes")
    precision: str = setting("float32", "float32 | bfloat16: autocast of the colour network")
    compile: bool = setting(False, "torch.compile the colour network")


@dataclass
class GridScheduleConfig:
    """When the VM grid is refined and cropped; shares of ``max_steps``, the published steps over 350,000."""

    final_resolution: int = setting(1024, "cube root of the number of voxels after the last upsampling")
    upsample_at: tuple[float, ...] = setting(
        (30000 / 350000, 50000 / 350000, 65000 / 350000, 91300 / 350000, 116200 / 350000),
        "shares of max_steps; voxel counts grow by equal factors",
    )
    shrink_at: tuple[float, ...] = setting(
        (20000 / 350000, 40000 / 350000), "shares of max_steps at which the box is cropped: to the hull first, then to what is occupied"
    )
    moments: str = setting("map", "map | reset: Adam's moments of the factors when the grid changes")


@dataclass
class OccupancyConfig:
    """The grid that tells both models which samples to skip."""

    enabled: bool = setting(True, "skip samples in empty voxels")
    resolution: int = setting(128, "voxels along the longest side of the box")
    refine_from: float = setting(0.05, "share of max_steps after which the density refines the grid")
    refine_every: float = setting(0.01, "share of max_steps between two refinements")
    opacity_threshold: float = setting(0.005, "a voxel is empty when its opacity over one voxel length stays below this")
    decay: float = setting(0.9, "factor on a voxel's remembered density per refinement")


@dataclass
class CameraJitterConfig:
    """Camera jitter of the recipe, with every reading of the slide; see specs in the README."""

    mode: str = setting("off", "off | view_direction | fixed_gauge | extrinsics")
    angle_std: float = setting(math.pi * 0.0625, "radians: std of the rotation of view_direction and fixed_gauge")
    extrinsics_angle_std: float = setting(0.001, "radians: std of the per-step camera rotation of extrinsics")
    extrinsics_shift_std: float = setting(0.001, "std of the per-step camera shift of extrinsics, in camera distances")


@dataclass
class ImplicitronModelConfig:
    """One of Implicitron's own models, given as its trainer would take it."""

    model_class_type: str = setting("OverfitModel", "OverfitModel | GenericModel")
    args: dict[str, Any] = setting({}, "model_<class>_args in Implicitron's format; loss_weights belong here")
    frames_per_step: int = setting(1, "target photographs per optimisation step")
    precision: str = setting("float32", "float32 | bfloat16: autocast of the implicit functions; their authors trained in float32")
    source_views: int = setting(9, "photographs that features are pooled from, at most in training and at rendering (view pooling only)")
    min_source_views: int = setting(1, "a training step draws its number of source photographs between this and source_views")
    kept_photographs: int = setting(64, "training photographs kept in the weights, of which rendering picks its source views")
    encoder_weights: str | None = setting(None, "file with torchvision's weights of the image encoder; null: random, nothing is downloaded")


@dataclass
class ModelConfig:
    kind: str = setting("nerf", "nerf | tensorf | implicitron")
    nerf: NeRFConfig = setting(NeRFConfig, "radiance MLP of the fine (and by default the coarse) pass")
    tensorf: TensoRFConfig = setting(TensoRFConfig, "VM field, used when kind is tensorf")
    grid: GridScheduleConfig = setting(GridScheduleConfig, "when the VM field's grid changes")
    coarse_overrides: dict[str, Any] = setting({}, "settings of the coarse MLP that differ from model.nerf")
    renderer: RendererConfig = setting(RendererConfig, "samples per ray")
    occupancy: OccupancyConfig = setting(OccupancyConfig, "empty-space skipping")
    camera_jitter: CameraJitterConfig = setting(CameraJitterConfig, "camera jitter while training")
    implicitron: ImplicitronModelConfig = setting(ImplicitronModelConfig, "used when kind is implicitron")


@dataclass
class BoundsConfig:
    mode: str = setting("visual_hull", "visual_hull: box carved from the masks | near_far: fixed distances (not of implicitron models)")
    near: float = setting(3.0, "near distance of near_far, world units")
    far: float = setting(24.0, "far distance of near_far, world units")
    overrides: dict[str, Any] = setting(
        {}, "near_far per '<category>/<subset_name>': [near, far] (on the command line: +data.bounds.overrides=...)"
    )
    hull_tolerance: float = setting(0.05, "share of the masks that may miss a voxel of the hull (bad masks)")
    hull_margin: float = setting(0.05, "margin around the hull, in box sides")


@dataclass
class DataConfig:
    longest_side: int | None = setting(None, "resize frames to this longest side in pixels; null: full size")
    val_share: float = setting(0.05, "share of the known frames held out where the set list has no usable val frames")
    min_known_frames: int = setting(8, "fewest good known frames to train on")
    max_val_frames: int = setting(12, "validation frames rendered per validation, evenly spread")
    bounds: BoundsConfig = setting(BoundsConfig, "where the object may be")


@dataclass
class LoopConfig:
    """What the training loop takes, whatever it trains."""

    max_steps: int = setting(350_000, "optimisation steps; every schedule scales with it")
    budget_minutes: float | None = setting(None, "probe the speed and set max_steps so that training takes this long")
    lr_final: float = setting(0.0, "share of lr at the end of the cosine")
    betas: tuple[float, float] = setting((0.9, 0.999), "Adam's moment decay rates")
    adam_eps: float = setting(1e-8, "Adam's epsilon")
    schedule: str = setting("warmup_cosine", "warmup_cosine | steps (Implicitron's: x0.1 at 50% and 75%)")
    warmup: float = setting(0.01, "share of max_steps with a linear warm-up")
    clip_grad_norm: float | None = setting(1.0, "gradient-norm clip; null: off")
    ema: bool = setting(True, "evaluate an exponential moving average of the weights")
    ema_horizon: float = setting(35.0, "decay = 1 - ema_horizon / max_steps: 0.9999 at 350,000 steps")
    loss_weights: dict[str, float | None] = setting({}, "weight per loss name; null drops a default; an unknown name is an error")
    ramped_losses: tuple[str, ...] = setting((), "losses ramped in linearly after the warm-up")
    ramp: float = setting(0.05, "share of max_steps over which they ramp")
    validate_every: float = setting(0.1, "share of max_steps between validations")
    early_stopping_patience: int | None = setting(None, "stop after this many validations without a better criterion (psnr_masked)")
    checkpoint_every_seconds: float = setting(120.0, "seconds between checkpoints")
    log_every: int = setting(50, "steps between two lines of metrics")
    resume: str = setting("auto", "auto: go on from the last good checkpoint | never: refuse an existing run | restart: discard it")
    seed: int = setting(0, "of weights, sampling and noise")
    deterministic: bool = setting(False, "torch's deterministic algorithms: resumed runs equal uninterrupted ones bit for bit on CPU")
    progress: bool = setting(True, "progress bar")


@dataclass
class TrainingConfig(LoopConfig):
    """Training on rays of one sequence."""

    n_rays: int = setting(1024, "rays per step")
    lr: float = setting(5e-4, "Adam's learning rate after the warm-up; of a VM field: its factors'")
    lr_network: float | None = setting(None, "learning rate of a VM field's basis and colour network; null: lr")
    loss_weights: dict[str, float | None] = setting(
        {
            "loss_roi_rgb": 1.0,
            "loss_prev_stage_roi_rgb": 1.0,
            "loss_alpha_bce": 1.0,
            "loss_prev_stage_alpha_bce": 1.0,
            "loss_sample_entropy": 1e-5,
        },
        "weight per loss name; null drops a default; an unknown name is an error; implicitron models bring their own",
    )
    ramped_losses: tuple[str, ...] = setting(("loss_sample_entropy",), "losses ramped in linearly after the warm-up")


@dataclass
class RenderingConfig:
    chunk_rays: int = setting(16_384, "rays rendered at once")
    all_targets: bool = setting(False, "after training also render every target at its original size, as an export needs it")


@dataclass
class ExperimentConfig:
    """One member model on one sequence."""

    dataset_root: str = setting(MISSING, "CO3Dv2 root folder")
    category: str = setting(MISSING, "e.g. cape")
    subset_name: str = setting("manyview_dev_0", "e.g. manyview_dev_0")
    output_dir: str = setting("outputs", "runs go to <output_dir>/<category>/<subset_name>/<member>")
    member: str = setting("nerf", "name of the run's folder, unique within an ensemble")
    device: str = setting("auto", "auto | cpu | cuda | cuda:N")
    data: DataConfig = setting(DataConfig, "frames and bounds")
    model: ModelConfig = setting(ModelConfig, "what is trained")
    training: TrainingConfig = setting(TrainingConfig, "how it is trained")
    rendering: RenderingConfig = setting(RenderingConfig, "how it is rendered")


FUSION_METHODS = ("auto", "mean", "opacity", "confidence", "agreement", "fitted", "fitted_zones", "weights", "best_member")


@dataclass
class MemberConfig:
    """One member of an ensemble."""

    experiment: str = setting(MISSING, "the experiment that the member is, a file of configs/experiment")
    overrides: list[str] = setting([], "settings of this member only; on the command line members.NAME.overrides.training.seed=1")


@dataclass
class FusionConfig:
    """How members are fused, see ``functional/fusion.py``."""

    method: str = setting("auto", "auto (what wins on validation frames) | " + " | ".join(FUSION_METHODS[1:]))
    weights: dict[str, float] = setting({}, "weight per member, of method weights")
    max_val_frames: int = setting(16, "validation frames that the fusion is chosen on, evenly spread")
    min_gain_psnr: float = setting(0.05, "dB of psnr_masked by which auto must see the plain average beaten")
    min_gain_iou: float = setting(0.001, "IoU by which auto must see the plain average's mask beaten")
    min_standard_errors: float = setting(2.0, "how many standard errors of the paired difference that gain must be")


@dataclass
class EnsembleConfig:
    """Several members on one sequence, and their fusion. Any other setting on the command line goes to every member."""

    dataset_root: str = setting(MISSING, "CO3Dv2 root folder")
    category: str = setting(MISSING, "e.g. cape")
    subset_name: str = setting("manyview_dev_0", "e.g. manyview_dev_0")
    output_dir: str = setting("outputs", "members go to <output_dir>/<category>/<subset_name>/<member>, the fusion to <name> beside them")
    name: str = setting("ensemble", "name of the fusion's folder")
    device: str = setting("auto", "auto | cpu | cuda | cuda:N")
    members: dict[str, MemberConfig] = setting({}, "name -> experiment and overrides (a new one: +members.NAME.experiment=...)")
    overrides: list[str] = setting([], "settings of every member; those of the command line are added")
    fusion: FusionConfig = setting(FusionConfig, "how the members are fused")


MIN_COARSE_SAMPLES = 3  # importance sampling drops the first and the last

# Keys that cannot change the result: a resumed run may differ in them.
FREE_KEYS = (
    "dataset_root",
    "output_dir",
    "device",
    "training.checkpoint_every_seconds",
    "training.log_every",
    "training.resume",
    "training.progress",
    "training.budget_minutes",
    "rendering.chunk_rays",
    "rendering.all_targets",
)

_CHOICES = {
    "model.kind": ("nerf", "tensorf", "implicitron"),
    "model.tensorf.precision": ("float32", "bfloat16"),
    "model.tensorf.tv_normalization": ("content", "reference"),
    "model.grid.moments": ("map", "reset"),
    "model.nerf.density_activation": ("relu", "softplus"),
    "model.nerf.precision": ("float32", "bfloat16"),
    "model.implicitron.precision": ("float32", "bfloat16"),
    "model.camera_jitter.mode": ("off", "view_direction", "fixed_gauge", "extrinsics"),
    "data.bounds.mode": ("visual_hull", "near_far"),
    "training.schedule": ("warmup_cosine", "steps"),
    "training.resume": ("auto", "never", "restart"),
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
    "model.tensorf.n_density",
    "model.tensorf.n_appearance",
    "model.tensorf.n_features",
    "model.tensorf.n_hidden",
    "model.tensorf.distance_scale",
    "model.tensorf.init_std",
    "data.min_known_frames",
)

# allowed interval as people write it; where the type allows null, null is allowed as well
LOOP_RANGES = {
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
    "model.grid.final_resolution": "[2, inf)",
    "training.lr_network": "(0, inf)",
    **LOOP_RANGES,
}


def check_choices(config: Any, choices: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError for a dotted key whose value is none of those that it may have."""
    for key, allowed in choices.items():
        if _value(config, key) not in allowed:
            raise ValueError(f"{key}={_value(config, key)!r}: expected one of {', '.join(allowed)}")


def check_positive(config: Any, keys: Sequence[str]) -> None:
    """Raises ValueError for a dotted key whose value is not positive."""
    for key in keys:
        if not _value(config, key) > 0:
            raise ValueError(f"{key}={_value(config, key)!r}: must be positive")


def check_ranges(config: Any, ranges: Mapping[str, str]) -> None:
    """Raises ValueError for a dotted key whose value lies outside of an interval written like ``(0, 1]``; null is inside."""
    for key, interval in ranges.items():
        value = _value(config, key)
        if value is not None and not _lies_in(value, interval):
            raise ValueError(f"{key}={value}: must lie in {interval}")


def _value(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def validate(config: Any) -> None:
    """Checks values that types cannot.

    Args:
        config: an ``ExperimentConfig`` or an omegaconf node of that shape.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """

    check_choices(config, _CHOICES)
    check_positive(config, _POSITIVE)
    bounds = config.data.bounds
    pairs = {"data.bounds.near, far": (bounds.near, bounds.far)}
    pairs |= {f"data.bounds.overrides.{name}": pair for name, pair in bounds.overrides.items()}
    for name, pair in pairs.items():
        numbers = [value for value in pair if isinstance(value, (int, float))] if isinstance(pair, Sequence) else []
        if len(numbers) != 2 or len(pair) != 2 or not 0 < numbers[0] < numbers[1]:
            raise ValueError(f"{name}={pair}: expected two distances with 0 < near < far")
    check_ranges(config, _RANGES)
    for key in ("upsample_at", "shrink_at"):
        shares = list(getattr(config.model.grid, key))
        if any(not 0 < share < 1 for share in shares) or shares != sorted(shares):
            raise ValueError(f"model.grid.{key}={shares}: expected ascending shares of max_steps in (0, 1)")
    _check_networks(config.model)
    if config.model.kind == "implicitron":
        _check_not_ignored(config)
        _check_source_views(config.model.implicitron)


_FUSION_RANGES = {"max_val_frames": "[1, inf)", "min_gain_psnr": "[0, inf)", "min_gain_iou": "[0, inf)", "min_standard_errors": "[0, inf)"}
_MEMBER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def validate_ensemble(config: Any) -> None:
    """Checks an ``EnsembleConfig``, or an omegaconf node of that shape, as :func:`validate` does an experiment."""
    if len(config.members) < 2:
        raise ValueError(f"members={list(config.members)}: an ensemble needs at least two (+members.NAME.experiment=... adds one)")
    for name in (config.name, *config.members):
        if not _MEMBER_NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be the name of a member's or an ensemble's folder: letters, digits, '_', '.' and '-'")
    if config.name in config.members:
        raise ValueError(f"name={config.name}: a member has that name; the fusion needs a folder of its own")
    if config.fusion.method not in FUSION_METHODS:
        raise ValueError(f"fusion.method={config.fusion.method!r}: expected one of {', '.join(FUSION_METHODS)}")
    for key, interval in _FUSION_RANGES.items():
        if not _lies_in(getattr(config.fusion, key), interval):
            raise ValueError(f"fusion.{key}={getattr(config.fusion, key)}: must lie in {interval}")
    check_fusion_weights(config.fusion, list(config.members))


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


def _lies_in(value: float, interval: str) -> bool:
    """Whether ``value`` lies in an interval written like ``(0, 1]``; nan lies in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


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


def settings_with_help(config_class: type = ExperimentConfig, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yields (dotted key, default, help) of every leaf setting, in declaration order."""
    for entry in fields(config_class):
        value = entry.default_factory() if entry.default_factory is not _MISSING_FACTORY else entry.default  # type: ignore[misc]
        key = prefix + entry.name
        if is_dataclass(value):
            yield from settings_with_help(type(value), key + ".")
        else:
            yield key, value, entry.metadata["help"]


_MISSING_FACTORY = next(f for f in fields(ExperimentConfig) if f.name == "device").default_factory
