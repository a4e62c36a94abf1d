"""The precision of a run: settled when it starts, kept when it goes on elsewhere, told in the log.

A run's ``config.yaml`` holds what ``auto`` became, never ``auto`` itself, for the networks that the run has.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from co3d_ensemble.base.precision import AUTO, PRECISIONS, bfloat16_words, multiplies_bfloat16, settled_precision

logger = logging.getLogger(__name__)

NAME = "precision"  # of the setting, wherever it stands
SIGNED_DISTANCES = "IdrFeatureField"  # sphere tracing stops at 5e-5, and bfloat16 resolves 4e-3 of a value
WHAT_IT_COSTS = "every product is emulated: on an AVX2 CPU nerf_laptop trained at 172 rays/s so, and at 2,346 in float32"


def network_keys(config: Any) -> list[str]:
    """Dotted keys of the precisions that the networks of an experiment, or of a run of MINE, are built with."""
    if "kind" not in config.model:
        return ["model.precision"]
    keys = [f"model.{config.model.kind}.{NAME}"]
    if config.model.kind == "nerf" and NAME in config.model.get("coarse_overrides", {}):
        keys.append(f"model.coarse_overrides.{NAME}")
    return keys


def automatic_precision(config: Any, device: torch.device | str) -> dict[str, str]:
    """What ``auto`` of each of :func:`network_keys` becomes on the device: ``float32`` for signed distances anywhere."""
    distances = config.model.get("kind") == "implicitron" and config.model.implicitron.args.get("implicit_function_class_type")
    value = "float32" if distances == SIGNED_DISTANCES else settled_precision(AUTO, device)
    return dict.fromkeys(network_keys(config), value)


def settle_precision(config: Any, automatic: Mapping[str, str], stored: Any = None) -> None:
    """Replaces every ``auto`` of ``config``: by the value of ``stored``, else by that of ``automatic`` where it has one."""
    for key in _precision_keys(config):
        if OmegaConf.select(config, key) != AUTO:
            continue
        kept = None if stored is None else OmegaConf.select(stored, key)
        value = kept if kept in PRECISIONS else automatic.get(key)
        if value is not None:
            OmegaConf.update(config, key, value)


def agrees_with_any(key: str, wanted: Any) -> bool:
    """Whether a setting asks for nothing in particular: ``auto`` goes on with whatever precision a run has."""
    return wanted == AUTO and key.rpartition(".")[2] == NAME


def used_precision(config: Any) -> str:
    """Of a settled configuration: "float32", or "bfloat16, coarse float32" where the networks differ."""
    first, *others = (str(OmegaConf.select(config, key)) for key in network_keys(config))
    return ", coarse ".join([first, *(other for other in others if other != first)])


def show_precision(config: Any) -> None:
    """Sets a run's precision to that in which its trained networks are shown: float32 where the device would emulate bfloat16.

    The pictures differ by what bfloat16 rounds, and nothing goes on from them. A run in float32 is shown in float32.
    """
    for key in network_keys(config):
        if OmegaConf.select(config, key) == "bfloat16":
            OmegaConf.update(config, key, AUTO)


def tell_precision(asked: Any, used: Any, path: Path, device: torch.device | str) -> None:
    """Logs what a run computes in, and warns once of bfloat16 that the device must emulate.

    Args:
        asked: the configuration as composed, ``auto`` where it says so.
        used: the run's own.
        path: of the run.
    """
    key = network_keys(used)[0]
    wanted, precision = OmegaConf.select(asked, key), used_precision(used)
    logger.info("precision: %s (%s=%s, on %s)", precision, key, wanted, bfloat16_words(device))
    if "bfloat16" not in precision or multiplies_bfloat16(device):
        return
    if wanted == AUTO:
        logger.warning(
            "%s was started in bfloat16 and goes on in it on %s: %s. training.resume=restart would start it anew in float32",
            *(path, bfloat16_words(device), WHAT_IT_COSTS),
        )
    else:
        _warn_once(f"precision=bfloat16 on {bfloat16_words(device)}: {WHAT_IT_COSTS}. precision=auto takes float32 here")


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def _precision_keys(config: Any) -> Iterator[str]:
    """Dotted keys of all settings of that name."""

    def visit(prefix: str, node: Any) -> Iterator[str]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from visit(f"{prefix}{key}.", value)
            elif key == NAME:
                yield prefix + key

    return visit("", OmegaConf.to_container(config))
