"""How a fleet stands: a table of its jobs, read from its output folder.

    python launch/status.py output_dir=OUT              # once
    python launch/status.py output_dir=OUT --watch      # live, until Ctrl-C
    python launch/status.py output_dir=OUT --json       # for programs

States: running, waiting, interrupted (begun, nobody is at it now), done, failed. Curves of all runs:
tensorboard --logdir OUT
"""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.live import Live

from co3d_ensemble.fleet.status import StatusConfig, as_json, read_status, render
from co3d_ensemble.scripts import run_script, run_with_settings
from co3d_ensemble.settings import settings_with_help


def show(settings: StatusConfig) -> int:
    status = read_status(settings.output_dir)
    if settings.json:
        print(as_json(status))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 200)
    if not settings.watch:
        console.print(render(status))
        return 0
    with Live(render(status), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(settings.every)
            live.update(render(read_status(settings.output_dir)), refresh=True)


def main(arguments: list[str]) -> int:
    flags = {"--watch": "watch=true", "--json": "json=true"}
    settings = [f"  {key}={default}\n      {text}" for key, default, text in settings_with_help(StatusConfig)]
    document = "\n".join([__doc__, "Settings:\n", *settings])
    return run_with_settings([flags.get(argument, argument) for argument in arguments], StatusConfig, document, show)


if __name__ == "__main__":
    run_script(main)
