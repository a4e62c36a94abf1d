"""Single-object reconstruction from ~100 posed, masked photographs: the CO3D many-view task on PyTorch3D's Implicitron."""

from co3d_ensemble.base.threads import sleep_when_waiting

__version__ = "0.1.0"

sleep_when_waiting()
