"""LPIPS (Zhang et al., CVPR 2018) of a frame on black, with weights that already lie on this disk. Never downloads."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from co3d_ensemble.base.paths import listed
from co3d_ensemble.fields.torchvision_import import import_torchvision
from co3d_ensemble.fields.weights_file import read_weights, restoring

BACKBONES = {"alex": "alexnet", "vgg": "vgg16"}
FOREGROUND = 0.5

Network = Callable[[Tensor, Tensor], Tensor]


def lpips_masked(network: Network, rgb: Tensor, gt_rgb: Tensor, gt_mask: Tensor) -> float:
    """LPIPS of the whole picture against the ground truth on black, 0 for equal pictures.

    Args:
        network: from ``load_lpips``; takes two pictures in [-1, 1], shape (1, 3, H, W).
        rgb: prediction on black in [0, 1], shape (3, H, W).
        gt_rgb: unmasked photograph in [0, 1], shape (3, H, W).
        gt_mask: foreground probability, shape (1, H, W); foreground where above 1/2.
    """
    on_black = gt_rgb * (gt_mask > FOREGROUND)
    with torch.no_grad():
        return network(2 * rgb.float()[None] - 1, 2 * on_black.float()[None] - 1).item()


def load_lpips(
    backbone: str = "vgg", *, weights_path: Path | str | None = None, device: torch.device | str = "cpu"
) -> tuple[Network | None, str | None]:
    """The network and None, or None and the reason why there is none.

    Args:
        backbone: ``vgg`` or ``alex``.
        weights_path: torchvision's ImageNet weights of the backbone; None looks in torch hub's cache.

    Raises:
        ValueError: an unknown backbone, or a ``weights_path`` that does not exist; a file of weights that is damaged or another
            network's, naming it.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"backbone={backbone!r}: expected one of {', '.join(BACKBONES)}")
    path, reason = _find_weights(backbone, weights_path)
    if path is None:
        return None, reason
    try:
        import_torchvision()  # lpips imports it, and on its own it fails where it was built for another torch
        import lpips
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not work
        return None, f"the package lpips cannot be imported: {error}"
    # pnet_rand: the backbone starts random, for lpips would download it; the linear layers come with the package
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torchvision\.models")  # lpips' way to ask for no weights
        network = lpips.LPIPS(net=backbone, pnet_rand=True, verbose=False)
    features = read_weights(path, str(path))
    with restoring(path, f"file of torchvision's weights of {BACKBONES[backbone]}"):
        network.net.load_state_dict(_by_slice(features, network.net.state_dict()))
    return network.eval().requires_grad_(False).to(device), None


def _find_weights(backbone: str, weights_path: Path | str | None) -> tuple[Path | None, str | None]:
    if weights_path is not None:
        path = Path(weights_path)
        if not path.is_file():
            raise ValueError(f"weights_path={str(path)!r}: no such file")
        return path, None
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    pattern = f"{BACKBONES[backbone]}-*.pth"
    found = listed(folder, pattern)
    return (found[-1], None) if found else (None, f"no {pattern} in {folder}, and nothing is downloaded")


def _by_slice(features: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's ``features.<layer>.*`` under lpips' names ``slice<n>.<layer>.*``."""
    renamed = {}
    for name in expected:
        source = "features." + name.split(".", 1)[1]
        if source not in features:
            raise KeyError(source)
        renamed[name] = features[source]
    return renamed
