"""What a run tells while it trains: ``metrics.jsonl``, TensorBoard events, a progress bar or log lines."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from co3d_ensemble.files import without_non_finite, write_text_atomic

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOG_LINES = 10.0
_BAR = "{desc}: {percentage:3.0f}% {bar} {n_fmt}/{total_fmt}{postfix}"


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
    """A bar on a terminal; elsewhere, or with ``enabled=False``, a log line now and then."""

    def __init__(self, max_steps: int, step: int, *, enabled: bool, criterion: str = "psnr_masked") -> None:
        self._stack = ExitStack()
        self._bar: tqdm | None = None
        self._max_steps, self._last_line = max_steps, 0.0
        self._criterion = criterion
        self._score: float | None = None
        if enabled and sys.stderr.isatty():
            self._stack.enter_context(logging_redirect_tqdm())
            self._bar = self._stack.enter_context(tqdm(total=max_steps, initial=step, desc="training", bar_format=_BAR, dynamic_ncols=True))

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def show(self, step: int, losses: Mapping[str, float], rays_per_second: float | None, seconds_left: float | None) -> None:
        parts = [] if seconds_left is None else [f"{tqdm.format_interval(seconds_left)} left"]
        if self._score is not None:
            parts.append(f"{self._criterion.removesuffix('_masked')} {self._score:.2f}")
        if rays_per_second is not None:
            parts.append(f"{rays_per_second:,.0f} rays/s")
        parts += [f"{name.removeprefix('loss_')} {value:.4g}" for name, value in losses.items()]  # last: a narrow bar cuts the end
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts))
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LOG_LINES or step == self._max_steps:
            self._last_line = time.monotonic()
            logger.info("step %d/%d: %s", step, self._max_steps, ", ".join(parts))

    def validated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._score = metrics[self._criterion]
        logger.info("validation at step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    def close(self) -> None:
        self._stack.close()


class Records:
    """The three of them together; ``step`` always counts the updates done.

    Args:
        metrics_path, tensorboard: where lines and events go.
        step: updates done at the start; later lines and events of an interrupted run are superseded.
        validated_step: the last validation that the checkpoint knows of.
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
        progress: bool,
        criterion: str = "psnr_masked",
    ) -> None:
        known = {"validation": validated_step}
        self._log = MetricsLog(metrics_path, keep=lambda record: record["step"] <= known.get(record.get("kind"), step))
        self._events = SummaryWriter(str(tensorboard), purge_step=step + 1 if step else None)
        self._progress = Progress(max_steps, step, enabled=progress, criterion=criterion)

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()
        self._events.close()
        self._log.close()

    def advance(self) -> None:
        """One more update on the bar."""
        self._progress.advance()

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
        self._progress.show(step, losses, rays_per_second, seconds_left)

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

    def training(self, *_: object, **__: object) -> None:
        pass

    def validation(self, *_: object, **__: object) -> None:
        pass
