"""Weights of Implicitron's image encoder, a torchvision ResNet: random, or from a local file; never downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch3d.implicitron.models.feature_extractor.resnet_feature_extractor import ResNetFeatureExtractor
from torch import nn

from co3d_ensemble.fields.resnet_encoder import read_state_dict

RESNET_ARGS = "image_feature_extractor_ResNetFeatureExtractor_args"


def refuse_download(given: Mapping[str, Any]) -> None:
    """Raises ValueError where ``given`` settings ask torchvision to fetch weights."""
    if (given.get(RESNET_ARGS) or {}).get("pretrained"):
        raise ValueError(
            f"{RESNET_ARGS}.pretrained=true would download weights: set it to false and give model.implicitron.encoder_weights "
            "the file of torchvision's weights, or null for random ones"
        )


def load_encoder_weights(encoder: nn.Module | None, path: Path | str) -> None:
    """Fills the encoder from a state dict of torchvision's network of the same name, as its own download is.

    The extractor keeps the network's stem and its first stages; what it adds (projections) stays random.

    Raises:
        ValueError: naming the file: there is none, it is no state dict, or it is that of another network.
    """
    if not isinstance(encoder, ResNetFeatureExtractor):
        raise ValueError(f"model.implicitron.encoder_weights={path}: this model has no ResNetFeatureExtractor that they could go to")
    weights = read_state_dict(path, "model.implicitron.encoder_weights")
    found, missing = {}, []
    own = encoder.state_dict()
    for name, value in own.items():
        if name.startswith("proj_layers."):
            continue
        source = weights.get(_torchvision_name(name))
        if source is None or source.shape != value.shape:
            missing.append(_torchvision_name(name))
        found[name] = source
    if missing:
        raise ValueError(
            f"model.implicitron.encoder_weights={path}: no weights of {encoder.name}: {', '.join(missing[:3])} and "
            f"{max(0, len(missing) - 3)} others are not there or have another shape"
        )
    encoder.load_state_dict({**own, **found})


def _torchvision_name(name: str) -> str:
    """Of an entry of the extractor: ``stem.0`` is conv1, ``stem.1`` bn1, ``layers.0`` layer1."""
    part, number, rest = name.split(".", 2)
    return f"{'conv1' if number == '0' else 'bn1'}.{rest}" if part == "stem" else f"layer{int(number) + 1}.{rest}"
