"""Plane stacks whose views are known, and a run directory with an untrained network, for the tests of inference and evaluation."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from co3d_ensemble.files import write_text_atomic
from co3d_ensemble.mine.assembly import build_network
from co3d_ensemble.mine.config import MINEConfig
from co3d_ensemble.mine.inference import PlaneStack, blended
from co3d_ensemble.training.checkpoint import write_checkpoint

OPAQUE = 1e6  # density


def camera(height: int, width: int, focal: float = 50.0) -> Tensor:
    return torch.tensor([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])


def smooth_picture(height: int, width: int, seed: int = 0) -> Tensor:
    """Random colours without detail below 8 pixels, in [0, 1], shape (3, height, width)."""
    coarse = torch.rand(1, 3, height // 8 + 2, width // 8 + 2, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)[0].clamp(0, 1)


def opaque_stack(height: int = 24, width: int = 32, *, disparity: tuple[float, ...] = (1.0, 0.5, 0.25), surface: int = 1) -> PlaneStack:
    """An opaque textured plane, number ``surface``, with empty planes before and behind it."""
    image = smooth_picture(height, width)
    n = len(disparity)
    sigma = torch.zeros(n, 1, height, width)
    sigma[surface] = OPAQUE
    return blended(torch.zeros(n, 3, height, width), sigma, torch.tensor(disparity), camera(height, width), mode="sigma", image=image)


def random_stack(
    n_planes: int, height: int = 24, width: int = 32, *, mode: str = "sigma", density: float = 0.5, blend: bool = False
) -> PlaneStack:
    """Smooth random colours, of each plane its own, and densities, some of them of hardly any opacity."""
    generator = torch.Generator().manual_seed(n_planes)
    rgb = torch.stack([smooth_picture(height, width, seed) for seed in range(n_planes)])
    strength = torch.rand(n_planes, 1, 1, 1, generator=generator) ** 4
    sigma = strength * torch.stack([smooth_picture(height, width, 1000 + seed)[:1] for seed in range(n_planes)])
    sigma = sigma * density if mode == "sigma" else sigma.clamp(0, 1)
    disparity = torch.linspace(1.0, 0.05, n_planes)
    image = smooth_picture(height, width, 7) if blend else None
    return blended(rgb, sigma, disparity, camera(height, width), mode=mode, image=image)


def mine_config(**changes: object) -> OmegaConf:
    """The smallest network on the smallest pictures; ``__`` in a setting's name stands for its dot."""
    config = OmegaConf.structured(MINEConfig)
    small = {
        "model.encoder": "resnet18",
        "model.n_planes": 4,
        "model.far_disparity": 0.05,
        "data.height": 32,
        "data.width": 48,
        "training.max_steps": 1,
    }
    for key, value in {**small, **{name.replace("__", "."): value for name, value in changes.items()}}.items():
        OmegaConf.update(config, key, value)
    return config


def write_run(folder: Path, **changes: object) -> Path:
    """A run directory as training leaves it, but for the training."""
    config = mine_config(**changes)
    torch.manual_seed(0)
    network = build_network(config.model)
    write_text_atomic(folder / "config.yaml", OmegaConf.to_yaml(config))
    write_checkpoint(folder / "checkpoints" / "best.pt", {"model": network.state_dict()})
    return folder
