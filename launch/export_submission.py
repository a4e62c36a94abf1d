"""Packs the target frames of trained runs into a CO3D challenge submission, checks and (for dev) scores it.

    python launch/export_submission.py dataset_root=ROOT output_dir=OUT sequence_set=dev models=[nerf]
    python launch/export_submission.py dataset_root=ROOT output_dir=OUT sequence_set=dev models=[ensemble]

Writes OUT/submission/submission_manyview_<set>.hdf5 and, for dev, results.json. Settings:

    dataset_root=ROOT      CO3Dv2 root folder
    output_dir=outputs     where the runs are
    sequence_set=dev       dev | test
    models=[nerf]          names of the runs' folders, <output_dir>/<category>/<subset_name>/<member>: several, as in
                           [nerf,tensorf], are fused; an ensemble's, as in [ensemble], stands for its members and fusion
    fusion=auto            of several members: auto takes the fusion that a sequence's ensemble of the same members recorded, else
                           the plain average; mean, opacity, confidence or agreement say which
    allow_missing=false    true leaves out subsets without a trained run
    device=auto            auto | cpu | cuda | cuda:N
    chunk_rays=null        rays rendered at once, fewer for less memory; null: each run's own

Exit codes: 0 done, 1 an error that the message explains, 2 wrong arguments, 130 Ctrl-C.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from omegaconf import MISSING

from co3d_ensemble.challenge.scoring import format_table
from co3d_ensemble.challenge.targets import SEQUENCE_SETS
from co3d_ensemble.scripts import run_script, run_with_settings
from co3d_ensemble.settings import setting
from co3d_ensemble.submission import FUSIONS, export_submission


@dataclass
class ExportConfig:
    dataset_root: str = setting(MISSING, "CO3Dv2 root folder", literal=True)
    output_dir: str = setting("outputs", "where the runs are", literal=True)
    sequence_set: str = "dev"
    models: list[str] = field(default_factory=lambda: ["nerf"])
    fusion: str = "auto"
    allow_missing: bool = False
    device: str = "auto"
    chunk_rays: int | None = None

    def __post_init__(self) -> None:
        if self.sequence_set not in (*SEQUENCE_SETS, MISSING):
            raise ValueError(f"sequence_set={self.sequence_set!r}: expected one of {', '.join(SEQUENCE_SETS)}")
        if self.chunk_rays is not None and self.chunk_rays < 1:
            raise ValueError(f"chunk_rays={self.chunk_rays}: must be positive")
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion={self.fusion!r}: expected one of {', '.join(FUSIONS)}")


def export(config: ExportConfig) -> int:
    done = export_submission(**asdict(config))
    if done["results"] is not None:
        print(format_table(done["results"]))
    if done["missing"]:
        print(f"left out, no trained run: {', '.join(done['missing'])}")
    print(f"{done['archive']}: checked, {done['archive'].stat().st_size / 1e6:.1f} MB")
    return 0


def main(arguments: list[str]) -> int:
    return run_with_settings(arguments, ExportConfig, __doc__, export)


if __name__ == "__main__":
    run_script(main)
