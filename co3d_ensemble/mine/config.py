"""Every setting of MINE, with its default and one line of help: the schema behind ``configs/mine`` and ``--help``.

The defaults are the reference's where it has one (``configs/mine/mine_*.yaml`` hold each data set's own). ``validate`` checks
what types cannot; what depends on the data (its length, whether it has points) is checked where the data are opened.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from co3d_ensemble.base.paths import plain_part
from co3d_ensemble.base.precision import AUTO, PRECISION_CHOICES, PRECISION_HELP
from co3d_ensemble.config import RESUME_MODES, LoopConfig
from co3d_ensemble.config_checks import LOOP_RANGES
from co3d_ensemble.settings import check_betas, check_choices, check_positive, check_ranges, check_shares, setting

DATA_KINDS = ("generated", "co3d", "realestate10k", "kitti_raw", "llff", "flowers")
ENCODERS = ("resnet18", "resnet34", "resnet50", "resnet101")
LOSSES = (
    "loss_rgb_target",
    "loss_ssim_target",
    "loss_smooth_v1_target",
    "loss_smooth_v2_source",
    "loss_smooth_v2_target",
    "loss_disparity_source",
    "loss_disparity_target",
)
DISPARITY_LOSSES = tuple(name for name in LOSSES if "disparity" in name)
SMALLEST_SIDE = 16  # two pixels at the coarsest of the four scales: below, nothing is left to compare


@dataclass
class MINEDataConfig:
    """Which pairs. What only one kind of data takes stands under ``options``, by the names of that data set's arguments."""

    kind: str = setting("generated", " | ".join(DATA_KINDS))
    root: str | None = setting(None, "folder of the data set; generated scenes need none", literal=True)
    height: int = setting(256, "rows of all pictures, pixels")
    width: int = setting(384, "columns of all pictures, pixels")
    n_points: int = setting(256, "sparse points per picture, where the data have any")
    options: dict[str, Any] = setting({}, "arguments of the data set of this kind, for training and validation (+data.options.KEY=VALUE)")
    train_options: dict[str, Any] = setting({}, "the same, for the training pairs only")
    val_options: dict[str, Any] = setting({}, "the same, for the validation pairs only")
    max_val_pairs: int = setting(32, "pairs of the validation split scored per validation, evenly spread")
    workers: int = setting(2, "processes that read pairs; 0: the training process itself")


@dataclass
class MINEModelConfig:
    encoder: str = setting("resnet50", " | ".join(ENCODERS))
    weights: str | None = setting(None, "file with torchvision's weights of the encoder | hub: torch hub's | null: random", literal=True)
    reference_weights: str | None = setting(None, "checkpoint file of MINE's authors that training starts from; null: none", literal=True)
    encoding: str = setting("reference", "reference: disparity and sin/cos(2^k d) | slides: sin/cos(2^k pi d)")
    n_harmonics: int = setting(10, "octaves of the encoding of the disparity")
    mode: str = setting("sigma", "sigma: density | alpha: opacity per plane")
    poolings: int = setting(2, "poolings of the bottleneck, 0 to 2; the reference's 2 leave one pixel of a picture of 128 x 128")
    density_unit: str = setting(
        "depth", "the network's density is per world unit (the reference's) | disparity: per unit of 1 / depth; of no use to mode=alpha"
    )
    density_scale: float = setting(1.0, "density in that unit that an output of 1 stands for (the reference's: 1); of no use to mode=alpha")
    n_planes: int = setting(32, "planes per picture in training; the same weights render with any number")
    n_fine_planes: int = setting(0, "planes added where a first pass finds surfaces (coarse to fine); 0: off")
    near_disparity: float = setting(1.0, "disparity of the nearest plane, 1 / unit of the scene")
    far_disparity: float = setting(0.001, "disparity of the farthest plane")
    blend_source: bool = setting(True, "visible source pixels keep the photograph's colours")
    plane_chunk: int | None = setting(None, "planes decoded at once in rendering, to fit a small card; null: all")
    precision: str = setting(AUTO, f"of the network; {PRECISION_HELP}")
    compile: bool = setting(False, "torch.compile the decoder")


@dataclass
class MINETrainingConfig(LoopConfig):
    """The loop's settings and the recipe's."""

    max_steps: int | None = setting(None, "optimisation steps; null: from epochs, the number of training pairs and batch_size")
    epochs: float | None = setting(None, "passes over the training pairs, where max_steps is null")
    batch_size: int = setting(4, "pairs per step, of all processes together")
    lr_encoder: float = setting(2e-4, "Adam's learning rate of the encoder after the warm-up")
    lr_decoder: float = setting(1e-3, "Adam's learning rate of the decoder after the warm-up")
    weight_decay: float = setting(4e-5, "Adam's L2 penalty")
    schedule: str = setting("warmup_cosine", "warmup_cosine | milestones: x0.1 at each of training.milestones")
    milestones: tuple[float, ...] = setting((), "shares of max_steps, ascending, for schedule=milestones")
    loss_weights: dict[str, float | None] = setting(
        {
            "loss_rgb_target": 1.0,
            "loss_ssim_target": 1.0,
            "loss_smooth_v1_target": None,
            "loss_smooth_v2_source": 0.01,
            "loss_smooth_v2_target": 0.01,
            "loss_disparity_source": 1.0,
            "loss_disparity_target": 1.0,
        },
        "weight per loss name, each a sum over the scales (v1: the full one); null or 0 drops it",
    )
    mirror: bool = setting(False, "show every other training pair in a mirror (the reference does not)")
    multi_scale: bool = setting(True, "all losses but v1 at all four scales, not only at the full one")
    smoothness_gmin: float = setting(2.0, "v1: normalised disparity gradient that costs nothing")
    smoothness_ratio: float = setting(0.1, "v1: share of the picture's largest gradient from which on a pixel is an edge")
    calibrate_scale: bool = setting(True, "the scene's unit is unknown: fit it to the sparse points in every step")
    plane_chunk: int | None = setting(None, "planes decoded at once, the rest computed again: less memory, the same steps; null: all")
    sync_batchnorm: bool = setting(True, "batch-norm statistics over all processes (CUDA only; one process has nothing to synchronise)")


@dataclass
class MINEEvaluationConfig:
    """How validations score, which picks ``best.pt``: one way from a run's first step to its last."""

    n_planes: int | None = setting(None, "planes per picture, of validations and of what renders the run; null: model.n_planes")
    sampling: str = setting("fixed", "fixed: centres of the intervals | stratified: drawn, as the reference does")
    depth_alignment: str = setting("none", "none | scale | median: of predicted depth before it is scored")


@dataclass
class MINEConfig:
    """One run of MINE."""

    output_dir: str = setting("outputs", "runs go to <output_dir>/mine/<name>", literal=True)
    name: str = setting("mine", "name of the run's folder", literal=True)
    device: str = setting("auto", "auto | cpu | cuda | cuda:N; under torchrun each process takes the GPU of its local rank")
    data: MINEDataConfig = setting(MINEDataConfig, "pairs of pictures")
    model: MINEModelConfig = setting(MINEModelConfig, "network and planes")
    training: MINETrainingConfig = setting(MINETrainingConfig, "how it is trained")
    evaluation: MINEEvaluationConfig = setting(MINEEvaluationConfig, "how validations score, which picks best.pt")


# Settings that cannot change the result: a resumed run may differ in them. Those under ``evaluation`` are not among them: with other
# planes a validation's scores are not those that best.pt was chosen by so far.
FREE_KEYS = (
    "output_dir",
    "device",
    "data.root",
    "data.workers",
    "model.plane_chunk",
    "training.plane_chunk",
    "training.checkpoint_every_seconds",
    "training.log_every",
    "training.resume",
    "training.progress",
    "training.budget_minutes",
)

_CHOICES = {
    "data.kind": DATA_KINDS,
    "model.encoder": ENCODERS,
    "model.encoding": ("reference", "slides"),
    "model.mode": ("sigma", "alpha"),
    "model.density_unit": ("depth", "disparity"),
    "model.precision": PRECISION_CHOICES,
    "training.schedule": ("warmup_cosine", "milestones"),
    "training.resume": RESUME_MODES,
    "evaluation.sampling": ("fixed", "stratified"),
    "evaluation.depth_alignment": ("none", "scale", "median"),
}
_POSITIVE = (
    "model.density_scale",
    "training.batch_size",
    "training.lr_encoder",
    "training.lr_decoder",
    "training.log_every",
    "model.far_disparity",
)
_RANGES = {
    "data.height": f"[{SMALLEST_SIDE}, inf)",
    "data.width": f"[{SMALLEST_SIDE}, inf)",
    "data.n_points": "[0, inf)",
    "data.max_val_pairs": "[1, inf)",
    "data.workers": "[0, inf)",
    "model.n_harmonics": "[0, inf)",
    "model.poolings": "[0, 2]",
    "model.n_planes": "[2, inf)",
    "model.n_fine_planes": "[0, inf)",
    "model.near_disparity": "(0, inf)",
    "model.plane_chunk": "[1, inf)",
    "training.max_steps": "[1, inf)",
    "training.epochs": "(0, inf)",
    "training.weight_decay": "[0, inf)",
    "training.plane_chunk": "[1, inf)",
    "training.smoothness_gmin": "[0, inf)",
    "training.smoothness_ratio": "[0, 1]",
    "evaluation.n_planes": "[2, inf)",
    **LOOP_RANGES,
}


def validate(config: Any) -> None:
    """Checks values that types cannot.

    Args:
        config: a ``MINEConfig`` or an omegaconf node of that shape.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    check_choices(config, _CHOICES)
    check_positive(config, _POSITIVE)
    check_ranges(config, _RANGES)
    _check_planes(config.model)
    _check_reference(config.model)
    check_shares(config, ("training.milestones",))
    check_betas(config, "training.betas")
    _check_schedule(config.training)
    _check_losses(config)
    if config.data.kind != "generated" and config.data.root is None:
        raise ValueError(f"data.root is missing: data.kind={config.data.kind} is read from a folder (data.root=FOLDER)")
    plain_part(config.name, "name")


def _check_planes(model: Any) -> None:
    near, far = model.near_disparity, model.far_disparity
    if not near > far:
        raise ValueError(f"model.near_disparity={near}: must be greater than model.far_disparity={far} (a disparity is 1 / z)")


def _check_reference(model: Any) -> None:
    """What the shapes of the authors' weights do not tell; the rest is checked when they are loaded."""
    if model.reference_weights is None:
        return
    if model.weights is not None:
        raise ValueError(f"model.weights={model.weights}: model.reference_weights has weights of the encoder, too; give one of them")
    theirs = {"encoding": "reference", "poolings": 2, "density_unit": "depth", "density_scale": 1.0}
    for name, value in theirs.items():
        if getattr(model, name) != value:
            raise ValueError(f"model.{name}={getattr(model, name)}: the network of model.reference_weights has {value}")


def _check_schedule(training: Any) -> None:
    if training.max_steps is None and training.epochs is None:
        raise ValueError("training.max_steps and training.epochs are both null: one of them must say how long to train")
    milestones = list(training.milestones)
    if milestones and training.schedule != "milestones":
        raise ValueError(f"training.milestones={milestones}: only training.schedule=milestones takes them, not {training.schedule}")
    if training.schedule == "milestones" and not milestones:
        raise ValueError(
            "training.milestones is empty, so training.schedule=milestones would never lower the learning rates: "
            "name shares of max_steps such as [0.4,0.8]"
        )


def _check_losses(config: Any) -> None:
    training = config.training
    weights = dict(training.loss_weights)
    unknown = sorted((weights.keys() | set(training.ramped_losses)) - set(LOSSES))
    if unknown:
        raise ValueError(f"training.loss_weights or ramped_losses name {', '.join(unknown)}: expected {', '.join(LOSSES)}")
    for name, weight in weights.items():
        if weight is not None and not 0 <= weight < math.inf:
            raise ValueError(f"training.loss_weights.{name}={weight}: must not be negative")
    active = active_weights(training)
    if not active.keys() & {"loss_rgb_target", "loss_ssim_target"}:
        raise ValueError("training.loss_weights: loss_rgb_target or loss_ssim_target needs a weight, or no colour is learned")
    dropped = sorted(set(training.ramped_losses) - active.keys())
    if dropped:
        raise ValueError(f"training.ramped_losses={dropped}: have no weight in training.loss_weights")
    if config.data.n_points == 0:
        check_points(config, has_points=False, why="data.n_points=0")


def planes_to_show(config: Any) -> int:
    """Planes per picture wherever a run is rendered and not trained, unless more or fewer are asked for."""
    return config.evaluation.n_planes or config.model.n_planes


def active_weights(training: Any) -> dict[str, float]:
    """Losses that have a weight other than 0."""
    return {str(name): float(weight) for name, weight in training.loss_weights.items() if weight}


def check_points(config: Any, *, has_points: bool, why: str) -> None:
    """Refuses settings that need sparse points where there are none.

    Args:
        why: what says that there are none, for the message.

    Raises:
        ValueError: naming all of them, and what to set them to.
    """
    if has_points:
        return
    wanting = {f"training.loss_weights.{name}": "null" for name in DISPARITY_LOSSES if name in active_weights(config.training)}
    if config.training.calibrate_scale:
        wanting["training.calibrate_scale"] = "false"
    if wanting:
        without = " ".join(f"{key}={value}" for key, value in wanting.items())
        raise ValueError(f"there are no sparse points ({why}) for {', '.join(wanting)}: {without} does without")


def resolve_steps(config: Any, n_pairs: int) -> None:
    """Fills ``training.max_steps`` of an omegaconf node from ``training.epochs``, in place, where it is null.

    Args:
        n_pairs: of the training split.
    """
    if config.training.max_steps is None:
        steps = max(1, round(config.training.epochs * n_pairs / config.training.batch_size))
        OmegaConf.update(config, "training.max_steps", steps)
