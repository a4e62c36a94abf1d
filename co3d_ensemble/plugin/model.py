"""The model that our trainer trains: Implicitron components put together for one object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import OmegaConf
from pytorch3d.implicitron.models.implicit_function.base import ImplicitFunctionBase
from pytorch3d.implicitron.models.metrics import ViewMetricsBase
from pytorch3d.implicitron.models.renderer.base import BaseRenderer, EvaluationMode, ImplicitronRayBundle, RendererOutput
from pytorch3d.implicitron.tools.config import expand_args_fields, get_default_args, registry
from torch import Tensor, nn

from co3d_ensemble.config import ModelConfig, OccupancyConfig
from co3d_ensemble.fields.compaction import Compaction
from co3d_ensemble.fields.occupancy import OccupancyGrid
from co3d_ensemble.functional.cameras import distance_to_depth, intersect_box, pixel_centers, pixel_rays
from co3d_ensemble.functional.types import SURFACE_ALPHA, PinholeCamera, RayTargets, RenderedView
from co3d_ensemble.functional.visual_hull import grid_resolution
from co3d_ensemble.functional.volume_rendering import stratified_lengths


def build_component(base: type, name: str, settings: Mapping[str, Any]) -> Any:
    """A registered Implicitron component with its defaults overridden by ``settings``.

    Raises:
        ValueError: ``settings`` has a key that the component does not know; the message lists those it does.
    """
    component = registry.get(base, name)
    expand_args_fields(component)
    known = get_default_args(component)
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"{name} has no setting {', '.join(unknown)}; it has: {', '.join(sorted(known))}")
    return component(**OmegaConf.merge(known, dict(settings)))


class ObjectModel(nn.Module):
    """Implicit functions, renderer and view metrics for one object in a known box.

    Attributes:
        functions: the passes in order, the last one is what is shown.
        renderer, view_metrics: components.
        occupancy: the grid that the renderer skips by, or None.
        box: what the grid and the rays are limited to, (2, 3), world units.
        near_far: fixed distances, shape (2,); nan where rays are clipped to ``box`` instead.
        bounded: whether training steps have rooms of fixed size for their samples, which :meth:`follow_counts` fits to the
            counts. :meth:`losses` has ``samples_left_out`` then, how many samples had no room.
    """

    def __init__(
        self,
        functions: list[nn.Module],
        renderer: nn.Module,
        view_metrics: nn.Module,
        *,
        n_pts_per_ray: int,
        box: Tensor,
        near_far: tuple[float, float] | None = None,
        occupancy: OccupancyGrid | None = None,
    ) -> None:
        super().__init__()
        self.functions = nn.ModuleList(functions)
        self.renderer, self.view_metrics = renderer, view_metrics
        self.n_pts_per_ray = n_pts_per_ray
        self.clips_to_box = near_far is None
        self.bounded = False
        self.register_buffer("box", box.clone())
        self.register_buffer("near_far", torch.tensor(near_far or (torch.nan, torch.nan)))
        renderer.set_occupancy(occupancy)

    @property
    def occupancy(self) -> OccupancyGrid | None:
        return self.renderer.occupancy

    @property
    def samples_per_ray(self) -> int:
        """That a step places on a ray, over all passes: every later pass sees those of the first as well."""
        later = len(self.functions) - 1
        return self.n_pts_per_ray + later * (self.n_pts_per_ray + (self.renderer.n_pts_per_ray_fine if later else 0))

    def bundle(self, origins: Tensor, directions: Tensor) -> ImplicitronRayBundle:
        """Coarse samples, stratified in training, on rays (n, 3) with unit directions; bundle of shape (n, n_pts_per_ray)."""
        if self.clips_to_box:
            near, far = intersect_box(origins, directions, self.box)
        else:
            near, far = self.near_far.expand(len(origins), 2).unbind(dim=-1)
        lengths = stratified_lengths(near, far, self.n_pts_per_ray, perturb=self.training)
        return ImplicitronRayBundle(origins=origins, directions=directions, lengths=lengths, xys=origins[:, :2])

    def forward(self, origins: Tensor, directions: Tensor) -> tuple[RendererOutput, ImplicitronRayBundle]:
        bundle = self.bundle(origins, directions)
        mode = EvaluationMode.TRAINING if self.training else EvaluationMode.EVALUATION
        return self.renderer(ray_bundle=bundle, implicit_functions=list(self.functions), evaluation_mode=mode), bundle

    def losses(self, origins: Tensor, directions: Tensor, targets: RayTargets) -> dict[str, Tensor]:
        """Unweighted losses of rays (n, 3); names as in ``RecipeViewMetrics``."""
        output, bundle = self(origins, directions)
        losses = self.view_metrics(raymarched=output, ray_bundle=bundle, targets=targets)
        if self.bounded:
            left_out = [room.left_out for room in self._rooms() if room.left_out is not None]
            losses["samples_left_out"] = sum(left_out, start=output.masks.new_zeros(()))
        return losses

    def parameter_groups(self, lr: float, lr_network: float | None) -> list[dict[str, Any]]:
        """Adam's groups with their learning rates after the warm-up; ``lr_network`` is for fields that are not all network."""
        return [{"params": list(self.parameters()), "name": "field", "lr": lr}]

    @torch.no_grad()
    def render_view(self, camera: PinholeCamera, chunk_rays: int) -> RenderedView:
        """Renders a camera at its own size, ``chunk_rays`` at a time, deterministically.

        Returns:
            On this model's device: colour on black, z depth, mask; see :class:`RenderedView`.
        """
        was_training = self.training
        self.eval()
        camera = camera.to(self.box.device)
        origins, directions = pixel_rays(camera, pixel_centers(camera.height, camera.width, self.box.device))
        rgb, distance, alpha = [], [], []
        for origin, direction in zip(origins.split(chunk_rays), directions.split(chunk_rays)):
            output, _ = self(origin, direction)
            rgb.append(output.features)
            distance.append(output.depths[:, 0])
            alpha.append(output.masks[:, 0])
        self.train(was_training)
        mask = torch.cat(alpha)
        surface = mask > SURFACE_ALPHA
        mean_distance = torch.cat(distance) / mask.clamp_min(SURFACE_ALPHA)
        depth = torch.where(surface, distance_to_depth(mean_distance, directions, camera.R), 0)
        shape = (camera.height, camera.width)
        return RenderedView(
            rgb=torch.cat(rgb).T.reshape(3, *shape).clamp(0, 1), depth=depth.reshape(1, *shape), mask=mask.reshape(1, *shape).clamp(0, 1)
        )

    def follow_counts(self) -> bool:
        """Fits every room for samples to the counts of the last steps, without waiting for the device; see ``Compaction``.

        Returns:
            Whether a room changed, and with it the shapes of the next step.
        """
        return any([room.follow() for room in self._rooms()])

    def forget_counts(self) -> None:
        """Steps take what they need, and wait for the device, until :meth:`follow_counts` is called again: after a change of structure."""
        for room in self._rooms():
            room.restart()

    def _rooms(self) -> list[Compaction]:
        return [room for function in self.functions for room in function.rooms()]

    @torch.no_grad()
    def density(self, points: Tensor) -> Tensor:
        """Largest density over the passes at world points (n, 3): (n,) per world unit. Without noise."""
        was_training = self.training
        self.eval()
        density = torch.stack([function.density(points) for function in self.functions]).amax(dim=0)
        self.train(was_training)
        return density


def build_nerf(
    config: ModelConfig,
    *,
    box: Tensor,
    hull: Tensor | None,
    near_far: tuple[float, float] | None,
    grid_box: Tensor | None = None,
) -> ObjectModel:
    """The recipe's NeRF: coarse and fine MLP, occupancy-aware renderer, recipe losses.

    Args:
        config: ``kind`` must be ``nerf``.
        box: the object's box, (2, 3), world units: unit of the MLP's coordinates, limit of the rays unless ``near_far``.
        hull: boolean grid over ``grid_box``, or None for a grid that starts out full.
        near_far: fixed distances in world units, or None to clip rays to the box.
        grid_box: what the occupancy grid covers, (2, 3); None: ``box``. Samples outside it are never evaluated.
    """
    config = OmegaConf.merge(OmegaConf.structured(ModelConfig), config)
    grid_box = box if grid_box is None else grid_box
    settings = OmegaConf.to_container(config.nerf) | box_settings(config, box)
    functions = [
        build_component(ImplicitFunctionBase, "NeRFImplicitFunction", settings | dict(config.coarse_overrides)),
        build_component(ImplicitFunctionBase, "NeRFImplicitFunction", settings),
    ]
    functions[0].gauge.copy_(functions[1].gauge)  # one world, one gauge
    renderer = build_component(BaseRenderer, "OccupancyAwareRenderer", OmegaConf.to_container(config.renderer))
    return ObjectModel(
        functions,
        renderer,
        build_component(ViewMetricsBase, "RecipeViewMetrics", {}),
        n_pts_per_ray=config.renderer.n_pts_per_ray_coarse,
        box=box,
        near_far=near_far,
        occupancy=build_occupancy(config.occupancy, grid_box, hull),
    )


def box_settings(config: ModelConfig, box: Tensor) -> dict[str, Any]:
    """What a field's component takes besides its own settings: the object's box (2, 3) and the jitter that belongs to a field."""
    jitter = config.camera_jitter
    return {
        "box_min": box[0].tolist(),
        "box_max": box[1].tolist(),
        "gauge_angle_std": jitter.angle_std if jitter.mode == "fixed_gauge" else 0.0,
        "view_jitter_angle_std": jitter.angle_std if jitter.mode == "view_direction" else 0.0,
    }


def build_occupancy(config: OccupancyConfig, box: Tensor, hull: Tensor | None) -> OccupancyGrid | None:
    """The grid that a renderer skips by, over ``box`` (2, 3), full where ``hull`` is None; None where skipping is off."""
    if not config.enabled:
        return None
    if hull is None:
        hull = torch.ones(grid_resolution(box, config.resolution), dtype=torch.bool, device=box.device)
    return OccupancyGrid(box, hull, opacity_threshold=config.opacity_threshold, decay=config.decay)
