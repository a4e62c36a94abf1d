"""Seconds and memory of one target view of a multiplane image: ours, and the way of MINE's authors.

    python benchmarks/mine_render.py --json benchmarks/results/mine_render_cpu.json
    python benchmarks/mine_render.py --device cuda --json out.json

Theirs warps rgb, sigma and the planes' 3D points, 7 channels, of all planes at once by ``grid_sample`` and composites what comes
out; it is written here. The sides take turns in one process; memory is measured in a process per side. Before anything is timed,
both must show the same picture inside the image.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import co3d_ensemble  # noqa: F401  (before torch, see co3d_ensemble/base/threads.py)

# isort: split
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import PeakMemory, circumstances, medians, prepare, say, synchronize
from benchmarks.step_timing import alternate
from co3d_ensemble.files import write_json_atomic
from co3d_ensemble.functional.cameras import so3_exp
from co3d_ensemble.functional.mpi import render_target_view
from co3d_ensemble.functional.mpi_sampling import fixed_disparities
from co3d_ensemble.scripts import reported, run_script

OURS, REFERENCE = "ours", "reference"
PLANES = (32, 64, 256)
NEAR, FAR = 1.0, 0.001  # disparities of RealEstate10K and LLFF
TIME_BAR, MEMORY_BAR, SAME = 3.0, 3.0, 1e-5  # times faster, times less memory, largest difference of colour and opacity
BEHIND_THE_LAST = 1e3  # the last plane's distance
VIEWS_PER_SAMPLE = {"cpu": 1, "cuda": 20}  # on CUDA a view is too short to be timed alone
WARM_UP = 2  # samples
DETAIL = 16  # pixels: the planes' content varies over as many, as in photographs and not as in noise


@dataclass(frozen=True)
class Case:
    """A multiplane image and a view of it; tensors as ``functional.mpi`` has them, B = 1."""

    rgb: Tensor
    sigma: Tensor
    depth: Tensor
    K: Tensor
    R: Tensor
    t: Tensor

    @property
    def size(self) -> tuple[int, int]:
        return self.rgb.shape[-2], self.rgb.shape[-1]


def make_case(n_planes: int, height: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Case:
    """Smooth planes, half transparent all together, and a camera that is turned by 2 degrees and moved by 5 % of the nearest depth."""
    generator = torch.Generator().manual_seed(0)

    def smooth(channels: int) -> Tensor:
        noise = torch.rand(n_planes, channels, height // DETAIL + 2, width // DETAIL + 2, generator=generator).to(dtype)
        return F.interpolate(noise, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)[None].contiguous()

    depth = fixed_disparities(n_planes, NEAR, FAR, batch=1, dtype=dtype).reciprocal()
    # an optical depth of about 1 between the nearest planes and the farthest, wherever the planes are
    gaps = torch.cat((depth.diff(dim=1), torch.full_like(depth[:, :1], BEHIND_THE_LAST)), dim=1)
    sigma = smooth(1) * 2 / n_planes / gaps[..., None, None, None]
    K = torch.tensor([[[0.8 * width, 0.0, 0.5 * width], [0.0, 0.8 * width, 0.5 * height], [0.0, 0.0, 1.0]]])
    R = so3_exp(torch.tensor([[0.01, -0.03, 0.01]], dtype=torch.float64))
    t = torch.tensor([[0.04, -0.02, 0.03]])
    return Case(*(value.to(device, dtype) for value in (smooth(3), sigma, depth, K, R, t)))


def ours(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Colour (1, 3, H, W), z (1, 1, H, W), opacity (1, 1, H, W)."""
    height, width = case.size
    view = render_target_view(
        case.rgb, case.sigma, case.depth, K_source=case.K, K_target=case.K, R=case.R, t=case.t, height=height, width=width
    )
    return view.rgb, view.depth, view.alpha


def reference(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The same by warping every plane's 3D points with its colour and density. Without the 1e-6 that the authors add to each
    plane's transparency, which over 256 planes is more than the difference that is allowed here."""
    n_planes, (height, width) = case.rgb.shape[1], case.size
    pixels = homogeneous_pixels(case).reshape(3, -1)
    rays = (torch.linalg.inv(case.K) @ pixels)[:, None]
    points = case.R[:, None] @ (rays * case.depth[..., None, None]) + case.t[:, None, :, None]
    everything = torch.cat((case.rgb, case.sigma, points.reshape(1, n_planes, 3, height, width)), dim=2)
    grid = source_grid(case)
    warped = F.grid_sample(everything.flatten(0, 1), grid, padding_mode="border", align_corners=False)[None]
    rgb, sigma, points = warped.split((3, 1, 3), dim=2)
    sigma = torch.where(points[:, :, 2:] >= 0, sigma, torch.zeros_like(sigma))
    gaps = points.diff(dim=1).norm(dim=2, keepdim=True)
    gaps = torch.cat((gaps, torch.full_like(gaps[:, :1], BEHIND_THE_LAST)), dim=1)
    transparency = torch.exp(-sigma * gaps)
    reaching = torch.cat((torch.ones_like(sigma[:, :1]), transparency.cumprod(dim=1)[:, :-1]), dim=1)
    weights = reaching * (1 - transparency)
    opacity = weights.sum(dim=1)
    return (weights * rgb).sum(dim=1), (weights * points[:, :, 2:]).sum(dim=1) / opacity, opacity


def homogeneous_pixels(case: Case) -> Tensor:
    """Pixel centres, (3, H, W)."""
    height, width = case.size
    y, x = torch.meshgrid(
        torch.arange(height, device=case.K.device, dtype=case.K.dtype) + 0.5,
        torch.arange(width, device=case.K.device, dtype=case.K.dtype) + 0.5,
        indexing="ij",
    )
    return torch.stack((x, y, torch.ones_like(x)))


def source_grid(case: Case) -> Tensor:
    """Where every target pixel lies in the source picture, by the inverted homography of every plane: (N, H, W, 2) in [-1, 1]."""
    height, width = case.size
    normal = case.K.new_tensor([0.0, 0.0, 1.0])
    homography = case.K @ (case.R + case.t[..., None] * normal / case.depth[0, :, None, None]) @ torch.linalg.inv(case.K)
    x, y, w = (torch.linalg.inv(homography) @ homogeneous_pixels(case).reshape(3, -1)).unbind(dim=1)
    grid = torch.stack((2 * x / w / width - 1, 2 * y / w / height - 1), dim=-1)
    return grid.reshape(-1, height, width, 2)


SIDES: dict[str, Callable[[Case], tuple[Tensor, Tensor, Tensor]]] = {OURS: ours, REFERENCE: reference}


def difference(case: Case) -> float:
    """Largest difference of colour and opacity between the sides where every plane is met inside the source picture.

    Inside means between its outermost pixel centres: beyond them the authors' 3D points are those of the edge, and ours go on.
    """
    height, width = case.size
    margin = torch.tensor([1 - 1 / width, 1 - 1 / height], device=case.K.device)
    inside = (source_grid(case).abs() < margin).all(dim=-1).all(dim=0)
    if inside.float().mean() < 0.5:
        raise RuntimeError("less than half of the view lies inside the image: there is little to compare")
    (rgb, _, opacity), (their_rgb, _, their_opacity) = ours(case), reference(case)
    return max(float((a - b).abs()[..., inside].max()) for a, b in ((rgb, their_rgb), (opacity, their_opacity)))


def check(case: Case, exact: Case) -> dict[str, float]:
    """The differences in the precision that is timed, and in float64: of the rounding of the one, and of the formulas.

    Raises:
        RuntimeError: one of them is larger than ``SAME``.
    """
    found = {"float32": difference(case), "float64": difference(exact)}
    if not max(found.values()) <= SAME:
        raise RuntimeError(f"{case.rgb.shape[1]} planes: the sides show different pictures: {found}, allowed is {SAME}")
    return found


def measure_time(case: Case, arguments: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    run = {name: lambda render=render: render(case) for name, render in SIDES.items()}
    return alternate(
        run,
        repeats=arguments.repeats,
        warm_up=WARM_UP,
        steps_per_sample=VIEWS_PER_SAMPLE[device.type],
        wait=lambda: synchronize(device),
    )


def measure_memory(name: str, arguments: argparse.Namespace, device: torch.device) -> float:
    """MiB that one view needs above the multiplane image."""
    # a small view first: what libraries allocate once is not the view's
    SIDES[name](make_case(2, 32, 32, device))
    case = make_case(arguments.planes[0], arguments.height, arguments.width, device)
    synchronize(device)
    held = torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
    peak = PeakMemory(device)
    peak.start()
    SIDES[name](case)
    synchronize(device)
    return peak.mebibytes() - held


def memory_in_process(name: str, n_planes: int, arguments: argparse.Namespace) -> float:
    sizes = ["--planes", str(n_planes), "--height", str(arguments.height), "--width", str(arguments.width), "--device", arguments.device]
    threads = [] if arguments.threads is None else ["--threads", str(arguments.threads)]
    command = [sys.executable, __file__, *sizes, *threads, "--memory-of", name]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise RuntimeError(f"measuring the memory of {name} failed: {answer.stderr.strip()[-500:]}")
    return json.loads(answer.stdout.splitlines()[-1])["peak_memory_mb"]


def row(n_planes: int, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    say(f"{n_planes} planes: the same result, then the time, then the memory of both sides")
    with torch.inference_mode():
        case = make_case(n_planes, arguments.height, arguments.width, device)
        differences = check(case, make_case(n_planes, arguments.height, arguments.width, device, torch.float64))
        samples = measure_time(case, arguments, device)
    del case
    seconds = medians(samples)
    result = {
        "planes": n_planes,
        "difference": differences,
        "ours_s": seconds[OURS],
        "reference_s": seconds[REFERENCE],
        "ratio": seconds[REFERENCE] / seconds[OURS],
        "bar": TIME_BAR,
        "samples_s": samples,
    }
    if not arguments.no_memory:
        memory = {name: memory_in_process(name, n_planes, arguments) for name in SIDES}
        result |= {"peak_memory_mb": memory, "memory_ratio": memory[REFERENCE] / memory[OURS], "memory_bar": MEMORY_BAR}
    return result


def print_table(result: dict[str, Any]) -> None:
    print(f"\none view of {result['width']} x {result['height']}, {result['machine']}")
    print(f"{'planes':>8}{'ours s':>12}{'theirs s':>12}{'ratio':>8}{'ours MiB':>12}{'theirs MiB':>12}{'ratio':>8}{'difference':>14}")
    for entry in result["rows"]:
        memory = entry.get("peak_memory_mb", dict.fromkeys(SIDES, float("nan")))
        times = f"{entry['ours_s']:12.4f}{entry['reference_s']:12.4f}{entry['ratio']:8.2f}"
        sizes = f"{memory[OURS]:12.1f}{memory[REFERENCE]:12.1f}{entry.get('memory_ratio', float('nan')):8.2f}"
        print(f"{entry['planes']:8d}{times}{sizes}{entry['difference']['float32']:14.1e}")
    print(f"bars: {TIME_BAR:.0f} times faster, {MEMORY_BAR:.0f} times less memory, difference at most {SAME:.0e}")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planes", type=int, nargs="+", default=PLANES)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7, help="timed samples per side (default: %(default)s)")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory, which takes a process per side")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--machine", help="the machine in words, for the result file")
    parser.add_argument("--json", type=Path, help="result file")
    parser.add_argument("--memory-of", choices=tuple(SIDES), help=argparse.SUPPRESS)  # a child process that measures one side
    arguments = parser.parse_args(argv)
    if min(arguments.planes) < 2 or arguments.repeats < 1 or min(arguments.width, arguments.height) < 2 * DETAIL:
        parser.error(f"--planes must be at least 2, --repeats 1, --width and --height {2 * DETAIL}")
    return arguments


def benchmark(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    device = prepare(arguments.device, arguments.threads)
    if arguments.memory_of:
        with torch.inference_mode():
            print(json.dumps({"peak_memory_mb": measure_memory(arguments.memory_of, arguments, device)}))
        return 0
    result: dict[str, Any] = {
        **circumstances("mine_render", argv, device, arguments.machine),
        "height": arguments.height,
        "width": arguments.width,
        "rows": [row(n_planes, arguments, device) for n_planes in arguments.planes],
    }
    print_table(result)
    if arguments.json:
        write_json_atomic(arguments.json, result)
    return 0


def main(argv: Sequence[str]) -> int:
    return reported(lambda: benchmark(parse_arguments(argv), argv))


if __name__ == "__main__":
    run_script(main)
