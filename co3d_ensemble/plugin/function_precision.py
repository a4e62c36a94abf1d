"""Autocast of Implicitron's implicit functions, and of nothing else: pooling, marching and losses stay float32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from pytorch3d.implicitron.models.implicit_function.base import ImplicitFunctionBase
from pytorch3d.implicitron.models.implicit_function.idr_feature_field import IdrFeatureField
from torch import Tensor, nn

from co3d_ensemble.base.precision import AUTO, autocast, check_precision, compute_dtype


def set_function_precision(model: nn.Module, precision: str) -> None:
    """Lets every implicit function of ``model`` compute in ``precision`` and return float32; networks of this package among them,
    where their own setting is ``auto``, too.

    Args:
        precision: ``auto``, which is float32 for signed distances, ``float32`` or ``bfloat16``.

    Raises:
        ValueError: bfloat16 for signed distances: sphere tracing stops at 5e-5, and bfloat16 resolves 4e-3 of a value.
    """
    check_precision(precision)
    for function in model.modules():
        if getattr(function, "precision", None) == AUTO:
            function.precision = precision
        if not isinstance(function, ImplicitFunctionBase) or precision == "float32":
            continue
        if not isinstance(function, IdrFeatureField):
            function.forward = _under_autocast(function.forward, precision)
        elif precision != AUTO:
            raise ValueError(f"model.implicitron.precision={precision!r}: the signed distances of IdrFeatureField need float32")


def _under_autocast(forward: Callable[..., Any], precision: str) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        device = (kwargs["ray_bundle"] if "ray_bundle" in kwargs else args[0]).origins.device
        dtype = compute_dtype(precision, device)
        if dtype is torch.float32:
            return forward(*args, **kwargs)
        if kwargs.get("fun_viewpool") is not None:
            # it projects points to pixels: 8 bits of mantissa would shift them by up to a pixel in 256
            kwargs["fun_viewpool"] = _outside_autocast(kwargs["fun_viewpool"], device)
        with autocast(device, dtype):
            answer = forward(*args, **kwargs)
        return tuple(part.float() if isinstance(part, Tensor) else part for part in answer)

    return wrapped


def _outside_autocast(function: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    def wrapped(points: Tensor) -> Tensor:
        with autocast(device, torch.float32):
            return function(points.float())

    return wrapped
