"""Renders CO3D's few-view targets with a run of MINE, packs, checks and (for dev) scores them.

    python launch/export_fewview.py dataset_root=ROOT run=outputs/mine/NAME output_dir=OUT sequence_set=dev

Each target is rendered from the source frames of its own eval batch. Writes OUT/submission/submission_fewview_<set>.hdf5 and, for
dev, results_fewview.json. Settings:

    dataset_root=ROOT      CO3Dv2 root folder
    run=FOLDER             a run of launch/train_mine.py, one of its checkpoints, or MINE's authors' checkpoint file
    preset=null            file of configs/mine that the authors' checkpoint goes with; null: its params.yaml beside it tells
    output_dir=outputs     where the submission goes
    sequence_set=dev       dev | test
    n_planes=null          planes per picture; null: as in the run's validations
    fine_planes=null       planes added where a first pass finds surfaces (coarse to fine); null: as in training
    n_sources=1            source frames that a target is rendered from: the nearest one, or the average of several
    scene_scale=null       world units per unit of the network; null: fitted to each sequence by the depth maps of its source frames or
                           its point cloud; 1, with a warning that names the sequence, where there is neither
    plane_chunk=null       planes decoded at once, fewer for less memory; null: as the run has it
    device=auto            auto | cpu | cuda | cuda:N

Exit codes: 0 done, 1 an error that the message explains, 2 wrong arguments, 130 Ctrl-C.
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from co3d_ensemble.challenge.scoring import format_table
from co3d_ensemble.challenge.targets import SEQUENCE_SETS
from co3d_ensemble.mine.fewview import export_fewview, model_of_run
from co3d_ensemble.rendering import resolve_device
from co3d_ensemble.scripts import run_script, run_with_settings
from co3d_ensemble.settings import setting


@dataclass
class FewViewConfig:
    dataset_root: str = setting(MISSING, "CO3Dv2 root folder", literal=True)
    run: str = setting(MISSING, "a run of MINE, or a checkpoint", literal=True)
    preset: str | None = None
    output_dir: str = setting("outputs", "where the submission goes", literal=True)
    sequence_set: str = "dev"
    n_planes: int | None = None
    fine_planes: int | None = None
    n_sources: int = 1
    scene_scale: float | None = None
    plane_chunk: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.sequence_set not in (*SEQUENCE_SETS, MISSING):
            raise ValueError(f"sequence_set={self.sequence_set!r}: expected one of {', '.join(SEQUENCE_SETS)}")
        for name in ("n_planes", "n_sources", "plane_chunk", "scene_scale"):
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not value > 0:
                raise ValueError(f"{name}={value}: must be positive")
        if self.fine_planes is not None and self.fine_planes < 0:
            raise ValueError(f"fine_planes={self.fine_planes}: must not be negative")


def export(config: FewViewConfig) -> int:
    given = {name: getattr(config, name) for name in ("n_planes", "plane_chunk", "scene_scale") if getattr(config, name) is not None}
    if config.fine_planes is not None:
        given["n_fine_planes"] = config.fine_planes
    model = model_of_run(config.run, config.preset, n_sources=config.n_sources, **given)
    device = resolve_device(config.device)
    done = export_fewview(model, config.dataset_root, config.output_dir, sequence_set=config.sequence_set, device=device)
    if done["results"] is not None:
        print(format_table(done["results"]))
    print(f"{done['archive']}: checked, {done['archive'].stat().st_size / 1e6:.1f} MB")
    return 0


def main(arguments: list[str]) -> int:
    return run_with_settings(arguments, FewViewConfig, __doc__, export)


if __name__ == "__main__":
    run_script(main)
