"""torchvision, importable also where it was built for another torch.

Such a torchvision cannot load its own ops and fails on import although its networks need none of them; naming the two schemas
that it looks for avoids it. This lies on floor 1 because the networks there need it without PyTorch3D; the plugin uses it, too,
as PyTorch3D imports torchvision.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept_alive: list[torch.library.Library] = []  # a schema disappears with its Library object


def import_torchvision() -> ModuleType | None:
    """The package, imported once; None where it is not installed.

    Raises:
        RuntimeError: it fails for another reason than its missing ops.
    """
    if "torchvision" in sys.modules:
        return sys.modules["torchvision"]
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _kept_alive.append(library)
    return importlib.import_module("torchvision")
