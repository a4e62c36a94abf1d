"""Every setting of an experiment, with its default and one line of help: the schema behind ``configs/`` and ``--help``.

Plain dataclasses, so that Hydra rejects unknown keys and wrong types by name. The defaults are the published recipe
(CO3D many-view solution, "Training Parameters") where the slides give a figure; files in ``configs/experiment`` hold
only what differs. ``config_checks.py`` checks what types cannot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from co3d_ensemble.base.precision import AUTO, PRECISION_HELP
from co3d_ensemble.settings import setting


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
    precision: str = setting(AUTO, f"of the MLP; {PRECISION_HELP}")
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
    precision: str = setting(AUTO, f"of the colour network; {PRECISION_HELP}")
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
    refine_share: float | None = setting(
        0.08, "a refinement looks at this many voxels per sample placed since the last one, all where that is enough; null: always at all"
    )
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
    precision: str = setting(AUTO, f"of the implicit functions, whose authors trained in float32; {PRECISION_HELP}")
    source_views: int = setting(9, "photographs that features are pooled from, at most in training and at rendering (view pooling only)")
    min_source_views: int = setting(1, "a training step draws its number of source photographs between this and source_views")
    kept_photographs: int = setting(64, "training photographs kept in the weights, of which rendering picks its source views")
    encoder_weights: str | None = setting(
        None, "file with torchvision's weights of the image encoder; null: random, nothing is downloaded", literal=True
    )


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
    near: float = setting(3.0, "near distance of near_far, world units; a VM field's rays are clipped to its box in either mode")
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
    check_agreement: str = setting("error", "error | warn | off: what to do where cameras and masks contradict each other")


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
    resume: str = setting(
        "auto",
        "auto: go on from the last good checkpoint | extend: go on to more max_steps or budget_minutes, also of a finished run | "
        "never: refuse an existing run | restart: discard it",
    )
    seed: int = setting(0, "of weights, sampling and noise")
    deterministic: bool = setting(False, "torch's deterministic algorithms: resumed runs equal uninterrupted ones bit for bit on CPU")
    progress: bool = setting(True, "progress bar")


@dataclass
class TrainingConfig(LoopConfig):
    """Training on rays of one sequence."""

    n_rays: int = setting(1024, "rays per step")
    validation_share: float | None = setting(
        0.25, "a validation renders at most this many pixels per ray trained on since the last one, evenly spread; null: all pixels"
    )
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

    dataset_root: str = setting(MISSING, "CO3Dv2 root folder", literal=True)
    category: str = setting(MISSING, "e.g. cape", literal=True)
    subset_name: str = setting("manyview_dev_0", "e.g. manyview_dev_0", literal=True)
    output_dir: str = setting("outputs", "runs go to <output_dir>/<category>/<subset_name>/<member>", literal=True)
    member: str = setting("nerf", "name of the run's folder, unique within an ensemble", literal=True)
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

    dataset_root: str = setting(MISSING, "CO3Dv2 root folder", literal=True)
    category: str = setting(
        MISSING, "e.g. cape", literal=True
    )
    subset_name: str = setting("manyview_dev_0", "e.g. manyview_dev_0", literal=True)
    output_dir: str = setting(
        "outputs", "members go to <output_dir>/<category>/<subset_name>/<member>, the fusion to <name> beside them", literal=True
    )
    name: str = setting("ensemble", "name of the fusion's folder", literal=True)
    device: str = setting("auto", "auto | cpu | cuda | cuda:N")
    members: dict[str, MemberConfig] = setting({}, "name -> experiment and overrides (a new one: +members.NAME.experiment=...)")
    overrides: list[str] = setting([], "settings of every member; those of the command line are added")
    fusion: FusionConfig = setting(FusionConfig, "how the members are fused")


RESUME_MODES = ("auto", "extend", "never", "restart")

# What runs from before a setting existed did without it: they go on so, whatever its default is now.
BEFORE_THE_SETTING: dict[str, Any] = {"model.occupancy.refine_share": None, "training.validation_share": None}

# Keys that cannot change the result: a resumed run may differ in them.
FREE_KEYS = (
    "dataset_root",
    "output_dir",
    "device",
    "data.check_agreement",
    "training.checkpoint_every_seconds",
    "training.log_every",
    "training.resume",
    "training.progress",
    "training.budget_minutes",
    "rendering.chunk_rays",
    "rendering.all_targets",
)
