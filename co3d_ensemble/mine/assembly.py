"""Configuration to network, and a run directory back to its trained network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from co3d_ensemble.fields.mpi_network import MPINetwork
from co3d_ensemble.mine.config import MINEConfig, validate
from co3d_ensemble.training.checkpoint import Checkpoints, read_checkpoint
from co3d_ensemble.training.run_directory import RunDirectory

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"

ConfigStore.instance().store(name="mine_schema", node=MINEConfig)  # what configs/train_mine.yaml builds on


def compose_mine(overrides: Sequence[str], config_dir: Path = CONFIG_DIR) -> DictConfig:
    """A run's settings from ``configs/mine`` and Hydra overrides (``experiment=mine_generated training.lr_decoder=1e-3``).

    Raises:
        hydra.errors.HydraException, ValueError: an unknown key or experiment, a wrong type or value; the message names it.
    """
    named = [f"mine={override.partition('=')[2]}" if override.startswith("experiment=") else override for override in overrides]
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        config = compose("train_mine", named)
    # Hydra's "+key=value" adds what the schema lacks: refused here like any other unknown key
    OmegaConf.merge(OmegaConf.structured(MINEConfig), OmegaConf.to_container(config))
    validate(config)
    return config


def run_directory(config: Any) -> Path:
    return Path(config.output_dir) / "mine" / config.name


def build_network(model: Any, *, load_weights: bool = True) -> MPINetwork:
    """The untrained network of a ``MINEModelConfig``; weights come from torch's default generator, or the encoder's from its file.

    Args:
        load_weights: False where a checkpoint follows, so that the file of the encoder's weights need not be there.
    """
    return MPINetwork(
        encoder=model.encoder,
        weights=model.weights if load_weights else None,
        n_harmonics=model.n_harmonics,
        encoding=model.encoding,
        mode=model.mode,
        poolings=model.poolings,
        density_unit=model.density_unit,
        density_scale=model.density_scale,
        precision=model.precision,
        compile=model.compile,
    )


def load_trained_mine(path: Path | str, device: torch.device | str = "cpu") -> tuple[MPINetwork, DictConfig]:
    """The network of a run's best checkpoint (averaged weights in place, eval mode) and the run's configuration.

    Args:
        path: a run directory, or one of its ``checkpoints/*.pt``.

    Raises:
        ValueError: neither a run of MINE nor a checkpoint in one; CheckpointDamaged (also a ValueError).
        FileNotFoundError: a run that has no best checkpoint yet.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent.parent
    run = RunDirectory(folder)
    if not run.config_path.is_file():
        raise ValueError(f"{path}: neither a run directory (no {run.config_path.name} in it) nor a checkpoint in one")
    stored = run.config
    if OmegaConf.select(stored, "model.near_disparity") is None:
        raise ValueError(f"{folder} holds a run of something else than MINE")
    config = OmegaConf.merge(OmegaConf.structured(MINEConfig), stored)  # of older runs, too
    if path.is_dir() and not Checkpoints(run.checkpoints).best.exists():
        raise FileNotFoundError(f"{path} has no checkpoints/best.pt: it was not trained up to its first validation")
    saved = read_checkpoint(Checkpoints(run.checkpoints).best if path.is_dir() else path, "cpu")
    network = build_network(config.model, load_weights=False)
    network.load_state_dict(_weights(saved))
    return network.to(device).eval(), config


def _weights(saved: dict[str, Any]) -> dict[str, Any]:
    """The averaged weights of a checkpoint: ``best.pt`` holds them alone, ``last.pt`` beside those that are trained."""
    average = saved.get("ema")
    return {**saved["model"], **(average["weights"] if average else {})}
