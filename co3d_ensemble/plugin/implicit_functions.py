"""Fields as Implicitron implicit functions: unpack a ray bundle, evaluate the occupied samples, pack the answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from pytorch3d.implicitron.models.implicit_function.base import ImplicitFunctionBase
from pytorch3d.implicitron.models.renderer.base import ImplicitronRayBundle
from pytorch3d.implicitron.tools.config import registry
from torch import Tensor

from co3d_ensemble.config import NeRFConfig, TensoRFConfig
from co3d_ensemble.fields.compaction import Compaction, Selection
from co3d_ensemble.fields.radiance_mlp import RadianceMLP, density_activation
from co3d_ensemble.fields.vm_field import VMField
from co3d_ensemble.functional.cameras import random_rotation_vector, so3_exp
from co3d_ensemble.functional.vm import grid_resolution
from co3d_ensemble.functional.volume_rendering import interval_lengths, rendering_weights


@dataclass(frozen=True)
class _Rays:
    """A bundle's rays as one list, and its samples as one list of them.

    Attributes:
        origins, directions: shape (n_rays, 3).
        lengths: shape (n_rays, n_samples).
    """

    origins: Tensor
    directions: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, bundle: ImplicitronRayBundle) -> _Rays:
        lengths = bundle.lengths.reshape(-1, bundle.lengths.shape[-1])
        return cls(bundle.origins.reshape(-1, 3), bundle.directions.reshape(-1, 3), lengths)

    def every(self) -> Tensor:
        """Index of every sample, (n_rays * n_samples,)."""
        return torch.arange(self.lengths.numel(), device=self.lengths.device)

    def points(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """World points (n, 3) and rays (n,) of samples (n,); the padding of a compaction becomes the last sample."""
        sample = index.clamp(max=max(self.lengths.numel() - 1, 0))  # it is evaluated and thrown away
        ray = torch.div(sample, self.lengths.shape[-1], rounding_mode="floor")
        return torch.addcmul(self.origins[ray], self.lengths.reshape(-1)[sample, None], self.directions[ray]), ray

    def spread(self, values: Tensor, index: Tensor) -> Tensor:
        """Values (n, ...) of samples (n,) among zeros for all the others, (n_rays * n_samples, ...)."""
        room = values.new_zeros(self.lengths.numel() + 1, *values.shape[1:])  # one place more, for the padding
        return room.index_copy(0, index, values)[:-1]


class _FunctionInBox:
    """What the fields' components share: the object's box, the jitter that belongs to a field, selection of samples.

    A component that inherits it has the settings ``box_min``, ``box_max``, ``gauge_angle_std``, ``view_jitter_angle_std``.
    """

    def _set_up_box(self) -> None:
        self.register_buffer("box", torch.tensor([list(self.box_min), list(self.box_max)]))
        if not (self.box[1] > self.box[0]).all():
            raise ValueError(f"box_min={self.box_min} must lie below box_max={self.box_max}")
        self.register_buffer("gauge", so3_exp(random_rotation_vector(self.gauge_angle_std, ())))
        self._compaction = Compaction()

    @property
    def center(self) -> Tensor:
        return self.box.mean(dim=0)

    def rooms(self) -> tuple[Compaction, ...]:
        """What bounds the samples of a training step; see :class:`Compaction`."""
        return (self._compaction,)

    def _select(self, chosen: Tensor, compaction: Compaction) -> Selection:
        """The chosen samples (bool, (..., n_samples)) in the flat list; of fixed number in training, where there is a capacity."""
        if self.training:
            return compaction(chosen.reshape(-1, chosen.shape[-1]))
        return Selection(chosen.reshape(-1).nonzero()[:, 0], None)

    def _seen_directions(self, directions: Tensor) -> Tensor:
        """Unit directions (n_rays, 3) for the colour head, in the field's gauge; in training with the view jitter."""
        seen = torch.nn.functional.normalize(directions, dim=-1)
        if self.training and self.view_jitter_angle_std > 0:
            turn = so3_exp(random_rotation_vector(self.view_jitter_angle_std, seen.shape[:1], seen.device))
            seen = (turn @ seen[..., None])[..., 0]
        return seen @ self.gauge.T


@registry.register
class NeRFImplicitFunction(_FunctionInBox, NeRFConfig, ImplicitFunctionBase, torch.nn.Module):
    """Component: NeRF's MLP on box coordinates. Settings: ``co3d_ensemble.config.NeRFConfig`` and those below.

    Points enter in units of the object's box: ``(x - centre) / (half of its longest side)``, and density leaves per
    world unit, so results do not depend on the scene's scale.

    Args:
        box_min, box_max: the object's box in world units; set once, kept in the state dict.
        gauge_angle_std: camera jitter "fixed_gauge": std in radians of one random rotation of the world per model.
        view_jitter_angle_std: camera jitter "view_direction": std in radians of a rotation, drawn per ray and step in
            training, of the direction that the colour head sees.
    """

    box_min: tuple[float, float, float] = (-1.0, -1.0, -1.0)
    box_max: tuple[float, float, float] = (1.0, 1.0, 1.0)
    gauge_angle_std: float = 0.0
    view_jitter_angle_std: float = 0.0

    def __post_init__(self) -> None:
        self._set_up_box()
        density_activation(torch.zeros(1), self.density_activation)  # refuses an unknown name now, not at the first step
        self.mlp = RadianceMLP(
            n_layers=self.n_layers,
            n_hidden=self.n_hidden,
            skip_layers=self.skip_layers,
            n_hidden_color=self.n_hidden_color,
            n_harmonics_xyz=self.n_harmonics_xyz,
            n_harmonics_dir=self.n_harmonics_dir,
            precision=self.precision,
            compile=self.compile,
        )

    @staticmethod
    def allows_multiple_passes() -> bool:
        return True

    @property
    def unit(self) -> Tensor:
        """Half of the box's longest side, world units."""
        return (self.box[1] - self.box[0]).max() / 2

    def density(self, points: Tensor) -> Tensor:
        """Density per world unit (n,) at world points (n, 3), in training with its noise."""
        direction = points.new_tensor([[0.0, 0.0, 1.0]])
        return self._density_and_color(points, direction, torch.zeros(len(points), dtype=torch.long, device=points.device))[0]

    def _density_and_color(self, points: Tensor, seen: Tensor, ray: Tensor) -> tuple[Tensor, Tensor]:
        raw, color = self.mlp((points - self.center) / self.unit @ self.gauge.T, seen, ray)
        if self.training and self.density_noise_std > 0:
            raw = raw + torch.randn_like(raw) * self.density_noise_std
        density = density_activation(raw + self.density_bias, self.density_activation)
        return density * (self.density_scale / self.unit), color

    def forward(
        self, *, ray_bundle: ImplicitronRayBundle, occupied: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """
        Args:
            ray_bundle: origins, directions (..., 3), lengths (..., n_samples).
            occupied: samples to evaluate, bool (..., n_samples); None: all. The others get density 0.

        Returns:
            density (..., n_samples, 1) per world unit, colour (..., n_samples, 3) in [0, 1], and ``counted`` (..., bool) where the
            room for samples is bounded: rays that were evaluated. The losses are means over those.
        """
        rays, shape = _Rays.of(ray_bundle), ray_bundle.lengths.shape
        index, whole = Selection(rays.every(), None) if occupied is None else self._select(occupied, self._compaction)
        points, ray = rays.points(index)
        density, color = self._density_and_color(points, self._seen_directions(rays.directions), ray)
        if occupied is not None:
            density, color = rays.spread(density, index), rays.spread(color, index)
        counted = {} if whole is None else {"counted": whole.reshape(shape[:-1])}
        return density.reshape(*shape, 1), color.reshape(*shape, 3), counted


@registry.register
class TensoRFImplicitFunction(_FunctionInBox, TensoRFConfig, ImplicitFunctionBase, torch.nn.Module):
    """Component: a VM-factorized field, in a single pass. Settings: ``co3d_ensemble.config.TensoRFConfig`` and those below.

    Densities are computed first; a sample whose weight along its ray is below ``color_threshold`` gets colour 0 and costs
    no colour network. With a gauge the grid is aligned to the rotated world and covers the rotated box.

    Inside the box the density is small but never 0. Implicitron's ``EmissionAbsorptionRaymarcher`` lets the last sample reach to
    its ``background_opacity``, 1e10 by default, so that a ray that ends there is opaque whatever it meets: set it to 0, or take
    ``OpacityRaymarcher``.

    Args:
        box_min, box_max: the object's box in world units at the start; its longest side is the unit of densities, also
            after the grid was cropped.
        gauge_angle_std, view_jitter_angle_std: as in :class:`NeRFImplicitFunction`.
        param_groups: for Implicitron's optimizer factory, which reads it: group of ``group_learning_rates`` per module
            (``field.basis`` and ``field.mlp`` are the colour network) or parameter; the others are in its default group.
    """

    box_min: tuple[float, float, float] = (-1.0, -1.0, -1.0)
    box_max: tuple[float, float, float] = (1.0, 1.0, 1.0)
    gauge_angle_std: float = 0.0
    view_jitter_angle_std: float = 0.0
    param_groups: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._set_up_box()
        self._color_compaction = Compaction()
        corners = torch.cartesian_prod(*self.box.T)
        local = self.to_field(corners)
        box = torch.stack((local.amin(dim=0), local.amax(dim=0)))
        self.field = VMField(
            box,
            resolution=grid_resolution(self.resolution**3, (box[1] - box[0]).tolist()),
            n_density=self.n_density,
            n_appearance=self.n_appearance,
            n_features=self.n_features,
            n_hidden=self.n_hidden,
            n_harmonics_features=self.n_harmonics_features,
            n_harmonics_dir=self.n_harmonics_dir,
            density_shift=self.density_shift,
            distance_scale=self.distance_scale,
            init_std=self.init_std,
            tv_normalization=self.tv_normalization,
            tv_lines=self.tv_lines,
            precision=self.precision,
            compile=self.compile,
        )

    @staticmethod
    def allows_multiple_passes() -> bool:
        return False

    def rooms(self) -> tuple[Compaction, ...]:
        return (self._compaction, self._color_compaction)

    def to_field(self, points: Tensor) -> Tensor:
        """World points (..., 3) in the frame that the grid is aligned to: rotated by the gauge about the box's centre."""
        return (points - self.center) @ self.gauge.T + self.center

    def density(self, points: Tensor) -> Tensor:
        """Density per world unit (n,) at world points (n, 3)."""
        # the field's unit is a third of its own box, which a gauge makes larger than the object's
        box, of_field = self.box, self.field.initial_box
        return self.field.density(self.to_field(points)) * ((of_field[1] - of_field[0]).max() / (box[1] - box[0]).max())

    def forward(
        self, *, ray_bundle: ImplicitronRayBundle, occupied: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """As :meth:`NeRFImplicitFunction.forward`; the colour of samples with a small weight is 0. ``counted_color`` beside
        ``counted``: rays all of whose colours were evaluated too."""
        rays, shape = _Rays.of(ray_bundle), ray_bundle.lengths.shape
        index, whole = Selection(rays.every(), None) if occupied is None else self._select(occupied, self._compaction)
        density = rays.spread(self.density(rays.points(index)[0]), index).reshape(rays.lengths.shape)
        with torch.no_grad():
            weights, _, _ = rendering_weights(density, interval_lengths(rays.lengths))
            colored, whole_color = self._select(weights > self.color_threshold, self._color_compaction)
        points, ray = rays.points(colored)
        color = rays.spread(self.field.color(self.to_field(points), self._seen_directions(rays.directions), ray), colored)
        counted = {} if whole is None else {"counted": whole.reshape(shape[:-1])}
        if whole_color is not None:
            counted["counted_color"] = (whole_color if whole is None else whole & whole_color).reshape(shape[:-1])
        return density.reshape(*shape, 1), color.reshape(*shape, 3), counted
