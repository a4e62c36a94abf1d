"""From a photograph to its multiplane image: the network's weights, where the planes lie, one pass of encoder and decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from co3d_ensemble.fields.mpi_network import ImageFeatures, MPINetwork
from co3d_ensemble.fields.mpi_reference_weights import is_reference, load_reference
from co3d_ensemble.fields.weights_file import read_weights, restoring
from co3d_ensemble.functional.cameras import opencv_from_pinhole
from co3d_ensemble.functional.mpi import blend_source, mean_plane_weights, render_source_view
from co3d_ensemble.functional.mpi_sampling import fine_disparities, fixed_disparities, stratified_disparities
from co3d_ensemble.plugin.frames import area_average
from co3d_ensemble.plugin.mine_views import SceneMPI, SourceImage

# what a checkpoint's weights are made for
NETWORK_SETTINGS = ("encoder", "encoding", "n_harmonics", "mode", "poolings", "density_unit", "density_scale")


@dataclass(frozen=True)
class PlaneSettings:
    """Settings of :class:`~co3d_ensemble.plugin.mine_model.MINEModel`, by their names there."""

    n_planes: int
    n_fine_planes: int
    near_disparity: float
    far_disparity: float
    mode: str
    blend_source: bool
    plane_chunk: int | None
    longest_side: int | None


def scene_mpi(network: MPINetwork, source: SourceImage, settings: PlaneSettings, *, training: bool) -> SceneMPI:
    """One pass of encoder and decoder, at the photograph's size or ``longest_side``; in ``training`` the planes are drawn."""
    height, width = source.camera.height, source.camera.width
    scale = 1.0 if settings.longest_side is None else min(1.0, settings.longest_side / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    camera = source.camera.resized(*size)
    rgb_mask = [part if part is None or size == (height, width) else area_average(part, *size) for part in (source.rgb, source.mask)]
    image, mask = (None if part is None else part[None] for part in rgb_mask)
    K, _, _ = opencv_from_pinhole(camera)
    features = network.encode(image)
    disparity = plane_disparities(network, features, K, settings, training=training)
    ((rgb, sigma),) = network.decode(features, disparity, plane_chunk=settings.plane_chunk, n_scales=1)
    depth = disparity.reciprocal()
    if settings.blend_source:
        seen = render_source_view(rgb, sigma, depth, K[None], mode=settings.mode)
        rgb = blend_source(rgb, seen.transmittance, image)
    return SceneMPI(rgb, sigma, depth, mask, camera)


def plane_disparities(network: MPINetwork, features: ImageFeatures, K: Tensor, settings: PlaneSettings, *, training: bool) -> Tensor:
    """1 / z of the planes, with the fine ones where there are any, descending, shape (1, N)."""
    draw = stratified_disparities if training else fixed_disparities
    disparity = draw(settings.n_planes, settings.near_disparity, settings.far_disparity, batch=1, device=K.device)
    if not settings.n_fine_planes:
        return disparity
    with torch.no_grad():
        ((rgb, sigma),) = network.decode(features, disparity, plane_chunk=settings.plane_chunk, n_scales=1)
        seen = render_source_view(rgb, sigma, disparity.reciprocal(), K[None], mode=settings.mode)
        return fine_disparities(disparity, mean_plane_weights(seen), settings.n_fine_planes, perturb=training)


def load_network(network: MPINetwork, path: Path | str, settings: Mapping[str, Any]) -> None:
    """Fills ``network`` from a checkpoint of MINE's training: its averaged weights, ``{"model": state dict, ...}``; or from its authors'.

    Args:
        settings: ``NETWORK_SETTINGS`` of ``network``: not all of them show in the weights' shapes.

    Raises:
        ValueError: naming the file: there is none, it is no such checkpoint, or it is another network's, naming the settings that
            differ from those in the ``config.yaml`` of its run.
    """
    run = Path(path).parent.parent / "config.yaml"
    own = OmegaConf.select(OmegaConf.load(run), "model") if run.is_file() else None
    different = [name for name in NETWORK_SETTINGS if own is not None and name in own and own[name] != settings[name]]
    if different:
        told = ", ".join(f"{name}={own[name]} there, {settings[name]} here" for name in different)
        raise ValueError(f"checkpoint={path} is of another network ({run}: {told})")
    saved = read_weights(path, f"checkpoint={path}")
    if is_reference(saved):
        return load_reference(network, path)
    state = saved.get("model") if isinstance(saved, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint={path}: is not a best.pt of MINE: it has no state dict under 'model'")
    with restoring(f"checkpoint={path}", "checkpoint of the network that these settings describe"):
        network.load_state_dict(state)
