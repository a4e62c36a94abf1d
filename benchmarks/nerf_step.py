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
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import co3d_ensemble  # noqa: F401  (before torch, see co3d_ensemble/base/threads.py)

# isort: split
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
    say,
    synchronize,
)
from benchmarks.step_timing import (
    IMPLICITRON,
    LONGEST_SIDE,
    OURS,
    measure,
    memory_in_processes,
    parse_step_arguments,
    precisions,
    run_in_scratch,
    step_parser,
)
from co3d_ensemble.assembly import Scene, load_scene
from co3d_ensemble.base.precision import PRECISIONS
from co3d_ensemble.base.spread import evenly_spread
from co3d_ensemble.files import write_json_atomic
from co3d_ensemble.plugin.frames import load_frames
from co3d_ensemble.plugin.model import ObjectModel
from co3d_ensemble.scripts import run_script
from co3d_ensemble.training.ray_bank_task import RayBankTask

WARM_UP = 2  # samples
MEMORY_STEPS = 3
CLIP = 1.0  # on both sides
SCALING_FRAMES, SCALING_PIXELS = (10, 94), (100, 200, 400)
SCALING_BASE_PIXELS = LONGEST_SIDE


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = step_parser(__doc__, rays=1024, repeats=7, network="MLP")
    parser.add_argument("--mlp", choices=sorted(MLPS), default="published", help="sizes of both sides' MLPs (default: %(default)s)")
    parser.add_argument("--samples", type=int, nargs=2, default=(96, 96), metavar=("COARSE", "FINE"))
    parser.add_argument("--scaling", action="store_true", help="also with few and many frames, small and large ones")
    return parse_step_arguments(parser, argv)


def configurations(arguments: argparse.Namespace, root: Path, category: str, device: torch.device) -> dict[str, DictConfig]:
    """Implicitron's and ours per precision, by name; ours first, as they take turns in this order."""
    mlp, (coarse, fine) = MLPS[arguments.mlp], arguments.samples
    common = [f"data.longest_side={arguments.longest_side}", f"training.n_rays={arguments.rays}", f"training.clip_grad_norm={CLIP}"]
    place = {"root": root, "category": category, "device": device}
    base = "nerf_laptop" if arguments.mlp == "laptop" else "nerf"
    samples = [f"model.renderer.n_pts_per_ray_coarse={coarse}", f"model.renderer.n_pts_per_ray_fine={fine}"]
    found = {}
    for precision in precisions(arguments, device):
        overrides = [f"experiment={base}", *common, *mlp.ours(), *samples, f"model.nerf.precision={precision}"]
        found[OURS + precision] = experiment(overrides, **place)
    own = "model.implicitron.precision=float32"  # as its authors train it
    theirs = experiment(["experiment=implicitron_nerf", own, *common, *mlp.implicitron(), *implicitron_samples(coarse, fine)], **place)
    as_overfit_model(theirs)
    return {**found, IMPLICITRON: theirs}


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
    """Medians and their ratios; ``ours_s`` is the first side of ours: at the precision of the presets here, or at the only one measured.

    The grid's refinement every ``refine_every`` steps is not in ``ours_s``, but in ``ours_with_refinement_s``.
    """
    median = medians(samples)
    theirs = median[IMPLICITRON]
    first = next(name for name in median if name != IMPLICITRON)
    precision, ours = first.removeprefix(OURS), median[first]
    amortised = ours + refine_s / refine_every
    result = {"ours_s": ours, "implicitron_s": theirs, "ratio": theirs / ours}
    result |= {"ours_precision": precision, "implicitron_precision": "float32"}
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
    median = medians(measure(steppers, arguments, device, warm_up=WARM_UP))
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
    say(f"loading {category}, carving its hull")
    scene = load_scene(ours)
    steppers = {name: make_stepper(config, scene, device) for name, config in configs.items()}
    samples = measure(steppers, arguments, device, warm_up=WARM_UP)
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
        place = ["--dataset-root", str(root), "--category", category]
        result["peak_memory_mb"] = memory_in_processes(__file__, [*argv, *place], list(configs), scratch)
    print_table(result)
    if arguments.json:
        write_json_atomic(arguments.json, result)
    return 0


def main(argv: Sequence[str]) -> int:
    return run_in_scratch(benchmark, parse_arguments(argv), argv)


if __name__ == "__main__":
    run_script(main)
