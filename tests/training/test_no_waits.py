"""A training step asks the device nothing and brings nothing to it, as far as that can be seen without one.

On torch's ``meta`` device tensors have shapes and no values: what waits on CUDA, reading a value or a shape that depends on
values, is an error there, and the code takes its branches for devices other than the CPU. What a step would copy from the host's
memory shows as a call that makes a tensor of numbers, or as an operator with tensors of both.
"""

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import co3d_ensemble.plugin  # noqa: F401 - makes pytorch3d importable
from co3d_ensemble.config import (
    CameraJitterConfig,
    GridScheduleConfig,
    ModelConfig,
    NeRFConfig,
    OccupancyConfig,
    RendererConfig,
    TensoRFConfig,
    TrainingConfig,
)
from co3d_ensemble.data.ray_bank import RayBank
from co3d_ensemble.functional.cameras import so3_exp
from co3d_ensemble.functional.types import Frame, PinholeCamera
from co3d_ensemble.plugin.model import build_nerf
from co3d_ensemble.plugin.tensorf_model import build_tensorf
from co3d_ensemble.training.ray_bank_task import EXACT_STEPS, GridTask, RayBankTask
from co3d_ensemble.training.stepper import Stepper
from co3d_ensemble.training.validation import FrameValidation

BOX = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
JITTERS = ["extrinsics", "view_direction"]  # those that draw in a step
TENSORF_LOSSES = {name: 0.1 for name in ("loss_roi_rgb", "loss_alpha_bce", "loss_sample_entropy", "loss_tv_density", "loss_l1_density")}
NERF_LOSSES = {**TrainingConfig().loss_weights, "loss_rgb": 0.1}
READS = {f"aten::{name}" for name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "repeat_interleave", "bincount")}


class Waits(TorchDispatchMode):
    """Fails on operators that read from the device or mix its tensors with the host's; keeps the results' shapes."""

    def __init__(self, device):
        super().__init__()
        self.device, self.shapes = device, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name
        by_mask = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        assert name not in READS and not by_mask, f"{name} waits"
        result = function(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)}
        assert devices <= {self.device}, f"{name} mixes tensors of {' and '.join(sorted(devices))}"
        self.shapes.append((name, [tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]))
        return result


def frames():
    mask = torch.zeros(1, 12, 16, dtype=torch.uint8)
    mask[:, 3:9, 4:12] = 255
    rgb = torch.full((3, 12, 16), 180, dtype=torch.uint8)
    center, focal, T = torch.tensor([8.0, 6.0]), torch.tensor([20.0, 20.0]), torch.tensor([0.0, 0.0, 4.0])
    cameras = [PinholeCamera(so3_exp(torch.tensor([0.0, 0.8 * i, 0.0])), T, focal, center, 12, 16) for i in range(3)]
    return [Frame(f"thing/{i}", "thing", i, rgb, mask, camera) for i, camera in enumerate(cameras)]


def stepper(kind, jitter, device):
    torch.manual_seed(0)
    occupancy = OccupancyConfig(resolution=8, refine_from=1.0)  # a refinement may wait, so none is due
    camera_jitter = CameraJitterConfig(mode=jitter, angle_std=0.1, extrinsics_angle_std=0.05, extrinsics_shift_std=0.02)
    renderer = RendererConfig(n_pts_per_ray_coarse=12, n_pts_per_ray_fine=6)
    training = TrainingConfig(max_steps=100, n_rays=64, lr=3e-3, loss_weights=NERF_LOSSES if kind == "nerf" else TENSORF_LOSSES)
    hull = torch.zeros(8, 8, 8, dtype=torch.bool)
    hull[1:7, 1:7, 1:7] = True
    place = {"training": training, "occupancy": occupancy, "jitter": camera_jitter, "chunk_rays": 50}
    bank = RayBank(frames(), "cpu")
    if kind == "nerf":
        sizes = NeRFConfig(n_layers=2, n_hidden=24, skip_layers=(1,), n_hidden_color=8, n_harmonics_xyz=3, n_harmonics_dir=1)
        config = ModelConfig(nerf=sizes, renderer=renderer, occupancy=occupancy, camera_jitter=camera_jitter)
        task = RayBankTask(build_nerf(config, box=BOX, hull=hull, near_far=None), bank, FrameValidation(frames()[:1]), **place)
    else:
        sizes = TensoRFConfig(resolution=8, n_density=2, n_appearance=3, n_features=5, n_hidden=8)
        config = ModelConfig(kind="tensorf", tensorf=sizes, renderer=renderer, occupancy=occupancy, camera_jitter=camera_jitter)
        model = build_tensorf(config, box=BOX, hull=hull, penalties=["tv_density", "l1_density"])
        grid = GridScheduleConfig(upsample_at=[], shrink_at=[])
        task = GridTask(model, bank, FrameValidation(frames()[:1]), resolution=8, grid=grid, **place)
    task.model.to(device).train()
    for holder in (bank.__dict__, task._jitter):
        holder |= {name: value.to(device) for name, value in holder.items() if isinstance(value, torch.Tensor)}
    bank.device = torch.device(device)
    task.model.bounded = True
    return Stepper(task, training, deferred=True)


class HostNumbers(TorchFunctionMode):
    """Fails on what makes a tensor of Python's numbers, lists as indices included."""

    MAKERS = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        by_list = function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and any(
            isinstance(part, list) for part in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        assert function not in self.MAKERS and not by_list, f"{function.__name__} brings numbers from the host"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("jitter", JITTERS)
@pytest.mark.parametrize("kind", ["nerf", "tensorf"])
def test_a_step_with_room_for_its_samples_has_fixed_shapes_and_asks_a_device_without_values_nothing(monkeypatch, kind, jitter):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # which meta tensors have none of
    monkeypatch.setattr("co3d_ensemble.training.stepper.build_adam", unfused_adam)
    step = stepper(kind, jitter, "meta")
    step.optimizer.step = lambda: None  # the fused kernel of CUDA, which is torch's own matter
    step.task.structure = lambda number: False  # the host's part, between the steps
    for function in step.task.model.functions:
        for room in function.rooms():
            room.capacity = 512
    step.run(0)  # what is made once, and kept
    seen = []
    for number in (1, 2):
        with HostNumbers(), Waits("meta") as waits:
            step.run(number)
        seen.append(waits.shapes)
    assert seen[0] == seen[1]


def unfused_adam(groups, model, *, betas, eps):
    prepared = [{**group, "params": list(group["params"]), "base_lr": group["lr"], "parameter_names": []} for group in groups]
    return torch.optim.Adam(prepared, betas=betas, eps=eps)


@pytest.mark.parametrize("kind", ["nerf", "tensorf"])
def test_two_batches_have_the_same_shapes_once_the_rooms_are_fitted(kind):
    step = stepper(kind, "off", "cpu")
    for number in range(EXACT_STEPS + 2):
        step.run(number)
    rooms = [room for function in step.task.model.functions for room in function.rooms()]
    assert all(room.capacity for room in rooms)
    seen = []
    for number in range(EXACT_STEPS + 2, EXACT_STEPS + 4):
        batch = step.task.batch(number)
        with Waits("cpu") as waits:
            losses = step.task.losses(batch)
        seen.append(waits.shapes)
    assert seen[0] == seen[1] and losses["samples_left_out"] == 0


def test_a_value_that_is_read_and_a_number_from_the_host_are_found():
    values = torch.ones(3)
    for reads in (lambda: float(values[0]), lambda: values[values > 0], lambda: values.nonzero(), lambda: bool(values.any())):
        with Waits("cpu"), pytest.raises(AssertionError, match="waits"):
            reads()
    there = torch.ones(3, device="meta")
    for mixes in (lambda: there * torch.ones(()), lambda: torch.where(there > 0, there, torch.zeros(()))):
        with Waits("meta"), pytest.raises(AssertionError, match="mixes"):
            mixes()
    by_list = [lambda: there[[0, 2]], lambda: there[..., [0]]]
    for makes in (lambda: torch.tensor(2.0, device="meta"), lambda: there.new_tensor([1.0]), *by_list):
        with HostNumbers(), pytest.raises(AssertionError, match="numbers from the host"):
            makes()


@pytest.mark.cuda
@pytest.mark.parametrize("jitter", ["off", "extrinsics"])
@pytest.mark.parametrize("kind", ["nerf", "tensorf"])
def test_a_step_with_room_for_its_samples_never_waits_for_the_device(never_waits, kind, jitter):
    step = stepper(kind, jitter, "cuda")
    for number in range(EXACT_STEPS + 10):  # the rooms are fitted, and every kernel has run once with them
        step.run(number)
    torch.cuda.synchronize()
    with never_waits():
        for number in range(EXACT_STEPS + 10, EXACT_STEPS + 20):
            step.run(number)
    step.check()
