"""Becomes a command that is killed when the process that started it dies, however it dies: ``bound.py PARENT COMMAND...``

Run by path, before anything is imported: setting this between fork and exec would run Python in the forked copy of a process
that has threads. Linux only; elsewhere the command runs unbound.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>; survives execve


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> bool:
    """Asks for ``number`` on the death of the parent; False where it is dead already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    return os.getppid() == parent


if __name__ == "__main__":
    if not die_with_parent(int(sys.argv[1])):
        sys.exit("the worker that started this has died")
    os.execvp(sys.argv[2], sys.argv[2:])
