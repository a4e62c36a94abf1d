"""Pairs of pictures of one scene: what every data set of MINE gives and its training and evaluation take.

Camera frames are OpenCV's (x right, y down, z into the scene), pixel coordinates have (0.5, 0.5) at the centre of the top
left pixel, and ``X_target = R X_source + t``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """A source picture, a target picture and what is known of their geometry; with a leading B in all tensors, a batch.

    Attributes:
        name: ``<scene>/<source>-><target>``, for messages and result files; a list of them in a batch.
        source, target: colour in [0, 1], shape (3, H, W); one size for all pictures of a data set.
        K_source, K_target: intrinsics in pixels of these pictures, shape (3, 3).
        R, t: from the source camera to the target camera, shapes (3, 3) and (3,), in the scene's unit.
        source_points, target_points: sparse points (x, y, z): pixel position and z in that camera, shape (P, 3); rows of
            points that there are not have z = 0. None where the data set has no points.
        source_depth, target_depth: z of every pixel, 0 where unknown, shape (1, H, W), for evaluation; None where there is none.
            NYU-Depth and iBims-1 give it at the ground truth's own size, as predictions are resized to it.
        source_mask, target_mask: foreground probability, shape (1, H, W); None where the data set has no masks.
    """

    name: Any
    source: Tensor
    target: Tensor
    K_source: Tensor
    K_target: Tensor
    R: Tensor
    t: Tensor
    source_points: Tensor | None = None
    target_points: Tensor | None = None
    source_depth: Tensor | None = None
    target_depth: Tensor | None = None
    source_mask: Tensor | None = None
    target_mask: Tensor | None = None

    def to(self, device: torch.device | str) -> Pair:
        """On a device; a copy to a GPU from pinned memory waits for nothing."""
        away = torch.device(device).type != "cpu"  # the other way, values could be read before they are there
        return self._each(lambda value: value.to(device, non_blocking=away))

    def pin_memory(self) -> Pair:
        """In page-locked memory: what a ``DataLoader`` with ``pin_memory`` calls; it leaves alone what lacks the method."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Pair:
        tensors = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "name"}
        return replace(self, **{name: change(value) for name, value in tensors.items() if value is not None})


def collate(pairs: Sequence[Pair]) -> Pair:
    """A batch of pairs; a field that one of them lacks is None in the batch.

    Raises:
        ValueError: no pair, or pictures of different sizes, naming two pairs.
    """
    if not pairs:
        raise ValueError("a batch needs at least one pair")
    for pair in pairs[1:]:
        if pair.source.shape != pairs[0].source.shape or pair.target.shape != pairs[0].target.shape:
            raise ValueError(
                f"{pairs[0].name} has pictures of {tuple(pairs[0].source.shape)} and {pair.name} of {tuple(pair.source.shape)}: "
                "a batch takes one size"
            )
    stacked: dict[str, Any] = {}
    for entry in fields(Pair):
        values = [getattr(pair, entry.name) for pair in pairs]
        if entry.name == "name":
            stacked["name"] = values
        else:
            stacked[entry.name] = None if any(value is None for value in values) else torch.stack(values)
    return Pair(**stacked)
