"""How threads wait for each other on a machine that does other things as well.

An operation that runs on several threads ends when the last of them does, and OpenMP runtimes let the others wait in a busy loop. With
a core taken by another program, that loop takes the core from the very thread that is waited for: a training with two threads beside
one busy process runs at a tenth of its speed. Threads that sleep after a short wait keep more than half (``benchmarks/busy_cores.py``).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping

logger = logging.getLogger(__name__)

SPINS = 1000  # of GNU's runtime before a thread sleeps, some microseconds: enough where all cores are free; its own default is 300,000
_GNU = "GOMP_SPINCOUNT"  # of torch's builds for Linux
_LLVM = "KMP_BLOCKTIME"  # milliseconds; of builds with Intel's or LLVM's runtime
_STANDARD = "OMP_WAIT_POLICY"


def sleep_when_waiting(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Has OpenMP's threads sleep after a short wait, in this process and its children; a user's own choice wins.

    The runtime reads its environment when torch loads it, so this has to come before the first ``import torch``:
    ``import co3d_ensemble`` calls it.

    Returns:
        Whether it came in time.
    """
    if not any(name in environment for name in (_GNU, _LLVM, _STANDARD)):
        environment[_GNU], environment[_LLVM] = str(SPINS), "0"
    return "torch" not in sys.modules
