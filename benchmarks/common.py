"""What the benchmarks share: the sequence, configurations of equal size, memory, medians, crossings, records of the machine."""

from __future__ import annotations

import ctypes
import os
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from co3d_ensemble.assembly import Scene, compose_experiment, make_task
from co3d_ensemble.base.machine import processor_name
from co3d_ensemble.base.precision import bfloat16_words, multiplies_bfloat16, settled_precision
from co3d_ensemble.base.quoting import escaped
from co3d_ensemble.data.synthetic import SyntheticConfig, generate_dataset
from co3d_ensemble.rendering import resolve_device
from co3d_ensemble.training.precision import automatic_precision, settle_precision
from co3d_ensemble.training.stepper import INITIALISATION, Stepper, seed_default_generators

REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_ROOT = REPOSITORY.parent / "shared" / "data" / "co3d"
GENERATED_CATEGORY = "mug"
SUBSET = "manyview_dev_0"
NERF_ARGS = "implicit_function_NeuralRadianceFieldImplicitFunction_args"
_MEBIBYTE = 2**20
_STARTED = time.monotonic()


@dataclass(frozen=True)
class MLP:
    """Sizes that both sides get; ``toy`` is for tests."""

    n_layers: int
    n_hidden: int
    skip_layer: int
    n_hidden_color: int

    def ours(self) -> list[str]:
        """As Hydra overrides of our experiments."""
        return [
            f"model.nerf.n_layers={self.n_layers}",
            f"model.nerf.n_hidden={self.n_hidden}",
            f"model.nerf.skip_layers=[{self.skip_layer}]",
            f"model.nerf.n_hidden_color={self.n_hidden_color}",
        ]

    def implicitron(self) -> list[str]:
        """As Hydra overrides of the ``implicitron_nerf`` experiments."""
        prefix = f"model.implicitron.args.{NERF_ARGS}"
        return [
            f"{prefix}.n_layers_xyz={self.n_layers}",
            f"{prefix}.n_hidden_neurons_xyz={self.n_hidden}",
            f"{prefix}.append_xyz=[{self.skip_layer}]",
            f"{prefix}.n_hidden_neurons_dir={self.n_hidden_color}",
        ]


MLPS = {"published": MLP(8, 256, 5, 128), "laptop": MLP(6, 128, 3, 64), "toy": MLP(2, 16, 1, 8)}


def implicitron_samples(coarse: int, fine: int) -> list[str]:
    """Samples per ray of an ``implicitron_nerf`` experiment as Hydra overrides."""
    sampler = "model.implicitron.args.raysampler_AdaptiveRaySampler_args"
    renderer = "model.implicitron.args.renderer_MultiPassEmissionAbsorptionRenderer_args"
    return [
        f"{sampler}.n_pts_per_ray_training={coarse}",
        f"{sampler}.n_pts_per_ray_evaluation={coarse}",
        f"{renderer}.n_pts_per_ray_fine_training={fine}",
        f"{renderer}.n_pts_per_ray_fine_evaluation={fine}",
    ]


def find_sequence(root: Path | None, category: str, scratch: Path) -> tuple[Path, str]:
    """(dataset root, category): the real sequence, or where there is none a generated one, which is said.

    Args:
        root: asked for explicitly, or None for the default place.
        scratch: folder that a generated sequence is written to; one that is there already is used again.

    Raises:
        ValueError: ``root`` was asked for and is no CO3Dv2 root.
    """
    found = root or DEFAULT_ROOT
    if (found / "category_to_subset_name_list.json").is_file():
        return found, category
    if root is not None:
        raise ValueError(f"dataset_root={root}: there is no category_to_subset_name_list.json in it")
    print(f"note: no real sequence found; measuring on a generated one, category {GENERATED_CATEGORY}")
    generated = scratch / "generated"
    if not (generated / "category_to_subset_name_list.json").is_file():
        say("generating it")
        settings = SyntheticConfig(n_known=94, n_val=8, n_unseen=13, height=200, width=200)
        generate_dataset(generated, {GENERATED_CATEGORY: [SUBSET]}, settings)
    return generated, GENERATED_CATEGORY


def experiment(
    overrides: Sequence[str], *, root: Path, category: str, device: torch.device, stored: Mapping[str, Any] | None = None
) -> DictConfig:
    """A composed, resolved experiment on a sequence; precision ``auto`` is that of ``stored``, a configuration, or else the device's."""
    config = compose_experiment([*overrides, f"category={category}", f"subset_name={SUBSET}"])
    settle_precision(config, automatic_precision(config, device), None if stored is None else OmegaConf.create(dict(stored)))
    OmegaConf.resolve(config)
    config.dataset_root, config.device = escaped(str(root)), str(device)  # last, for resolving takes escapes away
    return config


def as_overfit_model(config: DictConfig) -> None:
    """Turns an ``implicitron_nerf`` experiment into Implicitron's ``OverfitModel`` with the same two separate MLPs."""
    spec = config.model.implicitron
    with open_dict(spec):
        spec.model_class_type = "OverfitModel"
        spec.args.pop("num_passes")
        spec.args.coarse_implicit_function_class_type = spec.args.implicit_function_class_type
        spec.args[f"coarse_{NERF_ARGS}"] = OmegaConf.to_container(spec.args[NERF_ARGS])


def make_stepper(config: DictConfig, scene: Scene, device: torch.device) -> Stepper:
    """The project's own training step on a freshly initialised task, ready to run step 0."""
    seed_default_generators(config.training.seed, INITIALISATION)
    task = make_task(config, config.training, scene, device)
    task.model.train()
    return Stepper(task, config.training, deferred=device.type == "cuda")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def say(text: str) -> None:
    """What is being done, at once and beside the results: on stderr, with the seconds since this was first imported."""
    print(f"{time.monotonic() - _STARTED:6.1f} s  {text}", file=sys.stderr, flush=True)


def prepare(device: str, threads: int | None) -> torch.device:
    """Resolves the device, sets the number of CPU threads and says where it runs."""
    if threads is not None:
        torch.set_num_threads(threads)
    found = resolve_device(device)
    say(f"{Path(sys.argv[0]).name} on {machine_in_words(found)}")
    return found


class PeakMemory:
    """Most memory in use since :meth:`start`, in MiB: above what was in use then on the CPU, all that is allocated on CUDA.

    On Linux the kernel's high-water mark is set back first, so that a larger earlier peak (loading) does not hide this one.
    Elsewhere it is the process's lifetime peak.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._baseline = 0.0

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        self.set_back()
        self._baseline = _resident_peak()

    def set_back(self) -> None:
        """Forgets the peak and keeps the baseline."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        _return_freed_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass  # not Linux, or not allowed: the lifetime peak has to do

    def mebibytes(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / _MEBIBYTE
        return max(0.0, _resident_peak() - self._baseline)


def _return_freed_memory() -> None:
    """What was freed counts as in use as long as the C library keeps it for later, and would hide what is needed next."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pass  # only glibc has it


def _resident_peak() -> float:
    """MiB. The kernel's mark of this program alone: ``ru_maxrss`` of a child process includes its parent's at the fork."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MEBIBYTE


def medians(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in samples.items()}


def crossing(seconds: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """When a curve first reaches ``level``: linear between its points; None if it never does.

    A curve that starts at or above the level crosses it at its first point: an upper bound.

    Args:
        seconds: increasing.
        values: one per second.
    """
    for i, value in enumerate(values):
        if value >= level:
            if i == 0:
                return seconds[0]
            share = (level - values[i - 1]) / (value - values[i - 1])
            return seconds[i - 1] + share * (seconds[i] - seconds[i - 1])
    return None


def machine_in_words(device: torch.device) -> str:
    """Processor, number of usable cores and, on CUDA, the GPU; no host name."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = f"{cores} CPU cores ({processor_name()})"
    return f"{torch.cuda.get_device_name(device)}, {words}" if device.type == "cuda" else words


def circumstances(script: str, argv: Sequence[str], device: torch.device, machine: str | None) -> dict[str, Any]:
    """What every result file says about how it was made. Folders of this machine are cut from the command."""
    import pytorch3d

    shown = [Path(word).name if os.path.isabs(word) else word for word in argv]
    return {
        "benchmark": script,
        "machine": machine or machine_in_words(device),
        "device": str(device),
        "bfloat16": f"{'native' if multiplies_bfloat16(device) else 'emulated'}: {bfloat16_words(device)}",
        "auto_precision": settled_precision("auto", device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "pytorch3d": pytorch3d.__version__,
        "command": shlex.join(["python", f"benchmarks/{script}.py", *shown]),
    }
