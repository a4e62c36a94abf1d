"""Scores a trained MINE: PSNR, SSIM and LPIPS of views, depth metrics, for any numbers of planes of the same weights.

    python launch/evaluate_mine.py checkpoint=outputs/mine/RUN                                # the data it was trained on
    python launch/evaluate_mine.py checkpoint=outputs/mine/RUN planes=[16,32,64,256]
    python launch/evaluate_mine.py checkpoint=RUN dataset=realestate10k root=/data/re10k pair_list=validation_pairs.json
    python launch/evaluate_mine.py checkpoint=RUN dataset=kitti_raw root=/data/kitti
    python launch/evaluate_mine.py checkpoint=RUN dataset=nyu_depth root=/data/nyu            # depth only; or dataset=ibims
    python launch/evaluate_mine.py checkpoint=MINE_realestate10k_384x256_monodepth2_N64/checkpoint.pth root=/data/re10k

Takes the run's best weights (averaged), or a checkpoint file of MINE's authors with its params.yaml beside it (or, without that,
preset=mine_realestate10k and the like). Written to <run>/evaluation/<dataset>/results.json: the means, the scores of every
picture, the reason wherever there is no value, and whether best.pt was chosen on the very split that is scored (CO3D pairs and
LLFF have no other; RealEstate10K's validation is a part of it). The same command goes on with an interrupted evaluation.

Exit codes: 0 done, 1 an error that the message explains, 2 wrong arguments, 130 Ctrl-C.
"""

from __future__ import annotations

import sys

from rich.console import Console

from co3d_ensemble.mine.evaluation_run import EvaluateConfig, run_evaluation
from co3d_ensemble.mine.evaluation_table import table
from co3d_ensemble.scripts import run_script, run_with_settings
from co3d_ensemble.settings import settings_with_help


def show(settings: EvaluateConfig) -> int:
    results = run_evaluation(settings)
    Console(width=None if sys.stdout.isatty() else 160).print(table(results))
    print(results["path"])
    return 0


def main(arguments: list[str]) -> int:
    listed = "\n".join(f"  {key}={default}\n      {text}" for key, default, text in settings_with_help(EvaluateConfig))
    return run_with_settings(arguments, EvaluateConfig, f"{__doc__}\nSettings:\n\n{listed}\n", show)


if __name__ == "__main__":
    run_script(main)
