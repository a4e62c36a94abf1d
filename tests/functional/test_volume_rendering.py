"""Volume rendering against sums and products written as loops, and hierarchical sampling against the density it inverts."""

import math

import pytest
import torch

from co3d_ensemble.functional.volume_rendering import (
    composite,
    expected_distance,
    importance_lengths,
    interval_lengths,
    opacity,
    rendering_weights,
    stratified_lengths,
    transmittance,
)

F64 = torch.float64


def random_ray(n_samples=9, n_rays=4):
    generator = torch.Generator().manual_seed(0)
    density = 3 * torch.rand(n_rays, n_samples, dtype=F64, generator=generator)
    density[0, 2] = 0.0
    lengths = (5 * torch.rand(n_rays, n_samples, dtype=F64, generator=generator)).sort(dim=-1).values
    lengths[1, 4] = lengths[1, 3]  # importance samples that coincide
    return density, lengths


def test_transmittance_weights_and_opacity_match_the_equations_written_as_loops():
    density, lengths = random_ray()
    delta = interval_lengths(lengths)
    weights, alphas, alpha = rendering_weights(density, delta)
    for r in range(len(density)):
        light = 1.0
        for i in range(density.shape[1]):
            step = float(lengths[r, i + 1] - lengths[r, i]) if i + 1 < density.shape[1] else 0.0
            share = 1 - math.exp(-float(density[r, i]) * step)
            assert delta[r, i].item() == pytest.approx(step, abs=1e-14)
            assert transmittance(density, delta)[r, i].item() == pytest.approx(light, rel=1e-12)
            assert opacity(density, delta)[r, i].item() == pytest.approx(share, abs=1e-14)
            assert alphas[r, i].item() == pytest.approx(share, abs=1e-14)
            assert weights[r, i].item() == pytest.approx(light * share, abs=1e-14)
            light *= 1 - share
        assert alpha[r].item() == pytest.approx(1 - light, rel=1e-12)


def test_homogeneous_fog_follows_beers_law():
    lengths = torch.linspace(0, 2, 50, dtype=F64)
    weights, _, alpha = rendering_weights(torch.full((50,), 0.7, dtype=F64), interval_lengths(lengths))
    assert alpha.item() == pytest.approx(1 - math.exp(-1.4), rel=1e-12)
    torch.testing.assert_close(weights.cumsum(0)[:-1], 1 - torch.exp(-0.7 * lengths[1:]))


def test_weights_sum_to_the_opacity_of_the_ray():
    density, lengths = random_ray()
    weights, _, alpha = rendering_weights(density * 40, interval_lengths(lengths))
    torch.testing.assert_close(weights.sum(-1), alpha, rtol=1e-12, atol=0)


def test_an_opaque_sample_hides_everything_behind_it_in_float32():
    weights, alphas, alpha = rendering_weights(torch.tensor([0.0, 1e8, 5.0, 5.0]), torch.ones(4))
    assert weights.tolist() == [0, 1, 0, 0] and alpha == 1
    assert alphas[2] == pytest.approx(1 - math.exp(-5), rel=1e-6)


def test_thin_haze_keeps_its_digits_in_float32():
    _, alphas, alpha = rendering_weights(torch.full((3,), 1e-9), torch.tensor([1.0, 1.0, 1.0]))
    for value in (alphas[0], opacity(torch.tensor(1e-9), torch.tensor(1.0))):
        assert value.item() == pytest.approx(1e-9, rel=1e-6)  # 1 - exp(-x) would give 0
    assert alpha.item() == pytest.approx(3e-9, rel=1e-6)


def test_the_last_sample_carries_no_opacity():
    _, alphas, alpha = rendering_weights(torch.tensor([0.0, 0.0, 100.0]), interval_lengths(torch.tensor([1.0, 2.0, 3.0])))
    assert alphas[-1] == 0 and alpha == 0


def test_compositing_and_depth_match_loops():
    density, lengths = random_ray()
    weights, _, _ = rendering_weights(density, interval_lengths(lengths))
    features = torch.rand(*density.shape, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    color, distance = composite(weights, features), expected_distance(weights, lengths)
    for r in range(len(density)):
        samples = range(density.shape[1])
        assert distance[r].item() == pytest.approx(sum(float(weights[r, i] * lengths[r, i]) for i in samples), rel=1e-12)
        for c in range(3):
            assert color[r, c].item() == pytest.approx(sum(float(weights[r, i] * features[r, i, c]) for i in samples), rel=1e-12)


def test_gradients_of_weights_and_opacities_match_finite_differences():
    density, lengths = random_ray(5, 2)
    delta = interval_lengths(lengths)
    density = (density + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda sigma: rendering_weights(sigma, delta), (density,))


def test_gradients_are_finite_where_samples_coincide_or_are_opaque():
    density = torch.tensor([0.0, 1e8, 0.0, 3.0], requires_grad=True)
    weights, alphas, alpha = rendering_weights(density, torch.tensor([0.0, 1.0, 0.0, 1e-12]))
    (weights.sum() + alphas.sum() + alpha).backward()
    assert torch.isfinite(density.grad).all()


def test_stratified_lengths_are_bin_centres_or_one_uniform_sample_in_each_bin():
    near, far = torch.tensor([2.0, 0.0], dtype=F64), torch.tensor([4.0, 0.0], dtype=F64)
    centres = stratified_lengths(near, far, 4, perturb=False)
    torch.testing.assert_close(centres[0], torch.tensor([2.25, 2.75, 3.25, 3.75], dtype=F64))
    assert (centres[1] == 0).all()
    torch.manual_seed(0)
    many = stratified_lengths(near[:1].expand(4000), far[:1].expand(4000), 4, perturb=True)
    edges = torch.linspace(2, 4, 5, dtype=F64)
    assert ((many >= edges[:-1]) & (many < edges[1:])).all()
    within = (many - edges[:-1]) / 0.5
    assert (within.mean(0) - 0.5).abs().max() < 0.02 and (within.var(0) - 1 / 12).abs().max() < 0.005


WEIGHTS = torch.tensor([9.0, 1.0, 0.0, 3.0, 0.5, 9.0], dtype=F64)  # first and last do not count
LENGTHS = torch.tensor([0.0, 1.0, 2.0, 4.0, 5.0, 7.0], dtype=F64)


def inverse_cdf(u: float) -> float:
    """Quantile of the histogram with edges at the midpoints of LENGTHS, bin by bin."""
    edges = [(a + b) / 2 for a, b in zip(LENGTHS.tolist(), LENGTHS.tolist()[1:])]
    mass = WEIGHTS.tolist()[1:-1]
    rest = u * sum(mass)
    for low, high, weight in zip(edges, edges[1:], mass):
        if rest <= weight and weight > 0:
            return low + rest / weight * (high - low)
        rest -= weight
    return edges[-1]


def test_unperturbed_importance_lengths_are_the_quantiles_of_the_weights():
    n = 40
    samples = importance_lengths(LENGTHS, WEIGHTS, n, perturb=False)
    expected = torch.tensor([inverse_cdf((i + 0.5) / n) for i in range(n)], dtype=F64)
    torch.testing.assert_close(samples, expected, rtol=0, atol=1e-12)


def test_perturbed_importance_lengths_are_distributed_as_the_weights():
    torch.manual_seed(0)
    samples = importance_lengths(LENGTHS.expand(2000, 6), WEIGHTS.expand(2000, 6), 5, perturb=True).flatten()
    edges = [(a + b) / 2 for a, b in zip(LENGTHS.tolist(), LENGTHS.tolist()[1:])]
    for low, high, weight in zip(edges, edges[1:], WEIGHTS.tolist()[1:-1]):
        inside = samples[(samples >= low) & (samples < high)]
        assert len(inside) / len(samples) == pytest.approx(weight / 4.5, abs=0.01)
        if weight >= 1:  # uniform within the bin
            assert inside.mean().item() == pytest.approx((low + high) / 2, abs=0.05 * (high - low))


def test_perturbed_importance_lengths_are_one_per_quantile():
    torch.manual_seed(0)
    samples = importance_lengths(LENGTHS.expand(500, 6), WEIGHTS.expand(500, 6), 8, perturb=True)
    bounds = torch.tensor([inverse_cdf(i / 8) for i in range(9)], dtype=F64)
    assert ((samples >= bounds[:-1] - 1e-12) & (samples <= bounds[1:] + 1e-12)).all()


@pytest.mark.parametrize("perturb", [False, True])
def test_importance_lengths_ascend_and_keep_the_shape_of_the_rays(perturb):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.rand(3, 7, 12, generator=generator).sort(dim=-1).values
    weights = torch.rand(3, 7, 12, generator=generator) * (torch.rand(3, 7, 12, generator=generator) > 0.6)
    samples = importance_lengths(lengths, weights, 33, perturb=perturb)
    assert samples.shape == (3, 7, 33) and (samples.diff(dim=-1) >= 0).all()
    assert (samples >= lengths[..., :1]).all() and (samples <= lengths[..., -1:]).all()


def test_a_ray_without_weights_is_sampled_uniformly():
    lengths = torch.linspace(0, 10, 11, dtype=F64)
    weights = torch.zeros(2, 11, dtype=F64)
    weights[1, 0] = weights[1, -1] = 5.0  # only weights that do not count
    samples = importance_lengths(lengths.expand(2, 11), weights, 9, perturb=False)
    torch.testing.assert_close(samples, (0.5 + torch.arange(0.5, 9, dtype=F64)).expand(2, 9))


def test_all_samples_of_a_single_heavy_bin_lie_in_it():
    weights = torch.zeros(6)
    weights[3] = 1e-30
    samples = importance_lengths(LENGTHS.float(), weights, 64, perturb=True)
    assert ((samples >= 3.0) & (samples <= 4.5)).all()


def test_importance_lengths_of_a_ray_that_misses_are_finite():
    assert (importance_lengths(torch.zeros(2, 8), torch.zeros(2, 8), 5, perturb=True) == 0).all()


def test_no_gradient_flows_through_importance_lengths():
    weights = WEIGHTS.clone().requires_grad_()
    assert not importance_lengths(LENGTHS, weights, 5, perturb=False).requires_grad
