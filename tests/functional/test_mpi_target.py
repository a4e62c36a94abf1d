"""Target views in chunks: gradients, degenerate poses, precision, and that neither chunks nor devices' ways change the result."""

import pytest
import torch

from co3d_ensemble.functional import mpi_target
from co3d_ensemble.functional.cameras import so3_exp
from co3d_ensemble.functional.mpi import render_target_view
from tests.functional.test_mpi import F64, SOURCE, assert_equal_to_rays, cast, draw, intrinsics, render, scene


def outputs(view):
    return torch.cat((view.rgb, view.depth, view.alpha, view.disparity), dim=1)


def tiny(mode="sigma", **changes):
    """Small enough for gradcheck; some pixels see all planes, some a few, some none."""
    arguments = scene(batch=2, planes=3, target=(3, 4), **changes)
    cut = (slice(None), slice(None), slice(None), slice(0, 4), slice(0, 5))
    arguments["rgb"], arguments["sigma"] = arguments["rgb"][cut].clone(), arguments["sigma"][cut].clone() / 3
    arguments["K_source"] = torch.stack([intrinsics(5.0, 4.0, 2.6, 1.9), intrinsics(4.5, 4.2, 2.4, 2.1, 0.2)])
    arguments["K_target"] = torch.stack([intrinsics(3.0, 3.5, 2.1, 1.4), intrinsics(3.2, 3.0, 1.9, 1.6)])
    return {**arguments, "mode": mode}


def gradients(arguments, **changes):
    leaves = [arguments[name].detach().clone().requires_grad_() for name in ("rgb", "sigma")]
    view = render({**arguments, **changes}, rgb=leaves[0], sigma=leaves[1])
    upstream = draw(*outputs(view).shape, seed=7).to(view.rgb.dtype) - 0.5
    return outputs(view).detach(), *torch.autograd.grad(outputs(view), leaves, upstream)


@pytest.fixture(params=["one by one", "side by side"])
def way(request, monkeypatch):
    """The CPU's way of compositing a chunk, and the GPU's."""
    if request.param == "side by side":
        monkeypatch.setattr(mpi_target, "_one_by_one", lambda planes: False)


@pytest.mark.parametrize("mode", ["sigma", "alpha"])
def test_gradients_are_those_of_finite_differences(way, mode):
    arguments = tiny(mode)
    leaves = [arguments[name][:1].clone().requires_grad_() for name in ("rgb", "sigma")]
    rest = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    assert torch.autograd.gradcheck(lambda rgb, sigma: outputs(render(rest, rgb=rgb, sigma=sigma, plane_chunk=2)), leaves)


@pytest.mark.parametrize("mode", ["sigma", "alpha"])
@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 50])
def test_chunks_and_recomputation_change_neither_the_view_nor_its_gradients(way, mode, chunk):
    arguments = tiny(mode)
    kept = gradients(arguments, checkpoint=False, plane_chunk=3)
    for name, first, second in zip(("view", "rgb", "sigma"), gradients(arguments, plane_chunk=chunk), kept):
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    assert (kept[1] != 0).any() and (kept[2] != 0).any()


def test_without_recomputation_gradients_reach_depths_and_intrinsics_too():
    arguments = tiny()
    given = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    names = ("depth", "K_source", "K_target")

    def rendered(*values):
        return outputs(render({**given, **dict(zip(names, values))}, checkpoint=False))

    assert torch.autograd.gradcheck(rendered, [given[name].clone().requires_grad_() for name in names])


def test_without_recomputation_gradients_reach_the_poses_too():
    arguments = tiny()
    moved = [torch.zeros(2, 3, dtype=F64, requires_grad=True), arguments["t"].clone().requires_grad_()]

    def rendered(vector, t):
        return render(arguments, R=so3_exp(vector) @ arguments["R"], t=t, checkpoint=False).rgb

    assert torch.autograd.gradcheck(rendered, moved)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_planes_of_opacity_one_have_their_exact_gradient(checkpoint):
    arguments = tiny("alpha", translation=0.0, angle=0.0)
    arguments["sigma"][:, 0] = 1.0
    _, rgb_grad, sigma_grad = gradients(arguments, checkpoint=checkpoint)
    assert torch.isfinite(rgb_grad).all() and torch.isfinite(sigma_grad).all()
    assert (rgb_grad[:, 1:] == 0).all() and (sigma_grad[:, 1:] == 0).all()  # hidden
    assert (sigma_grad[:, 0] != 0).any()  # what lies behind would shine through


def test_an_opaque_density_has_no_infinite_or_undefined_gradient():
    arguments = tiny()
    arguments["sigma"] *= 1e6
    assert all(torch.isfinite(values).all() for values in gradients(arguments))


def test_one_plane_is_seen_through_its_last_distance():
    arguments = scene(planes=1)
    arguments["sigma"] *= 1e-3
    rays = cast(arguments)
    assert (rays[3] == 1).any() and (rays[3] == 0).any()
    assert_equal_to_rays(render(arguments), rays, 1)


def test_planes_behind_the_target_camera_are_dropped():
    arguments = scene(angle=0.05)
    arguments["t"] = torch.tensor([[0.0, 0.0, -1.7], [0.1, 0.0, -9.0]], dtype=F64)  # between planes, and past all of them
    arguments["K_source"] = arguments["K_source"] * torch.tensor([[0.3], [0.3], [1.0]]).double() + intrinsics(0, 0, 3.5, 2.2) * (
        1 - torch.eye(3, dtype=F64)
    )
    rays = cast(arguments)
    assert rays[3][0].max() == 2 and (rays[3][1] == 0).all()
    view = render(arguments)
    assert_equal_to_rays(view, rays, 4)
    assert (view.alpha[1] == 0).all() and (view.depth[1] == 0).all() and not view.valid[1].any()


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1e-17, 1e-12, -1e-12, 1e-30])
def test_a_plane_through_the_target_camera_gives_finite_views_and_gradients(checkpoint, offset):
    arguments = tiny(angle=0.0)
    arguments["depth"] = torch.tensor([[1.0, 2.0, 4.0]], dtype=F64).repeat(2, 1)
    arguments["t"] = torch.tensor([[0.2, 0.1, -2.0 - offset], [0.0, 0.0, -1.0 + offset]], dtype=F64)
    leaves = {name: arguments[name].clone().requires_grad_() for name in ("rgb", "sigma", "depth", "R", "t", "K_source", "K_target")}
    view = render({**arguments, **leaves}, checkpoint=checkpoint)
    assert torch.isfinite(outputs(view)).all()
    if abs(offset) < 1e-13:  # exactly at the plane, which is then not in front; the next one is at least 1 away
        assert (view.depth[view.depth > 0] > 1 - 1e-9).all() and (view.depth > 0).any()
    outputs(view).sum().backward()
    for name, leaf in leaves.items():
        if leaf.grad is not None:
            assert torch.isfinite(leaf.grad).all(), name


@pytest.mark.parametrize("checkpoint", [True, False])
def test_rays_that_do_not_run_with_the_planes_see_nothing(checkpoint):
    arguments = tiny()
    half_turn = torch.diag(torch.tensor([-1.0, 1, -1], dtype=F64))
    quarter = torch.tensor([[0.0, 0, -1], [0, 1, 0], [1, 0, 0]], dtype=F64)  # sees the planes edge-on in its middle column
    arguments["R"] = torch.stack((half_turn, quarter))
    arguments["K_target"][:, 0, 2] = 2.5
    arguments["depth"] = torch.tensor([[1.0, 2.0, 4.0]], dtype=F64).repeat(2, 1)
    centers = torch.tensor([[0.0, 0.0, 4.0], [0.0, 0.0, 0.0]], dtype=F64)  # the first looks back at all planes
    arguments["t"] = -(arguments["R"] @ centers[:, :, None])[..., 0]
    leaves = {name: arguments[name].clone().requires_grad_() for name in ("rgb", "sigma", "R", "t")}
    view = render({**arguments, **leaves}, checkpoint=checkpoint)
    assert (outputs(view) == 0).all() and not view.valid.any()
    outputs(view).sum().backward()
    assert all(leaf.grad is None or (leaf.grad == 0).all() for leaf in leaves.values())


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_view_that_sees_nothing_leaves_the_gradients_of_another_in_its_batch_alone(checkpoint):
    arguments = tiny()
    quarter = torch.tensor([[0.0, 0, -1], [0, 1, 0], [1, 0, 0]], dtype=F64)
    arguments["R"] = torch.stack((arguments["R"][0], quarter))
    arguments["t"] = torch.stack((arguments["t"][0], torch.zeros(3, dtype=F64)))
    arguments["K_target"][:, 0, 2] = 2.5
    alone = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    found = []
    for given in (arguments, alone):
        leaves = {name: given[name].clone().requires_grad_() for name in ("rgb", "sigma", "depth", "t")}
        view = render({**given, **leaves}, checkpoint=checkpoint)
        outputs(view).sum().backward()
        found.append({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})
    assert view.valid.any()
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name][:1], gradient)
        assert (found[0][name][1] == 0).all()


def test_planes_that_no_pixel_meets_are_skipped_and_get_gradient_zero(monkeypatch):
    arguments = scene(batch=1, planes=4, angle=0.0)
    arguments["depth"] = torch.tensor([[1.0, 1.1, 4.0, 8.0]], dtype=F64)
    arguments["t"] = torch.tensor([[3.0, 0.0, 0.0]], dtype=F64)  # near planes leave the picture sideways
    warped = []
    sample = mpi_target._sample
    monkeypatch.setattr(mpi_target, "_sample", lambda planes, grid: warped.append(planes.shape[1]) or sample(planes, grid))
    assert_equal_to_rays(render(arguments), cast(arguments), 4)
    assert sum(warped) == 2 * 2  # colour and density of two planes
    _, rgb_grad, sigma_grad = gradients(arguments)
    assert (rgb_grad[:, :2] == 0).all() and (sigma_grad[:, :2] == 0).all() and (rgb_grad[:, 2:] != 0).any()


def test_more_than_two_planes_are_not_asked_of_a_valid_pixel_and_fewer_do_not_do():
    arguments = scene(batch=1)
    rays = cast(arguments)
    assert {1, 2, 3} & set(rays[3].flatten().int().tolist())
    assert torch.equal(render(arguments).valid, rays[3] >= 2)


def test_single_precision_stays_within_a_hundred_thousandth():
    arguments = scene(planes=32)
    single = {name: value.float() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    view = render(single)
    assert view.rgb.dtype == torch.float32
    exact = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in single.items()}
    torch.testing.assert_close(view.rgb.double(), render(exact).rgb, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_planes_of_16_bits_are_composited_in_single_precision(dtype, checkpoint):
    arguments = {name: value.float() if isinstance(value, torch.Tensor) else value for name, value in tiny().items()}
    half = {name: arguments[name].to(dtype).requires_grad_() for name in ("rgb", "sigma")}
    rounded = {name: value.detach().float() for name, value in half.items()}
    view = render({**arguments, **half}, checkpoint=checkpoint)
    assert view.rgb.dtype == torch.float32
    torch.testing.assert_close(view.rgb, render({**arguments, **rounded}).rgb)
    view.rgb.sum().backward()
    _, *expected = gradients_of_sum({**arguments, **rounded})
    for leaf, gradient in zip(half.values(), expected):
        assert leaf.grad.dtype == dtype
        torch.testing.assert_close(leaf.grad.float(), gradient, rtol=0.02, atol=1e-3)


def gradients_of_sum(arguments):
    leaves = [arguments[name].clone().requires_grad_() for name in ("rgb", "sigma")]
    view = render(arguments, rgb=leaves[0], sigma=leaves[1])
    return view.rgb, *torch.autograd.grad(view.rgb.sum(), leaves)


def test_autocast_does_not_touch_poses_and_light():
    arguments = {name: value.float() if isinstance(value, torch.Tensor) else value for name, value in tiny().items()}
    plain = render(arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast_view = render(arguments)
        stored = render(arguments, checkpoint=False)
    assert torch.equal(plain.rgb, cast_view.rgb)
    torch.testing.assert_close(plain.rgb, stored.rgb)


@pytest.mark.parametrize("n_planes", [8, 64])
def test_what_is_kept_for_the_backward_pass_is_one_map_per_chunk(n_planes):
    arguments = scene(batch=1, planes=n_planes, target=SOURCE)
    arguments["rgb"].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        render(arguments, plane_chunk=8)
    planes = [tensor for tensor in kept if tensor.numel() > 3 * SOURCE[0] * SOURCE[1]]
    assert {tensor.data_ptr() for tensor in planes} <= {arguments["rgb"].data_ptr(), arguments["sigma"].data_ptr()}
    assert len(kept) < 30 + n_planes // 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "opacity"}, "'opacity'"),
        ({"plane_chunk": 0}, "plane_chunk=0"),
        ({"sigma": torch.rand(2, 4, 3, *SOURCE)}, r"sigma.*\(2, 4, 3, 7, 10\)"),
        ({"rgb": torch.rand(2, 4, 4, *SOURCE)}, r"rgb.*\(2, 4, 4, 7, 10\)"),
        ({"depth": torch.rand(2, 3)}, r"depth.*\(2, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_value(changes, message):
    with pytest.raises(ValueError, match=message):
        render(scene(), **changes)


def test_planes_may_be_views_of_one_tensor():
    arguments = scene()
    both = torch.cat((arguments["rgb"], arguments["sigma"]), dim=2)
    rest = {name: value for name, value in arguments.items() if name not in ("rgb", "sigma", "depth")}
    view = render_target_view(both[:, :, :3], both[:, :, 3:], arguments["depth"], **rest)
    torch.testing.assert_close(view.rgb, render(arguments).rgb)
