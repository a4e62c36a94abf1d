"""A tiny regression with dropout and a buffer that training changes; as a script, one run of it: ``toy_task.py FOLDER KEY=VALUE...``,
also under torchrun, where ``dies=RANK`` kills a process at step 10."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
from omegaconf import OmegaConf
from torch import nn

from co3d_ensemble.config import TrainingConfig
from co3d_ensemble.training.budget import fit_budget
from co3d_ensemble.training.loop import TrainingResult, train
from co3d_ensemble.training.processes import ALONE, joined
from co3d_ensemble.training.run_directory import opened_by_first
from co3d_ensemble.training.stepper import INITIALISATION, seed_default_generators

DEFAULTS = {
    "max_steps": 40,
    "lr": 0.01,
    "loss_weights": {"loss_fit": 1.0, "loss_size": 0.1},
    "ramped_losses": ["loss_size"],
    "ramp": 0.2,
    "ema_horizon": 4.0,
    "validate_every": 0.25,
    "log_every": 5,
    "deterministic": True,
    "progress": False,
}


class ToyTask:
    rays_per_step = 16

    def __init__(self, config, *, sleep: float = 0.0, device: str = "cpu") -> None:
        self.config, self.sleep, self.device = config, sleep, device
        self.model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1)).to(device)
        self.model.register_buffer("occupancy", torch.zeros(4, device=device))
        self.scores: list[float] = []  # what validate returns, where a test says so
        self.validations = 0

    def parameter_groups(self):
        return [
            {"params": self.model[0].parameters(), "name": "trunk", "lr": self.config.lr},
            {"params": self.model[3].parameters(), "name": "head", "lr": self.config.lr / 2},
        ]

    def batch(self, step):
        return torch.rand(self.rays_per_step, 2, device=self.device)

    def losses(self, batch):
        if self.sleep:
            time.sleep(self.sleep)
        prediction = self.model(batch)
        size = sum(parameter.square().sum() for parameter in self.model.parameters())
        return {
            "loss_fit": (prediction - batch.prod(dim=1, keepdim=True)).square().mean(),
            "loss_size": size,
            "loss_watched": prediction.mean(),
        }

    def validate(self):
        self.validations += 1
        if self.scores:
            return {"psnr_masked": self.scores.pop(0)}
        points = torch.rand(32, 2, device=self.device)
        error = (self.model(points) - points.prod(dim=1, keepdim=True)).square().mean()
        return {"psnr_masked": float(-10 * error.log10()), "error": float(error)}

    def pictures(self):
        yield "val/points", torch.zeros(3, 4, 4, dtype=torch.uint8)

    def structure(self, step):
        if step % 7 == 3:
            self.model.occupancy += torch.rand(4, device=self.device)
        return False


def settings(**overrides):
    merged = OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(TrainingConfig))), DEFAULTS)
    merged.loss_weights = dict(overrides.pop("loss_weights", DEFAULTS["loss_weights"]))
    return OmegaConf.create({"training": OmegaConf.merge(merged, overrides)})


def run_toy(folder, *, make_task=ToyTask, device="cpu", processes=ALONE, **overrides) -> tuple[TrainingResult, ToyTask]:
    """What a launch script does."""
    config = settings(**overrides)
    with opened_by_first(processes, folder, config, resume=config.training.resume, device=device) as run:
        training = fit_budget(make_task, run, device, processes)
        seed_default_generators(training.seed, INITIALISATION)
        task = make_task(training)
        return train(task, training, run, device, processes), task


class DyingTask(ToyTask):
    def batch(self, step):
        if step == 10 and os.environ.get("RANK") == self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(step)


if __name__ == "__main__":
    folder, *dotlist = sys.argv[1:]
    options = OmegaConf.to_container(OmegaConf.from_dotlist(dotlist))
    sleep, DyingTask.dies = options.pop("sleep", 0.0), str(options.pop("dies", None))
    with joined("cpu") as (processes, _):
        result, _ = run_toy(folder, make_task=lambda config: DyingTask(config, sleep=sleep), processes=processes, **options)
    sys.exit(result.exit_status)
