"""The losses of a batch: on planes that show exactly the pairs' pictures, and at scales that match the network's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from co3d_ensemble.functional import mpi_target
from co3d_ensemble.functional.mpi import render_source_view, render_target_view
from co3d_ensemble.functional.mpi_losses import (
    disparity_scale,
    edge_aware_smoothness,
    edge_threshold_smoothness,
    l1_loss,
    log_disparity_loss,
    ssim_loss,
)
from co3d_ensemble.mine.assembly import build_network
from co3d_ensemble.mine.config import LOSSES
from co3d_ensemble.mine.objective import Objective, reduced
from co3d_ensemble.mine.pairs import Pair, collate
from tests.mine.stacks import camera, mine_config, smooth_picture

HEIGHT, WIDTH, DEPTH = 32, 48, 2.0
DISPARITY = torch.tensor([[1.0, 1 / DEPTH, 0.1]])
ALL = frozenset(LOSSES)


def opaque_planes(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An opaque surface in the colours of the picture at ``DEPTH``, empty planes around it."""
    sigma = torch.zeros(1, 3, 1, *image.shape[-2:])
    sigma[:, 1] = 1e6
    return image[None, None].expand(1, 3, -1, -1, -1), sigma


def plane_pair(unit: float = 1.0) -> Pair:
    """The surface seen from its camera and from one to the side; ``unit`` is how many of the pair's units one of the planes' is."""
    source, K = smooth_picture(HEIGHT, WIDTH)[None], camera(HEIGHT, WIDTH)[None]
    R, t = torch.eye(3)[None], torch.tensor([[-0.2, 0.1, 0.05]])
    rgb, sigma = opaque_planes(source[0])
    pose = {"K_source": K, "K_target": K, "R": R, "t": t, "height": HEIGHT, "width": WIDTH}
    target = render_target_view(rgb, sigma, DISPARITY.reciprocal(), **pose)
    xy = torch.tensor([[10.5, 8.5], [30.5, 20.5], [40.5, 25.5]])
    points = torch.cat((xy, torch.full((3, 1), DEPTH)), dim=1)
    target_points = torch.cat((xy, target.depth[0, 0, xy[:, 1].long(), xy[:, 0].long(), None]), dim=1)
    scaled = torch.tensor([1.0, 1.0, unit])
    return Pair(
        ["pair"], source, target.rgb, K, K, R, t * unit, source_points=(points * scaled)[None], target_points=(target_points * scaled)[None]
    )


def test_planes_that_show_the_pictures_cost_nothing():
    pair = plane_pair()
    losses = Objective(ALL).losses([opaque_planes(pair.source[0])], DISPARITY, pair)
    assert losses.keys() == ALL
    for name in ALL - {"loss_smooth_v1_target", "loss_smooth_v2_target"}:  # the edge of the picture is one of the target's disparity
        assert losses[name].item() == pytest.approx(0.0, abs=2e-3), name


def test_the_unit_of_the_points_is_the_translations():
    pair = plane_pair(unit=7.0)
    planes = [opaque_planes(pair.source[0])]
    calibrated = Objective(ALL, calibrate=True).losses(planes, DISPARITY, pair)
    assert calibrated["loss_rgb_target"] < 1e-3 and calibrated["loss_disparity_target"] < 1e-3
    taken_as_it_is = Objective(ALL, calibrate=False).losses(planes, DISPARITY, pair)
    assert taken_as_it_is["loss_rgb_target"] > 0.01
    assert taken_as_it_is["loss_disparity_source"].item() == pytest.approx(torch.tensor(7.0).log().item(), rel=1e-3)


def random_batch(height: int = 36, width: int = 44) -> Pair:
    torch.manual_seed(0)
    points = torch.rand(2, 5, 3) * torch.tensor([width, height, 3.0])
    pictures = torch.stack([smooth_picture(height, width, seed) for seed in range(4)])
    K = camera(height, width).expand(2, 3, 3)
    t = torch.tensor([[0.1, 0.0, 0.0], [0.0, 0.1, 0.1]])
    return Pair(["a", "b"], pictures[:2], pictures[2:], K, K, torch.eye(3).expand(2, 3, 3), t, source_points=points, target_points=points)


def test_a_pair_whose_source_has_no_points_does_not_say_what_its_target_shows():
    """Its unit is not known: with a guess for it, the network would be taught a wrong picture."""
    pair = plane_pair(unit=7.0)
    lost = replace(pair, source_points=torch.zeros_like(pair.source_points))
    both = collate([Pair(**{**vars(p), "name": "p"} | {k: v[0] for k, v in vars(p).items() if torch.is_tensor(v)}) for p in (pair, lost)])
    names = frozenset({"loss_rgb_target", "loss_ssim_target", "loss_disparity_target"})
    rgb, sigma = (part.repeat(2, 1, 1, 1, 1) for part in opaque_planes(pair.source[0]))
    right = Objective(names).losses([(rgb, sigma)], DISPARITY.expand(2, -1), both)
    assert right["loss_rgb_target"] < 1e-3 and right["loss_disparity_target"] < 1e-3 and right["loss_ssim_target"] < 1e-2
    dark = (0.9 * rgb).requires_grad_()
    wrong = Objective(names, blend=False).losses([(dark, sigma)], DISPARITY.expand(2, -1), both)
    torch.stack(list(wrong.values())).sum().backward()
    assert dark.grad[0].any() and not dark.grad[1].any()


def test_losses_are_sums_over_the_networks_scales_of_its_sizes():
    config = mine_config().model
    torch.manual_seed(1)
    network = build_network(config).eval()
    pair, disparity = random_batch(), torch.tensor([[0.9, 0.5, 0.2, 0.1]]).expand(2, 4)
    planes = network(pair.source, disparity)
    losses = Objective(ALL, blend=False, calibrate=False).losses(planes, disparity, pair)
    expected = dict.fromkeys(("loss_rgb_target", "loss_ssim_target", "loss_disparity_source"), 0.0)
    for scale, (rgb, sigma) in enumerate(planes):
        small = reduced(pair, scale)
        assert small.source.shape[-2:] == rgb.shape[-2:] == (-(-36 // 2**scale), -(-44 // 2**scale))
        shared = {"K_source": small.K_source, "K_target": small.K_target, "R": pair.R, "t": pair.t}
        height, width = small.target.shape[-2:]
        view = render_target_view(rgb, sigma, disparity.reciprocal(), **shared, height=height, width=width)
        source = render_source_view(rgb, sigma, disparity.reciprocal(), small.K_source)
        expected["loss_rgb_target"] += l1_loss(view.rgb, small.target, view.valid)
        expected["loss_ssim_target"] += ssim_loss(view.rgb, small.target, view.valid)
        expected["loss_disparity_source"] += log_disparity_loss(source.disparity, small.source_points, torch.ones(2))
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)
    total = sum(losses.values())
    total.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters() if parameter.grad is not None)


def translucent_planes(pair: Pair, scales: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random planes at so many scales of a batch, with gradients."""
    generator, planes = torch.Generator().manual_seed(5), []
    for scale in range(scales):
        size = (-(-pair.source.shape[-2] // 2**scale), -(-pair.source.shape[-1] // 2**scale))
        rgb, sigma = (torch.rand(2, 4, channels, *size, generator=generator) for channels in (3, 1))
        planes.append((rgb.requires_grad_(), sigma.requires_grad_()))
    return planes


@pytest.mark.parametrize("blend", [True, False])
def test_every_loss_compares_its_own_view_and_picture_in_the_unit_of_the_full_scale(blend):
    """Each loss as the slides have it, of views that are rendered here, step by step; with their gradients."""
    pair, disparity = random_batch(), torch.tensor([[0.9, 0.5, 0.2, 0.1]]).expand(2, 4)
    planes, unit = translucent_planes(pair, 3), None
    losses = Objective(ALL, blend=blend, smoothness_gmin=0.5, smoothness_ratio=0.4).losses(planes, disparity, pair)
    expected = dict.fromkeys(LOSSES, torch.zeros(()))
    for scale, (rgb, sigma) in enumerate(planes):
        small = reduced(pair, scale)
        source = render_source_view(rgb, sigma, 1 / disparity, small.K_source)
        if blend:
            T = source.transmittance
            rgb = T * small.source[:, None] + (1 - T) * rgb
        if unit is None:
            unit = disparity_scale(source.disparity, pair.source_points)
        shared = {"K_source": small.K_source, "K_target": small.K_target, "R": pair.R, "t": pair.t / unit.detach()[:, None]}
        height, width = small.target.shape[-2:]
        target = render_target_view(rgb, sigma, 1 / disparity, **shared, height=height, width=width)
        found = {
            "loss_rgb_target": l1_loss(target.rgb, small.target, target.valid),
            "loss_ssim_target": ssim_loss(target.rgb, small.target, target.valid),
            "loss_smooth_v2_source": edge_aware_smoothness(source.disparity, small.source),
            "loss_smooth_v2_target": edge_aware_smoothness(target.disparity, small.target),
            "loss_disparity_source": log_disparity_loss(source.disparity, small.source_points, unit),
            "loss_disparity_target": log_disparity_loss(target.disparity, small.target_points, unit),
        }
        if scale == 0:
            found["loss_smooth_v1_target"] = edge_threshold_smoothness(target.disparity, pair.target, edge_ratio=0.4, min_gradient=0.5)
        expected = {name: value + found.get(name, 0) for name, value in expected.items()}
    leaves = [part for mpi in planes for part in mpi]
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert value > 0, name
        torch.testing.assert_close(losses[name], value, msg=lambda text, name=name: f"{name}: {text}")
        gradients = (torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True) for loss in (losses[name], value))
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"gradient of {name}: {text}")


def test_only_what_has_a_name_is_computed_and_v1_only_at_the_full_scale():
    config = mine_config().model
    network = build_network(config).eval()
    pair, disparity = random_batch(), torch.tensor([[0.9, 0.1]]).expand(2, 2)
    with torch.no_grad():
        planes = network(pair.source, disparity)
        some = Objective(frozenset({"loss_rgb_target", "loss_smooth_v1_target"}), calibrate=False).losses(planes, disparity, pair)
        full = Objective(frozenset({"loss_smooth_v1_target"}), calibrate=False).losses(planes[:1], disparity, pair)
        pointless = replace(pair, source_points=None, target_points=None)
        same = Objective(frozenset({"loss_rgb_target"}), calibrate=False).losses(planes, disparity, pointless)
    assert some.keys() == {"loss_rgb_target", "loss_smooth_v1_target"}
    assert some["loss_smooth_v1_target"] == full["loss_smooth_v1_target"] > 0
    assert same["loss_rgb_target"] == some["loss_rgb_target"]


def test_a_reduced_picture_keeps_its_camera():
    """A linear picture of the ray's direction, reduced, is that of the reduced camera."""
    height, width = 32, 48
    K = camera(height, width)[None]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    rays = torch.linalg.inv(K[0]) @ torch.stack((x, y, torch.ones_like(x))).flatten(1)
    picture = rays.view(1, 3, height, width)
    points = torch.tensor([[[12.0, 20.0, 5.0]]])
    pair = Pair(["a"], picture, picture, K, K, torch.eye(3)[None], torch.zeros(1, 3), source_points=points)
    small = reduced(pair, 2)
    y, x = torch.meshgrid(torch.arange(height // 4) + 0.5, torch.arange(width // 4) + 0.5, indexing="ij")
    expected = torch.linalg.inv(small.K_source[0]) @ torch.stack((x, y, torch.ones_like(x))).flatten(1)
    torch.testing.assert_close(small.source.flatten(2)[0], expected)
    assert small.source_points.tolist() == [[[3.0, 5.0, 5.0]]] and small.target_points is None


class _HostTraffic(TorchDispatchMode):
    """Collects the operations that read a tensor's values on the host or make a tensor of the host's values: on a GPU both wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if any(part in name for part in ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select")):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_losses_and_their_gradients_never_make_a_gpu_wait(monkeypatch):
    monkeypatch.setattr(mpi_target, "_one_by_one", lambda planes: False)  # the way that a GPU goes
    monkeypatch.setattr(mpi_target, "_chunks", lambda hits, chunk: [slice(0, 2), slice(2, 3)])
    pair = plane_pair()
    planes = []
    for scale in range(2):
        rgb, sigma = opaque_planes(reduced(pair, scale).source[0])
        planes.append((rgb.clone().requires_grad_(), sigma.clamp_max(1.0).requires_grad_()))
    with _HostTraffic() as traffic:
        torch.stack(list(Objective(ALL).losses(planes, DISPARITY, pair).values())).sum().backward()
    assert traffic.found == [] and all(part.grad is not None for part in planes[1])
