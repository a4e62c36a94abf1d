"""Fitted fusion weights against brute force, and a choice that few frames cannot fool."""

from __future__ import annotations

import itertools

import pytest
import torch

from co3d_ensemble.functional.fusion_fit import Guard, error_products, paired_choice, simplex_weights


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_products_are_the_sums_of_two_members_errors_in_each_zone():
    predictions, truth = random(3, 2, 4, 5), random(2, 4, 5, seed=1)
    zone = torch.randint(0, 2, (4, 5), generator=torch.Generator().manual_seed(2))
    found = error_products(predictions, truth, zone, 2)
    for z, a, b in itertools.product(range(2), range(3), range(3)):
        expected = sum(
            (predictions[a, c, y, x] - truth[c, y, x]) * (predictions[b, c, y, x] - truth[c, y, x])
            for c, y, x in itertools.product(range(2), range(4), range(5))
            if zone[y, x] == z
        )
        assert found[z, a, b].item() == pytest.approx(float(expected))
    torch.testing.assert_close(found.sum(dim=0), error_products(predictions, truth)[0])


def test_a_weighted_fusion_s_squared_error_is_the_quadratic_form():
    predictions, truth, weights = random(3, 2, 4, 5), random(2, 4, 5, seed=1), torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
    fused = (weights.view(-1, 1, 1, 1) * predictions).sum(dim=0)
    products = error_products(predictions, truth)[0]
    assert (weights @ products @ weights).item() == pytest.approx((fused - truth).square().sum().item())


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("count", [2, 3, 5])
def test_no_other_average_has_a_smaller_error(seed, count):
    """Against the best of all supports, each solved by itself: what the active set must find without trying them all."""
    errors = torch.randn(count, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 3 * random(count, 1, seed=seed)
    products = errors @ errors.T
    weights = simplex_weights(products)
    assert (weights >= 0).all() and weights.sum().item() == pytest.approx(1.0)
    best = float("inf")
    for size in range(1, count + 1):
        for support in itertools.combinations(range(count), size):
            solution = torch.linalg.solve(products[support, :][:, support], torch.ones(size, dtype=torch.float64))
            solution = solution / solution.sum()
            if (solution >= 0).all():
                best = min(best, (solution @ products[support, :][:, support] @ solution).item())
    assert (weights @ products @ weights).item() == pytest.approx(best, rel=1e-5)


def test_independent_errors_are_weighed_by_their_inverse_variance():
    assert simplex_weights(torch.diag(torch.tensor([1.0, 4.0]))).tolist() == pytest.approx([0.8, 0.2], rel=1e-5)


def test_a_member_that_only_adds_its_error_gets_nothing():
    error = random(30)
    errors = torch.stack((error, 3 * error))
    assert simplex_weights(errors @ errors.T).tolist() == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize("products", [torch.zeros(3, 3), torch.ones(3, 3), 1e-30 * torch.ones(3, 3)])
def test_members_that_cannot_be_told_apart_share_equally(products):
    assert simplex_weights(products).tolist() == pytest.approx([1 / 3] * 3)


def test_many_members_are_no_trouble():
    errors = random(40, 60) + 0.1 * random(40, 1, seed=3)
    weights = simplex_weights(errors @ errors.T)
    slope = (errors @ errors.T) @ weights
    assert weights.sum().item() == pytest.approx(1.0) and (slope[weights > 0].max() <= slope.min() * (1 + 1e-3))  # optimality


def test_products_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        simplex_weights(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))


GUARD = Guard(min_gain=0.05, min_standard_errors=2.0)


def test_a_clear_winner_is_chosen_and_all_are_recorded():
    winner, told = paired_choice({"mean": [20.0, 21.0, 19.0], "a": [20.2, 21.2, 19.21], "b": [20.5, 21.6, 19.4]}, "mean", GUARD)
    assert winner == "b" and set(told) == {"mean", "a", "b"}
    assert told["b"]["gain"] == pytest.approx(0.5) and told["b"]["standard_error"] == pytest.approx(0.1 / 3**0.5)
    assert told["a"]["passes"] and not told["mean"]["passes"]


@pytest.mark.parametrize(
    ("scores", "why"),
    [
        ([20.04, 21.04, 19.04], "a gain below the margin"),
        ([23.0, 20.0, 19.0], "one frame's luck: 0.67 dB with a standard error of 1.2"),
        ([19.0, 20.0, 18.0], "worse"),
    ],
)
def test_the_plain_average_stays_unless_it_is_beaten_beyond_doubt(scores, why):
    assert paired_choice({"mean": [20.0, 21.0, 19.0], "other": scores}, "mean", GUARD)[0] == "mean", why


def test_one_frame_is_no_evidence():
    winner, told = paired_choice({"mean": [20.0], "other": [30.0]}, "mean", GUARD)
    assert winner == "mean" and told["other"]["standard_error"] is None
