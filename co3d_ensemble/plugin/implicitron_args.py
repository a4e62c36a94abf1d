"""Settings in Implicitron's format over Implicitron's defaults, with every mistake named before a model is built."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch3d.implicitron.models.base_model import ImplicitronModelBase
from pytorch3d.implicitron.tools.config import get_default_args, registry


def merged_args(model_class_type: str, args: Mapping[str, Any]) -> DictConfig:
    """Implicitron's defaults with ``args`` over them.

    Raises:
        ValueError: unknown model class, component or setting, naming it.
    """
    model_class = model_class_named(model_class_type)
    defaults = _default_args(model_class)
    given = OmegaConf.create(plain(args))
    try:
        config = OmegaConf.merge(defaults, given)
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        where = f" (at {error.full_key})" if error.full_key else ""
        raise ValueError(f"model_{model_class_type}_args: {str(error).splitlines()[0]}{where}") from error
    _check_components(given, config)
    return config


@functools.cache
def _default_args(model_class: type[ImplicitronModelBase]) -> DictConfig:
    """Fixed since the first call, which expands the class; to be read only. Collecting them takes as long as building a small model."""
    return get_default_args(model_class)


def plain(args: Mapping[str, Any]) -> dict[str, Any]:
    """``args`` as a dict, the interpolations of a config's node resolved."""
    return OmegaConf.to_container(args, resolve=True) if isinstance(args, DictConfig) else dict(args)


def model_class_named(model_class_type: str) -> type[ImplicitronModelBase]:
    known = sorted(model_class.__name__ for model_class in registry.get_all(ImplicitronModelBase))
    if model_class_type not in known:
        raise ValueError(f"model_class_type={model_class_type!r}: expected one of {', '.join(known)}")
    return registry.get(ImplicitronModelBase, model_class_type)


def _check_components(given: DictConfig, config: DictConfig) -> None:
    """Raises ValueError where a given ``<member>_class_type`` names a component that is not registered for the member."""
    for key, value in given.items():
        if isinstance(value, DictConfig):
            _check_components(value, config[key])
        elif str(key).endswith("_class_type") and value is not None:
            start, end = key.removesuffix("class_type"), "_args"
            known = [other[len(start) : -len(end)] for other in config if other.startswith(start) and other.endswith(end)]
            if value not in known:
                raise ValueError(f"{key}={value!r}: expected one of {', '.join(sorted(known))}")
