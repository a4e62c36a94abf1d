"""Trains one member model on one sequence, then renders and scores its target frames.

    python launch/train_sequence.py experiment=nerf_laptop dataset_root=ROOT category=cape subset_name=manyview_dev_0 output_dir=OUT
    python launch/train_sequence.py --help        # every setting with one line of help
    python launch/train_sequence.py --cfg ...     # the composed configuration, without running

Arguments are Hydra overrides. The same command goes on with an interrupted run. Exit codes: 0 done, 1 an error that the
message explains, 2 wrong arguments, 130 Ctrl-C, 143 SIGTERM (both after writing a checkpoint).
"""

from __future__ import annotations

import sys

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from co3d_ensemble.assembly import CONFIG_DIR, compose_experiment
from co3d_ensemble.config import settings_with_help
from co3d_ensemble.pipeline import train_sequence
from co3d_ensemble.scripts import configure_logging, first_line, reported


def print_help() -> None:
    experiments = ", ".join(sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml")))
    print(__doc__)
    print(f"experiment=<one of {experiments}>\n")
    for key, default, text in settings_with_help():
        print(f"  {key}={default}\n      {text}")


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print_help()
        return 0
    configure_logging()
    try:
        config = compose_experiment([argument for argument in arguments if argument != "--cfg"])
        OmegaConf.to_container(config, throw_on_missing="--cfg" not in arguments)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        print(f"error: {first_line(error)} (python launch/train_sequence.py --help lists the settings)", file=sys.stderr)
        return 2
    if "--cfg" in arguments:
        print(OmegaConf.to_yaml(config))
        return 0
    return reported(lambda: train_sequence(config).exit_status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
