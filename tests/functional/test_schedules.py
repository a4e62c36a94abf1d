import math

import pytest

from co3d_ensemble.functional.schedules import due, ema_decay, implicitron_steps, ramp, scaled_step, warmup_cosine


def test_warm_up_is_linear_and_moves_from_the_first_step():
    values = [warmup_cosine(step, 1000, 0.1) for step in range(100)]
    assert values == pytest.approx([(step + 1) / 100 for step in range(100)])


def test_cosine_runs_from_one_to_the_final_share():
    assert warmup_cosine(100, 1000, 0.1, 0.2) == 1.0
    assert warmup_cosine(550, 1000, 0.1, 0.2) == pytest.approx(0.6)
    assert warmup_cosine(325, 1000, 0.1, 0.2) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert warmup_cosine(1000, 1000, 0.1, 0.2) == warmup_cosine(5000, 1000, 0.1, 0.2) == 0.2


@pytest.mark.parametrize("warmup_share", [0.0, 0.013, 0.1, 1.0])
@pytest.mark.parametrize("max_steps", [1, 2, 7, 1000])
def test_learning_rate_is_positive_within_a_run_and_never_above_one(warmup_share, max_steps):
    assert all(0.0 < warmup_cosine(step, max_steps, warmup_share) <= 1.0 for step in range(max_steps))


def test_runs_of_any_length_follow_the_same_curve():
    for share in (0.005, 0.01, 0.3, 0.75):
        long = warmup_cosine(round(share * 350_000) - 1, 350_000, 0.01)
        assert warmup_cosine(round(share * 2000) - 1, 2000, 0.01) == pytest.approx(long, abs=2e-3)


def test_implicitrons_steps_are_at_half_and_three_quarters():
    assert [implicitron_steps(step, 400_000) for step in (0, 199_999, 200_000, 299_999, 300_000, 399_999)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )


def test_ramp_starts_at_its_share_and_ends_after_its_length():
    assert [ramp(step, 1000, 0.1, 0.05) for step in (0, 99, 100, 125, 150, 999)] == pytest.approx([0, 0, 0, 0.5, 1, 1])


def test_ramp_of_no_length_is_a_jump():
    assert [ramp(step, 10, 0.5, 0.0) for step in (4, 5)] == [0.0, 1.0]
    assert ramp(0, 10, 0.0, 0.0) == 1.0


def test_ema_decay_is_the_published_one_and_scales_with_the_run():
    assert ema_decay(350_000) == pytest.approx(0.9999, abs=1e-12)
    assert ema_decay(5_000) == pytest.approx(0.993)
    assert ema_decay(20) == 0.0


def test_published_steps_scale_with_the_run():
    assert scaled_step(30_000, 350_000) == 30_000
    assert [scaled_step(step, 3500) for step in (20_000, 91_300)] == [200, 913]


def test_due_counts_whole_intervals_and_skips_step_zero():
    assert [step for step in range(351) if due(step, 0.1, 350)] == list(range(35, 351, 35))
    assert [step for step in range(4) if due(step, 0.1, 3)] == [1, 2, 3]
