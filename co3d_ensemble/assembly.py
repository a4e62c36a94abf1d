"""Configuration to scene to model to task: what a run is put together from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from co3d_ensemble.base.progress import tracked
from co3d_ensemble.base.quoting import literal
from co3d_ensemble.base.spread import evenly_spread
from co3d_ensemble.config import ExperimentConfig, ImplicitronModelConfig, ModelConfig
from co3d_ensemble.config_checks import validate
from co3d_ensemble.data.agreement import check_agreement
from co3d_ensemble.data.audit import audit_subset, hold_out, usable_frames
from co3d_ensemble.data.co3d import CO3DIndex, FrameRecord, Subset
from co3d_ensemble.data.ray_bank import RayBank
from co3d_ensemble.fields.vm_field import PENALTIES
from co3d_ensemble.functional.silhouettes import Silhouette
from co3d_ensemble.functional.types import Frame
from co3d_ensemble.functional.visual_hull import candidate_box, grid_resolution, visual_hull
from co3d_ensemble.mine.co3d_points import SequenceClouds, points_of_frames
from co3d_ensemble.mine.member import completed_settings
from co3d_ensemble.plugin.frames import load_frames
from co3d_ensemble.plugin.implicitron_args import plain
from co3d_ensemble.plugin.implicitron_model import ImplicitronModel
from co3d_ensemble.plugin.mine_model import MINEModel, build_mine_model
from co3d_ensemble.plugin.model import ObjectModel, build_nerf
from co3d_ensemble.plugin.source_views import SourceSettings
from co3d_ensemble.plugin.tensorf_model import build_tensorf
from co3d_ensemble.settings import literal_settings
from co3d_ensemble.training.implicitron_task import ImplicitronTask
from co3d_ensemble.training.ray_bank_task import GridTask, RayBankTask
from co3d_ensemble.training.task import Task
from co3d_ensemble.training.validation import FrameValidation

logger = logging.getLogger(__name__)

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"

ConfigStore.instance().store(name="experiment_schema", node=ExperimentConfig)  # what configs/*.yaml build on


def compose_experiment(overrides: Sequence[str], config_dir: Path = CONFIG_DIR) -> DictConfig:
    """An experiment from ``configs/`` and Hydra overrides (``experiment=nerf_laptop category=cape training.lr=1e-3``).

    Paths and names are taken literally, whatever characters they have, unless they stand in quotes.

    Raises:
        hydra.errors.HydraException, ValueError: an unknown key or experiment, a wrong type or value; the message names it.
    """
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        config = compose("train_sequence", literal(overrides, literal_settings(ExperimentConfig)))
    # Hydra's "+key=value" adds what the schema lacks: refused here like any other unknown key
    OmegaConf.merge(OmegaConf.structured(ExperimentConfig), OmegaConf.to_container(config))
    if _is_mine(config):
        config.model.implicitron.args = completed_settings(plain(config.model.implicitron.args))
    validate(config)
    return config


@dataclass(frozen=True)
class Scene:
    """One sequence, loaded and bounded.

    Attributes:
        subset: usable frames by role.
        train, val: decoded frames at the run's resolution.
        box: of the object, (2, 3), world units: the unit of its coordinates.
        grid_box: what ``hull`` covers, (2, 3); ``box``, or more where the bounds are fixed distances.
        hull: boolean grid over ``grid_box``, all true where the bounds are fixed distances.
        near_far: fixed distances, or None to clip rays to the box.
    """

    subset: Subset
    train: list[Frame]
    val: list[Frame]
    box: Tensor
    grid_box: Tensor
    hull: Tensor
    near_far: tuple[float, float] | None


def usable_subset(config: Any) -> Subset:
    """The experiment's subset after its audit: broken known frames dropped with a warning each, val held out if needed.

    Raises:
        ValueError: a wrong root, category or subset, several sequences in it, or too few usable known frames.
    """
    index = CO3DIndex(config.dataset_root)
    subset = index.subset(config.category, config.subset_name)
    _ = subset.sequence_name  # raises where the subset is no single sequence
    subset = usable_frames(subset, audit_subset(index, subset, decode=True), min_known_frames=config.data.min_known_frames)
    return hold_out(subset, config.data.val_share)


def load_scene(config: Any) -> Scene:
    """Decodes the known and validation frames and bounds the object, per ``config.data``."""
    subset = usable_subset(config)

    known = tracked(subset.known, "reading", "photographs")
    frames = [load_frame(config, record, with_depth=False) for record in known]  # no depth supervision
    val = [load_frame(config, record) for record in evenly_spread(list(subset.val), config.data.max_val_frames)]
    silhouettes = [Silhouette.of(frame) for frame in frames]
    check_agreement(silhouettes, mode=config.data.check_agreement, place=f"{config.category}/{config.subset_name}")
    bounds, longest = config.data.bounds, config.model.occupancy.resolution
    if bounds.mode == "visual_hull":
        box, hull = visual_hull(frames, longest=longest, tolerance=bounds.hull_tolerance, margin=bounds.hull_margin)
        corners = [[round(value, 3) for value in corner] for corner in box.tolist()]
        logger.info("visual hull: box %s, %.1f %% occupied", corners, 100 * hull.float().mean())
        return Scene(subset, frames, val, box, box, hull, None)
    near, far = bounds.overrides.get(f"{config.category}/{config.subset_name}", (bounds.near, bounds.far))
    # no carving: the grid starts full, over a cube that every ray's [near, far] lies in as far as it can show the object
    box = candidate_box(frames)
    center, half = box.mean(dim=0), (far - near) / 2
    grid_box = torch.stack((center - half, center + half))
    return Scene(subset, frames, val, box, grid_box, torch.ones(grid_resolution(grid_box, longest), dtype=torch.bool), (near, far))


def load_frame(config: Any, record: FrameRecord, *, with_depth: bool = True) -> Frame:
    """One frame at the run's resolution; depth only where the audit left it (a damaged map costs the depth, not the frame)."""
    (frame,) = load_frames(
        config.dataset_root,
        config.category,
        config.subset_name,
        [record.key],
        longest_side=config.data.longest_side,
        load_depths="auto" if with_depth and record.depth_path is not None else False,
    )
    return frame


def build_model(config: Any, scene: Scene) -> ObjectModel | ImplicitronModel | MINEModel:
    """The experiment's untrained model for a scene; weights come from torch's default generator."""
    if _is_mine(config):
        model = build_mine_model(**_mine_settings(config.model.implicitron))
        points = points_of_frames(scene.train, scene.subset.known, SequenceClouds(config.dataset_root))
        model.set_sources(scene.train, kept=config.model.implicitron.kept_photographs, points=points)
        return model
    if config.model.kind == "implicitron":
        height, width = scene.train[0].camera.height, scene.train[0].camera.width
        center, radius = scene.box.mean(dim=0), (scene.box[1] - scene.box[0]).norm() / 2
        spec = config.model.implicitron
        return _implicitron_model(
            spec,
            render_size=(height, width),
            scene_sphere=(tuple(center.tolist()), float(radius)),
            training_frames=scene.train,
            encoder_weights=spec.encoder_weights,
        )
    if config.model.kind == "tensorf":
        # rays are clipped to the box whatever the bounds; fixed distances are carved by nothing
        hull = scene.hull if scene.near_far is None else None
        return build_tensorf(config.model, box=scene.box, hull=hull, penalties=_penalties(config.training))
    return build_nerf(config.model, box=scene.box, grid_box=scene.grid_box, hull=scene.hull, near_far=scene.near_far)


def _implicitron_model(spec: Any, **scene: Any) -> ImplicitronModel:
    settings = SourceSettings(views=spec.source_views, min_views=spec.min_source_views, kept=spec.kept_photographs)
    return ImplicitronModel(spec.model_class_type, spec.args, source_settings=settings, precision=spec.precision, **scene)


def _is_mine(config: Any) -> bool:
    """Whether the model is MINE, which is an Implicitron model, too, but renders and trains by itself: no adapter stands before it."""
    return config.model.kind == "implicitron" and config.model.implicitron.model_class_type == MINEModel.__name__


def _mine_settings(spec: Any, *, trained: bool = False) -> dict[str, Any]:
    """``MINEModel``'s settings; those of a trained one without the files that it started from, which may be gone."""
    settings = {"encoder_weights": spec.encoder_weights, "precision": spec.precision, **plain(spec.args)}
    return settings | ({"checkpoint": None, "encoder_weights": None} if trained else {})


def _penalties(training: Any) -> list[str]:
    """Penalties of VM factors that have a weight."""
    return [name for name in PENALTIES if training.loss_weights.get(f"loss_{name}") is not None]


def make_task(config: Any, training: Any, scene: Scene, device: torch.device) -> Task:
    """The task that the loop trains; ``training`` replaces ``config.training`` (a budget may have set its steps)."""
    model = build_model(config, scene)
    if config.model.kind == "implicitron":
        return ImplicitronTask(
            model,
            train_frames=scene.train,
            val_frames=scene.val,
            training=training,
            frames_per_step=config.model.implicitron.frames_per_step,
            chunk_rays=config.rendering.chunk_rays,
            device=device,
        )
    make, more = RayBankTask, {}
    if config.model.kind == "tensorf":
        make, more = GridTask, {"resolution": config.model.tensorf.resolution, "grid": config.model.grid}
    return make(
        model.to(device),
        RayBank(scene.train, device),
        FrameValidation.of_run(scene.val, training, training.n_rays),
        training=training,
        occupancy=config.model.occupancy,
        jitter=config.model.camera_jitter,
        chunk_rays=config.rendering.chunk_rays,
        **more,
    )


def model_of_state(config: Any, state: dict[str, Tensor]) -> ObjectModel | ImplicitronModel | MINEModel:
    """An untrained model that the state dict of a trained one fits, without reading the data set."""
    if config.model.kind == "implicitron":
        spec = OmegaConf.merge(OmegaConf.structured(ImplicitronModelConfig), config.model.implicitron)  # of older runs, too
        if _is_mine(config):
            return build_mine_model(**_mine_settings(spec, trained=True))
        return _implicitron_model(spec, render_size=(64, 64))
    model = OmegaConf.merge(OmegaConf.structured(ModelConfig), config.model)
    if model.kind == "tensorf":
        hull = state.get("renderer.occupancy.hull")
        return build_tensorf(model, box=state["functions.0.box"], hull=hull, penalties=_penalties(config.training))
    near_far = state["near_far"].tolist()
    fixed = None if any(value != value for value in near_far) else (near_far[0], near_far[1])
    grid = {name: state.get(f"renderer.occupancy.{name}") for name in ("box", "hull")}
    return build_nerf(model, box=state["box"], grid_box=grid["box"], hull=grid["hull"], near_far=fixed)
