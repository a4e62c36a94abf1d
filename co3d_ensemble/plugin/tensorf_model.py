"""The recipe's TensoRF: one VM field, whose grid grows and is cropped while it is trained."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
from omegaconf import OmegaConf
from pytorch3d.implicitron.models.implicit_function.base import ImplicitFunctionBase
from pytorch3d.implicitron.models.metrics import ViewMetricsBase
from pytorch3d.implicitron.models.renderer.base import BaseRenderer
from torch import Tensor

from co3d_ensemble.config import ModelConfig
from co3d_ensemble.fields.vm_field import PENALTIES, Mapped, VMField
from co3d_ensemble.functional.visual_hull import voxel_centers
from co3d_ensemble.functional.vm import grid_resolution
from co3d_ensemble.plugin.model import ObjectModel, box_settings, build_component, build_occupancy

logger = logging.getLogger(__name__)

_FIELD = "functions.0.field."
_LOSS = "loss_"


class TensoRFModel(ObjectModel):
    """An :class:`ObjectModel` with one ``TensoRFImplicitFunction``, its penalties, and changes of its grid.

    Rays are always clipped to ``box``, which shrinks with the field. :meth:`losses` has no penalties; see :meth:`add_penalties`.
    (In an Implicitron model the component ``VMRegularization`` computes them.)

    Attributes:
        penalty_names: of the penalties that the model is trained with, as losses (``loss_tv_density``).

    Raises:
        ValueError: an unknown penalty.
    """

    def __init__(self, function: torch.nn.Module, *args: Any, penalties: Collection[str], **kwargs: Any) -> None:
        super().__init__([function], *args, **kwargs)
        unknown = sorted(set(penalties) - set(PENALTIES))
        if unknown:
            raise ValueError(f"unknown penalties {unknown}: expected some of {', '.join(PENALTIES)}")
        self.penalty_names = tuple(_LOSS + name for name in penalties)

    @property
    def field(self) -> VMField:
        return self.functions[0].field

    def add_penalties(self, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """Unweighted values of the penalties in ``weights`` (names of losses); the gradient of their weighted sum is added to
        the factors' ``grad``, after the backward pass of the losses: at high resolution a gradient of its own would be the
        larger part of the step."""
        values = self.field.add_penalties({name.removeprefix(_LOSS): weight for name, weight in weights.items()})
        return {_LOSS + name: value for name, value in values.items()}

    def parameter_groups(self, lr: float, lr_network: float | None) -> list[dict[str, Any]]:
        """The factors at ``lr``, basis and colour network at ``lr_network`` (None: ``lr``)."""
        return [
            {"params": self.field.factors(), "name": "factors", "lr": lr},
            {"params": self.field.network(), "name": "network", "lr": lr if lr_network is None else lr_network},
        ]

    def upsample(self, n_voxels: int) -> Mapped:
        """Brings the field to ``n_voxels`` nearly cubic voxels by linear interpolation.

        Returns:
            The same linear operation for tensors that belong to parameters of this model, by name.
        """
        mapped = self.field.upsample(grid_resolution(n_voxels, (self.field.box[1] - self.field.box[0]).tolist()))
        logger.info("grid of %s vertices", " x ".join(str(count) for count in self.field.resolution))
        return _by_model_name(mapped)

    @torch.no_grad()
    def shrink(self, *, to_hull: bool = False) -> Mapped:
        """Crops field and rays to the occupied voxels of the occupancy grid; changes nothing without one, or if none is left.

        Args:
            to_hull: crop to the carved hull instead, which no density has a say in. A grid that was not carved has none.

        Returns:
            As :meth:`upsample`.
        """
        grid = self.occupancy
        if grid is None:
            return lambda name, tensor: tensor
        kept = grid.hull if to_hull and not bool(grid.hull.all()) else grid.occupied
        cells = kept.nonzero()
        if len(cells) == 0:
            return lambda name, tensor: tensor
        size = (grid.box[1] - grid.box[0]) / torch.tensor(kept.shape, device=grid.box.device)
        low, high = grid.box[0] + cells.amin(dim=0) * size, grid.box[0] + (cells.amax(dim=0) + 1) * size
        self.box.copy_(torch.stack((torch.maximum(self.box[0], low), torch.minimum(self.box[1], high))))
        centers = voxel_centers(grid.box, tuple(kept.shape))[kept]
        local = self.functions[0].to_field(centers)
        reach = (self.functions[0].gauge.abs() @ size) / 2  # of a rotated voxel along the field's axes
        mapped = self.field.crop(torch.stack((local.amin(dim=0) - reach, local.amax(dim=0) + reach)))
        logger.info("box cropped to %s: grid of %s vertices", _rounded(self.box), " x ".join(map(str, self.field.resolution)))
        return _by_model_name(mapped)


def _by_model_name(mapped: Mapped) -> Mapped:
    def by_name(name: str, tensor: Tensor) -> Tensor:
        return mapped(name.removeprefix(_FIELD), tensor) if name.startswith(_FIELD) else tensor

    return by_name


def _rounded(box: Tensor) -> list[list[float]]:
    return [[round(value, 3) for value in corner] for corner in box.tolist()]


def build_tensorf(
    config: ModelConfig, *, box: Tensor, hull: Tensor | None, penalties: Collection[str] = PENALTIES
) -> TensoRFModel:
    """The recipe's TensoRF: a single pass, occupancy-aware renderer, recipe losses and penalties.

    Args:
        config: ``kind`` must be ``tensorf``; ``renderer.n_pts_per_ray_coarse`` is the number of samples per ray.
        box: the object's box, (2, 3), world units: the grid's extent at the start, the limit of the rays.
        hull: boolean grid over ``box``, or None for an occupancy grid that starts out full.
        penalties: those to train with, among ``vm_field.PENALTIES``; what has no weight need not be paid for.
    """
    config = OmegaConf.merge(OmegaConf.structured(ModelConfig), config)
    settings = OmegaConf.to_container(config.tensorf) | box_settings(config, box)
    return TensoRFModel(
        build_component(ImplicitFunctionBase, "TensoRFImplicitFunction", settings),
        build_component(BaseRenderer, "OccupancyAwareRenderer", OmegaConf.to_container(config.renderer)),
        build_component(ViewMetricsBase, "RecipeViewMetrics", {}),
        n_pts_per_ray=config.renderer.n_pts_per_ray_coarse,
        box=box,
        occupancy=build_occupancy(config.occupancy, box, hull),
        penalties=penalties,
    )
