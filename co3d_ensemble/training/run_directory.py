"""The folder of one run: exclusive while it trains, self-describing afterwards.

``config.yaml``, ``environment.json``, ``budget.json`` (where a time budget set ``max_steps``),
``extensions.json`` (where it was raised), ``metrics.jsonl``,
``tensorboard/``, ``checkpoints/``, ``views/`` (exact arrays), ``renders/`` (pictures), ``results.json``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from co3d_ensemble.base.paths import listed
from co3d_ensemble.base.quoting import with_escapes
from co3d_ensemble.config import BEFORE_THE_SETTING, FREE_KEYS, RESUME_MODES
from co3d_ensemble.files import remove_temporaries, write_json_atomic, write_text_atomic
from co3d_ensemble.training.environment import describe_environment
from co3d_ensemble.training.extension import BUDGET, LENGTH_KEYS, MAX_STEPS, extended_steps
from co3d_ensemble.training.lock import FolderLock
from co3d_ensemble.training.precision import agrees_with_any, settle_precision
from co3d_ensemble.training.processes import Processes

logger = logging.getLogger(__name__)

_ABSENT = "<absent>"
_LOSS_WEIGHTS = "training.loss_weights"


class RunExists(RuntimeError):
    """``resume=never`` met an existing run."""


class ConfigMismatch(ValueError):
    """An existing run was made with another configuration.

    Attributes:
        differences: dotted key -> (stored value, requested value).
    """

    def __init__(self, path: Path, differences: dict[str, tuple[Any, Any]]) -> None:
        self.differences = differences
        lines = "".join(f"\n  {key}: {stored!r} in the run, {wanted!r} now" for key, (stored, wanted) in differences.items())
        longer = "training.resume=extend goes on to more steps, restart discards it"
        advice = longer if differences.keys() <= {*LENGTH_KEYS} else "training.resume=restart discards it"
        super().__init__(f"{path} holds a run with a different configuration ({advice}):{lines}")


class RunDirectory:
    """Paths of a run; made by :meth:`open` for training, or directly for reading one.

    Args:
        free_keys: dotted keys of settings, or groups, that cannot change the result.
    """

    def __init__(self, path: Path | str, *, free_keys: Sequence[str] = FREE_KEYS) -> None:
        self.path = Path(path)
        self._free_keys = tuple(free_keys)
        self.config_path = self.path / "config.yaml"
        self.environment_path = self.path / "environment.json"
        self.budget_path = self.path / "budget.json"
        self.extensions_path = self.path / "extensions.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.results_path = self.path / "results.json"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.views = self.path / "views"
        self.renders = self.path / "renders"

    @property
    def config(self) -> DictConfig:
        """The run's configuration as stored, ``max_steps`` as a budget fixed it."""
        return OmegaConf.load(self.config_path)

    @property
    def budget(self) -> dict[str, Any] | None:
        """What the probe of ``training.budget_minutes`` found, or None."""
        return json.loads(self.budget_path.read_text()) if self.budget_path.exists() else None

    @property
    def extensions(self) -> list[dict[str, Any]]:
        """What ``resume=extend`` did, in order: ``max_steps`` and ``budget_minutes`` (or None) then, ``from_max_steps`` and
        ``from_digests`` before."""
        return json.loads(self.extensions_path.read_text()) if self.extensions_path.exists() else []

    @property
    def fixed_max_steps(self) -> int | None:
        """As a budget or an extension fixed it, whatever the command says, or None."""
        fixed = self.budget or (self.extensions[-1] if self.extensions else None)
        return None if fixed is None else int(fixed["max_steps"])

    @property
    def config_digest(self) -> str:
        """Hash of every setting that can change the result; the steps of a run with a budget, or of an extended one, may change."""
        return self._digest(leave_out_steps=self.fixed_max_steps is not None)

    def is_own(self, digest: str) -> bool:
        """Whether a checkpoint with this digest is of this run's configuration, or of what it was before it was extended."""
        own = (self.config_digest, self._digest(leave_out_steps=False))  # the latter: of a budget before steps could change
        return digest in (*own, *(before for extension in self.extensions for before in extension["from_digests"]))

    def _digest(self, *, leave_out_steps: bool) -> str:
        settings = {key: value for key, value in flattened(self.config).items() if not is_free(key, self._free_keys)}
        settings = {key: value for key, value in settings.items() if value is not None or key not in BEFORE_THE_SETTING}
        if leave_out_steps:
            del settings[MAX_STEPS]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @classmethod
    @contextmanager
    def open(
        cls,
        path: Path | str,
        config: Any,
        *,
        resume: str = "auto",
        device: torch.device | str = "cpu",
        free_keys: Sequence[str] = FREE_KEYS,
        precision: Mapping[str, str] | None = None,
    ) -> Iterator[RunDirectory]:
        """The directory, locked for this process, its configuration checked and written.

        Args:
            config: the whole experiment, a dataclass or an omegaconf node, without missing values.
            resume: ``auto`` goes on with an existing run, ``extend`` also to more steps (see ``extension.py``), ``never`` refuses it,
                ``restart`` deletes it.
            device: named in ``environment.json``.
            free_keys: settings in which a resumed run may differ.
            precision: what ``auto`` becomes in a new run, by dotted key, see ``automatic_precision``; an existing run keeps its own.

        Raises:
            RunDirectoryBusy: another process holds it.
            RunExists: ``resume=never`` and there is a run.
            ConfigMismatch: the existing run has checkpoints and differs in a setting that can change the result.
            ValueError: an extension to fewer steps, or by a budget that allows no more.
        """
        if resume not in RESUME_MODES:
            raise ValueError(f"resume={resume!r}: expected one of {', '.join(RESUME_MODES)}")
        run = cls(path, free_keys=free_keys)
        run.path.mkdir(parents=True, exist_ok=True)
        with FolderLock(run.path):
            remove_temporaries(run.path)
            if resume == "restart":
                run._discard()
            elif resume == "never" and run.config_path.exists():
                raise RunExists(f"{run.path} holds a run already (training.resume=auto goes on with it, restart discards it)")
            run._settle(_resolved(config), precision or {}, extend=resume == "extend")
            run._describe(device, {key: OmegaConf.select(run.config, key) for key in precision or {}})
            yield run

    def fix_max_steps(self, max_steps: int, probe: dict[str, Any]) -> None:
        """Makes ``max_steps``, as a budget has it so far, part of the configuration, for all resumes."""
        write_json_atomic(self.budget_path, {"max_steps": max_steps, **probe})
        self._settle(self.config, {})

    def _settle(self, asked: DictConfig, precision: Mapping[str, str], *, extend: bool = False) -> None:
        """Writes the configuration; the steps that a budget or an extension fixed win over the default they replaced, as does an
        earlier precision."""
        self._carry_over_extensions()
        config, stored = asked.copy(), self.config if self.config_path.exists() else None
        settle_precision(config, precision, stored)
        fixed, extend = self.fixed_max_steps, extend and any(self.checkpoints.glob("*.pt"))
        if fixed is not None and not extend and OmegaConf.select(config, BUDGET) is not None:
            OmegaConf.update(config, MAX_STEPS, fixed)
        if stored is not None:
            for key, value in BEFORE_THE_SETTING.items():
                if OmegaConf.select(config, key) is not None and key not in flattened(stored):
                    OmegaConf.update(config, key, value)
            if fixed is not None:
                OmegaConf.update(stored, MAX_STEPS, fixed)  # killed between the two files
            if extend:
                self._extend(stored, config)
            differences = config_differences(stored, config, self._free_keys)
            if differences and listed(self.checkpoints, "*.pt"):
                raise ConfigMismatch(self.path, differences)
            if differences:  # it stopped before its first checkpoint: there is nothing to protect, and nothing to reuse
                self._discard()
                config = asked
                settle_precision(config, precision)
            elif OmegaConf.select(stored, _LOSS_WEIGHTS) is not None:  # as they were written: checkpoints know the digest
                OmegaConf.update(config, _LOSS_WEIGHTS, OmegaConf.select(stored, _LOSS_WEIGHTS), merge=False)
        write_text_atomic(self.config_path, OmegaConf.to_yaml(config))

    def _extend(self, stored: DictConfig, config: DictConfig) -> None:
        """Gives both configurations the steps that ``config`` asks for, and notes what the run was before."""
        before, extensions = int(OmegaConf.select(stored, MAX_STEPS)), self.extensions
        digests = [self.config_digest, self._digest(leave_out_steps=False)]
        other = {key: pair for key, pair in config_differences(stored, config, self._free_keys).items() if key not in LENGTH_KEYS}
        if other:
            raise ConfigMismatch(self.path, other)
        steps = extended_steps(self.path, config, before=before, known_minutes=(self.budget or {}).get("budget_minutes"))
        for key in LENGTH_KEYS[1:]:
            if (value := OmegaConf.select(config, key, default=_ABSENT)) != _ABSENT:
                OmegaConf.update(stored, key, value)
        for either in (stored, config):
            OmegaConf.update(either, MAX_STEPS, steps)
        if steps == before:
            return
        self.results_path.unlink(missing_ok=True)  # first: what a kill then leaves is a run to be scored again
        entry = {"max_steps": steps, "budget_minutes": OmegaConf.select(config, BUDGET), "from_max_steps": before, "from_digests": digests}
        write_json_atomic(self.extensions_path, [*extensions, entry])
        self._carry_over_extensions()
        logger.info("%s goes on to %d steps, it was made for %d", self.path, steps, before)

    def _carry_over_extensions(self) -> None:
        """Brings a budget, which goes on to follow the run's speed, to what the last extension made of it."""
        extensions, budget = self.extensions, self.budget
        if not extensions or (budget or {}).get("extensions", 0) == len(extensions):
            return
        minutes = extensions[-1]["budget_minutes"]
        if budget is not None or minutes is not None:
            news = {"max_steps": extensions[-1]["max_steps"], "extensions": len(extensions)}
            news |= {} if minutes is None else {"budget_minutes": minutes}
            write_json_atomic(self.budget_path, {**(budget or {}), **news})

    def _describe(self, device: torch.device | str, precision: Mapping[str, str]) -> None:
        earlier = []
        if self.environment_path.exists():
            before = json.loads(self.environment_path.read_text())
            earlier = [*before.pop("earlier_starts", []), before]
        write_json_atomic(self.environment_path, {**describe_environment(device), "precision": precision, "earlier_starts": earlier})

    def _discard(self) -> None:
        """Deletes the run, and nothing that is not a run's; the configuration last, so that a kill leaves a run."""
        if self.config_path.exists():
            logger.info("discarding the run in %s", self.path)
        for folder in (self.checkpoints, self.tensorboard, self.views, self.renders):
            if folder.exists():
                shutil.rmtree(folder)
        for file in (
            self.metrics_path,
            self.results_path,
            self.budget_path,
            self.extensions_path,
            self.environment_path,
            self.config_path,
        ):
            file.unlink(missing_ok=True)


@contextmanager
def opened_by_first(processes: Processes, path: Path | str, config: Any, **options: Any) -> Iterator[RunDirectory | None]:
    """:meth:`RunDirectory.open` in the first of several processes; the others get None, or the first one's error."""
    with ExitStack() as held:
        opened: list[RunDirectory] = []
        processes.from_first(lambda: opened.append(held.enter_context(RunDirectory.open(path, config, **options))))
        yield opened[0] if opened else None


def is_free(key: str, free_keys: Iterable[str] = FREE_KEYS) -> bool:
    """Whether a dotted key, or a group that holds it, cannot change the result."""
    return any(key == free or key.startswith(free + ".") for free in free_keys)


def config_differences(stored: Any, wanted: Any, free_keys: Iterable[str] = FREE_KEYS) -> dict[str, tuple[Any, Any]]:
    """Settings that can change the result and differ: dotted key -> (stored, wanted).

    A loss of weight null is one without a weight. A wanted precision ``auto`` differs from none.
    """
    before, now = _without_dropped_losses(flattened(stored)), _without_dropped_losses(flattened(wanted))
    keys = [*before, *(key for key in now if key not in before)]
    return {
        key: (before.get(key, _ABSENT), now.get(key, _ABSENT))
        for key in keys
        if before.get(key, _ABSENT) != now.get(key, _ABSENT)
        and not is_free(key, free_keys)
        and not (key in before and agrees_with_any(key, now.get(key)))
    }


def _without_dropped_losses(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if not (is_free(key, (_LOSS_WEIGHTS,)) and value in (None, {}))}


def flattened(config: Any) -> dict[str, Any]:
    """Dotted key -> plain value of every leaf; lists, and empty groups, are leaves."""
    leaves: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, entry in value.items():
                visit(f"{prefix}.{key}" if prefix else str(key), entry)
        else:
            leaves[prefix] = value

    visit("", OmegaConf.to_container(_resolved(config), resolve=True))
    return leaves


def _resolved(config: Any) -> DictConfig:
    """A plain copy, interpolations replaced, as it reads back from YAML (tuples become lists)."""
    container = OmegaConf.to_container(OmegaConf.create(config), resolve=True, throw_on_missing=True)
    return OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(with_escapes(container))))
