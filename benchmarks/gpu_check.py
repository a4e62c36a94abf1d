"""All that needs a GPU, unattended, in at most four minutes: tests, times of a step, memory, a minute of training of each member.

    python benchmarks/gpu_check.py --json gpu_check.json
    python benchmarks/gpu_check.py --dataset-root ROOT --category cape
    python benchmarks/gpu_check.py --quick --device cpu          # the same at toy sizes

Every part runs in a process of its own and has a time limit: one that fails is recorded with its reason, and the others still
run. The status is 0 only if all parts ended well. Without a data set a generated sequence is measured on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import co3d_ensemble  # noqa: F401  (before torch, see co3d_ensemble/base/threads.py)

# isort: split
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import REPOSITORY, SUBSET, PeakMemory, circumstances, experiment, find_sequence, prepare, say, synchronize
from co3d_ensemble.assembly import load_scene, make_task
from co3d_ensemble.base.quoting import override
from co3d_ensemble.files import write_json_atomic
from co3d_ensemble.scripts import reported, run_script
from co3d_ensemble.training.ray_bank_task import EXACT_STEPS, GridTask
from co3d_ensemble.training.stepper import INITIALISATION, Stepper, seed_default_generators

MINUTES = 4.0
TESTS_SECONDS, START_SECONDS, STEP_SECONDS = 50.0, 20.0, 12.0  # limits: of the tests, of a process's start, of one preset's steps
QUICK_SECONDS = 300.0  # limit of a part at toy sizes, on a machine that may be busy
START_AND_SCORE = 25.0  # seconds that a member's training takes beside its minute
LEAST_TRAINING = 10.0  # seconds of a member's training that are worth their start
WARM_UP, TIMED, PROFILED = EXACT_STEPS + 14, 20, 5  # steps; the rooms for samples are fitted within the first
LAUNCHES = re.compile(r"cu(da)?(LaunchKernel|GraphLaunch)")
FINAL = "_final_grid"  # behind a preset: at the grid that it ends with
PRESETS = ("nerf", "nerf_published", "tensorf", "tensorf" + FINAL, "implicitron_nerf", "nerf_laptop", "tensorf_laptop")
MEMBERS = ("nerf", "tensorf")
QUICK_PRESETS, QUICK_MEMBERS = ("nerf_laptop", "tensorf_laptop"), ("nerf_laptop",)
QUICK = (  # toy sizes
    "training.n_rays=32", "model.renderer.n_pts_per_ray_coarse=8", "model.renderer.n_pts_per_ray_fine=8", "model.occupancy.resolution=16",
    "model.nerf.n_layers=2", "model.nerf.n_hidden=16", "model.nerf.skip_layers=[]", "model.tensorf.resolution=8",
    "model.tensorf.n_hidden=8", "model.grid.final_resolution=12", "data.longest_side=24",
)  # fmt: skip
_EVERY_RESULT = re.compile(r"(\d+) (passed|failed|skipped|errors?)")


@dataclass(frozen=True)
class Part:
    """A command and the seconds that it may take."""

    name: str
    command: tuple[str, ...]
    seconds: float


def run_part(part: Part, *, folder: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """``status`` (``ok``, ``failed`` or ``timed out``), ``reason`` (None where it is ok), ``seconds``, and the ``lines`` it wrote."""
    start, log = time.monotonic(), folder / f"{part.name}.log"
    with log.open("w") as output:
        streams: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT}
        child = subprocess.Popen(part.command, **streams, env=environment, start_new_session=True, cwd=REPOSITORY)
        try:
            code: int | None = child.wait(part.seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    status = {0: "ok", None: "timed out"}.get(code, "failed")
    told = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "it said nothing")
    reason = None if status == "ok" else f"after {part.seconds:.0f} s" if code is None else f"exit {code}: {told[-300:]}"
    return {"status": status, "reason": reason, "seconds": time.monotonic() - start, "lines": lines}


def tests_part(arguments: argparse.Namespace) -> Part:
    place = ["tests/fields/test_compaction.py"] if arguments.quick else ["tests"]
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "--tb=line", "-p", "no:cacheprovider", *place]
    return Part("tests", tuple(command), QUICK_SECONDS if arguments.quick else TESTS_SECONDS)


def with_counts(result: dict[str, Any]) -> dict[str, Any]:
    """The result of pytest with its counts, and the lines that name what failed."""
    lines = result.pop("lines")
    counts = {name: int(n) for n, name in _EVERY_RESULT.findall(lines[-1])} if lines else {}
    return {**result, "counts": counts, "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))]}


def steps_part(presets: Sequence[str], arguments: argparse.Namespace, place: Sequence[str]) -> Part:
    own = [sys.executable, str(Path(__file__).resolve()), "--device", arguments.device, *place, "--steps-of", *presets]
    seconds = QUICK_SECONDS if arguments.quick else START_SECONDS + STEP_SECONDS * len(presets)
    return Part("steps", tuple([*own, *(["--quick"] if arguments.quick else [])]), seconds)


def time_presets(presets: Sequence[str], run: Callable[[Sequence[str]], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The results by preset. One process times them one after the other; where it ends early, the first preset without an answer
    is to blame, and another process goes on behind it.

    Args:
        run: of some presets: the result of their process.
    """
    found: dict[str, dict[str, Any]] = {}
    left = list(presets)
    while left:
        result = run(left)
        lines = result.pop("lines")
        answers = [json.loads(line) for line in lines if line.startswith("{")]
        for answer in answers:
            found[left.pop(0)] = {**result, "status": "ok", "reason": None, **answer}
        if left:
            culprit = left.pop(0)
            told = {"reason": "its process ended without an answer"} if result["status"] == "ok" else {}
            found[culprit] = {**result, "status": "failed" if result["status"] == "ok" else result["status"], **told}
    return found


def training_part(member: str, arguments: argparse.Namespace, root: Path, category: str, output: Path, *, seconds: float) -> Part:
    settings = {"experiment": member, "dataset_root": root, "category": category, "subset_name": SUBSET, "output_dir": output}
    settings |= {"device": arguments.device, "training.progress": False}
    sizes = [*QUICK, "training.max_steps=4"] if arguments.quick else [f"training.budget_minutes={seconds / 60:.4f}"]
    if not arguments.quick and arguments.dataset_root is None:
        sizes.append("data.longest_side=200")
    script = str(REPOSITORY / "launch" / "train_sequence.py")
    command = [sys.executable, script, *(override(key, str(value)) for key, value in settings.items()), *sizes]
    return Part(f"training_{member}", tuple(command), QUICK_SECONDS if arguments.quick else seconds + START_AND_SCORE)


def with_score(result: dict[str, Any], output: Path) -> dict[str, Any]:
    """The result of a training with what its ``results.json`` says."""
    del result["lines"]
    found = sorted(output.rglob("results.json"))
    if result["status"] != "ok" or not found:
        return result
    told = json.loads(found[0].read_text())
    return {**result, **{key: told[key] for key in ("steps", "metrics")}, "training_seconds": told["seconds"]}


def make_preset(preset: str, arguments: argparse.Namespace, device: torch.device) -> Stepper:
    """The preset's own step, at the size of picture that the generated sequence has."""
    name = preset.removesuffix(FINAL)
    sizes = QUICK if arguments.quick else ("data.longest_side=200",)
    if name.startswith("implicitron"):
        sizes = tuple(size for size in sizes if size.startswith("data."))
    config = experiment([f"experiment={name}", *sizes], root=arguments.dataset_root, category=arguments.category, device=device)
    scene = load_scene(config)
    seed_default_generators(config.training.seed, INITIALISATION)
    task = make_task(config, config.training, scene, device)
    if preset.endswith(FINAL):
        assert isinstance(task, GridTask)
        task.settle()
    task.model.train()
    return Stepper(task, config.training, deferred=device.type == "cuda")


def measure_steps(stepper: Stepper, device: torch.device, *, quick: bool) -> dict[str, Any]:
    """Seconds per step, and of one step its kernels' time, its launches and its copies; on the CPU its operators in their place."""
    warm_up, timed, profiled = (1, 2, 1) if quick else (WARM_UP, TIMED, PROFILED)
    peak = PeakMemory(device)
    peak.start()
    for step in range(warm_up):
        stepper.run(step)
    synchronize(device)
    start = time.perf_counter()
    for step in range(warm_up, warm_up + timed):
        stepper.run(step)
    synchronize(device)
    seconds = (time.perf_counter() - start) / timed
    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])], acc_events=True) as recorded:
        for step in range(warm_up + timed, warm_up + timed + profiled):
            stepper.run(step)
        synchronize(device)
    stepper.check()
    events = recorded.events()
    result: dict[str, Any] = {"step_ms": 1e3 * seconds, "peak_memory_mb": peak.mebibytes(), "kernel_ms": None, "launches": None}
    result["operators"] = sum(event.name.startswith("aten::") for event in events) / profiled
    if on_cuda:
        on_device = [event for event in events if event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))]
        kernels = [event for event in on_device if not event.is_user_annotation]
        copies: dict[str, float] = {}
        for event in events:
            if event.name.startswith("Memcpy"):
                copies[event.name] = copies.get(event.name, 0) + 1 / profiled
        result |= {
            "kernel_ms": sum(event.self_device_time_total for event in kernels) / 1e3 / profiled,
            "launches": sum(bool(LAUNCHES.match(event.name)) for event in events) / profiled,
            "copies": copies,
        }
    return result


def card(device: torch.device) -> dict[str, Any]:
    """The GPU, its driver and the versions that count on it."""
    if device.type != "cuda":
        return {"name": None, "driver": None, "cuda": torch.version.cuda}
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = None
    about = torch.cuda.get_device_properties(device)
    memory = {"memory_mb": about.total_memory / 2**20, "capability": f"{about.major}.{about.minor}"}
    return {"name": about.name, "driver": driver, "cuda": torch.version.cuda, **memory}


def table(result: Mapping[str, Any]) -> str:
    lines = [f"{result['machine']}, driver {result['card']['driver']}, torch {result['torch']}, Python {result['python']}"]
    lines.append(f"{'part':28}{'status':>10}{'s':>7}{'step ms':>9}{'kernels':>9}{'launches':>9}{'peak MiB':>10}   ")
    for name, part in result["parts"].items():
        numbers = [part.get(key) for key in ("step_ms", "kernel_ms", "launches", "peak_memory_mb")]
        shown = "".join(f"{'-' if number is None else format(number, '.1f'):>{width}}" for number, width in zip(numbers, (9, 9, 9, 10)))
        more = part["reason"] or ", ".join(f"{n} {what}" for what, n in part.get("counts", {}).items())
        if part.get("metrics"):
            score = part["metrics"]["psnr_masked"]
            told = "-" if score is None else f"{score:.2f} dB"
            more = f"{part['steps']} steps in {part['training_seconds']:.0f} s, psnr_masked {told}"
        lines.append(f"{name:28}{part['status']:>10}{part['seconds']:7.1f}{shown}   {more}")
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset-root", type=Path, help="CO3Dv2 root (default: ../shared/data/co3d beside the checkout, else generated)")
    parser.add_argument("--category", default="cape")
    parser.add_argument("--train-seconds", type=float, default=60.0, help="of each member, if the minutes allow (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=("tests", "steps", "training"), default=("tests", "steps", "training"))
    parser.add_argument("--presets", nargs="+", choices=PRESETS, help="whose steps are timed (default: all)")
    parser.add_argument("--quick", action="store_true", help="toy sizes and few of all parts, to see that they work")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--machine", help="the machine in words, for the result file")
    parser.add_argument("--json", type=Path, help="result file")
    parser.add_argument("--steps-of", nargs="+", choices=PRESETS, help=argparse.SUPPRESS)  # a child process that times these presets
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace, argv: Sequence[str], scratch: Path) -> int:
    ends = time.monotonic() + 60 * MINUTES
    device = prepare(arguments.device, arguments.threads)
    arguments.device = str(device)
    root, category = find_sequence(arguments.dataset_root, arguments.category, scratch)
    place = ["--dataset-root", str(root), "--category", category]
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    parts: dict[str, dict[str, Any]] = {}

    def run(part: Part) -> dict[str, Any]:
        left = ends - time.monotonic()
        if left < 5 and not arguments.quick:
            return {"status": "left out", "reason": f"{MINUTES:.0f} minutes are over", "seconds": 0.0, "lines": []}
        limit = part.seconds if arguments.quick else min(part.seconds, left)
        say(f"{part.name}: at most {limit:.0f} s")
        return run_part(Part(part.name, part.command, limit), folder=scratch, environment=environment)

    if "tests" in arguments.parts:
        parts["tests"] = with_counts(run(tests_part(arguments)))
    if "steps" in arguments.parts:
        presets = arguments.presets or (QUICK_PRESETS if arguments.quick else PRESETS)
        timed = time_presets(presets, lambda some: run(steps_part(some, arguments, place)))
        parts |= {f"steps_{preset}": found for preset, found in timed.items()}
    if "training" in arguments.parts:
        members = QUICK_MEMBERS if arguments.quick else MEMBERS
        for i, member in enumerate(members):
            share = (ends - time.monotonic()) / (len(members) - i) - START_AND_SCORE
            seconds = max(LEAST_TRAINING, min(arguments.train_seconds, share))
            output = scratch / member
            parts[f"training_{member}"] = with_score(run(training_part(member, arguments, root, category, output, seconds=seconds)), output)
    result = {
        **circumstances("gpu_check", argv, device, arguments.machine),
        "python": sys.version.split()[0],
        "card": card(device),
        "quick": arguments.quick,
        "parts": parts,
    }
    print(table(result))
    if arguments.json:
        write_json_atomic(arguments.json, result)
    return 0 if all(part["status"] == "ok" for part in parts.values()) else 1


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    if arguments.steps_of:
        device = prepare(arguments.device, arguments.threads)
        for preset in arguments.steps_of:
            start = time.monotonic()
            answer = measure_steps(make_preset(preset, arguments, device), device, quick=arguments.quick)
            print(json.dumps({**answer, "seconds": time.monotonic() - start}), flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        return reported(lambda: check(arguments, argv, Path(scratch)))


if __name__ == "__main__":
    run_script(main)
