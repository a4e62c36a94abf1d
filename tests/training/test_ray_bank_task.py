"""The recipe's task: rays in, named losses out, validation on frames, the grid refined when it is due."""

import time

import pytest
import torch

import co3d_ensemble.plugin  # noqa: F401 - makes pytorch3d importable
from co3d_ensemble.base.spread import evenly_spread
from co3d_ensemble.config import CameraJitterConfig, ModelConfig, NeRFConfig, OccupancyConfig, RendererConfig, TrainingConfig
from co3d_ensemble.data.ray_bank import RayBank
from co3d_ensemble.functional.cameras import angle_between, so3_exp
from co3d_ensemble.functional.types import Frame, PinholeCamera
from co3d_ensemble.plugin.model import build_nerf
from co3d_ensemble.training.ray_bank_task import RayBankTask
from co3d_ensemble.training.validation import FrameValidation

BOX = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])


def frame(number: int, size=(12, 16)) -> Frame:
    """A grey disk before noise."""
    height, width = size
    generator = torch.Generator().manual_seed(number)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    inside = ((y + 0.5 - height / 2) ** 2 + (x + 0.5 - width / 2) ** 2) < 16
    rgb = torch.where(inside, 180, torch.randint(0, 256, (3, height, width), generator=generator)).to(torch.uint8)
    return Frame(
        name=f"thing/{number}",
        sequence_name="thing",
        frame_number=number,
        rgb=rgb,
        mask=inside[None].to(torch.uint8) * 255,
        camera=PinholeCamera(
            so3_exp(torch.tensor([0.0, 0.8 * number, 0.0])), torch.tensor([0.0, 0.0, 4.0]), torch.tensor([20.0, 20.0]),
            torch.tensor([width / 2, height / 2]), height, width,
        ),
    )


def task(
    *, jitter="off", shift_std=0.02, hull=None, max_steps=100, n_rays=64, occupancy=True, frames=None, device="cpu", **occupancy_settings
) -> RayBankTask:
    torch.manual_seed(0)
    schedule = OccupancyConfig(enabled=occupancy, resolution=8, **occupancy_settings)
    camera_jitter = CameraJitterConfig(mode=jitter, extrinsics_angle_std=0.05, extrinsics_shift_std=shift_std)
    config = ModelConfig(
        nerf=NeRFConfig(n_layers=2, n_hidden=24, skip_layers=(1,), n_hidden_color=8, n_harmonics_xyz=3, n_harmonics_dir=1),
        renderer=RendererConfig(n_pts_per_ray_coarse=12, n_pts_per_ray_fine=6),
        occupancy=schedule,
        camera_jitter=camera_jitter,
    )
    return RayBankTask(
        build_nerf(config, box=BOX, hull=hull, near_far=None).to(device),
        RayBank(frames or [frame(i) for i in range(5)], device),
        FrameValidation([frame(9)]),
        training=TrainingConfig(max_steps=max_steps, n_rays=n_rays, lr=3e-3),
        occupancy=schedule,
        jitter=camera_jitter,
        chunk_rays=50,
    )


def train(t: RayBankTask, steps: int) -> list[float]:
    optimizer = torch.optim.Adam(t.parameter_groups())
    weights, history = TrainingConfig().loss_weights, []
    for step in range(steps):
        torch.manual_seed(step)
        losses = t.losses(t.batch(step))
        optimizer.zero_grad()
        objective = sum(weight * losses[name] for name, weight in weights.items())
        objective.backward()
        optimizer.step()
        t.structure(step)
        history.append(objective.item())
    return history


def test_training_learns_the_disk_and_validation_says_so():
    t = task()
    before = t.validate()
    history = train(t, 60)
    after = t.validate()
    assert sum(history[-5:]) < 0.5 * sum(history[:5])
    assert after["psnr_masked"] > before["psnr_masked"] + 3 and after["iou"] > 0.5
    assert [tag for tag, _ in t.pictures()] == ["val/thing/9"]


def test_a_batch_holds_the_rays_asked_for_and_follows_the_default_generator():
    t = task(n_rays=37)
    torch.manual_seed(3)
    first = t.batch(0)
    torch.manual_seed(3)
    again = t.batch(8)
    assert t.rays_per_step == 37 and first.origins.shape == (37, 3) and first.targets.rgb.shape == (37, 3)
    assert torch.equal(first.directions, again.directions)
    assert not torch.equal(first.directions, t.batch(0).directions)


def test_all_parameters_train_at_the_rate_of_the_settings():
    t = task()
    (group,) = t.parameter_groups()
    assert group["lr"] == 3e-3 and group["name"] == "field"
    assert {id(p) for p in group["params"]} == {id(p) for p in t.model.parameters()}


@pytest.mark.parametrize(("mode", "moves"), [("extrinsics", True), ("fixed_gauge", False), ("view_direction", False), ("off", False)])
def test_only_the_extrinsics_mode_moves_the_cameras_about_the_middle_of_the_box(mode, moves):
    t, still = task(jitter=mode, n_rays=4000), task(n_rays=4000)
    torch.manual_seed(3)
    batch = t.batch(0)
    torch.manual_seed(3)
    reference = still.batch(0)
    assert torch.equal(batch.targets.rgb, reference.targets.rgb) and torch.equal(batch.xy, reference.xy)
    if not moves:
        assert torch.equal(batch.origins, reference.origins) and torch.equal(batch.directions, reference.directions)
        return
    angle = angle_between(batch.directions, reference.directions)
    assert 0.001 < angle.mean() < 0.15
    assert 0.001 < (batch.origins.norm(dim=-1) - 4.0).abs().mean() < 0.3
    turned = task(jitter=mode, shift_std=0.0).batch(0)  # about the middle of the box, the origin: the distance stays
    torch.testing.assert_close(turned.origins.norm(dim=-1), torch.full((64,), 4.0))


def test_the_grid_is_refined_from_its_first_due_step_on_and_at_the_asked_interval():
    t = task(refine_from=0.3, refine_every=0.1)
    refined = []
    t.model.occupancy.refine = lambda density, part: refined.append(density)
    for step in range(100):
        assert t.structure(step) is False
    assert len(refined) == 7  # 30, 40, ..., 90
    refined.clear()
    for step in (29, 30, 31, 39, 40, 41):
        t.structure(step)
        if refined:
            assert step in (30, 40)
        refined.clear()


@pytest.mark.parametrize(("refine_from", "refine_every"), [(0.3, 0.1), (0.05, 0.01), (0.0, 0.05), (0.95, 0.5), (0.0, 1.0)])
def test_the_announced_refinements_are_those_of_a_run_and_one_is_made_to_time_it(refine_from, refine_every):
    t = task(refine_from=refine_from, refine_every=refine_every, max_steps=1000)
    refined = []
    t.model.occupancy.refine = lambda density, part: refined.append(time.sleep(0.01))
    count, seconds = t.structure_seconds()
    assert len(refined) == (count > 0) and (seconds >= 0.01) == (count > 0)
    refined.clear()
    for step in range(1000):
        t.structure(step)
    assert len(refined) == count
    assert task(occupancy=False).structure_seconds() == (0, 0.0)


@pytest.mark.parametrize("max_steps", [2, 21, 150, 5000])
@pytest.mark.parametrize("n_rays", [2, 64])
def test_all_refinements_together_look_at_a_share_of_the_samples_that_the_steps_place(max_steps, n_rays):
    hull = torch.rand(8, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.4
    t = task(hull=hull, refine_from=0.05, refine_every=0.01, refine_share=0.1, max_steps=max_steps, n_rays=n_rays)
    looked_at, parts = [], []
    refine = t.model.occupancy.refine
    t.model.occupancy.refine = lambda density, part: (parts.append(part), refine(density, part=part))
    t.model.density = lambda points: (looked_at.append(len(points)), torch.ones(len(points)))[1]
    for step in range(max_steps):
        t.structure(step)
    assert sum(looked_at) <= 0.1 * hull.float().mean() * max_steps * n_rays * (12 + 12 + 6) + max(looked_at, default=0)
    assert all(n <= 8 for _, n in parts)
    assert len(parts) == t.structure_seconds()[0]
    if max_steps == 5000:  # long enough for every voxel
        assert {i for i, _ in parts} == set(range(parts[0][1]))


def test_refinement_looks_at_the_models_density():
    t = task(refine_from=0.0, refine_every=0.05)
    assert t.model.occupancy.occupied.all()
    t.model.density = lambda points: 100.0 * (points[:, 0] > 0)
    t.structure(4)
    assert t.model.occupancy.occupied.all()  # not due yet
    t.structure(5)
    expected = torch.ones(8, 8, 8, dtype=torch.bool)
    expected[:3] = False  # one voxel beside what is dense stays
    assert torch.equal(t.model.occupancy.occupied, expected)


def test_without_a_grid_there_is_nothing_to_refine():
    t = task(occupancy=False)
    assert t.model.occupancy is None
    assert all(t.structure(step) is False for step in range(100))


def test_a_hull_that_holds_nothing_still_trains_without_an_error():
    t = task(hull=torch.zeros(8, 8, 8, dtype=torch.bool))
    assert len(train(t, 3)) == 3


def test_the_cost_of_a_step_does_not_know_the_number_or_size_of_frames():
    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for frames in ([frame(0)], [frame(i, (60, 50)) for i in range(9)]):
        t = task(frames=frames)
        with Count() as count:
            sum(t.losses(t.batch(0)).values()).backward()
        counts.append(count.calls)
    assert counts[0] == counts[1]


def test_items_are_spread_evenly_in_order_from_first_to_last():
    assert evenly_spread(list(range(5)), 9) == [0, 1, 2, 3, 4]
    assert evenly_spread(list(range(101)), 5) == [0, 25, 50, 75, 100]
    assert evenly_spread(list(range(10)), 1) == [0]
    assert evenly_spread([], 3) == []
