"""Single-object reconstruction from ~100 posed, masked photographs: the CO3D many-view task on PyTorch3D's Implicitron."""

__version__ = "0.1.0"
