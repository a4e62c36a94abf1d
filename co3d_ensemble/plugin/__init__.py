"""Floor 2: the only importer of PyTorch3D. ``import co3d_ensemble.plugin`` registers every Implicitron component.

Import it before the first ``get_default_args`` or ``expand_args_fields`` of an Implicitron model: expansion freezes the
list of subclasses.
"""

from co3d_ensemble.plugin import compat

RUNS_ON_STAND_INS = compat.install()

from co3d_ensemble.plugin.implicit_functions import NeRFImplicitFunction, TensoRFImplicitFunction  # noqa: E402
from co3d_ensemble.plugin.mine_model import MINEModel  # noqa: E402
from co3d_ensemble.plugin.raymarcher import OpacityRaymarcher  # noqa: E402
from co3d_ensemble.plugin.regularization import VMRegularization  # noqa: E402
from co3d_ensemble.plugin.renderer import OccupancyAwareRenderer  # noqa: E402
from co3d_ensemble.plugin.view_metrics import RecipeViewMetrics  # noqa: E402

__all__ = [
    "MINEModel",
    "NeRFImplicitFunction",
    "OccupancyAwareRenderer",
    "OpacityRaymarcher",
    "RecipeViewMetrics",
    "RUNS_ON_STAND_INS",
    "TensoRFImplicitFunction",
    "VMRegularization",
]
