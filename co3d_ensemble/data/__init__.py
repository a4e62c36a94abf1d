"""Floor 1: bytes on disk to frames to rays; no PyTorch3D."""
