"""Trains MINE on pairs of pictures, on one device or on several.

    python launch/train_mine.py                                                     # generated scenes, needs no data
    python launch/train_mine.py experiment=mine_kitti_384 data.root=/data/kitti_raw output_dir=OUT
    torchrun --nproc_per_node 8 launch/train_mine.py experiment=mine_realestate10k data.root=/data/re10k training.batch_size=32
    python launch/train_mine.py experiment=mine_realestate10k data.root=/data/re10k model.reference_weights=checkpoint.pth   # finetune
    python launch/train_mine.py experiment=mine_llff --cfg                          # the composed configuration, without running
    python launch/train_mine.py --help                                              # every setting with one line of help

Arguments are Hydra overrides. Under torchrun training.batch_size pairs are shared by all processes, whose gradients are averaged;
the first one owns the run directory, <output_dir>/mine/<name>. The same command goes on with an interrupted run, with any number
of processes; training.resume=extend with more training.max_steps or training.epochs goes on with a finished one.
launch/evaluate_mine.py scores a run, launch/render_mine.py shows a photograph from other places.

Exit codes: 0 done, 1 an error that the message explains, 2 wrong arguments, 130 Ctrl-C, 143 SIGTERM (both after writing a
checkpoint).
"""

from __future__ import annotations

import sys

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from co3d_ensemble.base.paths import listed
from co3d_ensemble.mine.assembly import CONFIG_DIR, compose_mine
from co3d_ensemble.mine.config import MINEConfig
from co3d_ensemble.mine.run import train_mine
from co3d_ensemble.scripts import configure_logging, first_line, reported, run_script
from co3d_ensemble.settings import settings_with_help


def print_help() -> None:
    experiments = ", ".join(path.stem for path in listed(CONFIG_DIR / "mine", "*.yaml"))
    print(f"{__doc__}\nexperiment=<one of {experiments}>; without it {compose_mine([]).name}\n")
    print("Settings, with the values they have where the experiment's file says nothing (--cfg shows what it says):\n")
    for key, default, text in settings_with_help(MINEConfig):
        print(f"  {key}={default}\n      {text}")


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print_help()
        return 0
    configure_logging()
    try:
        config = compose_mine([argument for argument in arguments if argument != "--cfg"])
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        print(f"error: {first_line(error)} (python launch/train_mine.py --help lists the settings)", file=sys.stderr)
        return 2
    if "--cfg" in arguments:
        print(OmegaConf.to_yaml(config))
        return 0
    return reported(lambda: train_mine(config).exit_status)


if __name__ == "__main__":
    run_script(main)
