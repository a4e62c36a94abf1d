"""The NeRF component: what it makes of a ray bundle, its settings, and the jitter that belongs to it."""

import copy

import pytest
import torch
from pytorch3d.implicitron.models.implicit_function.base import ImplicitFunctionBase
from pytorch3d.implicitron.models.renderer.base import ImplicitronRayBundle

import co3d_ensemble.plugin  # noqa: F401 - registers the components
from co3d_ensemble.functional.cameras import angle_between
from co3d_ensemble.plugin.model import build_component

TINY = {"n_layers": 2, "n_hidden": 16, "skip_layers": (1,), "n_hidden_color": 8, "n_harmonics_xyz": 3, "n_harmonics_dir": 2}
BOX = {"box_min": (1.0, -2.0, 3.0), "box_max": (5.0, 0.0, 4.0)}  # centre (3, -1, 3.5), longest half side 2


def build(seed=0, **changes):
    torch.manual_seed(seed)
    function = build_component(ImplicitFunctionBase, "NeRFImplicitFunction", {**TINY, **BOX, **changes})
    torch.manual_seed(0)  # the same weights whatever was drawn before them
    for parameter in function.mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return function


def bundle(shape=(2, 5, 1), n_samples=7, scale=1.0) -> ImplicitronRayBundle:
    generator = torch.Generator().manual_seed(1)
    origins = torch.tensor([3.0, -1.0, 3.5]) + torch.randn(*shape, 3, generator=generator)
    directions = torch.nn.functional.normalize(torch.randn(*shape, 3, generator=generator), dim=-1)
    lengths = torch.rand(*shape, n_samples, generator=generator).sort(dim=-1).values
    return ImplicitronRayBundle(origins=scale * origins, directions=directions, lengths=scale * lengths, xys=torch.zeros(*shape, 2))


def test_samples_enter_in_box_units_and_density_leaves_per_world_unit():
    function = build(density_scale=7.0, density_bias=0.3, density_noise_std=0.0)
    rays = bundle()
    density, color, aux = function(ray_bundle=rays)
    assert density.shape == (2, 5, 1, 7, 1) and color.shape == (2, 5, 1, 7, 3) and aux == {}
    for b in range(2):
        for r in range(5):
            points = rays.origins[b, r] + rays.lengths[b, r, 0, :, None] * rays.directions[b, r]
            local = (points - torch.tensor([3.0, -1.0, 3.5])) / 2
            raw, expected = function.mlp(local, rays.directions[b, r], torch.zeros(7, dtype=torch.long))
            torch.testing.assert_close(density[b, r, 0, :, 0], torch.log1p((raw + 0.3).exp()) * 7 / 2, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(color[b, r, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 3, 1)])
def test_any_leading_shape_gives_the_same_values(shape):
    function = build(density_noise_std=0.0)
    flat = bundle((6,))
    shaped = ImplicitronRayBundle(*(getattr(flat, name).reshape(*shape, -1) for name in ("origins", "directions", "lengths", "xys")))
    for one, other in zip(function(ray_bundle=flat)[:2], function(ray_bundle=shaped)[:2]):
        torch.testing.assert_close(other.reshape(one.shape), one)


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_optical_depth_and_colour_do_not_depend_on_the_scale_of_the_scene(scale):
    scaled_box = {name: tuple(scale * x for x in corner) for name, corner in BOX.items()}
    density, color, _ = build(density_noise_std=0.0)(ray_bundle=bundle())
    scaled_density, scaled_color, _ = build(density_noise_std=0.0, **scaled_box)(ray_bundle=bundle(scale=scale))
    torch.testing.assert_close(scaled_density * scale, density, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scaled_color, color, rtol=1e-3, atol=1e-4)


def test_skipped_samples_are_empty_and_the_others_unchanged():
    function = build(density_noise_std=0.0)
    rays = bundle()
    occupied = torch.rand(rays.lengths.shape, generator=torch.Generator().manual_seed(2)) > 0.5
    density, color, _ = function(ray_bundle=rays)
    sparse_density, sparse_color, _ = function(ray_bundle=rays, occupied=occupied)
    assert not sparse_density[~occupied].any() and not sparse_color[~occupied].any()
    torch.testing.assert_close(sparse_density[occupied], density[occupied])
    torch.testing.assert_close(sparse_color[occupied], color[occupied])


def test_skipped_samples_are_never_evaluated():
    function = build()
    rays, asked = bundle(), []
    function.mlp.register_forward_pre_hook(lambda module, args: asked.append(len(args[0])))
    occupied = torch.zeros(rays.lengths.shape, dtype=torch.bool)
    occupied[0, 1, 0, 2:5] = True
    function(ray_bundle=rays, occupied=occupied)
    assert sum(asked) == 3


def test_a_fixed_room_for_occupied_samples_changes_neither_outputs_nor_gradients():
    function = build(density_noise_std=0.0).train()
    rays = bundle()
    occupied = torch.rand(rays.lengths.shape, generator=torch.Generator().manual_seed(2)) > 0.5
    results = []
    for _ in range(2):
        density, color, _ = function(ray_bundle=rays, occupied=occupied)
        function.zero_grad()
        (density.square().sum() + color.square().sum()).backward()
        results.append((density.detach(), color.detach(), *(p.grad.clone() for p in function.parameters())))
        assert [room.follow() for room in function.rooms()] == [len(results) == 1]
    for exact, padded in zip(*results):
        torch.testing.assert_close(padded, exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())


def test_noise_is_on_the_raw_density_in_training_only():
    noisy, clean = build(density_noise_std=0.5, density_activation="relu"), build(density_noise_std=0.0, density_activation="relu")
    for function in (noisy, clean):
        function.mlp.density.bias.data.fill_(20.0)  # all densities far above the kink
    rays = bundle((40, 20), 9)
    noise = (noisy(ray_bundle=rays)[0] - clean(ray_bundle=rays)[0]) / (clean.density_scale / 2)
    assert noise.std().item() == pytest.approx(0.5, rel=0.05) and abs(noise.mean().item()) < 0.03
    assert torch.equal(noisy.eval()(ray_bundle=rays)[0], clean.eval()(ray_bundle=rays)[0])
    torch.testing.assert_close(noisy.train()(ray_bundle=rays)[1], clean(ray_bundle=rays)[1])


def test_the_gauge_is_one_rotation_of_points_and_directions():
    plain, turned = build(density_noise_std=0.0), build(seed=5, density_noise_std=0.0, gauge_angle_std=1.0)
    gauge = turned.gauge
    torch.testing.assert_close(gauge @ gauge.T, torch.eye(3))
    assert (gauge - torch.eye(3)).abs().max() > 0.05
    # the same world, seen by the plain function through rays rotated about the centre of the box
    rays, center = bundle(), torch.tensor([3.0, -1.0, 3.5])
    rotated = copy.copy(rays)
    rotated.origins, rotated.directions = center + (rays.origins - center) @ gauge.T, rays.directions @ gauge.T
    for one, other in zip(turned(ray_bundle=rays)[:2], plain(ray_bundle=rotated)[:2]):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_the_gauge_is_drawn_once_per_model_and_travels_in_the_state_dict():
    first, second = build(seed=1, gauge_angle_std=0.5), build(seed=2, gauge_angle_std=0.5)
    assert not torch.allclose(first.gauge, second.gauge)
    before = first.gauge.clone()
    first(ray_bundle=bundle())
    assert torch.equal(first.gauge, before)
    second.load_state_dict(first.state_dict())
    for one, other in zip(first.eval()(ray_bundle=bundle())[:2], second.eval()(ray_bundle=bundle())[:2]):
        assert torch.equal(one, other)
    assert torch.equal(build().gauge, torch.eye(3))


def test_view_jitter_turns_only_what_the_colour_head_sees_and_only_in_training():
    function = build(density_noise_std=0.0, view_jitter_angle_std=0.4)
    rays = bundle()
    density, color, _ = function.eval()(ray_bundle=rays)
    assert torch.equal(color, function(ray_bundle=rays)[1])
    jittered_density, jittered_color, _ = function.train()(ray_bundle=rays)
    torch.testing.assert_close(jittered_density, density)
    assert (jittered_color - color).abs().max() > 1e-3
    assert not torch.equal(function(ray_bundle=rays)[1], jittered_color)  # anew at every step


def test_view_jitter_has_the_std_that_is_asked_for_and_is_one_turn_per_ray():
    function = build(view_jitter_angle_std=0.05)
    rays, seen = bundle((3000,), 2), []
    function.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    function(ray_bundle=rays)
    assert seen[0].shape == (3000, 3)
    angle = angle_between(seen[0], rays.directions)
    assert angle.square().mean().sqrt().item() == pytest.approx(0.05 * (2 / 3) ** 0.5, rel=0.1)


def test_the_box_of_a_checkpoint_wins_over_that_of_the_settings():
    source, target = build(), build(box_min=(-1.0, -1.0, -1.0), box_max=(1.0, 1.0, 1.0))
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target.eval()(ray_bundle=bundle())[0], source.eval()(ray_bundle=bundle())[0])


def test_gradients_reach_every_parameter():
    function = build()
    density, color, _ = function(ray_bundle=bundle())
    (density.sum() + color.sum()).backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in function.parameters())


def test_it_allows_multiple_passes():
    assert build().allows_multiple_passes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"box_min": (1.0, 2.0, 3.0)}, "box_min=.* must lie below box_max"),
        ({"density_activation": "exp"}, "density_activation='exp'.*softplus"),
        ({"precision": "half"}, "precision='half'"),
        ({"skip_layers": (7,)}, r"skip_layers=\(7,\)"),
        ({"n_hiden": 3, "widht": 2}, "NeRFImplicitFunction has no setting n_hiden, widht; it has: .*n_hidden, .*precision"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)
