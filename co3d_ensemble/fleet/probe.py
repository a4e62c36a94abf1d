"""How long a model's jobs will take: a few of its steps, a validation and its loading, timed on one sequence.

    python -m co3d_ensemble.fleet.probe RESULT.json SECONDS <overrides of launch/train_sequence.py>

is what the dry run starts, a process per model, so that a model that does not fit the device costs only its own figure.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from co3d_ensemble.assembly import compose_experiment, load_scene, make_task
from co3d_ensemble.base.quoting import override
from co3d_ensemble.files import write_json_atomic
from co3d_ensemble.fleet.disk import read_json
from co3d_ensemble.fleet.environment import device_of
from co3d_ensemble.fleet.plan import Plan
from co3d_ensemble.fleet.settings import FleetConfig
from co3d_ensemble.rendering import resolve_device
from co3d_ensemble.scripts import configure_logging, reported
from co3d_ensemble.training.budget import measure_speed
from co3d_ensemble.training.precision import automatic_precision, settle_precision, used_precision


@dataclass(frozen=True)
class Cost:
    """What a job of one model costs, measured on one sequence.

    Attributes:
        start_seconds: of the process until its first step, decoding ``frames`` photographs included.
        loop_seconds: of the training loop, validations and structure changes included.
        pixel_seconds: of a rendered pixel.
        precision: that the model was measured in.
        pixel_share: pixels of a scored render per pixel of the original picture; 1 where the two are one render.
    """

    start_seconds: float
    frames: int
    loop_seconds: float
    pixel_seconds: float
    pixel_share: float
    precision: str

    def job_seconds(self, *, frames: int, pixels: int) -> float:
        """Of a job with so many photographs to train on and so many pixels in all of its targets at their original size."""
        renders = pixels * (1.0 + (self.pixel_share if self.pixel_share < 1 else 0.0))
        return self.start_seconds * frames / max(1, self.frames) + self.loop_seconds + renders * self.pixel_seconds


def probe_models(settings: FleetConfig, plan: Plan, category: str, subset: str, environment: Mapping[str, str]) -> dict[str, Cost | str]:
    """Cost by model, or why there is none: the last line of what the probe said."""
    found: dict[str, Cost | str] = {}
    for model, overrides in plan.models.overrides.items():
        where = {"dataset_root": Path(settings.dataset_root).absolute(), "category": category, "subset_name": subset}
        place = [override(key, value) for key, value in where.items()]
        with TemporaryDirectory() as folder:
            result = Path(folder) / "cost.json"
            command = [sys.executable, "-m", "co3d_ensemble.fleet.probe", str(result), str(settings.probe_seconds), *overrides, *place]
            command.append(f"device={device_of(settings.device, environment)}")
            done = subprocess.run(command, capture_output=True, text=True, env=dict(environment))
            cost = read_json(result)
            told = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        found[model] = told[-1] if cost is None else Cost(**cost)
    return found


def measure(overrides: Sequence[str], result: Path, *, seconds: float, started: float) -> int:
    """Times one model and writes its cost."""
    config = compose_experiment(overrides)
    device = resolve_device(config.device)
    settle_precision(config, automatic_precision(config, device))
    scene = load_scene(config)
    training = config.training
    make_task(config, training, scene, device)
    start_seconds = time.perf_counter() - started
    speed = measure_speed(lambda settings: make_task(config, settings, scene, device), training, device, seconds)
    loop = speed.run_seconds(training.max_steps, training.validate_every)
    if training.budget_minutes is not None:
        loop = 60.0 * training.budget_minutes
    camera, record = scene.val[0].camera, scene.subset.known[0]
    cost = Cost(
        start_seconds=start_seconds,
        frames=len(scene.train),
        loop_seconds=loop,
        pixel_seconds=speed.validation_seconds / sum(frame.camera.height * frame.camera.width for frame in scene.val),
        pixel_share=min(1.0, camera.height * camera.width / (record.height * record.width)),
        precision=used_precision(config),
    )
    write_json_atomic(result, asdict(cost))
    return 0


def main(arguments: list[str]) -> int:
    started = time.perf_counter()
    configure_logging()
    return reported(lambda: measure(arguments[2:], Path(arguments[0]), seconds=float(arguments[1]), started=started))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
