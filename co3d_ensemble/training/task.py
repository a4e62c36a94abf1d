"""What the training loop trains: a small interface that a field on rays, an Implicitron model and MINE all fill."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, nn


class Task(Protocol):
    """One thing to train. The loop owns steps, optimizer, EMA, checkpoints and logs; the task owns meaning.

    Randomness: before ``batch(step)`` the loop seeds torch's default generators from (seed, step), in several processes each
    with its own numbers; a task draws from them and keeps no generator of its own, so that a resumed run sees the same numbers.

    Optional, looked up by name:
        structure_seconds() -> (count, seconds): how many structure changes a whole run of the task's settings makes and what
            one takes, measured by making one. A time budget calls it on a task that is thrown away, so it may leave the
            model changed. Without it, changes count as free.
        settle() -> None: brings a task that is thrown away to the structure that most steps of a run have, before a time
            budget times steps on it.
        structure_time: seconds that structure changes of this task took so far; the loop reports their share.
        planned(plans) -> None: the run's length was changed on its way, or is that of a run that goes on: ``(from_step, max_steps)``
            in order, see :func:`~co3d_ensemble.functional.schedules.first_step_of`. For a task that changes something once, at a
            share of the run. ``max_steps`` of the training settings that the task was made with is the newest one's by then.
        penalty_names, add_penalties(weights) -> losses: penalties on the parameters that the task differentiates itself. The
            names have their weights among those of the losses; the call, after the backward pass, adds the gradient of the
            weighted sum to the parameters' ``grad`` and returns the unweighted values.
        criterion: name of the metric of ``validate``, higher is better, that picks the best checkpoint and stops early; without it
            psnr_masked.
        remap_moments, loss_weights: see :class:`~co3d_ensemble.training.stepper.Stepper`.
        rays_per_step: for rays per second.

    Attributes:
        model: trained module. Its ``state_dict`` must hold everything that rendering needs (occupancy included).
    """

    model: nn.Module

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Adam's groups: ``{"params": [...], "name": str, "lr": float}``; ``lr`` is the rate after the warm-up."""

    def batch(self, step: int) -> Any:
        """What ``losses`` takes, already on the device."""

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Unweighted scalar losses under stable names."""

    def validate(self) -> dict[str, float]:
        """Metrics of ``model`` as it stands (the loop has put the EMA weights in); must hold the criterion.

        Of several processes all call this; the first one's metrics count.
        """

    def pictures(self) -> Iterable[tuple[str, Tensor]]:
        """(tag, uint8 picture (3, H, W)) pairs for TensorBoard, from the last ``validate``."""

    def structure(self, step: int) -> bool:
        """Changes the model's structure if ``step`` asks for it (occupancy refinement, upsampling).

        Returns:
            True when parameters were replaced: the loop then rebuilds optimizer groups and EMA.
        """
