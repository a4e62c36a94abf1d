"""Rays per second of the laptop presets' training steps in float32 and in bfloat16, and which of them ``auto`` is here.

    python benchmarks/precision_step.py --json out.json
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/precision_step.py   # a newer CPU kept to AVX2

The precisions take turns in one process, so that another program on the machine slows both. A step is whole: batch, forward,
backward, clip, Adam, EMA; at the start of a training, when the hull is all that is skipped. Refinements are not in it. Every
occupied sample of a TensoRF gets a colour: at the preset's threshold of the weight none does so early, and its network would rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import co3d_ensemble  # noqa: F401  (before torch, see co3d_ensemble/base/threads.py)

# isort: split
import torch

from benchmarks.common import circumstances, experiment, find_sequence, make_stepper, medians, prepare, say
from benchmarks.step_timing import measure, parse_step_arguments, precisions, run_in_scratch, step_parser
from co3d_ensemble.assembly import load_scene
from co3d_ensemble.files import write_json_atomic
from co3d_ensemble.scripts import run_script
from co3d_ensemble.training.precision import network_keys

PRESETS = ("nerf_laptop", "tensorf_laptop")
WARM_UP = 2  # samples
COMMON = ("training.max_steps=1000000", "model.tensorf.color_threshold=0")  # no refinement falls due; every sample gets a colour


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = step_parser(__doc__, rays=1024, repeats=7, network="networks")
    parser.add_argument("--presets", nargs="+", default=PRESETS, help="experiments (default: %(default)s)")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="Hydra override, repeatable")
    return parse_step_arguments(parser, argv)


def rays_per_second(preset: str, arguments: argparse.Namespace, root: Path, category: str, device: torch.device) -> dict[str, Any]:
    """Of one preset: ``{precision: rays per second, "samples_s": {precision: seconds of each sample}}``."""
    sizes = (f"data.longest_side={arguments.longest_side}", f"training.n_rays={arguments.rays}", *COMMON)
    config = experiment((f"experiment={preset}", *sizes, *arguments.override), root=root, category=category, device=device)
    say(f"{preset}: loading {category}, carving its hull")
    scene, steppers = load_scene(config), {}
    (key,) = network_keys(config)
    for name in precisions(arguments, device):
        chosen = config.copy()
        chosen.model[key.split(".")[1]].precision = name
        steppers[name] = make_stepper(chosen, scene, device)
    say(f"{preset}: {arguments.repeats} steps in {' and '.join(steppers)}")
    samples = measure(steppers, arguments, device, warm_up=WARM_UP)
    return {name: arguments.rays / seconds for name, seconds in medians(samples).items()} | {"samples_s": samples}


def print_table(result: Mapping[str, Any]) -> None:
    print(f"\n{result['sequence']}, {result['rays']} rays, {result['machine']}, {result['threads']} threads")
    print(f"bfloat16 {result['bfloat16']}; auto is {result['auto_precision']}")
    print(f"{'rays per second':20}{'float32':>12}{'bfloat16':>12}")
    for preset, row in result["presets"].items():
        print(f"{preset:20}" + "".join(f"{row[name]:12.0f}" if name in row else f"{'-':>12}" for name in ("float32", "bfloat16")))


def benchmark(arguments: argparse.Namespace, argv: Sequence[str], scratch: Path) -> int:
    device = prepare(arguments.device, arguments.threads)
    root, category = find_sequence(arguments.dataset_root, arguments.category, scratch)
    result = {
        **circumstances("precision_step", argv, device, arguments.machine),
        "sequence": f"{category}, photographs of at most {arguments.longest_side} px",
        "rays": arguments.rays,
        "presets": {preset: rays_per_second(preset, arguments, root, category, device) for preset in arguments.presets},
    }
    print_table(result)
    if arguments.json:
        write_json_atomic(arguments.json, result)
    return 0


def main(argv: Sequence[str]) -> int:
    return run_in_scratch(benchmark, parse_arguments(argv), argv)


if __name__ == "__main__":
    run_script(main)
