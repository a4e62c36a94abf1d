"""Adam over a task's parameter groups: learning rates as a function of step, clipping, moments by parameter name."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Moments = dict[str, dict[str, Tensor]]  # parameter name -> Adam's {"step", "exp_avg", "exp_avg_sq"}


def build_adam(groups: Iterable[Mapping[str, Any]], model: nn.Module, *, betas: tuple[float, float], eps: float) -> torch.optim.Adam:
    """Adam (fused) over ``groups``.

    Args:
        groups: ``{"params": [...], "name": str, "lr": float}``, ``lr`` being the rate after the warm-up; other keys of
            Adam (``weight_decay``, ``betas``, ``eps``) are passed on.
        model: where the parameters live; its names identify moments across changes of structure.

    Raises:
        ValueError: a group without parameters, or with one that is not the model's.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    prepared = []
    for group in groups:
        parameters = list(group["params"])
        label = group.get("name", len(prepared))
        if not parameters:
            raise ValueError(f"parameter group {label!r} is empty")
        if any(parameter not in names for parameter in parameters):
            raise ValueError(f"parameter group {label!r} holds a tensor that is not a parameter of the task's model")
        parameter_names = [names[parameter] for parameter in parameters]
        prepared.append({**group, "params": parameters, "base_lr": float(group["lr"]), "parameter_names": parameter_names})
    return torch.optim.Adam(prepared, betas=tuple(betas), eps=eps, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, multiplier: float) -> dict[str, float]:
    """Sets every group to ``multiplier`` times its rate after the warm-up; returns the rates by group name."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * multiplier
    return {str(group.get("name", index)): group["lr"] for index, group in enumerate(optimizer.param_groups)}


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every parameter of every group, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def load_adam(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Gives a new optimizer the moments and learning rates of a saved one; its other settings stay the configuration's.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: other groups, or moments that do not fit the parameters.
    """
    own, groups = optimizer.state_dict()["param_groups"], saved["param_groups"]
    if [group["parameter_names"] for group in groups] != [group["parameter_names"] for group in own]:
        raise ValueError("its optimizer has other groups of parameters")
    parameters = parameters_of(optimizer)
    for number, state in saved["state"].items():
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        expected = tuple(parameters[number].shape)
        if shapes != {"step": (), "exp_avg": expected, "exp_avg_sq": expected}:
            raise ValueError(f"its optimizer has {shapes} for a parameter of shape {expected}")
    last_rates = [{**group, "lr": float(saved_group["lr"])} for group, saved_group in zip(own, groups, strict=True)]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": last_rates})


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scales all gradients by ``min(1, max_norm / norm)`` (Pascanu et al., 2013), norm being that of all of them together.

    Unlike ``torch.nn.utils.clip_grad_norm_`` no epsilon is added to the norm, so gradients within the limit stay exact.

    Args:
        max_norm: None measures without clipping.

    Returns:
        The norm before clipping, a scalar on the parameters' device; nothing waits for the device.

    Raises:
        ValueError: no parameter has a gradient.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        raise ValueError("no parameter received a gradient")
    norm = torch.linalg.vector_norm(torch.stack([value.float() for value in torch._foreach_norm(gradients)]))
    # on the CPU the norm can be looked at without waiting, and gradients within the limit need no pass over them
    if max_norm is not None and (norm.device.type != "cpu" or norm > max_norm):
        torch._foreach_mul_(gradients, max_norm / norm.clamp_min(max_norm))
    return norm


def moments_by_name(optimizer: torch.optim.Optimizer) -> Moments:
    """Adam's state of every parameter that has had an update, under its name in the model."""
    return {
        name: dict(optimizer.state[parameter])
        for group in optimizer.param_groups
        for name, parameter in zip(group["parameter_names"], group["params"], strict=True)
        if optimizer.state.get(parameter)
    }


def load_moments(optimizer: torch.optim.Optimizer, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Gives parameters their moments back; those whose name or shape is not in ``moments`` start anew."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["parameter_names"], group["params"], strict=True):
            state = moments.get(name)
            if state is not None and state["exp_avg"].shape == parameter.shape:
                optimizer.state[parameter] = dict(state)
            elif state is not None:
                logger.info("moments of %s start anew: its shape changed to %s", name, tuple(parameter.shape))
