"""Experiment and data set to the jobs of a fleet. Composes configurations, so only the worker that leads imports it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from co3d_ensemble.assembly import CONFIG_DIR, compose_experiment
from co3d_ensemble.base.quoting import DEVICE, override
from co3d_ensemble.composition import compose_ensemble, is_ensemble, member_overrides
from co3d_ensemble.data.co3d import CO3DIndex
from co3d_ensemble.fleet.disk import JobFolder, read_json
from co3d_ensemble.fleet.jobs import Job, chosen_subsets, digest, longest_first
from co3d_ensemble.fleet.settings import FleetConfig
from co3d_ensemble.training.run_directory import flattened, is_free

TRAIN = CONFIG_DIR.parent / "launch" / "train_sequence.py"
OF_THE_PLACE = ("category", "subset_name", "member")


@dataclass(frozen=True)
class Models:
    """What an experiment trains.

    Attributes:
        overrides: of ``launch/train_sequence.py``, by model.
        configs: what they compose to.
        ensemble: settings of their fusion, with the chosen members only; None where a single model is left.
    """

    overrides: dict[str, list[str]]
    configs: dict[str, DictConfig]
    ensemble: DictConfig | None

    @property
    def exported(self) -> str:
        """The folder that the archive is made of: the ensemble's, or the one model's."""
        return next(iter(self.overrides)) if self.ensemble is None else self.ensemble.name


@dataclass(frozen=True)
class Plan:
    """Attributes: jobs: longest expected first. subsets: (category, subset name), in the data set's order."""

    models: Models
    subsets: list[tuple[str, str]]
    jobs: list[Job]


def compose_models(experiment: str, overrides: Sequence[str], chosen: Sequence[str] = ()) -> Models:
    """The models of an experiment, all or the chosen ones.

    Raises:
        hydra.errors.HydraException, ValueError: an unknown experiment, key or model, a wrong type or value.
    """
    arguments = [f"experiment={experiment}", *overrides]
    ensemble = None
    if is_ensemble(arguments):
        ensemble, configs = compose_ensemble(arguments)
        given = member_overrides(arguments)
    else:
        config = compose_experiment(arguments)
        configs, given = {config.member: config}, {config.member: arguments}
    unknown = [name for name in chosen if name not in given]
    if unknown:
        raise ValueError(f"models={list(chosen)}: {experiment} has no {', '.join(unknown)}, there are {', '.join(given)}")
    names = [name for name in given if not chosen or name in chosen]
    if ensemble is not None:
        ensemble.members = {name: ensemble.members[name] for name in names}
    return Models({name: given[name] for name in names}, {name: configs[name] for name in names}, ensemble if len(names) > 1 else None)


def make_plan(settings: FleetConfig, overrides: Sequence[str]) -> Plan:
    """All jobs, also those that are done.

    Raises:
        hydra.errors.HydraException, ValueError: bad settings, or no CO3Dv2 root; the message says which.
    """
    models = compose_models(settings.experiment, overrides, settings.models)
    index = CO3DIndex(settings.dataset_root)
    available = index.all_subsets(settings.sequence_set)
    subsets = chosen_subsets(available, categories=settings.categories, subsets=settings.subsets)
    names = {model: [f"{category}/{subset}/{model}" for category, subset in subsets] for model in models.overrides}
    jobs = []
    for model, config in models.configs.items():
        recipe = recipe_of(config)
        measured = measured_seconds(settings.output_dir, names[model])
        mean = sum(measured.values()) / len(measured) if measured else None
        for name, (category, subset) in zip(names[model], subsets, strict=True):
            work = work_of(config) * (1 + 1e-3 * n_listed_frames(index, category, subset))
            command = command_of(settings, models.overrides[model], category, subset, model)
            jobs.append(Job(name, command, recipe, measured.get(name, mean), work))
    return Plan(models, subsets, longest_first(jobs))


def recipe_of(config: DictConfig) -> str:
    """Digest of every setting that can change a model's results, wherever it is trained."""
    return digest({key: value for key, value in flattened_without_missing(config).items() if not is_free(key) and key not in OF_THE_PLACE})


def flattened_without_missing(config: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=True)  # leaves ??? where the fleet fills in the place
    for key in ("dataset_root", "category"):
        plain[key] = ""
    return flattened(plain)


def command_of(settings: FleetConfig, overrides: Sequence[str], category: str, subset: str, model: str) -> tuple[str, ...]:
    place = {
        "dataset_root": Path(settings.dataset_root).absolute(),
        "category": category,
        "subset_name": subset,
        "output_dir": Path(settings.output_dir).absolute(),
        "member": model,
    }
    return (
        sys.executable,
        str(TRAIN),
        *overrides,
        *(override(key, value) for key, value in place.items()),
        DEVICE,
        "training.progress=false",
        "rendering.all_targets=true",  # or the last step would render everything on one device
    )


def measured_seconds(output_dir: Path | str, names: Sequence[str]) -> dict[str, float]:
    """What jobs that are done took, all attempts together, by name."""
    found = {}
    for name in names:
        record = read_json(JobFolder(output_dir, name).done)
        if record is not None:
            found[name] = float(record["seconds"])
    return found


def n_listed_frames(index: CO3DIndex, category: str, subset: str) -> int:
    """Frames that a subset's set list gives to train on; 0 where it cannot be read (the job itself will say why)."""
    try:
        return index.n_listed(category, subset)
    except ValueError:
        return 0


def work_of(config: DictConfig) -> float:
    """How long models take relative to each other: multiplications of their networks over all steps, roughly.

    Only an order until something has been measured.
    """
    model, training = config.model, config.training
    if training.budget_minutes is not None:
        return 1e12 * training.budget_minutes
    steps = float(training.max_steps)
    coarse, fine = model.renderer.n_pts_per_ray_coarse, model.renderer.n_pts_per_ray_fine
    if model.kind == "nerf":
        return steps * training.n_rays * (2 * coarse + fine) * model.nerf.n_layers * model.nerf.n_hidden**2
    if model.kind == "tensorf":
        per_sample = 3 * (model.tensorf.n_density + model.tensorf.n_appearance) * 8 + 2 * model.tensorf.n_hidden**2
        return steps * training.n_rays * (coarse + fine) * per_sample
    return steps * model.implicitron.frames_per_step * training.n_rays * (coarse + fine) * 8 * 256**2
