"""The authors' weights of MINE (github.com/vincentfung13/MINE) under the names of :class:`MPINetwork`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from co3d_ensemble.fields.weights_file import read_weights, restoring

_BOTTLENECK = {"conv_down1": "down1", "conv_down2": "down2", "conv_up1": "up1", "conv_up2": "up2"}


def from_reference(checkpoint: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A state dict of ``MPINetwork(encoder="resnet50")`` with the defaults, or of what else the authors' configuration names.

    The shapes are equal and no channel is moved: both order a layer's inputs plane, picture, encoding, and the encoding d,
    sin d, cos d, sin 2d, ... Only names differ. Their pictures, disparities and outputs mean the same as ours.

    Args:
        checkpoint: their file as loaded: state dicts under ``backbone`` and ``decoder``; other entries are left alone.

    Raises:
        ValueError: one of the two is missing, or has an entry that is unknown here, naming it.
    """
    for part in ("backbone", "decoder"):
        if part not in checkpoint:
            raise ValueError(f"not a checkpoint of MINE's authors: it has no {part!r}, only {', '.join(map(str, checkpoint))}")
    state = {}
    for name, value in checkpoint["backbone"].items():
        name = name.removeprefix("module.").removeprefix("encoder.")
        if not name.startswith("fc."):  # the classifier, which is not used
            state[f"encoder.{name}"] = value
    prefixes = _decoder_names()
    for name, value in checkpoint["decoder"].items():
        name = name.removeprefix("module.")
        theirs = next((prefix for prefix in prefixes if name.startswith(prefix + ".")), None)
        if theirs is None:
            raise ValueError(f"not a checkpoint of MINE's authors: its decoder has an unknown entry {name!r}")
        state[prefixes[theirs] + name.removeprefix(theirs)] = value
    return state


def is_reference(saved: Any) -> bool:
    """Whether a loaded checkpoint is laid out as the authors' are."""
    return isinstance(saved, Mapping) and "backbone" in saved


def load_reference(network: nn.Module, path: Path | str) -> None:
    """Fills an ``MPINetwork`` from a checkpoint file of the authors.

    Raises:
        ValueError: naming the file: there is none, it is not theirs, or its network is another one.
    """
    saved = read_weights(path, str(path))
    with restoring(path, "checkpoint of the network that these settings describe"):
        network.load_state_dict(from_reference(saved if isinstance(saved, Mapping) else {}))


def _decoder_names() -> dict[str, str]:
    """Their prefix to ours. Their layers are numbered from the finest stage on and keyed by the letters of a printed tuple."""

    def key(*entries: str | int) -> str:
        return "convs." + "-".join(str(entries))

    names = {theirs: f"bottleneck.{ours}" for theirs, ours in _BOTTLENECK.items()}
    for stage in range(5):
        for half in (0, 1):
            theirs, ours = key("upconv", 4 - stage, half), f"layers.{2 * stage + half}"
            names |= {f"{theirs}.conv.conv": f"{ours}.conv", f"{theirs}.bn": f"{ours}.bn"}
    return names | {f"{key('dispconv', scale)}.conv": f"heads.{scale}" for scale in range(4)}
