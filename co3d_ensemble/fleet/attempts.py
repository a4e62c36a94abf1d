"""How the attempts at a job are counted: pure functions on the record that ``attempts.json`` holds.

An attempt that ends with an error counts against the job, unless it left a newer checkpoint: then the count starts anew. An
attempt that ended with its worker (killed, or told to stop) does not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN_HISTORY = 20  # attempts kept in the record

Record = dict[str, Any]
DONE, FAILED, STOPPED, LOST = "done", "failed", "stopped", "lost"


def new_record() -> Record:
    """``started``: attempts; ``fruitless``: failed ones since the last newer checkpoint; ``seconds``, ``gpu_seconds``: of all."""
    return {"started": 0, "fruitless": 0, "seconds": 0.0, "gpu_seconds": 0.0, "running": None, "history": []}


def begin(record: Mapping[str, Any], *, now: float, worker: str, device: str, gpu_share: float, checkpoint: Any) -> Record:
    """The record at the start of an attempt.

    Args:
        now: Unix time, as all times here.
        gpu_share: of a GPU that the attempt has; 0 on CPUs.
        checkpoint: stamp of the newest one, None without any.
    """
    running = {"began": now, "worker": worker, "device": device, "gpu_share": gpu_share, "checkpoint": checkpoint}
    return {**record, "started": record["started"] + 1, "running": running}


def end(record: Mapping[str, Any], how: str, *, now: float, checkpoint: Any, error: str | None = None) -> Record:
    """The record after the attempt that is under way ended as ``done``, ``failed``, ``stopped`` or ``lost``."""
    attempt = record["running"]
    seconds = max(0.0, now - attempt["began"])
    newer = checkpoint is not None and checkpoint != attempt["checkpoint"]
    fruitless = 0 if newer or how == DONE else record["fruitless"] + (how == FAILED)
    entry = {"how": how, "began": attempt["began"], "seconds": seconds, "worker": attempt["worker"], "newer_checkpoint": newer}
    if error is not None:
        entry["error"] = error
    return {
        **record,
        "fruitless": fruitless,
        "seconds": record["seconds"] + seconds,
        "gpu_seconds": record["gpu_seconds"] + seconds * attempt["gpu_share"],
        "running": None,
        "history": [*record["history"], entry][-SHOWN_HISTORY:],
    }


def is_exhausted(record: Mapping[str, Any], max_attempts: int) -> bool:
    return record["fruitless"] >= max_attempts
