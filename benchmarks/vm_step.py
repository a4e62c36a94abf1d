"""Seconds per training step: Implicitron's VM grid, and our TensoRF, with the same components, rays and samples.

    python benchmarks/vm_step.py --json benchmarks/results/vm_step_cpu.json
    python benchmarks/vm_step.py --scaling --json out.json
    python benchmarks/vm_step.py --device cuda

A step is whole: batch, forward, losses, backward, clip, Adam, and for ours the penalties on the factors and the EMA. The
sides take turns in one process.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import co3d_ensemble  # noqa: F401  (before torch, see co3d_ensemble/base/threads.py)

# isort: split
import torch
from omegaconf import DictConfig
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import (
    GENERATED_CATEGORY,
    SUBSET,
    PeakMemory,
    circumstances,
    experiment,
    find_sequence,
    make_stepper,
    medians,
    prepare,
    say,
    synchronize,
)
from benchmarks.implicitron_vm import implicitron_stepper
from benchmarks.step_timing import (
    IMPLICITRON,
    OURS,
    measure,
    memory_in_processes,
    parse_step_arguments,
    precisions,
    run_in_scratch,
    step_parser,
    steps_per_sample,
)
from co3d_ensemble.assembly import Scene, load_scene
from co3d_ensemble.data.synthetic import SyntheticConfig, generate_dataset
from co3d_ensemble.files import write_json_atomic
from co3d_ensemble.scripts import run_script
from co3d_ensemble.training.ray_bank_task import RayBankTask
from co3d_ensemble.training.stepper import Stepper

ALL_SAMPLES = "_all_samples"  # behind the name of a side of ours that evaluates every sample
GENERATED, HULL = "generated", "hull"
BARS = {GENERATED: 25.0, HULL: 15.0, ALL_SAMPLES: 1.0}  # times faster than Implicitron
WARM_UP = 1  # samples
MEMORY_STEPS = {OURS: 3, IMPLICITRON: 1}  # Implicitron's step takes half a minute and keeps nothing but moments
SHARE_BATCHES = 20  # of rays: the share of one batch varies by a few percent of itself
SMOOTHING = 5  # voxels: the hull grows or shrinks by as much as it takes to have a given share
SCALING = (128, 300, 512, 1024)  # vertices per axis
COPIES = 8  # of the factors during a step: themselves, gradient, two moments, average, and buffers of the backward pass
STEP_BYTES = 3 * 2**30  # of samples and activations at published size
REGIONS = {"penalties": "penalties", "clip": "clip", "adam": "Adam", "ema": "EMA"}  # ranges of a step, by their names in the table


@dataclass(frozen=True)
class Case:
    """One scene, our steppers on it by name of the side, and Implicitron's.

    Attributes:
        name: ``generated`` or ``hull``.
        occupied_share: of the samples that ours evaluates, unless the side's name ends in ``ALL_SAMPLES``.
    """

    name: str
    sequence: str
    occupied_share: float
    steppers: dict[str, Stepper]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = step_parser(__doc__, rays=4096, repeats=3, network="colour network")
    parser.add_argument("--resolution", type=int, default=128, help="cube root of the grid's voxels (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=384, help="per ray (default: %(default)s)")
    parser.add_argument("--occupied-share", type=float, default=0.078, help="of the generated scene's samples (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", choices=(GENERATED, HULL), default=(GENERATED, HULL))
    parser.add_argument("--scaling", action="store_true", help="also our step at other resolutions, with the share of its parts")
    parser.add_argument("--scaling-resolutions", type=int, nargs="+", default=SCALING, help=argparse.SUPPRESS)
    parser.add_argument("--only-scaling", action="store_true", help="nothing but --scaling; Implicitron is not run")
    arguments = parse_step_arguments(parser, argv)
    if not 0 < arguments.occupied_share < 1:
        parser.error("--occupied-share must lie between 0 and 1")
    return arguments


def configuration(arguments: argparse.Namespace, root: Path, category: str, device: torch.device, *more: str) -> DictConfig:
    """The published TensoRF on a carved grid, its colour network run on every occupied sample.

    At the published threshold of a sample's weight no colour at all is computed at the start of a training, when everything
    is nearly transparent: the figures would be better than those of the steps that follow.
    """
    sizes = [
        f"data.longest_side={arguments.longest_side}",
        f"training.n_rays={arguments.rays}",
        f"model.renderer.n_pts_per_ray_coarse={arguments.samples}",
        f"model.tensorf.resolution={arguments.resolution}",
        "data.bounds.mode=visual_hull",
        "data.max_val_frames=1",
        "model.camera_jitter.mode=off",
        "model.tensorf.color_threshold=0.0",
    ]
    return experiment(["experiment=tensorf_published", *sizes, *more], root=root, category=category, device=device)


def sampled_voxels(task: RayBankTask, n_batches: int = SHARE_BATCHES) -> torch.Tensor:
    """How many samples of a few batches lie in each voxel of the occupancy grid, in all and outside it last: (n_voxels + 1,)."""
    grid = task.model.occupancy
    number = torch.arange(1, grid.occupied.numel() + 1, device=grid.occupied.device).view_as(grid.occupied)
    shape = torch.tensor(grid.occupied.shape, device=number.device)
    counts = torch.zeros(number.numel() + 1, dtype=torch.long, device=number.device)
    for step in range(n_batches):
        batch = task.batch(step)
        lengths = task.model.bundle(batch.origins, batch.directions).lengths
        points = batch.origins[:, None] + lengths[..., None] * batch.directions[:, None]
        cell = ((points - grid.box[0]) / (grid.box[1] - grid.box[0]) * shape).floor().long()
        inside = ((cell >= 0) & (cell < shape)).all(dim=-1)
        flat = number[tuple(cell.minimum(shape - 1).clamp_min(0).unbind(dim=-1))] - 1
        counts += torch.bincount(torch.where(inside, flat, number.numel()).flatten(), minlength=len(counts))
    return counts


def occupied_share(task: RayBankTask) -> float:
    """Share of the samples of a few batches of rays that lie in occupied voxels."""
    counts = sampled_voxels(task).double()
    return float(counts[:-1][task.model.occupancy.occupied.flatten()].sum() / counts.sum())


def fit_occupancy(task: RayBankTask, share: float) -> None:
    """Grows or shrinks the occupied part of the grid, evenly over the hull's surface, until it has a share of the samples."""
    grid = task.model.occupancy
    smooth = grid.hull[None, None].float()
    for _ in range(SMOOTHING):
        smooth = torch.nn.functional.avg_pool3d(smooth, SMOOTHING, stride=1, padding=SMOOTHING // 2)
    order = smooth.flatten().sort(descending=True, stable=True).indices
    counts = sampled_voxels(task).double()
    kept = counts[:-1][order].cumsum(0) <= share * counts.sum()
    grid.occupied.view(-1)[order] = kept


def generated_scene(arguments: argparse.Namespace, scratch: Path, device: torch.device) -> tuple[DictConfig, Scene]:
    root = scratch / "vm_scene"
    if not root.is_dir():
        say("generating a scene")
        generate_dataset(root, {GENERATED_CATEGORY: [SUBSET]}, SyntheticConfig())
    config = configuration(arguments, root, GENERATED_CATEGORY, device)
    return config, load_scene(config)


def real_scene(arguments: argparse.Namespace, scratch: Path, device: torch.device) -> tuple[DictConfig, Scene]:
    root, category = find_sequence(arguments.dataset_root, arguments.category, scratch)
    config = configuration(arguments, root, category, device)
    return config, load_scene(config)


def our_stepper(config: DictConfig, scene: Scene, device: torch.device, precision: str, *, share: float | None) -> Stepper:
    chosen = config.copy()
    chosen.model.tensorf.precision = precision
    stepper = make_stepper(chosen, scene, device)
    if share is not None:
        fit_occupancy(stepper.task, share)
    return stepper


def make_case(name: str, arguments: argparse.Namespace, scratch: Path, device: torch.device) -> Case:
    say(f"case {name}: loading the scene, carving its hull, building the sides")
    config, scene = (generated_scene if name == GENERATED else real_scene)(arguments, scratch, device)
    share = arguments.occupied_share if name == GENERATED else None
    steppers = {OURS + precision: our_stepper(config, scene, device, precision, share=share) for precision in precisions(arguments, device)}
    first = next(iter(steppers.values())).task
    occupied = occupied_share(first)
    if name == GENERATED:
        everything = config.copy()
        everything.model.occupancy.enabled = False
        for precision in precisions(arguments, device):
            steppers[OURS + precision + ALL_SAMPLES] = our_stepper(everything, scene, device, precision, share=None)
    steppers[IMPLICITRON] = implicitron_stepper(config, first, device)
    return Case(name, f"{config.category}, {len(scene.train)} frames", occupied, steppers)


def summary(case: str, samples: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Medians and ratios of one case; ``ours_s`` is the first precision that was measured, that of the presets here."""
    median = medians(samples)
    theirs = median.pop(IMPLICITRON)
    first = next(iter(median))
    result = {"ours_s": median[first], "implicitron_s": theirs, "ratio": theirs / median[first], "bar": BARS[case]}
    result["sides"] = {
        name: {"seconds": seconds, "ratio": theirs / seconds, "bar": BARS[ALL_SAMPLES if name.endswith(ALL_SAMPLES) else case]}
        for name, seconds in median.items()
    }
    return result | {"samples_s": {name: list(values) for name, values in samples.items()}}


def available_bytes(device: torch.device) -> int:
    """Free memory: what the kernel would give without swapping, or what the device has left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024


def parts(stepper: Stepper, step: int, device: torch.device) -> dict[str, float]:
    """Seconds of the parts of one step, on the host or, on CUDA, on the device; ``field`` is lookups and network, both ways."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, acc_events=True) as recorded:
        stepper.run(step)
        synchronize(device)
    on_device = device.type == "cuda"
    found: dict[str, float] = {}
    for event in recorded.key_averages():
        seconds = (event.device_time_total if on_device else event.cpu_time_total) / 1e6
        found[event.key] = found.get(event.key, 0.0) + seconds
    total = sum(found.get(name, 0.0) for name in ("batch", "losses", "backward", *REGIONS))
    result = {label: found.get(name, 0.0) for name, label in REGIONS.items()}
    result["field and losses"] = found["losses"] + found["backward"]
    return {"rest": max(0.0, total - sum(result.values())), **result}


def scaling(arguments: argparse.Namespace, scratch: Path, device: torch.device) -> list[dict[str, Any]]:
    """Our step on the hull at several resolutions: median seconds, and the share of its parts; or why it was skipped."""
    config, scene = real_scene(arguments, scratch, device)
    rows: list[dict[str, Any]] = []
    for resolution in arguments.scaling_resolutions:
        chosen = config.copy()
        chosen.model.tensorf.resolution = resolution
        components = chosen.model.tensorf.n_density + chosen.model.tensorf.n_appearance
        needed = COPIES * 4 * 3 * components * resolution**2 + STEP_BYTES * arguments.rays * arguments.samples // (4096 * 384)
        if needed > available_bytes(device):
            reason = f"needs about {needed / 2**30:.0f} GiB, {available_bytes(device) / 2**30:.0f} GiB are free"
            rows.append({"resolution": resolution, "skipped": reason})
            continue
        say(f"scaling: {resolution} vertices per axis")
        stepper = our_stepper(chosen, scene, device, precisions(arguments, device)[0], share=None)
        seconds = medians(measure({"ours": stepper}, arguments, device, warm_up=WARM_UP))["ours"]
        split = parts(stepper, (arguments.repeats + WARM_UP) * steps_per_sample(arguments, device), device)
        stepper.check()
        total = sum(split.values())
        rows.append(
            {
                "resolution": resolution,
                "parameters": sum(parameter.numel() for parameter in stepper.task.model.parameters()),
                "ours_s": seconds,
                "shares": {name: value / total for name, value in split.items()},
            }
        )
        del stepper
    return rows


def measure_memory(name: str, arguments: argparse.Namespace, scratch: Path, device: torch.device) -> float:
    """MiB that a few steps need above the loaded scene (CPU), or altogether on the device (CUDA)."""
    config, scene = generated_scene(arguments, scratch, device)
    peak = PeakMemory(device)
    peak.start()
    if name == IMPLICITRON:
        # its rays come from a task of ours, here of the smallest grid
        tiny = config.copy()
        stepper = implicitron_stepper(config, our_stepper(tiny, scene, device, "float32", share=None).task, device)
        peak.start()
    else:
        chosen = config.copy()
        chosen.model.occupancy.enabled = not name.endswith(ALL_SAMPLES)
        share = None if name.endswith(ALL_SAMPLES) else arguments.occupied_share
        precision = name.removeprefix(OURS).removesuffix(ALL_SAMPLES)
        stepper = our_stepper(chosen, scene, device, precision, share=share)
        peak.set_back()
    for step in range(MEMORY_STEPS[IMPLICITRON if name == IMPLICITRON else OURS]):
        stepper.run(step)
    stepper.check()
    return peak.mebibytes()


def print_table(result: Mapping[str, Any]) -> None:
    print(f"\n{result['rays']} rays x {result['samples']} samples, grid {result['resolution']}^3, {result['machine']}")
    memory = result["peak_memory_mb"]
    for case in result["cases"]:
        print(f"\n{case['name']}: {case['sequence']}, {100 * case['occupied_share']:.2f} % of the samples occupied")
        print(f"{'':28}{'s / step':>12}{'ratio':>10}{'bar':>8}{'peak MiB':>12}")
        print(f"{IMPLICITRON:28}{case['implicitron_s']:12.3f}{1:10.2f}{'':8}{memory.get(IMPLICITRON, float('nan')):12.0f}")
        for name, side in case["sides"].items():
            print(f"{name:28}{side['seconds']:12.3f}{side['ratio']:10.2f}{side['bar']:8.0f}{memory.get(name, float('nan')):12.0f}")
    for row in result.get("scaling", ()):
        text = row.get("skipped") or f"{row['ours_s']:.3f} s: " + ", ".join(f"{k} {100 * v:.0f} %" for k, v in row["shares"].items())
        print(f"{row['resolution']:5}^3  {text}")


def benchmark(arguments: argparse.Namespace, argv: Sequence[str], scratch: Path) -> int:
    device = prepare(arguments.device, arguments.threads)
    if arguments.memory_of:
        print(json.dumps({"peak_memory_mb": measure_memory(arguments.memory_of, arguments, scratch, device)}))
        return 0
    result: dict[str, Any] = {
        **circumstances("vm_step", argv, device, arguments.machine),
        "rays": arguments.rays,
        "samples": arguments.samples,
        "resolution": arguments.resolution,
        "cases": [],
        "peak_memory_mb": {},
    }
    sides: list[str] = []
    for name in () if arguments.only_scaling else arguments.cases:
        case = make_case(name, arguments, scratch, device)
        found = summary(name, measure(case.steppers, arguments, device, warm_up=WARM_UP))
        result["cases"].append({"name": name, "sequence": case.sequence, "occupied_share": case.occupied_share, **found})
        sides = sides or list(case.steppers)
        del case  # its moments and averages are large
    if result["cases"]:
        result |= {key: result["cases"][0][key] for key in ("ours_s", "implicitron_s", "ratio", "occupied_share")}
        result["implicitron_precision"] = "float32"
        result["ours_precision"] = precisions(arguments, device)[0]
    if arguments.scaling or arguments.only_scaling:
        result["scaling"] = scaling(arguments, scratch, device)
    if sides and not arguments.no_memory:
        result["peak_memory_mb"] = memory_in_processes(__file__, argv, sides, scratch)
    print_table(result)
    if arguments.json:
        write_json_atomic(arguments.json, result)
    return 0


def main(argv: Sequence[str]) -> int:
    return run_in_scratch(benchmark, parse_arguments(argv), argv)


if __name__ == "__main__":
    run_script(main)
