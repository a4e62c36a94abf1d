"""Training MINE on pairs of pictures: the task of the one training loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from co3d_ensemble.functional.mpi import mean_plane_weights, render_source_view
from co3d_ensemble.functional.mpi_sampling import fine_disparities, stratified_disparities
from co3d_ensemble.mine.assembly import build_network
from co3d_ensemble.mine.config import active_weights, planes_to_show
from co3d_ensemble.mine.evaluation import NO_VALID, PlaneSampling, Record, Scoring, score_source
from co3d_ensemble.mine.inference import predict_stack, render_pose
from co3d_ensemble.mine.loader import PairLoader
from co3d_ensemble.mine.objective import ALL_SCALES, Objective
from co3d_ensemble.mine.pairs import Pair
from co3d_ensemble.mine.protocols import RULES, PairTasks, evenly_spread, rules_of
from co3d_ensemble.mine.trajectories import Pose
from co3d_ensemble.report.pictures import depth_to_rgb, to_uint8
from co3d_ensemble.training.processes import ALONE, Processes

logger = logging.getLogger(__name__)

MAX_PICTURES = 4  # validation pairs shown in TensorBoard
NO_LPIPS = "not computed in training"


class MINETask:
    """A :class:`~co3d_ensemble.training.task.Task`: a network that makes of every source picture what its target shows.

    Each process takes its share of a step's batch and of the validation pairs.

    Args:
        config: a ``MINEConfig`` or a node of its shape.
        training: replaces ``config.training``, whose steps a budget may have set.

    Attributes:
        model: the network, on ``device``.
        criterion: PSNR over the pixels that two planes cover; what no plane covers is nobody's to know.
        loss_weights: the losses that have a weight.
    """

    criterion = "psnr_valid"

    def __init__(
        self,
        config: Any,
        training: Any,
        train: Dataset[Pair],
        val: Dataset[Pair],
        *,
        device: torch.device,
        processes: Processes = ALONE,
    ) -> None:
        network = build_network(config.model)
        if training.sync_batchnorm and processes.size > 1 and device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.model = network.to(device)
        self.loss_weights = active_weights(training)
        self._config, self._training, self._device, self._processes = config.model, training, device, processes
        self._loader = PairLoader(
            train,
            batch_size=training.batch_size,
            seed=training.seed,
            rank=processes.rank,
            size=processes.size,
            workers=config.data.workers,
            mirror=training.mirror,
            pin_memory=device.type == "cuda",
        )
        self._objective = Objective(
            frozenset(self.loss_weights),
            mode=config.model.mode,
            blend=config.model.blend_source,
            calibrate=training.calibrate_scale,
            smoothness_gmin=training.smoothness_gmin,
            smoothness_ratio=training.smoothness_ratio,
        )
        self._val = val
        self._val_indices = evenly_spread(len(val), config.data.max_val_pairs)  # type: ignore[arg-type]
        self._pictures: list[tuple[str, Tensor]] = []
        rules = rules_of(config.data.kind)
        if config.data.kind not in RULES:
            rules = replace(rules, depth_alignment=config.evaluation.depth_alignment)
        self._scoring = Scoring(rules, scale="auto" if training.calibrate_scale else "none", no_lpips=NO_LPIPS)
        self._planes = PlaneSampling(
            (planes_to_show(config),),
            config.model.near_disparity,
            config.model.far_disparity,
            kind=config.evaluation.sampling,
            seed=training.seed,
            chunk=config.model.plane_chunk,
            blend=config.model.blend_source,
            fine=config.model.n_fine_planes,
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        encoder = {id(parameter) for parameter in self.model.encoder.parameters()}
        decoder = [parameter for parameter in self.model.parameters() if id(parameter) not in encoder]
        decay = self._training.weight_decay
        return [
            {"params": list(self.model.encoder.parameters()), "name": "encoder", "lr": self._training.lr_encoder, "weight_decay": decay},
            {"params": decoder, "name": "decoder", "lr": self._training.lr_decoder, "weight_decay": decay},
        ]

    def batch(self, step: int) -> Pair:
        return self._loader.batch(step).to(self._device)

    def losses(self, batch: Pair) -> dict[str, Tensor]:
        n_scales = ALL_SCALES if self._training.multi_scale else 1
        features = self.model.encode(batch.source)
        disparity = self._disparities(batch, features)
        planes = self.model.decode(features, disparity, n_scales=n_scales, plane_chunk=self._training.plane_chunk)
        return self._objective.losses(planes, disparity, batch)

    def _disparities(self, batch: Pair, features: Any) -> Tensor:
        """Stratified, and with ``n_fine_planes`` more where a first pass finds surfaces."""
        model, n_pairs = self._config, len(batch.source)
        range_ = (model.near_disparity, model.far_disparity)
        disparity = stratified_disparities(model.n_planes, *range_, batch=n_pairs, device=batch.source.device)
        if not model.n_fine_planes:
            return disparity
        with torch.no_grad():
            rgb, sigma = self.model.decode(features, disparity, n_scales=1, plane_chunk=self._training.plane_chunk)[0]
            view = render_source_view(rgb, sigma, disparity.reciprocal(), batch.K_source, mode=model.mode)
            return fine_disparities(disparity, mean_plane_weights(view), model.n_fine_planes)

    def validate(self) -> dict[str, float]:
        """Mean scores of the validation pairs at fixed planes; a metric is missing where no pair has its ground truth.

        The criterion is always there: NaN, which no ``best.pt`` is chosen by, where no pair has it or a pair's is not finite.
        """
        tasks = PairTasks(self._val, row=self._scoring.rules.row, seed=self._training.seed)
        scored: list[tuple[int, Record]] = []
        self._pictures = []
        for index in self._val_indices[self._processes.rank :: self._processes.size]:
            task = tasks[index]
            records = list(score_source(self.model, task, index, planes=self._planes, scoring=self._scoring))
            scored += [(index, record) for record in records]
            if len(self._pictures) < MAX_PICTURES:
                self._pictures.append((f"val/{task.name}", self._strip(task.pairs[0][1], index, records[0]["scale"])))
        gathered = sorted((entry for part in self._processes.gather(scored) for entry in part), key=lambda entry: entry[0])
        scores = mean_scores(record for _, record in gathered)
        if self.criterion not in scores:
            logger.warning("no validation pair has a %s: %s", self.criterion, NO_VALID)
            scores[self.criterion] = math.nan
        return scores

    def pictures(self) -> Iterable[tuple[str, Tensor]]:
        """(tag, source | target | prediction | depth) of the first pairs of the last validation, uint8 (3, H, 4 W)."""
        return list(self._pictures)

    def _strip(self, pair: Pair, index: int, scale: float) -> Tensor:
        pair = pair.to(self._device)
        disparity = self._planes.disparities(self._planes.counts[0], index, self._device)
        how = {"plane_chunk": self._planes.chunk, "blend": self._planes.blend, "n_fine": self._planes.fine}
        stack = predict_stack(self.model, pair.source, pair.K_source, disparity, **how)
        size = (pair.target.shape[-2], pair.target.shape[-1])
        view = render_pose(stack, Pose(pair.R, pair.t / scale), K=pair.K_target, size=size)
        panels = [to_uint8(picture) for picture in (pair.source, pair.target, view.rgb[0])]
        return torch.cat([*panels, depth_to_rgb(stack.view.depth[0], stack.view.alpha[0])], dim=-1)

    def structure(self, step: int) -> bool:
        return False


def mean_scores(records: Iterable[Record]) -> dict[str, float]:
    """Mean of every metric over the records that have it, which those without its ground truth do not.

    A score that is not finite is not left out, or a broken network would be judged by what it did not break: the metric's mean
    is NaN, which no ``best.pt`` is chosen by, and a warning names metric and pair.
    """
    found: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            if isinstance(value, float) and name != "scale":
                found.setdefault(name, []).append(value)
                if not math.isfinite(value):
                    logger.warning("%s of %s is %s: this validation has no %s", name, record["name"], value, name)
    return {name: math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan for name, values in found.items()}
