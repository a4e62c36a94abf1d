"""Exponential moving average of a model's parameters, corrected for its start."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def update_weight(decay: float, n_updates: int) -> float:
    """Weight of the newest parameters in update number ``n_updates`` (from 1): ``(1 - d) / (1 - d^n)``.

    With it the average is ``sum_i d^(n-i) p_i / sum_i d^(n-i)``: Adam's debiasing (Kingma and Ba, 2015, section 3),
    applied inside the recursion. The first update has weight 1 and copies.
    """
    if decay == 0.0:
        return 1.0
    return (1.0 - decay) / -math.expm1(n_updates * math.log(decay))


class EMA:
    """Average of the parameters of ``model``; buffers (occupancy) are state, not weights, and stay as they are.

    Args:
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay={decay}: must lie in [0, 1)")
        self.decay = decay
        self.n_updates = 0
        self.weights: dict[str, Tensor] = {}
        self.rebuild(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes the parameters as they stand into the average; one fused kernel per dtype, no synchronisation."""
        self.n_updates += 1
        averages, parameters = self._pairs(model)
        torch._foreach_lerp_(averages, parameters, update_weight(self.decay, self.n_updates))

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Puts the average into ``model`` for the duration of the block; the parameters come back exactly.

        Values are copied, not pointers, so that compiled code and captured graphs see them.
        """
        averages, parameters = self._pairs(model)
        with torch.no_grad():
            trained = [parameter.clone() for parameter in parameters]
            torch._foreach_copy_(parameters, averages)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, trained)

    @torch.no_grad()
    def rebuild(self, model: nn.Module, mapped: Mapping[str, Tensor] | None = None) -> None:
        """Follows a change of the model's structure.

        Args:
            mapped: averages of replaced parameters, brought to the new structure; default: the present ones. A parameter
                without an average of its shape starts from its own value.
        """
        known = self.weights if mapped is None else mapped
        self.weights = {}
        for name, parameter in model.named_parameters():
            average = known.get(name)
            fits = average is not None and average.shape == parameter.shape
            source = average if fits else parameter.detach()
            self.weights[name] = source.to(parameter).clone(memory_format=torch.preserve_format)

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "n_updates": self.n_updates, "weights": dict(self.weights)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a saved average.

        Raises:
            ValueError: names or shapes differ from the model's, or a decay or count that no average has.
        """
        shapes = {name: tuple(value.shape) for name, value in self.weights.items()}
        saved = {name: tuple(value.shape) for name, value in state["weights"].items()}
        if shapes != saved:
            names = sorted(name for name in shapes.keys() | saved.keys() if shapes.get(name) != saved.get(name))
            raise ValueError(f"the saved average does not fit the model: {', '.join(names)}")
        decay, n_updates = float(state["decay"]), int(state["n_updates"])
        if not 0.0 <= decay < 1.0 or n_updates < 0:
            raise ValueError(f"the saved average has decay={decay} and n_updates={n_updates}")
        for name, value in self.weights.items():
            value.copy_(state["weights"][name])
        self.decay, self.n_updates = decay, n_updates

    def _pairs(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        named = dict(model.named_parameters())
        assert named.keys() == self.weights.keys(), "the model's structure changed without EMA.rebuild"
        return [self.weights[name] for name in named], [parameter.detach() for parameter in named.values()]
