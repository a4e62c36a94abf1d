"""The recipe's losses as Implicitron view metrics."""

from __future__ import annotations

from typing import Any

import torch
from pytorch3d.implicitron.models.metrics import ViewMetricsBase
from pytorch3d.implicitron.models.renderer.base import ImplicitronRayBundle, RendererOutput
from pytorch3d.implicitron.tools.config import registry
from pytorch3d.renderer.utils import ndc_grid_sample
from torch import Tensor

from co3d_ensemble.functional.losses import alpha_bce_loss, full_rgb_loss, roi_rgb_loss, sample_entropy_loss
from co3d_ensemble.functional.types import RayTargets


@registry.register
class RecipeViewMetrics(ViewMetricsBase):
    """Component: ``loss_roi_rgb``, ``loss_rgb``, ``loss_alpha_bce``, ``loss_sample_entropy`` of the last pass and, for
    earlier passes, ``loss_prev_stage_roi_rgb`` and so on (the entropy is of the fine pass only). ``loss_rgb`` is that of
    all rays, in place of ``loss_roi_rgb`` or beside it; without a weight it costs a sum over the rays and no gradient."""

    def forward(
        self,
        raymarched: RendererOutput,
        ray_bundle: ImplicitronRayBundle,
        image_rgb: Tensor | None = None,
        depth_map: Tensor | None = None,
        fg_probability: Tensor | None = None,
        mask_crop: Tensor | None = None,
        keys_prefix: str = "loss_",
        targets: RayTargets | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """
        Args:
            raymarched: features (..., 3), masks (..., 1); ``aux`` of ``OpacityRaymarcher`` in training, and of a function whose
                samples had no room for all rays ``counted`` and ``counted_color`` (...): rays that the means are over.
            ray_bundle: ``xys`` (..., 2) in NDC, read when ``targets`` is None.
            image_rgb: (B, 3, H, W); fg_probability: (B, 1, H, W).
            targets: the rays' ground truth, in place of sampling it from the images.

        Returns:
            Unweighted scalars; nothing where there is no ground truth to compare with.
        """
        if targets is None:
            targets = _sampled_targets(ray_bundle, image_rgb, fg_probability)
        if targets is None:
            return {}
        shape = raymarched.masks.shape[:-1]
        rgb, mask = targets.rgb.reshape(*shape, 3), targets.mask.reshape(shape)
        depth, counted = raymarched.aux.get("optical_depth"), raymarched.aux.get("counted")
        depth, colored = None if depth is None else depth[..., 0], raymarched.aux.get("counted_color", counted)
        losses = {
            f"{keys_prefix}roi_rgb": roi_rgb_loss(raymarched.features, rgb, mask, counted=colored),
            f"{keys_prefix}rgb": full_rgb_loss(raymarched.features, rgb, mask, counted=colored),
            f"{keys_prefix}alpha_bce": alpha_bce_loss(raymarched.masks[..., 0], mask, depth, counted=counted),
        }
        if "opacities" in raymarched.aux and "prev_stage" not in keys_prefix:
            losses[f"{keys_prefix}sample_entropy"] = sample_entropy_loss(raymarched.aux["opacities"], counted=counted)
        if raymarched.prev_stage is not None:
            losses |= self(
                raymarched=raymarched.prev_stage, ray_bundle=ray_bundle, targets=targets, keys_prefix=f"{keys_prefix}prev_stage_"
            )
        return losses


def _sampled_targets(bundle: ImplicitronRayBundle, image_rgb: Tensor | None, fg_probability: Tensor | None) -> RayTargets | None:
    if image_rgb is None or fg_probability is None:
        return None
    xys, drawn = bundle.xys, None
    if bundle.is_packed():  # n_rays_total_training: single rays; one picture per drawn camera, its rays padded to a common count
        xys, _, _ = bundle.get_padded_xys()
        image_rgb, fg_probability = image_rgb[bundle.camera_ids], fg_probability[bundle.camera_ids]
        drawn = torch.arange(xys.shape[1], device=xys.device) < bundle.camera_counts[:, None]
    xys = xys.reshape(len(image_rgb), -1, 1, 2)
    rgb = ndc_grid_sample(image_rgb, xys, mode="bilinear")[..., 0].transpose(1, 2)
    mask = ndc_grid_sample(fg_probability, xys, mode="nearest")[:, 0, :, 0]
    if drawn is not None:
        rgb, mask = rgb[drawn], mask[drawn]
    return RayTargets(rgb=rgb, mask=(mask > 0.5).to(rgb.dtype))
