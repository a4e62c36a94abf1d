"""Floor 2: the only importer of PyTorch3D. ``import co3d_ensemble.plugin`` registers every Implicitron component."""

from co3d_ensemble.plugin import compat

RUNS_ON_STAND_INS = compat.install()
