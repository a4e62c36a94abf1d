"""The multi-pass renderer that skips empty samples, as an Implicitron renderer.

No postponed annotations here: Implicitron reads the type of ``raymarcher`` when it expands the class.
"""

import copy
from typing import Any

import torch
from pytorch3d.implicitron.models.renderer.base import BaseRenderer, EvaluationMode, ImplicitronRayBundle, RendererOutput
from pytorch3d.implicitron.models.renderer.raymarcher import RaymarcherBase
from pytorch3d.implicitron.tools.config import registry, run_auto_creation
from torch import Tensor

from co3d_ensemble.config import RendererConfig
from co3d_ensemble.fields.occupancy import OccupancyGrid
from co3d_ensemble.functional.volume_rendering import importance_lengths


@registry.register
class OccupancyAwareRenderer(RendererConfig, BaseRenderer, torch.nn.Module):
    """Component: coarse and fine passes as in NeRF; samples in empty voxels are never evaluated.

    Settings: ``co3d_ensemble.config.RendererConfig`` (``n_pts_per_ray_coarse`` belongs to whoever makes the bundle).
    ``occupancy`` is None until :meth:`set_occupancy`; every sample is evaluated then.

    Importance sampling draws from ``w_i + occupied_floor * occupied_i``: samples are spent in occupied space even where
    the coarse pass does not see the surface yet, and never in space known to be empty.
    """

    raymarcher_class_type: str = "OpacityRaymarcher"
    raymarcher: RaymarcherBase

    def __post_init__(self) -> None:
        self.occupancy: OccupancyGrid | None = None
        run_auto_creation(self)

    def set_occupancy(self, occupancy: OccupancyGrid | None) -> None:
        self.occupancy = occupancy

    def forward(
        self,
        ray_bundle: ImplicitronRayBundle,
        implicit_functions: list[Any],
        evaluation_mode: EvaluationMode = EvaluationMode.EVALUATION,
        **kwargs: Any,
    ) -> RendererOutput:
        """Passes ``implicit_functions`` in turn; each later one sees the earlier one's samples and ``n_pts_per_ray_fine`` more.

        Returns:
            The last pass's output; ``prev_stage`` chains to the earlier ones.

        Raises:
            ValueError: no implicit function, or a bundle of intervals (``bins``), which this renderer does not support.
        """
        if not implicit_functions:
            raise ValueError("a renderer needs at least one implicit function")
        if getattr(ray_bundle, "bins", None) is not None:
            raise ValueError("cast_ray_bundle_as_cone=True makes bundles of intervals; OccupancyAwareRenderer needs points")
        output, occupied = None, None
        for function in implicit_functions:
            if output is not None:
                ray_bundle = self._refined(ray_bundle, output.weights, occupied, evaluation_mode)
                output.weights = None
            occupied = self._occupied(ray_bundle)
            previous = output
            skip = {} if occupied is None else {"occupied": occupied}
            output = self.raymarcher(*function(ray_bundle=ray_bundle, **skip), ray_lengths=ray_bundle.lengths)
            output.prev_stage = previous
        output.weights = None
        return output

    def _occupied(self, bundle: ImplicitronRayBundle) -> Tensor | None:
        if self.occupancy is None:
            return None
        with torch.no_grad():
            return self.occupancy.along_rays(bundle.origins, bundle.directions, bundle.lengths)

    def _refined(
        self, bundle: ImplicitronRayBundle, weights: Tensor, occupied: Tensor | None, mode: EvaluationMode
    ) -> ImplicitronRayBundle:
        floor = self.occupied_floor if occupied is None else self.occupied_floor * occupied.to(weights.dtype)
        fine = importance_lengths(
            bundle.lengths, weights.detach() + floor, self.n_pts_per_ray_fine, perturb=mode == EvaluationMode.TRAINING
        )
        refined = copy.copy(bundle)
        refined.lengths = torch.cat((bundle.lengths, fine), dim=-1).sort(dim=-1).values
        return refined
