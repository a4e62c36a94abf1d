"""Emission-absorption marching that keeps the per-sample opacities, as an Implicitron raymarcher."""

from __future__ import annotations

from typing import Any

import torch
from pytorch3d.implicitron.models.renderer.base import RendererOutput
from pytorch3d.implicitron.models.renderer.raymarcher import RaymarcherBase
from pytorch3d.implicitron.tools.config import registry
from torch import Tensor

from co3d_ensemble.functional.volume_rendering import composite, expected_distance, interval_lengths, rendering_weights


@registry.register
class OpacityRaymarcher(RaymarcherBase, torch.nn.Module):
    """Component: renders on black; the last interval is 0; in training ``aux`` holds ``opacities``, the alpha_i
    (..., n_samples), and ``optical_depth``, the sums of sigma delta (..., 1).

    Works in Implicitron's ``MultiPassEmissionAbsorptionRenderer`` too. Densities must not be negative: activation and
    noise belong to the implicit function, which knows the samples that were skipped.
    """

    def __post_init__(self) -> None:
        pass

    def forward(
        self,
        rays_densities: Tensor,
        rays_features: Tensor,
        aux: dict[str, Any],
        ray_lengths: Tensor,
        ray_deltas: Tensor | None = None,
        density_noise_std: float = 0.0,
        **kwargs: Any,
    ) -> RendererOutput:
        """
        Args:
            rays_densities: per world unit, (..., n_samples, 1).
            rays_features: (..., n_samples, c).
            aux: passed through.
            ray_lengths: distances, (..., n_samples).
            ray_deltas: interval lengths of PyTorch3D 0.7.9's binned bundles, or None.
            density_noise_std: must be 0.

        Returns:
            features (..., c), depths = sum w t (..., 1), masks (..., 1), weights (..., n_samples).

        Raises:
            ValueError: ``density_noise_std`` is not 0.
        """
        if density_noise_std != 0:
            raise ValueError(f"density_noise_std={density_noise_std}: the noise is a setting of the implicit function")
        deltas = interval_lengths(ray_lengths) if ray_deltas is None else ray_deltas
        densities = rays_densities[..., 0]
        weights, opacities, alpha = rendering_weights(densities, deltas)
        if self.training:
            aux = {**aux, "opacities": opacities, "optical_depth": (densities * deltas).sum(dim=-1, keepdim=True)}
        return RendererOutput(
            features=composite(weights, rays_features),
            depths=expected_distance(weights, ray_lengths)[..., None],
            masks=alpha[..., None],
            weights=weights,
            aux=aux,
        )
