"""Trains one model, or an ensemble of several, on one sequence, then renders and scores its target frames.

    python launch/train_sequence.py experiment=nerf_laptop dataset_root=ROOT category=cape subset_name=manyview_dev_0 output_dir=OUT
    python launch/train_sequence.py experiment=ensemble_laptop dataset_root=ROOT category=cape output_dir=OUT
    python launch/train_sequence.py --help        # every setting with one line of help
    python launch/train_sequence.py --cfg ...     # the composed configuration, without running

Arguments are Hydra overrides; paths and names are taken as they are typed, whatever characters they have. The same command goes on
with an interrupted run; training.resume=extend with more training.max_steps or training.budget_minutes goes on with a finished one
(the learning rate rises again along the new schedule). An ensemble hands all settings but its own to
every member (training.budget_minutes is for each); members.NAME.overrides.training.seed=1 is for one. Exit codes: 0 done, 1 an
error that the message explains, 2 wrong arguments, 130 Ctrl-C, 143 SIGTERM (both after writing a checkpoint).
"""

from __future__ import annotations

import sys

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from co3d_ensemble.assembly import CONFIG_DIR, compose_experiment
from co3d_ensemble.base.paths import listed
from co3d_ensemble.composition import compose_ensemble, is_ensemble
from co3d_ensemble.config import EnsembleConfig, ExperimentConfig, MemberConfig
from co3d_ensemble.ensemble import format_members, train_ensemble
from co3d_ensemble.pipeline import train_sequence
from co3d_ensemble.scripts import configure_logging, first_line, reported, run_script
from co3d_ensemble.settings import settings_with_help


def print_help() -> None:
    experiments = ", ".join(path.stem for path in listed(CONFIG_DIR / "experiment", "*.yaml"))
    print(__doc__)
    print(f"experiment=<one of {experiments}>\n")
    ensemble = [*settings_with_help(EnsembleConfig), *settings_with_help(MemberConfig, "members.NAME.")]
    for title, settings in (("one model", settings_with_help(ExperimentConfig)), ("an ensemble", ensemble)):
        print(f"Settings of {title}:\n")
        for key, default, text in settings:
            print(f"  {key}={default}\n      {text}")
        print()


def train_members(config: DictConfig, members: dict[str, DictConfig]) -> int:
    status, results = train_ensemble(config, members)
    if results is not None:
        print(format_members(results, config.name))
    return status


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print_help()
        return 0
    configure_logging()
    overrides = [argument for argument in arguments if argument != "--cfg"]
    try:
        if is_ensemble(overrides):
            config, members = compose_ensemble(overrides)
        else:
            config, members = compose_experiment(overrides), {}
        OmegaConf.to_container(config, throw_on_missing="--cfg" not in arguments)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        print(f"error: {first_line(error)} (python launch/train_sequence.py --help lists the settings)", file=sys.stderr)
        return 2
    if "--cfg" in arguments:
        print("---\n".join(OmegaConf.to_yaml(part) for part in (config, *members.values())))
        return 0
    return reported(lambda: train_members(config, members) if members else train_sequence(config).exit_status)


if __name__ == "__main__":
    run_script(main)
