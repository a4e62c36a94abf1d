"""Command line and ``configs/`` to an ensemble's settings and its members' experiments."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from co3d_ensemble.assembly import CONFIG_DIR, compose_experiment
from co3d_ensemble.base.quoting import escaped, literal, with_escapes
from co3d_ensemble.config import EnsembleConfig, ExperimentConfig
from co3d_ensemble.config_checks import validate_ensemble
from co3d_ensemble.scripts import first_line
from co3d_ensemble.settings import literal_settings

PLACE = ("dataset_root", "category", "subset_name", "output_dir", "device")  # what an ensemble and its members have in common
NAMED_BY_THE_ENSEMBLE = ("member", *PLACE)
_LITERAL = literal_settings(EnsembleConfig) | literal_settings(ExperimentConfig)
_FOR_ONE = re.compile(r"(?P<sign>[+~]*)members\.(?P<name>[^.=]+)\.overrides\.(?P<rest>.*)", re.DOTALL)


def is_ensemble(overrides: Sequence[str], config_dir: Path = CONFIG_DIR) -> bool:
    """Whether ``experiment=NAME`` among the overrides is a file, or builds on one, that lists members."""
    names = [override.partition("=")[2] for override in overrides if override.startswith("experiment=")]
    return bool(names) and _lists_members(names[-1], config_dir)


def _lists_members(experiment: str, config_dir: Path) -> bool:
    path = config_dir / "experiment" / f"{experiment}.yaml"
    if not path.is_file():
        return False
    content = OmegaConf.load(path)
    bases = [base for base in content.get("defaults", []) if isinstance(base, str) and base != "_self_"]
    return "members" in content or any(_lists_members(base, config_dir) for base in bases)


def compose_ensemble(overrides: Sequence[str], config_dir: Path = CONFIG_DIR) -> tuple[DictConfig, dict[str, DictConfig]]:
    """An ensemble and its members' experiments from Hydra overrides.

    Overrides of an ensemble's own settings (``EnsembleConfig``) change the ensemble. All others go to every member, after the
    experiment's own ``overrides`` and those that it gives the member. ``members.NAME.overrides.KEY=VALUE`` is ``KEY=VALUE`` for
    that member, and comes last.

    Raises:
        hydra.errors.HydraException, ValueError: an unknown key or experiment, a wrong type or value; the message names it and,
            where it is a member's, the member.
    """
    special, own, shared = _parted(literal(overrides, _LITERAL))
    schema = OmegaConf.structured(EnsembleConfig)
    # untyped, for OmegaConf cannot add a member to a typed dictionary key by key; types and unknown keys are checked below
    ConfigStore.instance().store(name="ensemble_schema", node=OmegaConf.to_container(schema))
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        config = OmegaConf.merge(schema, OmegaConf.to_container(compose("train_ensemble", own)))
    validate_ensemble(config)
    unknown = sorted({name for name, _ in special} - set(config.members))
    if unknown:
        raise ValueError(f"members.{unknown[0]}: no such member, there are {', '.join(config.members)}")
    experiments = {}
    for name, member in config.members.items():
        mine = [override for owner, override in special if owner == name]
        experiments[name] = _compose_member(config, name, [*config.overrides, *member.overrides, *shared, *mine], config_dir)
        member.overrides = with_escapes([*member.overrides, *mine])
    config.overrides = with_escapes([*config.overrides, *shared])
    return config, experiments


def member_overrides(overrides: Sequence[str], config_dir: Path = CONFIG_DIR) -> dict[str, list[str]]:
    """Per member, the overrides that compose its experiment by itself: what ``compose_ensemble`` gives it, places left out.

    Raises:
        hydra.errors.HydraException, ValueError: as :func:`compose_ensemble`.
    """
    special, _, shared = _parted(literal(overrides, _LITERAL))
    config, _ = compose_ensemble(overrides, config_dir)
    found = {}
    for name, member in config.members.items():
        mine = [override for owner, override in special if owner == name]
        general = list(config.overrides)[: len(config.overrides) - len(shared)]
        given = list(member.overrides)[: len(member.overrides) - len(mine)]
        found[name] = [f"experiment={member.experiment}", *general, *given, *shared, *mine]
    return found


def _parted(overrides: Sequence[str]) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    """Overrides for single members with their names, those of the ensemble itself, and those of all members."""
    special = [(match["name"], match["sign"] + match["rest"]) for match in map(_FOR_ONE.fullmatch, overrides) if match]
    general = [override for override in overrides if not _FOR_ONE.fullmatch(override)]
    own = [override for override in general if _group(override) in (*EnsembleConfig.__dataclass_fields__, "experiment")]
    return special, own, [override for override in general if override not in own]


def _compose_member(config: DictConfig, name: str, overrides: Sequence[str], config_dir: Path) -> DictConfig:
    taken = [override for override in overrides if _group(override) in (*NAMED_BY_THE_ENSEMBLE, *EnsembleConfig.__dataclass_fields__)]
    if taken:
        raise ValueError(f"members.{name}: {taken[0]} cannot be set per member: the ensemble's own settings name members and places")
    try:
        if OmegaConf.is_missing(config.members[name], "experiment"):
            raise ValueError(f"members.{name}.experiment is missing")
        if is_ensemble([f"experiment={config.members[name].experiment}"], config_dir):
            raise ValueError(f"experiment={config.members[name].experiment} is an ensemble itself")
        experiment = compose_experiment([f"experiment={config.members[name].experiment}", *overrides], config_dir)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"member {name}: {first_line(error)}") from error
    experiment.member = escaped(name)
    for key in PLACE:
        if not OmegaConf.is_missing(config, key):
            experiment[key] = with_escapes(config[key])
    return experiment


def _group(override: str) -> str:
    """The outermost key that an override changes: ``training`` of ``+training.loss_weights.x=1``."""
    return override.lstrip("+~").partition("=")[0].partition(".")[0].partition("@")[0].strip()
