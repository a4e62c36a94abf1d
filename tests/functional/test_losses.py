"""The recipe's losses against their formulas written as loops, and their gradients where the formulas degenerate."""

import math

import pytest
import torch

from co3d_ensemble.functional.losses import alpha_bce_loss, full_rgb_loss, roi_rgb_loss, sample_entropy_loss

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.rand(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def gradient(loss, *values):
    x = torch.tensor(values, requires_grad=True)
    (g,) = torch.autograd.grad(loss(x), x)
    return g


def test_roi_rgb_is_the_mean_squared_norm_over_rays_of_the_region_as_a_loop():
    rgb, target = draw(11, 3), draw(11, 3, seed=1)
    mask = (draw(11, seed=2) > 0.4).to(F64)
    total, count = 0.0, 0
    for c, t, m in zip(rgb.tolist(), target.tolist(), mask.tolist()):
        if m:
            total, count = total + sum((a - b) ** 2 for a, b in zip(c, t)), count + 1
    assert 0 < count < 11
    assert roi_rgb_loss(rgb, target, mask).item() == pytest.approx(total / count, rel=1e-12)


def test_rays_outside_the_region_get_no_colour_gradient():
    rgb = draw(4, 3).requires_grad_()
    roi_rgb_loss(rgb, draw(4, 3, seed=1), torch.tensor([1.0, 0, 0, 1], dtype=F64)).backward()
    assert (rgb.grad[1:3] == 0).all() and (rgb.grad[[0, 3]] != 0).all()


def test_an_empty_region_gives_zero_loss_and_zero_gradient():
    rgb = draw(4, 3).requires_grad_()
    loss = roi_rgb_loss(rgb, draw(4, 3, seed=1), torch.zeros(4, dtype=F64))
    loss.backward()
    assert loss == 0 and (rgb.grad == 0).all()


def test_one_ray_in_the_region_is_not_diluted():
    mask = torch.tensor([0.0, 1.0, 0.0])
    assert roi_rgb_loss(torch.zeros(3, 3), torch.ones(3, 3), mask) == 3


def test_full_rgb_is_the_mean_squared_norm_over_all_rays_against_black_outside_the_mask_as_a_loop():
    rgb, target = draw(11, 3), draw(11, 3, seed=1)
    mask = (draw(11, seed=2) > 0.4).to(F64)
    total = 0.0
    for c, t, m in zip(rgb.tolist(), target.tolist(), mask.tolist()):
        total += sum((a - (b if m else 0.0)) ** 2 for a, b in zip(c, t))
    assert full_rgb_loss(rgb, target, mask).item() == pytest.approx(total / 11, rel=1e-12)


def test_full_rgb_pulls_background_rays_to_black_whatever_was_photographed_there():
    rgb = draw(4, 3).requires_grad_()
    full_rgb_loss(rgb, draw(4, 3, seed=1), torch.zeros(4, dtype=F64)).backward()
    torch.testing.assert_close(rgb.grad, 2 * rgb.detach() / 4)


def test_both_colour_losses_agree_where_every_ray_is_foreground():
    rgb, target, mask = draw(7, 3), draw(7, 3, seed=1), torch.ones(7, dtype=F64)
    torch.testing.assert_close(full_rgb_loss(rgb, target, mask), roi_rgb_loss(rgb, target, mask))


def test_alpha_bce_matches_the_formula_written_as_a_loop():
    alpha, mask = draw(13), (draw(13, seed=1) > 0.5).to(F64)
    expected = -sum(math.log(a) if m else math.log(1 - a) for a, m in zip(alpha.tolist(), mask.tolist())) / 13
    assert alpha_bce_loss(alpha, mask).item() == pytest.approx(expected, rel=1e-12)


def test_alpha_bce_takes_soft_targets():
    alpha, mask = draw(5), draw(5, seed=1)
    expected = -sum(m * math.log(a) + (1 - m) * math.log(1 - a) for a, m in zip(alpha.tolist(), mask.tolist())) / 5
    assert alpha_bce_loss(alpha, mask).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("haze", [0.0, 1e-9, 1e-6, 1e-3, 9.9e-3])
def test_haze_of_any_thinness_over_background_keeps_its_full_gradient(haze):
    assert gradient(lambda a: alpha_bce_loss(a, torch.zeros(1)), haze).item() == pytest.approx(1 / (1 - haze), rel=1e-5)


@pytest.mark.parametrize("alpha", [1e-5, 0.3, 0.995, 1 - 1e-7, 1.0])
def test_foreground_keeps_its_full_gradient_up_to_opacity_one(alpha):
    assert gradient(lambda a: alpha_bce_loss(a, torch.ones(1)), alpha).item() == pytest.approx(-1 / alpha, rel=1e-5)


@pytest.mark.parametrize(("alpha", "mask"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)])
def test_alpha_bce_and_its_gradient_are_finite_at_exactly_zero_and_one(alpha, mask):
    mask = torch.tensor([mask])
    value = alpha_bce_loss(torch.tensor([alpha]), mask)
    assert torch.isfinite(value) and 0 <= value < 14.0
    assert torch.isfinite(gradient(lambda a: alpha_bce_loss(a, mask), alpha)).all()


def test_right_opacities_cost_nothing():
    assert alpha_bce_loss(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])) == 0


def test_sample_entropy_matches_the_formula_written_as_a_loop():
    p = draw(5, 7)
    expected = sum(-x * math.log(x) for x in p.flatten().tolist()) / 35
    assert sample_entropy_loss(p).item() == pytest.approx(expected, rel=1e-12)


def test_sample_entropy_is_not_the_binary_entropy_and_peaks_at_one_over_e():
    assert sample_entropy_loss(torch.tensor([1 / math.e], dtype=F64)).item() == pytest.approx(1 / math.e, rel=1e-12)
    below, above = gradient(sample_entropy_loss, 0.3), gradient(sample_entropy_loss, 0.45)
    assert below > 0 > above


def test_skipped_samples_count_as_opacity_zero():
    seen = draw(6)
    with_skipped = torch.cat((seen, torch.zeros(18, dtype=F64)))
    assert sample_entropy_loss(with_skipped).item() == pytest.approx(sample_entropy_loss(seen).item() / 4, abs=3e-9)


def test_entropy_of_empty_and_opaque_samples_is_zero():
    assert sample_entropy_loss(torch.tensor([0.0, 1.0, 0.0, 1.0])).item() == pytest.approx(0, abs=3e-9)


def test_entropy_gradient_is_finite_where_samples_coincide_are_empty_or_opaque():
    sigma = torch.tensor([1.0, 0.0, 1.0, 1.0], requires_grad=True)
    opacity = -torch.expm1(-sigma * torch.tensor([0.0, 1.0, 1e-12, 50.0]))
    sample_entropy_loss(opacity).backward()
    assert torch.isfinite(sigma.grad).all()
    assert torch.isfinite(gradient(sample_entropy_loss, 0.0, 1.0)).all()


def test_gradients_match_finite_differences_away_from_the_clamps():
    rgb, target, mask = draw(3, 3).requires_grad_(), draw(3, 3, seed=1), torch.tensor([1.0, 0, 1], dtype=F64)
    alpha = (0.1 + 0.8 * draw(3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: roi_rgb_loss(x, target, mask), (rgb,))
    assert torch.autograd.gradcheck(lambda x: full_rgb_loss(x, target, mask), (rgb,))
    assert torch.autograd.gradcheck(lambda x: alpha_bce_loss(x, mask), (alpha,))
    assert torch.autograd.gradcheck(sample_entropy_loss, (alpha,))


def test_bce_of_optical_depth_equals_that_of_alpha_where_alpha_can_say_it():
    depth = torch.tensor([0.0, 1e-4, 0.3, 2.0, 9.0], dtype=torch.float64)
    alpha, mask = -torch.expm1(-depth), torch.tensor([0.0, 0, 1, 0, 1], dtype=torch.float64)
    torch.testing.assert_close(alpha_bce_loss(alpha, mask, depth), alpha_bce_loss(alpha, mask))


def test_an_opaque_background_ray_keeps_its_gradient_through_its_optical_depth():
    depth = torch.tensor([40.0], requires_grad=True)
    alpha_bce_loss(-torch.expm1(-depth), torch.zeros(1), depth).backward()
    assert depth.grad.item() == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(3))
def test_counted_rays_have_the_mean_to_themselves_and_the_others_no_gradient(seed):
    generator = torch.Generator().manual_seed(seed)
    rgb, target, opacities = (torch.rand(9, 3, dtype=F64, generator=generator) for _ in range(3))
    alpha, counted = 0.1 + 0.8 * torch.rand(9, dtype=F64, generator=generator), torch.rand(9, generator=generator) > 0.4
    mask = (torch.rand(9, generator=generator) > 0.5).to(F64)
    for loss in (
        lambda x, rays, **how: roi_rgb_loss(x, target[rays], mask[rays], **how),
        lambda x, rays, **how: full_rgb_loss(x, target[rays], mask[rays], **how),
        lambda x, rays, **how: alpha_bce_loss(alpha[rays] * x[:, 0], mask[rays], **how),
        lambda x, rays, **how: sample_entropy_loss(opacities[rays] * x, **how),
    ):
        some, every = rgb[counted].requires_grad_(), rgb.clone().requires_grad_()
        expected, found = loss(some, counted), loss(every, slice(None), counted=counted)
        torch.testing.assert_close(found, expected)
        expected.backward(), found.backward()
        torch.testing.assert_close(every.grad[counted], some.grad)
        assert not every.grad[~counted].any()
        assert loss(rgb, slice(None), counted=torch.zeros(9, dtype=torch.bool)) == 0
