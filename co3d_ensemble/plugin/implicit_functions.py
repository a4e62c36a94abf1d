"""Fields as Implicitron implicit functions: unpack a ray bundle, evaluate the occupied samples, pack the answer."""

from __future__ import annotations

from typing import Any

import torch
from pytorch3d.implicitron.models.implicit_function.base import ImplicitFunctionBase
from pytorch3d.implicitron.models.renderer.base import ImplicitronRayBundle
from pytorch3d.implicitron.tools.config import registry
from torch import Tensor

from co3d_ensemble.config import NeRFConfig
from co3d_ensemble.fields.compaction import Compaction
from co3d_ensemble.fields.radiance_mlp import RadianceMLP, density_activation
from co3d_ensemble.functional.cameras import random_rotation_vector, so3_exp


@registry.register
class NeRFImplicitFunction(NeRFConfig, ImplicitFunctionBase, torch.nn.Module):
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
        self.register_buffer("box", torch.tensor([list(self.box_min), list(self.box_max)]))
        if not (self.box[1] > self.box[0]).all():
            raise ValueError(f"box_min={self.box_min} must lie below box_max={self.box_max}")
        self.register_buffer("gauge", so3_exp(random_rotation_vector(self.gauge_angle_std, ())))
        self._compaction = Compaction()
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

    def adapt_capacity(self) -> None:
        """Lets training steps run without waiting for the device from now on; see :class:`Compaction`. This call waits."""
        self._compaction.adapt()

    @property
    def unit(self) -> Tensor:
        """Half of the box's longest side, world units."""
        return (self.box[1] - self.box[0]).max() / 2

    def density_and_color(self, points: Tensor, directions: Tensor, ray: Tensor) -> tuple[Tensor, Tensor]:
        """World points (n, 3), unit directions (n_rays, 3) and each point's ray (n,) to density per world unit (n,) and
        colour (n, 3)."""
        local = (points - self.box.mean(dim=0)) / self.unit @ self.gauge.T
        raw, color = self.mlp(local, directions @ self.gauge.T, ray)
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
            density (..., n_samples, 1) per world unit, colour (..., n_samples, 3) in [0, 1], {}.
        """
        lengths = ray_bundle.lengths
        n_samples = lengths.shape[-1]
        origins, directions = ray_bundle.origins.reshape(-1, 3), ray_bundle.directions.reshape(-1, 3)
        if occupied is None:
            index = sample = torch.arange(lengths.numel(), device=lengths.device)
        else:
            index = self._compaction(occupied) if self.training else occupied.reshape(-1).nonzero()[:, 0]
            sample = index.clamp(max=max(lengths.numel() - 1, 0))  # padding evaluates the last sample and is thrown away
        ray = torch.div(sample, n_samples, rounding_mode="floor")
        points = torch.addcmul(origins[ray], lengths.reshape(-1)[sample, None], directions[ray])
        seen = torch.nn.functional.normalize(directions, dim=-1)
        if self.training and self.view_jitter_angle_std > 0:
            turn = so3_exp(random_rotation_vector(self.view_jitter_angle_std, seen.shape[:1], seen.device))
            seen = (turn @ seen[..., None])[..., 0]
        density, color = self.density_and_color(points, seen, ray)
        if occupied is not None:  # one place more than there are samples, for the padding
            density = density.new_zeros(lengths.numel() + 1).index_copy(0, index, density)[:-1]
            color = color.new_zeros(lengths.numel() + 1, 3).index_copy(0, index, color)[:-1]
        return density.reshape(*lengths.shape, 1), color.reshape(*lengths.shape, 3), {}
