"""Where a worker's jobs run: their device, threads and environment, and that data set and disk are there."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

import torch

from co3d_ensemble.base.quoting import for_device
from co3d_ensemble.data.co3d import SUBSET_LIST_FILE
from co3d_ensemble.fleet import child
from co3d_ensemble.fleet.jobrun import Terms
from co3d_ensemble.fleet.jobs import Job
from co3d_ensemble.fleet.settings import FleetConfig

REPOSITORY = Path(__file__).resolve().parents[2]


def check_environment(settings: FleetConfig) -> None:
    """That what all jobs need is there.

    Raises:
        OSError: naming the disk or the folder.
    """
    listing = Path(settings.dataset_root) / SUBSET_LIST_FILE
    if not listing.is_file():
        raise FileNotFoundError(errno.ENOENT, "no data set here: a wrong dataset_root, or a vanished mount", str(listing))
    output = Path(settings.output_dir)
    if not output.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the output folder has vanished", str(output))
    free = shutil.disk_usage(output).free / 1e9
    if free < settings.min_free_gb:
        raise OSError(errno.ENOSPC, f"the disk is almost full: {free:.2f} GB free, min_free_gb={settings.min_free_gb:g}", str(output))


def terms_of(settings: FleetConfig) -> Terms:
    """How this worker runs jobs."""
    rank, device = os.environ.get("RANK", "0"), device_of(settings.device, os.environ)
    environment = job_environment(settings)

    def start(job: Job, log: Path) -> child.Process:
        return child.start(for_device(job.command, device), log, environment)

    return Terms(
        output_dir=Path(settings.output_dir),
        worker=f"{rank}@{socket.gethostname()}",
        device=device,
        start=start,
        max_attempts=settings.max_attempts,
        gpu_share=1 / settings.jobs_per_device if device.startswith("cuda") else 0.0,
        check=lambda: check_environment(settings),
    )


def job_environment(settings: FleetConfig) -> dict[str, str]:
    """Of a child process: this worker's share of the threads, and this checkout's package."""
    threads = settings.threads or max(1, (os.cpu_count() or 1) // (int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * settings.jobs_per_device))
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return child.child_environment({**os.environ, "PYTHONPATH": path}, threads)


def device_of(setting: str, environment: Mapping[str, str]) -> str:
    """``auto``: a GPU per worker of the node, or the CPU."""
    if setting != "auto":
        return setting
    count = torch.cuda.device_count()
    return f"cuda:{int(environment.get('LOCAL_RANK', 0)) % count}" if count else "cpu"
