"""Seconds per training step: Implicitron's own NeRF in its OverfitModel, and ours, with the same MLPs, rays and samples.

    python benchmarks/nerf_step.py
    python benchmarks/nerf_step.py --mlp laptop --json out.json
    python benchmarks/nerf_step.py --scaling
    python benchmarks/nerf_step.py --device cuda

A step is whole: batch, forward, backward, clip, Adam (and for ours the EMA). The sides take turns in one process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from omegaconf import DictConfig

from benchmarks.common import (
    MLPS,
    PeakMemory,
    as_overfit_model,
    circumstances,
    experiment,
    find_sequence,
    implicitron_samples,
    make_stepper,
    medians,
    prepare,
    synchronize,
)
from co3d_ensemble.assembly import Scene, load_scene
from co3d_ensemble.files import write_json_atomic
from co3d_ensemble.plugin.frames import load_frames
from co3d_ensemble.plugin.model import ObjectModel
from co3d_ensemble.scripts import reported
from co3d_ensemble.training.ray_bank_task import RayBankTask, evenly_spread
from co3d_ensemble.training.stepper import Stepper

IMPLICITRON, OURS = "implicitron", "ours_"  # names of the sides; ours with the precision behind it
PRECISIONS = ("bfloat16", "float32")  # the first that is measured is that of the presets, and "ours_s"
STEPS_PER_SAMPLE = {"cpu": 1, "cuda": 20}  # a CUDA step is too short to be timed alone
WARM_UP = {"cpu": 2, "cuda": 2}  # samples
MEMORY_STEPS = 3
CLIP = 1.0  # on both sides
SCALING_FRAMES, SCALING_PIXELS = (10, 94), (100, 200, 400)
SCALING_BASE_PIXELS = 200


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset-root", type=Path, help="CO3Dv2 root (default: ../shared/data/co3d beside the checkout, else generated)")
    parser.add_argument("--category", default="cape")
    parser.add_argument("--longest-side", type=int, default=SCALING_BASE_PIXELS, help="of the photographs, pixels (default: %(default)s)")
    parser.add_argument("--mlp", choices=sorted(MLPS), default="published", help="sizes of both sides' MLPs (default: %(default)s)")
    parser.add_argument("--rays", type=int, default=1024)
    parser.add_argument("--samples", type=int, nargs=2, default=(96, 96), metavar=("COARSE", "FINE"))
    parser.add_argument("--precision", choices=(*PRECISIONS, "both"), default="both", help="of our MLP (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="timed samples per side (default: %(default)s)")
    parser.add_argument("--steps-per-sample", type=int, help="steps per timed sample (default: 1 on the CPU, 20 on CUDA)")
    parser.add_argument("--scaling", action="store_true", help="also with few and many frames, small and large ones")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory, which takes a process per side")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--machine", help="the machine in words, for the result file")
    parser.add_argument("--json", type=Path, help="result file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # a child process that measures one side
    arguments = parser.parse_args(argv)
    for name in ("repeats", "rays", "steps_per_sample"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return arguments


def configurations(arguments: argparse.Namespace, root: Path, category: str, device: torch.device) -> dict[str, DictConfig]:
    """Implicitron's and ours per precision, by name; ours first, as they take turns in this order."""
    mlp, (coarse, fine) = MLPS[arguments.mlp], arguments.samples
    common = [f"data.longest_side={arguments.longest_side}", f"training.n_rays={arguments.rays}", f"training.clip_grad_norm={CLIP}"]
    place = {"root": root, "category": category, "device": device}
    base = "nerf_laptop" if arguments.mlp == "laptop" else "nerf"
    samples = [f"model.renderer.n_pts_per_ray_coarse={coarse}", f"model.renderer.n_pts_per_ray_fine={fine}"]
    found = {}
    for precision in PRECISIONS if arguments.precision == "both" else (arguments.precision,):
        overrides = [f"experiment={base}", *common, *mlp.ours(), *samples, f"model.nerf.precision={precision}"]
        found[OURS + precision] = experiment(overrides, **place)
    theirs = experiment(["experiment=implicitron_nerf", *common, *mlp.implicitron(), *implicitron_samples(coarse, fine)], **place)
    as_overfit_model(theirs)
    return {**found, IMPLICITRON: theirs}


def alternate(
    run: Mapping[str, Callable[[], None]], *, repeats: int, warm_up: int, steps_per_sample: int = 1, wait: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds per step of each side in ``repeats`` rounds; every round runs all sides in turn.

    Args:
        run: one step of a side, by name.
        warm_up: rounds that are not counted.
        wait: returns when the device has finished.
    """
    samples: dict[str, list[float]] = {name: [] for name in run}
    for i in range(warm_up + repeats):
        for name, step in run.items():
            wait()
            start = time.perf_counter()
            for _ in range(steps_per_sample):
                step()
            wait()
            if i >= warm_up:
                samples[name].append((time.perf_counter() - start) / steps_per_sample)
    return samples


def counted(stepper: Stepper) -> Callable[[], None]:
    """``stepper`` as a function that runs its next step."""
    position = iter(range(stepper.config.max_steps))
    return lambda: stepper.run(next(position))


def measure(steppers: Mapping[str, Stepper], arguments: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    samples = alternate(
        {name: counted(stepper) for name, stepper in steppers.items()},
        repeats=arguments.repeats,
        warm_up=WARM_UP[device.type],
        steps_per_sample=arguments.steps_per_sample or STEPS_PER_SAMPLE[device.type],
        wait=lambda: synchronize(device),
    )
    for stepper in steppers.values():
        stepper.check()
    return samples


def occupied_share(task: RayBankTask) -> float:
    """Share of the samples of all passes that the MLPs are evaluated at, counted at their doors in one forward pass."""
    model, evaluated, offered = task.model, 0, 0

    def count(module: Any, positional: Any, named: dict[str, Any]) -> None:
        nonlocal evaluated, offered
        lengths = named["ray_bundle"].lengths
        offered += lengths.numel()
        occupied = named.get("occupied")
        evaluated += lengths.numel() if occupied is None else int(occupied.sum())

    handles = [function.register_forward_pre_hook(count, with_kwargs=True) for function in model.functions]
    with torch.no_grad():
        task.losses(task.batch(0))
    for handle in handles:
        handle.remove()
    return evaluated / offered


def refinement_seconds(model: ObjectModel, device: torch.device) -> float:
    """Of one look at every voxel of the hull; the second of two."""
    for _ in range(2):
        synchronize(device)
        start = time.perf_counter()
        model.occupancy.refine(model.density)
        synchronize(device)
    return time.perf_counter() - start


def summary(samples: Mapping[str, Sequence[float]], *, refine_s: float, refine_every: int) -> dict[str, Any]:
    """Medians and their ratios; ``ours_s`` is ours at the precision of the presets, or at the only one measured.

    The grid's refinement every ``refine_every`` steps is not in ``ours_s``, but in ``ours_with_refinement_s``.
    """
    median = medians(samples)
    theirs = median[IMPLICITRON]
    precision = next(name for name in PRECISIONS if OURS + name in median)
    ours = median[OURS + precision]
    amortised = ours + refine_s / refine_every
    result = {"ours_s": ours, "implicitron_s": theirs, "ratio": theirs / ours, "ours_precision": precision}
    for name in PRECISIONS:
        if OURS + name in median:
            result |= {f"ours_{name}_s": median[OURS + name], f"ratio_{name}": theirs / median[OURS + name]}
    return result | {
        "refine_s": refine_s,
        "refine_every_steps": refine_every,
        "ours_with_refinement_s": amortised,
        "ratio_with_refinement": theirs / amortised,
        "samples_s": {name: list(values) for name, values in samples.items()},
    }


def scaling(
    configs: Mapping[str, DictConfig], scene: Scene, arguments: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """Medians per number and size of the frames, all cases taking turns. Box and hull stay those of ``scene``."""
    sides = {"ours": next(iter(configs.values())), IMPLICITRON: configs[IMPLICITRON]}
    cases = []
    most = len(scene.train)
    for pixels in SCALING_PIXELS:
        for n_frames in SCALING_FRAMES if pixels == SCALING_BASE_PIXELS else SCALING_FRAMES[-1:]:
            records = evenly_spread(list(scene.subset.known), n_frames)
            config = sides["ours"]
            keys = [record.key for record in records]
            frames = load_frames(config.dataset_root, config.category, config.subset_name, keys, longest_side=pixels)
            cases.append((min(n_frames, most), pixels, replace(scene, train=frames)))
    steppers = {
        f"{name} {n_frames} {pixels}": make_stepper(config, at_size, device)
        for n_frames, pixels, at_size in cases
        for name, config in sides.items()
    }
    median = medians(measure(steppers, arguments, device))
    return [
        {
            "frames": n_frames,
            "longest_side": pixels,
            "ours_s": median[f"ours {n_frames} {pixels}"],
            "implicitron_s": median[f"{IMPLICITRON} {n_frames} {pixels}"],
        }
        for n_frames, pixels, _ in cases
    ]


def measure_memory(config: DictConfig, device: torch.device) -> float:
    """MiB that a few steps need above the loaded scene (CPU), or altogether on the device (CUDA)."""
    scene = load_scene(config)
    peak = PeakMemory(device)
    peak.start()
    stepper = make_stepper(config, scene, device)
    for step in range(MEMORY_STEPS):
        stepper.run(step)
    stepper.check()
    return peak.mebibytes()


def memory_in_processes(argv: Sequence[str], names: Sequence[str], root: Path, category: str) -> dict[str, float]:
    """Peak memory of every side, each in a fresh process."""
    found = {}
    for name in names:
        command = [sys.executable, __file__, *argv, "--dataset-root", str(root), "--category", category, "--memory-of", name]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode != 0:
            raise RuntimeError(f"measuring the memory of {name} failed: {answer.stderr.strip()[-500:]}")
        found[name] = json.loads(answer.stdout.splitlines()[-1])["peak_memory_mb"]
    return found


def print_table(result: Mapping[str, Any]) -> None:
    print(f"\n{result['sequence']}, {result['rays']} rays x {result['samples']} samples, MLP {result['mlp']}, {result['machine']}")
    print(f"{'':24}{'s / step':>12}{'ratio':>10}{'peak MiB':>12}")
    memory = result["peak_memory_mb"]
    rows = [(IMPLICITRON, result["implicitron_s"], 1.0)]
    rows += [(OURS + name, result[f"ours_{name}_s"], result[f"ratio_{name}"]) for name in PRECISIONS if f"ours_{name}_s" in result]
    for name, seconds, ratio in rows:
        print(f"{name:24}{seconds:12.4f}{ratio:10.2f}{memory.get(name, float('nan')):12.0f}")
    print(f"{'ours with refinement':24}{result['ours_with_refinement_s']:12.4f}{result['ratio_with_refinement']:10.2f}")
    print(f"samples evaluated: {100 * result['occupied_share']:.1f} %")
    for case in result.get("scaling", ()):
        sizes = f"{case['frames']} frames, {case['longest_side']} px"
        print(f"{sizes:24} ours {case['ours_s']:.4f} s, implicitron {case['implicitron_s']:.4f} s")


def benchmark(arguments: argparse.Namespace, argv: Sequence[str], scratch: Path) -> int:
    device = prepare(arguments.device, arguments.threads)
    root, category = find_sequence(arguments.dataset_root, arguments.category, scratch)
    configs = configurations(arguments, root, category, device)
    if arguments.memory_of:
        print(json.dumps({"peak_memory_mb": measure_memory(configs[arguments.memory_of], device)}))
        return 0
    ours = next(iter(configs.values()))
    scene = load_scene(ours)
    steppers = {name: make_stepper(config, scene, device) for name, config in configs.items()}
    samples = measure(steppers, arguments, device)
    first = next(iter(steppers.values())).task
    share = occupied_share(first)
    refine_every = max(1, round(ours.model.occupancy.refine_every * ours.training.max_steps))
    result = {
        **circumstances("nerf_step", argv, device, arguments.machine),
        **summary(samples, refine_s=refinement_seconds(first.model, device), refine_every=refine_every),
        "occupied_share": share,
        "rays": arguments.rays,
        "samples": list(arguments.samples),
        "mlp": arguments.mlp,
        "sequence": f"{category}, {len(scene.train)} frames of at most {arguments.longest_side} px",
        "peak_memory_mb": {},
    }
    del steppers, first
    if arguments.scaling:
        result["scaling"] = scaling(configs, scene, arguments, device)
    if not arguments.no_memory:
        result["peak_memory_mb"] = memory_in_processes(argv, list(configs), root, category)
    print_table(result)
    if arguments.json:
        write_json_atomic(arguments.json, result)
    return 0


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as scratch:
        return reported(lambda: benchmark(arguments, argv, Path(scratch)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
