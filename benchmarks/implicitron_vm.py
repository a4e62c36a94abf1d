"""Implicitron's own VM grid as a task of our trainer: its components, on the rays and samples that one of our tasks draws."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from co3d_ensemble import plugin  # noqa: F401  before anything of PyTorch3D: it may need stand-ins
from co3d_ensemble.config import TensoRFConfig
from co3d_ensemble.data.ray_bank import RayBatch
from co3d_ensemble.functional.losses import alpha_bce_loss, roi_rgb_loss
from co3d_ensemble.plugin.model import build_component
from co3d_ensemble.training.ray_bank_task import GridTask
from co3d_ensemble.training.stepper import INITIALISATION, Stepper, seed_default_generators

# isort: split
from pytorch3d.implicitron.models.implicit_function import voxel_grid_implicit_function  # noqa: F401  registers it
from pytorch3d.implicitron.models.implicit_function.base import ImplicitFunctionBase
from pytorch3d.implicitron.models.renderer import multipass_ea  # noqa: F401  registers it
from pytorch3d.implicitron.models.renderer.base import BaseRenderer, EvaluationMode


class ImplicitronVMTask:
    """A :class:`~co3d_ensemble.training.task.Task`: ``VoxelGridImplicitFunction`` over two ``VMFactorizedVoxelGrid``,
    rendered by ``MultiPassEmissionAbsorptionRenderer`` in one pass, with a colour and a mask loss.

    Its grid has the box, the vertices and the components of ``ours``, its decoder the sizes of ours. It is not meant to be
    trained to the end: Implicitron's decoder ends in a ReLU whatever its settings say.

    Args:
        ours: gives the rays and the samples along them, the box and the grid's vertices.
        settings: of our field.
    """

    loss_weights = {"loss_roi_rgb": 1.0, "loss_alpha_bce": 1.0}

    def __init__(self, ours: GridTask, settings: TensoRFConfig) -> None:
        self._ours = ours
        function = build_component(ImplicitFunctionBase, "VoxelGridImplicitFunction", _function_settings(ours, settings))
        # 1e10, the default, makes every ray opaque for a density that is never 0
        marcher = {"raymarcher_EmissionAbsorptionRaymarcher_args": {"background_opacity": 0.0}}
        renderer = build_component(BaseRenderer, "MultiPassEmissionAbsorptionRenderer", marcher)
        self.model = nn.ModuleDict({"function": function, "renderer": renderer}).to(ours.model.box.device)
        self.rays_per_step = ours.rays_per_step

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters()), "name": "implicitron", "lr": 0.02}]

    def batch(self, step: int) -> RayBatch:
        return self._ours.batch(step)

    def losses(self, batch: RayBatch) -> dict[str, Tensor]:
        bundle = self._ours.model.bundle(batch.origins, batch.directions)
        output = self.model["renderer"](
            ray_bundle=bundle, implicit_functions=[self.model["function"]], evaluation_mode=EvaluationMode.TRAINING
        )
        return {
            "loss_roi_rgb": roi_rgb_loss(output.features, batch.targets.rgb, batch.targets.mask),
            "loss_alpha_bce": alpha_bce_loss(output.masks[..., 0], batch.targets.mask),
        }

    def structure(self, step: int) -> bool:
        return False


def implicitron_stepper(config: DictConfig, ours: GridTask, device: torch.device) -> Stepper:
    """Its training step, with the clipping and the optimizer of ours and without what Implicitron lacks (penalties, EMA)."""
    training = OmegaConf.merge(config.training, {"ema": False, "ramped_losses": []})
    seed_default_generators(training.seed, INITIALISATION)
    task = ImplicitronVMTask(ours, config.model.tensorf)
    task.model.train()
    return Stepper(task, training, deferred=device.type == "cuda")


def _function_settings(ours: GridTask, settings: TensoRFConfig) -> dict[str, Any]:
    box, resolution = ours.model.field.box.cpu(), list(ours.model.field.resolution)

    def grid(n_components: int, n_features: int, basis: bool) -> dict[str, Any]:
        return {
            "extents": (box[1] - box[0]).tolist(),
            "translation": box.mean(dim=0).tolist(),
            "voxel_grid_class_type": "VMFactorizedVoxelGrid",
            "voxel_grid_VMFactorizedVoxelGrid_args": {
                "n_components": n_components,
                "n_features": n_features,
                "basis_matrix": basis,
                "align_corners": True,
                "resolution_changes": {0: resolution},
            },
        }

    network = {
        "n_layers": 3,
        "hidden_dim": settings.n_hidden,
        "output_dim": 3,
        "input_skips": [],
        "last_layer_bias_init": 0.0,
        "use_xavier_init": False,
    }
    return {
        "voxel_grid_density_args": grid(3 * settings.n_density, 1, False),  # its counts are totals of the three modes
        "voxel_grid_color_args": grid(3 * settings.n_appearance, settings.n_features, True),
        "harmonic_embedder_xyz_density_args": {"n_harmonic_functions": 0, "append_input": True},
        "harmonic_embedder_xyz_color_args": {"n_harmonic_functions": settings.n_harmonics_features, "append_input": True},
        "harmonic_embedder_dir_color_args": {"n_harmonic_functions": settings.n_harmonics_dir, "append_input": True},
        "decoder_density_class_type": "ElementwiseDecoder",
        "decoder_density_ElementwiseDecoder_args": {"shift": settings.density_shift, "operation": "SOFTPLUS"},
        "decoder_color_class_type": "MLPDecoder",
        "decoder_color_MLPDecoder_args": {"network_args": network},
    }
