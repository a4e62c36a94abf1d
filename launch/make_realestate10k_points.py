"""Sparse points for RealEstate10K: a COLMAP model beside each clip's frames, made with the clip's published cameras.

    pip install 'co3d_ensemble[points]'
    python launch/make_realestate10k_points.py root=/data/realestate10k split=train

Writes ROOT/frames/<split>/<clip>/sparse/ for every clip that has at least two frames on disk; clips that have it are skipped.
Start it again after an interruption, or several times with other parts. Settings:

    root=ROOT            see co3d_ensemble/mine/realestate10k.py for what lies in it
    split=train          train | test
    clips=[]             names of clips; empty: all of the split
    part=0 parts=1       this run takes every parts-th clip, from the part-th on: several runs share the work
    overwrite=false      true makes models again that are there

Exit codes: 0 done, 1 an error that the message explains or clips without a model, 2 wrong arguments, 130 Ctrl-C.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from co3d_ensemble.base.progress import tracked
from co3d_ensemble.mine.realestate10k import camera_files, read_clip
from co3d_ensemble.mine.realestate10k_points import triangulate_clip
from co3d_ensemble.scripts import run_script, run_with_settings
from co3d_ensemble.settings import setting

logger = logging.getLogger(__name__)


@dataclass
class PointsConfig:
    root: str = setting(MISSING, "folder of the data set", literal=True)
    split: str = "train"
    clips: list[str] = field(default_factory=list)
    part: int = 0
    parts: int = 1
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.part < self.parts:
            raise ValueError(f"part={self.part}: must lie in [0, parts={self.parts})")


def make_points(config: PointsConfig) -> int:
    root = Path(config.root)
    files = camera_files(root, config.split)
    chosen = [path for path in files if not config.clips or path.stem in config.clips]
    unknown = set(config.clips) - {path.stem for path in chosen}
    if unknown:
        raise ValueError(f"clips: {files[0].parent} has no {sorted(unknown)[0]}.txt")
    made = failed = absent = 0
    for path in tracked(chosen[config.part :: config.parts], "making points", "clips"):
        clip = read_clip(root, config.split, path)
        if len(clip) < 2:
            absent += 1
            continue
        try:
            model = triangulate_clip(clip, clip.folder / "sparse", overwrite=config.overwrite)
        except ValueError as error:  # one clip's frames or cameras; the others go on
            logger.error("%s", error)
            failed += 1
            continue
        made += 1
        logger.info("%s: %d points in %d frames", clip.name, len(model.xyz), len(clip.frames))
    print(f"{made} clips have points, {failed} failed, {absent} have fewer than two frames")
    return 1 if failed else 0


def main(arguments: list[str]) -> int:
    try:
        return run_with_settings(arguments, PointsConfig, __doc__, make_points)
    except ModuleNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    run_script(main)
