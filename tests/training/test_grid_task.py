"""Training while the grid grows and is cropped: parameters, Adam's moments and the average move together."""

import pytest
import torch
from omegaconf import OmegaConf

import co3d_ensemble.plugin  # noqa: F401 - makes pytorch3d importable
from co3d_ensemble.config import (
    CameraJitterConfig,
    GridScheduleConfig,
    ModelConfig,
    OccupancyConfig,
    RendererConfig,
    TensoRFConfig,
    TrainingConfig,
)
from co3d_ensemble.data.ray_bank import RayBank
from co3d_ensemble.plugin.tensorf_model import build_tensorf
from co3d_ensemble.training.ray_bank_task import GridTask
from co3d_ensemble.training.stepper import Stepper
from co3d_ensemble.training.validation import FrameValidation
from tests.training.test_ray_bank_task import BOX, frame

WEIGHTS = {"loss_roi_rgb": 1.0, "loss_alpha_bce": 1.0, "loss_tv_density": 1.0, "loss_l1_appearance": 1e-3}


NAMES = ("tv_density", "l1_appearance")


def training(**changes) -> TrainingConfig:
    settings = {"max_steps": 40, "n_rays": 64, "lr": 0.02, "lr_network": 1e-3, "loss_weights": WEIGHTS, "ramped_losses": (), **changes}
    return OmegaConf.structured(TrainingConfig(**settings))


def grid_task(config, *, moments="map", upsample_at=(0.25, 0.5), shrink_at=(0.25,), refine_from=1.0, hull=None) -> GridTask:
    torch.manual_seed(0)
    occupancy = OccupancyConfig(resolution=8, refine_from=refine_from, refine_every=0.1)
    schedule = GridScheduleConfig(final_resolution=12, upsample_at=upsample_at, shrink_at=shrink_at, moments=moments)
    fields = TensoRFConfig(resolution=6, n_density=2, n_appearance=3, n_features=4, n_hidden=8, density_shift=-2.0)
    model = ModelConfig(kind="tensorf", tensorf=fields, renderer=RendererConfig(n_pts_per_ray_coarse=16), occupancy=occupancy)
    if hull is None:
        hull = torch.ones(8, 8, 8, dtype=torch.bool)
        hull[0], hull[-1] = False, False
    return GridTask(
        build_tensorf(model, box=BOX, hull=hull, penalties=NAMES),
        RayBank([frame(i) for i in range(5)]),
        FrameValidation([frame(9)]),
        training=config,
        occupancy=occupancy,
        jitter=CameraJitterConfig(),
        chunk_rays=50,
        resolution=6,
        grid=schedule,
    )


def stepper(max_steps=40, **changes) -> Stepper:
    config = training(max_steps=max_steps)
    return Stepper(grid_task(config, **changes), config, deferred=False)


def run(s: Stepper, steps) -> None:
    for step in steps:
        s.run(step)


def test_a_change_of_the_grid_does_not_change_what_was_learned():
    s = stepper(shrink_at=())
    run(s, range(10))
    before, average = s.task.validate(), {name: value.clone() for name, value in s.ema.weights.items()}
    assert s.task.structure(10) is True  # what step 10 begins with
    s._rebuild()
    after = s.task.validate()
    assert after["psnr_masked"] == pytest.approx(before["psnr_masked"], abs=0.15)
    assert s.ema.weights["functions.0.field.density_planes.0"].shape != average["functions.0.field.density_planes.0"].shape
    with s.ema.applied(s.task.model):
        assert torch.isfinite(torch.tensor(s.task.validate()["psnr_masked"]))


def test_penalties_added_after_the_backward_pass_train_as_those_of_autograd(monkeypatch):
    added = stepper()
    run(added, range(6))
    losses = GridTask.losses
    with_autograd = lambda task, batch: losses(task, batch) | {f"loss_{n}": v for n, v in task.model.field.penalties(NAMES).items()}
    monkeypatch.setattr(GridTask, "losses", with_autograd)
    monkeypatch.setattr(GridTask, "penalty_names", ())
    reference = stepper()
    run(reference, range(6))
    logged, expected = added.take_window(), reference.take_window()
    assert logged == pytest.approx(expected, rel=1e-4) and logged["loss_tv_density"] > 0
    for (name, one), two in zip(added.task.model.named_parameters(), reference.task.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5, msg=name)


def test_moments_and_average_move_by_the_operation_of_the_parameters():
    s = stepper()
    run(s, range(10))
    state = {name: dict(values) for name, values in _moments(s).items()}
    average = dict(s.ema.weights)
    assert s.task.structure(10)
    operations = list(s.task._operations)
    assert len(operations) == 2  # cropped, then grown
    s._rebuild()
    for name, parameter in s.task.model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            expected = state[name][key]
            for operation in operations:
                expected = operation(name, expected)
            moved = _moments(s)[name]
            assert moved[key].shape == parameter.shape and torch.equal(moved[key], expected), (name, key)
            assert moved["step"] == state[name]["step"]
        expected = average[name]
        for operation in operations:
            expected = operation(name, expected)
        assert torch.equal(s.ema.weights[name], expected)
    assert (_moments(s)["functions.0.field.density_planes.0"]["exp_avg_sq"] >= 0).all()


def test_moments_of_the_factors_start_anew_where_that_is_asked_for_and_the_networks_stay():
    s = stepper(moments="reset")
    run(s, range(10))
    network = _moments(s)["functions.0.field.basis.weight"]["exp_avg"].clone()
    s.task.structure(10)
    s._rebuild()
    assert not any("planes" in name or "lines" in name for name in _moments(s))
    assert torch.equal(_moments(s)["functions.0.field.basis.weight"]["exp_avg"], network)


def _moments(s: Stepper):
    from co3d_ensemble.training.optimizer import moments_by_name

    return moments_by_name(s.optimizer)


def test_the_learning_rate_does_not_restart_and_the_groups_keep_theirs():
    s, rates = stepper(), []
    for step in range(40):
        s.run(step)
        rates.append(s.learning_rates["factors"])
        assert s.learning_rates["network"] == pytest.approx(s.learning_rates["factors"] / 20)
    assert all(later < earlier for earlier, later in zip(rates[1:], rates[2:]))  # the warm-up is less than a step here
    assert s.task.model.field.resolution != (6, 6, 6)


def test_training_goes_on_improving_through_every_change():
    s = stepper(max_steps=120, refine_from=0.5)
    before = s.task.validate()["psnr_masked"]
    run(s, range(120))
    with s.ema.applied(s.task.model):
        assert s.task.validate()["psnr_masked"] > before + 2


def test_a_run_with_nothing_in_its_hull_survives_all_changes():
    s = stepper(hull=torch.zeros(8, 8, 8, dtype=torch.bool), refine_from=0.1)
    run(s, range(40))
    assert torch.equal(s.task.model.field.box, BOX) and all(p.isfinite().all() for p in s.task.model.parameters())


def test_a_budget_times_steps_at_the_final_size():
    s = stepper()
    s.task.settle()
    assert s.task.model.field.resolution == (12, 12, 12)
    nothing = stepper(upsample_at=())
    nothing.task.settle()
    assert nothing.task.model.field.resolution == (6, 6, 6)
