"""Trains all sequences of a CO3Dv2 root on many devices, fuses, scores and exports them.

    torchrun --nnodes 1 --nproc_per_node 8 --max-restarts 1000 --rdzv_backend c10d --rdzv_endpoint localhost:0 \\
        launch/train_all_sequences.py dataset_root=ROOT output_dir=OUT sequence_set=[dev,test] experiment=ensemble
    python launch/train_all_sequences.py dataset_root=ROOT output_dir=OUT experiment=ensemble_laptop    # one worker
    python launch/train_all_sequences.py ... dry_run=true                      # jobs, order, disk, hours; checks the data
    python launch/train_all_sequences.py ... finish_only=true                  # fuse, score, export what is there
    python launch/status.py output_dir=OUT --watch

A job is one model on one sequence. The same command goes on after anything, with any number of workers. Put
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 into torchrun's environment where nodes may come and go. Arguments that are not among the
settings below are overrides for every job, as of launch/train_sequence.py: training.max_steps=200.

Results: OUT/summary.md, OUT/summary.csv, OUT/submission/, OUT/<category>/<subset>/<model>/; logs in OUT/fleet/jobs/<job>/log.txt.
OUT/fleet_state.json: "done", "failed" or "requeue". Exit codes of plain python: 0 done, 1 an error that the message explains,
2 wrong settings, 3 some jobs failed for good (a dry run: something would), 4 another fleet is at work in OUT, 130 Ctrl-C,
143 SIGTERM (both after writing checkpoints). torchrun hides its workers' codes: read the file.
"""

from __future__ import annotations

import os
import sys

from co3d_ensemble.fleet.run import run_fleet
from co3d_ensemble.fleet.settings import FleetConfig, split_arguments
from co3d_ensemble.scripts import WRONG_ARGUMENTS, run_script, run_with_settings
from co3d_ensemble.settings import settings_with_help


def help_text() -> str:
    settings = [f"  {key}={default}\n      {text}" for key, default, text in settings_with_help(FleetConfig)]
    return "\n".join([__doc__, "Settings:\n", *settings])


def main(arguments: list[str]) -> int:
    try:
        own, overrides = split_arguments(arguments)
    except ValueError as error:
        print(f"error: {error} (--help lists the settings)", file=sys.stderr)
        return WRONG_ARGUMENTS

    def act(settings: FleetConfig) -> int:
        if settings.dry_run:
            from co3d_ensemble.fleet.dry_run import dry_run  # composes every experiment: seconds that a worker need not wait

            return dry_run(settings, overrides)
        return run_fleet(settings, overrides, arguments)

    return run_with_settings(own, FleetConfig, help_text(), act)


def worker(arguments: list[str]) -> int:
    """:func:`main`, but torchrun would start all workers again and again over a mistake in the command."""
    status = main(arguments)
    return 0 if status == WRONG_ARGUMENTS and "TORCHELASTIC_RUN_ID" in os.environ else status


if __name__ == "__main__":
    run_script(worker)
