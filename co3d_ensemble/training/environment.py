"""What a run ran on: versions, device, command line, source revision."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from co3d_ensemble.base.machine import processor_name
from co3d_ensemble.base.precision import bfloat16_words, multiplies_bfloat16

_PACKAGES = ("torch", "pytorch3d", "numpy", "omegaconf", "hydra-core")


def describe_environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """JSON-ready facts about this process; what cannot be found out is None."""
    device = torch.device(device)
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES} | {"torch": torch.__version__},  # with its build: 2.11.0+cu130
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "bfloat16": f"{'native' if multiplies_bfloat16(device) else 'emulated'}: {bfloat16_words(device)}",
        "cpu": processor_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "command_line": list(sys.argv),
        "git_commit": _git_commit(Path(__file__).resolve().parents[2]),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit(root: Path) -> str | None:
    """HEAD if ``root`` is the top of a git checkout (an installed copy may lie inside someone else's)."""
    command = ["git", "-C", str(root), "rev-parse", "HEAD", "--show-prefix"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    commit, prefix = (*answer, "")[:2]
    return commit if prefix == "" else None
