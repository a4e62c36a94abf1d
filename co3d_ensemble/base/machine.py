"""What this machine calls itself."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """The CPU's model, such as "AMD EPYC 7B13"; where only the kernel's word is known, the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
