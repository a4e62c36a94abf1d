"""What a run tells while it trains: ``metrics.jsonl``, TensorBoard events, a progress bar or log lines."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from co3d_ensemble.base import progress
from co3d_ensemble.files import without_non_finite, write_text_atomic

logger = logging.getLogger(__name__)


class MetricsLog:
    """``metrics.jsonl``: one JSON object per line, each with ``kind`` and ``step`` (updates done).

    Args:
        keep: which records of an interrupted run still hold; the others, and torn lines, are removed on opening.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool] = lambda record: True) -> None:
        if path.exists():
            self._drop(path, keep)
        self._file = open(path, "a", encoding="utf-8")

    @staticmethod
    def _drop(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                whole = line.endswith("\n") and isinstance(record, dict) and "step" in record
            except json.JSONDecodeError:
                whole = False
            if not whole:
                logger.warning("%s: dropping line %d, which is torn", path, number)
            elif keep(record):
                kept.append(line)
        if len(kept) != len(lines):
            write_text_atomic(path, "".join(kept))

    def append(self, kind: str, step: int, **values: Any) -> None:
        record = without_non_finite({"kind": kind, "step": step, **values})
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Records of ``metrics.jsonl`` of one kind (``train`` or ``validation``); a torn last line is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [record for record in map(json.loads, lines) if kind in (None, record["kind"])]


class Progress:
    """Steps, speed and losses of a training on the bar or the lines of :mod:`~co3d_ensemble.base.progress`."""

    def __init__(self, max_steps: int, step: int, *, enabled: bool, criterion: str = "psnr_masked") -> None:
        self._shown = progress.Progress("training", max_steps, "steps", done=step, bar=enabled)
        self._criterion = criterion
        self._parts: list[str] = []  # of the last window
        self._score: float | None = None

    def advance(self) -> None:
        self._shown.advance()

    def planned(self, max_steps: int) -> None:
        """The run has another length from now on."""
        self._shown.expect(max_steps)

    def show(self, losses: Mapping[str, float], rays_per_second: float | None, seconds_left: float | None) -> None:
        self._parts = [] if rays_per_second is None else [f"{rays_per_second:,.0f} rays/s"]
        self._parts += [f"{name.removeprefix('loss_')} {value:.4g}" for name, value in losses.items()]  # last: a narrow bar cuts the end
        self._note(seconds_left=seconds_left)

    def validating(self) -> None:
        self._note("validating")

    def validated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._score = metrics[self._criterion]
        logger.info("validation at step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        self._note()

    def close(self) -> None:
        self._shown.close()

    def _note(self, *first: str, seconds_left: float | None = None) -> None:
        score = [] if self._score is None else [f"{self._criterion.removesuffix('_masked')} {self._score:.2f}"]
        self._shown.note(", ".join([*first, *score, *self._parts]), seconds_left)


class Records:
    """The three of them together; ``step`` always counts the updates done.

    Args:
        metrics_path, tensorboard: where lines and events go.
        step: updates done at the start; later lines and events of an interrupted run are superseded.
        validated_step: the last validation that the checkpoint knows of.
        bar: on a terminal, show a bar instead of lines.
        criterion: the metric of a validation that is shown.
    """

    def __init__(
        self,
        metrics_path: Path,
        tensorboard: Path,
        *,
        max_steps: int,
        step: int,
        validated_step: int,
        bar: bool,
        criterion: str = "psnr_masked",
    ) -> None:
        known = {"validation": validated_step}
        self._log = MetricsLog(metrics_path, keep=lambda record: record["step"] <= known.get(record.get("kind"), step))
        self._events = SummaryWriter(str(tensorboard), purge_step=step + 1 if step else None)
        self._progress = Progress(max_steps, step, enabled=bar, criterion=criterion)

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()
        self._events.close()
        self._log.close()

    def advance(self) -> None:
        """One more update on the bar."""
        self._progress.advance()

    def planned(self, max_steps: int) -> None:
        self._progress.planned(max_steps)

    def training(
        self,
        step: int,
        losses: Mapping[str, float],
        learning_rates: Mapping[str, float],
        *,
        seconds_per_step: float,
        rays_per_second: float | None,
        seconds_left: float,
    ) -> None:
        """Mean losses since the last line, and the speed."""
        speed = {"seconds_per_step": seconds_per_step, "rays_per_second": rays_per_second}
        self._log.append("train", step, losses=dict(losses), lr=dict(learning_rates), **speed)
        for prefix, values in (("loss", losses), ("lr", learning_rates), ("speed", speed)):
            self._scalars(prefix, values, step)
        self._progress.show(losses, rays_per_second, seconds_left)

    def validating(self) -> None:
        """A validation begins."""
        self._progress.validating()

    def validation(self, step: int, metrics: Mapping[str, float], pictures: Iterable[tuple[str, Tensor]], *, seconds: float) -> None:
        """Metrics and uint8 pictures (3, H, W) of one validation."""
        self._log.append("validation", step, metrics=dict(metrics), seconds=seconds)
        self._scalars("validation", metrics, step)
        for tag, picture in pictures:
            self._events.add_image(tag, picture.cpu(), step)
        self._events.flush()
        self._progress.validated(step, metrics)

    def _scalars(self, prefix: str, values: Mapping[str, float | None], step: int) -> None:
        for name, value in values.items():
            if value is not None:
                self._events.add_scalar(f"{prefix}/{name}", value, step)


class NoRecords:
    """In the place of :class:`Records` in a process that does not own the run."""

    def __enter__(self) -> NoRecords:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self) -> None:
        pass

    def planned(self, max_steps: int) -> None:
        pass

    def training(self, *_: object, **__: object) -> None:
        pass

    def validating(self) -> None:
        pass

    def validation(self, *_: object, **__: object) -> None:
        pass
