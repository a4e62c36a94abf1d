"""A ResNet (He et al., CVPR 2016) as an encoder: five feature maps of a picture."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from co3d_ensemble.fields.torchvision_import import import_torchvision
from co3d_ensemble.fields.weights_file import DAMAGED, read_weights, reason

CHANNELS = {
    "resnet18": (64, 64, 128, 256, 512),
    "resnet34": (64, 64, 128, 256, 512),
    "resnet50": (64, 256, 512, 1024, 2048),
    "resnet101": (64, 256, 512, 1024, 2048),
}
FROM_HUB = "hub"
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_NO_ENCODER = "fc."  # the classifier at the end of torchvision's network


class ResNetEncoder(nn.Module):
    """torchvision's network without its classifier, with torchvision's names in the state dict.

    Args:
        name: one of ``CHANNELS``.
        weights: file with torchvision's state dict of this network; ``hub``: torchvision's ImageNet weights from torch hub's
            cache, or downloaded into it; None: random.

    Raises:
        ValueError: unknown name, or weights that cannot be read or are another network's.
        RuntimeError: torchvision is not installed.
        OSError: ``hub`` cannot be reached and its cache lacks the weights, or holds a damaged file, naming it.
    """

    def __init__(self, name: str, weights: Path | str | None = None) -> None:
        super().__init__()
        if name not in CHANNELS:
            raise ValueError(f"encoder={name!r}: expected one of {', '.join(CHANNELS)}")
        torchvision = import_torchvision()
        if torchvision is None:
            raise RuntimeError(f"encoder={name}: the package torchvision is not installed")
        network = getattr(torchvision.models, name)(weights=None)
        for part in ("conv1", "bn1", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            setattr(self, part, getattr(network, part))
        self.channels = CHANNELS[name]
        for buffer, values in (("mean", _IMAGENET_MEAN), ("std", _IMAGENET_STD)):
            self.register_buffer(buffer, torch.tensor(values).view(3, 1, 1), persistent=False)
        if weights is not None:
            self._fill(name, weights)

    def forward(self, image: Tensor) -> list[Tensor]:
        """
        Args:
            image: in [0, 1], shape (B, 3, H, W), both sides multiples of 32.

        Returns:
            Maps at 1/2, 1/4, 1/8, 1/16 and 1/32 of the size, with ``channels``.
        """
        maps = [self.bn1(self.conv1((image - self.mean) / self.std)).relu()]
        maps.append(self.layer1(self.maxpool(maps[0])))
        for layer in (self.layer2, self.layer3, self.layer4):
            maps.append(layer(maps[-1]))
        return maps

    def _fill(self, name: str, weights: Path | str) -> None:
        found = _from_hub(name) if weights == FROM_HUB else read_state_dict(weights, "weights")
        found = {key: value for key, value in found.items() if not key.startswith(_NO_ENCODER)}
        own = self.state_dict()
        # files of before 2018 lack these counters, which nothing here reads
        found = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")} | found
        wrong = sorted(key for key in own.keys() | found.keys() if key not in own or key not in found or own[key].shape != found[key].shape)
        if wrong:
            raise ValueError(
                f"weights={weights}: not those of {name}: {', '.join(wrong[:3])} and {max(0, len(wrong) - 3)} others are missing, "
                "are not of this network or have another shape"
            )
        self.load_state_dict(found)


def _from_hub(name: str) -> dict[str, Tensor]:
    torchvision = import_torchvision()
    # the first version of the weights: those that the reference starts from
    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except DAMAGED as error:
        place = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        raise OSError(f"weights={FROM_HUB}: {place} cannot be read, or not be downloaded from {weights.url}: {reason(error)}") from error


def read_state_dict(path: Path | str, key: str) -> dict[str, Tensor]:
    """A file of weights, as torchvision's downloads are.

    Raises:
        ValueError: ``key=path``, and why: there is no such file, it cannot be read, or it is no state dict.
    """
    if not Path(path).is_file():
        raise ValueError(f"{key}={path}: there is no such file; null gives random weights")
    found = read_weights(path, f"{key}={path}")
    if not isinstance(found, dict) or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()):
        raise ValueError(f"{key}={path}: holds no state dict")
    return found
