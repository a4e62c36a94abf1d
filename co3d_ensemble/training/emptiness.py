"""Why a trained model shows nothing where the object is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from co3d_ensemble.data.agreement import judge_agreement
from co3d_ensemble.functional.cameras import camera_center
from co3d_ensemble.functional.silhouettes import Silhouette
from co3d_ensemble.functional.visual_hull import candidate_box

EMPTY_IOU = 0.05  # mean IoU below which a model is called empty: wrong axes and inverted masks still reach 0.26
SHOWN_IOU = 0.3  # a validation that had reached it showed the object
MASK_LOSSES = ("loss_alpha_bce", "loss_mask_bce")  # what asks a model for opacity where the masks are foreground


@dataclass(frozen=True)
class EmptyModel:
    """What is known of a run whose model is empty.

    Attributes:
        iou: mean IoU of its renders with the masks.
        validations: (step, IoU) in their order.
        near_far: fixed distances that rays are sampled in, or None.
        loss_weights: weight per loss, None for one that is dropped; empty where the model brings its own.
        steps: optimisation steps done.
    """

    iou: float
    validations: Sequence[tuple[int, float]]
    near_far: tuple[float, float] | None
    loss_weights: Mapping[str, float | None]
    steps: int

    def told(self, frames: Sequence[Silhouette]) -> str:
        """One line: that it is empty, and the first cause that applies.

        Args:
            frames: masks and cameras of known frames.
        """
        causes = (self._disagreement(frames), self._distances(frames), self._collapse(), self._no_mask_loss(), self._too_short())
        why = next(cause for cause in causes if cause)
        return f"the model is empty: its masks and the true ones have an IoU of {self.iou:.3f}; {why}"

    def _disagreement(self, frames: Sequence[Silhouette]) -> str:
        return judge_agreement(frames).told() if frames else ""

    def _distances(self, frames: Sequence[Silhouette]) -> str:
        if self.near_far is None or not frames:
            return ""
        box = candidate_box(frames)
        half = float((box[1] - box[0]).max() / 2)
        centers = torch.stack([camera_center(frame.camera.R, frame.camera.T) for frame in frames])
        distance = float((centers - box.mean(dim=0)).norm(dim=-1).median())
        near, far = self.near_far
        if near < distance < far:
            return ""
        return (
            f"its rays end before they reach the object or begin behind it: the object is {distance - half:.3g} to "
            f"{distance + half:.3g} from the cameras, data.bounds.near={near:g}, far={far:g} (data.bounds.mode=visual_hull finds them)"
        )

    def _collapse(self) -> str:
        step, best = max(self.validations, key=lambda pair: pair[1], default=(0, 0.0))
        if best < SHOWN_IOU:
            return ""
        return f"it showed the object at step {step} (IoU {best:.2f}) and lost it later: training.lr is too high"

    def _no_mask_loss(self) -> str:
        names = [name for name in MASK_LOSSES if name in self.loss_weights]
        if not self.loss_weights or any(self.loss_weights[name] for name in names):
            return ""
        return "no loss asks it for opacity in the masks: training.loss_weights.loss_alpha_bce has no weight"

    def _too_short(self) -> str:
        return (
            f"masks and cameras agree and it never showed the object in {self.steps} steps: it is as transparent as it began; "
            "try more steps (training.max_steps), a higher training.lr, or the model's own density_bias, density_scale or density_shift"
        )


def empty_model(
    *,
    iou: float | None,
    validations: Sequence[Mapping[str, Any]],
    bounds: Any,
    kind: str,
    loss_weights: Mapping[str, float | None],
    steps: int,
) -> EmptyModel | None:
    """What is known of a finished run, if its model is empty.

    Args:
        iou: mean IoU on its targets; None where they have no ground truth: then the last validation's counts.
        validations: records of ``metrics.jsonl``.
        bounds: ``data.bounds``.
        kind: ``model.kind``.
    """
    history = [(record["step"], record["metrics"]["iou"]) for record in validations if record["metrics"].get("iou") is not None]
    final = history[-1][1] if iou is None and history else iou
    if final is None or final >= EMPTY_IOU:
        return None
    near_far = (bounds.near, bounds.far) if kind == "nerf" and bounds.mode == "near_far" else None
    return EmptyModel(final, history, near_far, {} if kind == "implicitron" else dict(loss_weights), steps)
