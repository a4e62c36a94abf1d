"""Floor 1: neural fields as plain ``nn.Module`` on top of ``functional``; no PyTorch3D."""
