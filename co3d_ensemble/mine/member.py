"""MINE as a model of CO3D sequences: the settings of ``MINEModel`` that a run of MINE stands for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from co3d_ensemble.mine.assembly import is_lone_file, trained_config
from co3d_ensemble.mine.config import planes_to_show
from co3d_ensemble.plugin.mine_model import default_settings
from co3d_ensemble.plugin.mine_planes import NETWORK_SETTINGS
from co3d_ensemble.training.checkpoint import Checkpoints
from co3d_ensemble.training.run_directory import RunDirectory

PLANE_SETTINGS = ("n_fine_planes", "near_disparity", "far_disparity", "blend_source", "plane_chunk")


def settings_of_run(config: Any) -> dict[str, Any]:
    """Network, planes and unit of a run's ``MINEConfig``; photographs are averaged down to the longest side of its training pictures."""
    own = {name: getattr(config.model, name) for name in NETWORK_SETTINGS + PLANE_SETTINGS}
    own |= {"n_planes": planes_to_show(config), "longest_side": max(config.data.height, config.data.width)}
    if config.data.kind == "co3d" and not config.training.calibrate_scale:
        own["scene_scale"] = 1.0  # it was trained in the sequences' own units
    return own


def completed_settings(args: Mapping[str, Any]) -> dict[str, Any]:
    """``args`` of ``MINEModel`` with what is null or missing as the run has it that ``checkpoint`` is of, or else, if null, as by default.

    Args:
        args: ``checkpoint`` is a run directory (its best one), a checkpoint in one, one of MINE's authors with their ``params.yaml``
            beside it, or a lone file of either, which says nothing about its settings.

    Raises:
        ValueError, FileNotFoundError: ``checkpoint`` is none of them, naming it.
    """
    defaults, own = default_settings(), {}
    given = {name: value for name, value in args.items() if value is not None}
    if "checkpoint" in given:
        path = Path(str(given["checkpoint"]))  # a number may be the name of a folder
        own = {} if is_lone_file(path) else settings_of_run(trained_config(path))
        given["checkpoint"] = str(Checkpoints(RunDirectory(path).checkpoints).best if path.is_dir() else path)
    return {**{name: defaults.get(name) for name in args}, **own, **given}
