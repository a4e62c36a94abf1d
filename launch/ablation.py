"""What each part of the recipe is worth: trains every row of the table on every sequence from every seed, and writes the table.

    python launch/ablation.py dataset_root=ROOT sequences=[cape/manyview_dev_0] generated=[bear,truck,plant] \\
        seeds=[0,1] output_dir=OUT jobs=2
    python launch/ablation.py preset=ablation ... devices=[cuda:0,cuda:1] jobs=2     # full size, on GPUs
    python launch/ablation.py ... rows=[nerf_baseline,nerf_ema_warmup]               # a part of the table
    python launch/ablation.py ... report_only=true                                   # the report of what is there

Cells are independent runs, OUT/<category>/<subset_name>/<row>_seed<n>, logs in OUT/logs; a seed of all rows on all sequences comes
before the next seed. The report: OUT/table.md, table.csv, cells.csv, differences.png, curves.png, kept up to date while cells end.
Ctrl-C or SIGTERM stops after a checkpoint of each running cell; the same command goes on, also after a kill. A cell that fails is
reported, the rest goes on, and the same command tries it again.

Exit codes: 0 done, 1 a cell failed or another error that the message explains, 2 wrong arguments, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import sys

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from co3d_ensemble.ablation.rows import ROWS
from co3d_ensemble.ablation.run import ablate
from co3d_ensemble.ablation.settings import PRESETS, AblationConfig, preset_defaults
from co3d_ensemble.base.paths import listed
from co3d_ensemble.scripts import WRONG_ARGUMENTS, first_line, run_script, run_with_settings
from co3d_ensemble.settings import settings_with_help


def help_text() -> str:
    presets = ", ".join(path.stem for path in listed(PRESETS, "*.yaml"))
    settings = [f"  {key}={default}\n      {text}" for key, default, text in settings_with_help(AblationConfig)]
    rows = [f"  {row.name}: {row.what}" + (f" (against {row.builds_on})" if row.builds_on else "") for row in ROWS]
    intro = f"preset=<one of {presets}>; what is not given comes from it, then from these defaults:\n"
    return "\n".join([__doc__, intro, *settings, "\nrows:", *rows])


def main(arguments: list[str]) -> int:
    try:
        given = OmegaConf.from_cli([argument for argument in arguments if argument.startswith("preset=")])
        defaults = preset_defaults(given.get("preset", AblationConfig.preset))
    except (OmegaConfBaseException, ValueError) as error:
        print(f"error: {first_line(error)} (--help lists the settings)", file=sys.stderr)
        return WRONG_ARGUMENTS
    command = ["python", "launch/ablation.py", *arguments]
    return run_with_settings(arguments, defaults, help_text(), lambda settings: ablate(settings, command))


if __name__ == "__main__":
    run_script(main)
