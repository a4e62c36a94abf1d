"""Schedules as pure functions of ``step`` and ``max_steps``, so that resuming needs one number.

``step`` is 0-based: step 0 is the first update. Shares are fractions of ``max_steps``, so a run of 2,000 steps follows
the same recipe as one of 350,000 (CO3D many-view solution, "Training Parameters").
"""

from __future__ import annotations

import math
from collections.abc import Sequence

PUBLISHED_MAX_STEPS = 350_000
STEP_GAMMA = 0.1  # factor at every milestone: Implicitron's and MINE's
_IMPLICITRON_MILESTONES = (0.5, 0.75)  # 200k and 300k of 400k steps in repro_singleseq_nerf


def warmup_cosine(step: int, max_steps: int, warmup_share: float, final_share: float = 0.0) -> float:
    """Multiplier of the learning rate: a linear warm-up, then half a cosine.

    The warm-up gives ``(step + 1) / (warmup_share * max_steps)``, so that step 0 already moves the weights.

    Args:
        warmup_share: share of ``max_steps`` with a linear warm-up; 0: none.
        final_share: multiplier that the cosine reaches at ``step = max_steps``.

    Returns:
        A value in (0, 1] before ``max_steps``, ``final_share`` from there on.
    """
    warmup_steps = warmup_share * max_steps
    if step + 1 < warmup_steps:
        return (step + 1) / warmup_steps
    if step >= max_steps:
        return final_share
    progress = max(0.0, (step - warmup_steps) / (max_steps - warmup_steps)) if warmup_steps < max_steps else 0.0
    return final_share + (1.0 - final_share) * 0.5 * (1.0 + math.cos(math.pi * progress))


def implicitron_steps(step: int, max_steps: int) -> float:
    """Multiplier of Implicitron's single-sequence NeRF: x0.1 at 50 % and again at 75 % of ``max_steps``."""
    return milestone_steps(step, max_steps, _IMPLICITRON_MILESTONES)


def milestone_steps(step: int, max_steps: int, shares: Sequence[float]) -> float:
    """Multiplier that falls to a tenth at each of some shares of ``max_steps``."""
    return STEP_GAMMA ** sum(step >= share * max_steps for share in shares)


def ramp(step: int, max_steps: int, start_share: float, length_share: float) -> float:
    """Factor on a loss weight: 0 until ``start_share``, then linear to 1 over ``length_share``; length 0 is a jump."""
    since_start = step - start_share * max_steps
    if since_start < 0:
        return 0.0
    length = length_share * max_steps
    return min(1.0, since_start / length) if length > 0 else 1.0


def ema_decay(max_steps: int, horizon: float = 35.0) -> float:
    """Decay of the weight average, ``max(0, 1 - horizon / max_steps)``: the published 0.9999 at 350,000 steps."""
    return max(0.0, 1.0 - horizon / max_steps)


def scaled_step(published_step: int, max_steps: int, published_max: int = PUBLISHED_MAX_STEPS) -> int:
    """The step of a run of ``max_steps`` that corresponds to ``published_step`` of a run of ``published_max``."""
    return round(published_step * max_steps / published_max)


def first_step_of(share: float, plans: Sequence[tuple[int, int]]) -> int | None:
    """The step that something due once, at a share of a run, falls on; at least 1. None: of a plan that was left before.

    Args:
        plans: ``(from_step, max_steps)`` in order, the first from 0: what ``max_steps`` was, from which step on. A run whose length
            is changed on its way has several. What was due under an earlier plan is not due again, and what a new plan has
            behind it is due at once.
    """
    ends = [start for start, _ in plans[1:]]
    for (start, max_steps), end in zip(plans, [*ends, math.inf]):
        step = max(start, 1, round(share * max_steps))
        if step < end:
            return step
    return None


def due(step: int, every_share: float, max_steps: int) -> bool:
    """Whether something that happens every ``every_share`` of a run happens at ``step``; never at step 0.

    The interval is rounded to whole steps, at least one.
    """
    return step > 0 and step % max(1, round(every_share * max_steps)) == 0
