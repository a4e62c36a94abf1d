"""Configuration to network, and a run directory back to its trained network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from co3d_ensemble.base.paths import listed, plain_part
from co3d_ensemble.base.quoting import literal, override
from co3d_ensemble.fields.mpi_network import MPINetwork
from co3d_ensemble.fields.mpi_reference_weights import load_reference
from co3d_ensemble.fields.weights_file import restoring
from co3d_ensemble.mine.config import MINEConfig, validate
from co3d_ensemble.settings import literal_settings
from co3d_ensemble.training.checkpoint import Checkpoints, read_checkpoint
from co3d_ensemble.training.precision import show_precision
from co3d_ensemble.training.run_directory import RunDirectory

PARAMETERS = "params.yaml"  # what the authors' checkpoints come with
REFERENCE_PRESETS = {"realestate10k": "mine_realestate10k", "kitti_raw": "mine_kitti_384", "flowers": "mine_flowers", "llff": "mine_llff"}
REFERENCE_KEYS = {
    "data.img_h": "data.height",
    "data.img_w": "data.width",
    "mpi.num_bins_coarse": "model.n_planes",
    "mpi.num_bins_fine": "model.n_fine_planes",
    "mpi.disparity_start": "model.near_disparity",
    "mpi.disparity_end": "model.far_disparity",
    "model.pos_encoding_multires": "model.n_harmonics",
    "training.src_rgb_blending": "model.blend_source",
}

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"

ConfigStore.instance().store(name="mine_schema", node=MINEConfig)  # what configs/train_mine.yaml builds on


def compose_mine(overrides: Sequence[str], config_dir: Path = CONFIG_DIR) -> DictConfig:
    """A run's settings from ``configs/mine`` and Hydra overrides (``experiment=mine_generated training.lr_decoder=1e-3``).

    Raises:
        hydra.errors.HydraException, ValueError: an unknown key or experiment, a wrong type or value; the message names it.
    """
    named = [f"mine={given.partition('=')[2]}" if given.startswith("experiment=") else given for given in overrides]
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        config = compose("train_mine", literal(named, literal_settings(MINEConfig)))
    # Hydra's "+key=value" adds what the schema lacks: refused here like any other unknown key
    OmegaConf.merge(OmegaConf.structured(MINEConfig), OmegaConf.to_container(config))
    validate(config)
    return config


def run_directory(config: Any) -> Path:
    return Path(config.output_dir) / "mine" / plain_part(config.name, "name")


def build_network(model: Any, *, load_weights: bool = True) -> MPINetwork:
    """The network of a ``MINEModelConfig`` as training starts from it: weights from torch's default generator, the encoder's from their
    file where there is one, or all of them from the authors' (``reference_weights``).

    Args:
        load_weights: False where a checkpoint follows, so that these files need not be there.

    Raises:
        ValueError: a file that cannot be read or is of another network, naming it.
    """
    network = MPINetwork(
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
    if load_weights and model.reference_weights is not None:
        load_reference(network, model.reference_weights)
    return network


def load_trained_mine(path: Path | str, device: torch.device | str = "cpu", preset: str | None = None) -> tuple[MPINetwork, DictConfig]:
    """The network of a run's best checkpoint (averaged weights in place, eval mode) and the run's configuration, its precision as
    :func:`show_precision` has it.

    Args:
        path: a run directory, one of its ``checkpoints/*.pt``, or a checkpoint file of MINE's authors.
        preset: file of ``configs/mine`` with the sizes and planes of the authors' network; None: as their ``params.yaml`` beside the
            checkpoint has them.

    Raises:
        ValueError: neither a run of MINE nor a checkpoint in one nor the authors'; CheckpointDamaged and NotACheckpoint (also
            ValueErrors).
        FileNotFoundError: a run that has no best checkpoint yet.
    """
    path = Path(path)
    config = trained_config(path, preset)
    show_precision(config)
    network = build_network(config.model, load_weights=False)
    run = RunDirectory(run_of(path))
    if run.config_path.is_file():
        file = Checkpoints(run.checkpoints).best if path.is_dir() else path
        saved = read_checkpoint(file, "cpu")
        with restoring(file):
            network.load_state_dict(_weights(saved))
    else:
        load_reference(network, path)
    return network.to(device).eval(), config


def trained_config(path: Path, preset: str | None = None) -> DictConfig:
    """The configuration of what :func:`load_trained_mine` loads; it raises the same, but for damaged weights."""
    run = RunDirectory(run_of(path))
    if not run.config_path.is_file():
        if not path.is_file():
            hint = _runs_below(path)
            raise ValueError(f"{path}: neither a run directory (no {run.config_path.name} in it) nor a checkpoint in one{hint}")
        return _authors_config(path, preset)
    if preset is not None:
        raise ValueError(f"preset={preset}: {run.path} is a run and has settings of its own; a preset goes with the authors' checkpoint")
    stored = run.config
    if OmegaConf.select(stored, "model.near_disparity") is None:
        raise ValueError(f"{run.path} holds a run of something else than MINE")
    if path.is_dir() and not Checkpoints(run.checkpoints).best.exists():
        raise FileNotFoundError(f"{path} has no checkpoints/best.pt: it was not trained up to its first validation")
    return OmegaConf.merge(OmegaConf.structured(MINEConfig), stored)  # of older runs, too


def _runs_below(output_dir: Path) -> str:
    """Where the runs are, of someone who names the output directory or its ``mine`` instead of one of them."""
    found = sorted(str(file.parent) for pattern in ("*/config.yaml", "mine/*/config.yaml") for file in listed(output_dir, pattern))
    return f"; runs in it: {', '.join(found)}" if found else ""


def is_lone_file(path: Path) -> bool:
    """Whether there is a file, but neither a run around it nor the authors' parameters beside it."""
    return path.is_file() and not RunDirectory(run_of(path)).config_path.is_file() and not (path.parent / PARAMETERS).is_file()


def run_of(path: Path) -> Path:
    """The folder that is a run if ``path`` is one or a checkpoint in one."""
    return path if path.is_dir() else path.parent.parent


def _authors_config(path: Path, preset: str | None) -> DictConfig:
    parameters = path.parent / PARAMETERS
    presets = [file.stem for file in listed(CONFIG_DIR / "mine", "*.yaml")]
    if preset is None and not parameters.is_file():
        raise ValueError(
            f"{path}: neither a run directory nor a checkpoint in one. If it is a file of MINE's authors, put its {PARAMETERS} beside it "
            "or say which file of configs/mine has its size and planes, such as preset=mine_realestate10k"
        )
    if preset is not None and preset not in presets:
        raise ValueError(f"preset={preset}: expected one of {', '.join(presets)}")
    overrides = reference_overrides(parameters) if preset is None else [f"experiment={preset}"]
    try:
        config = compose_mine([*overrides, "data.root=unknown"])
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"{parameters}: {error}") from error
    config.data.root = None  # theirs
    config.model.precision = "float32"  # theirs, too
    return config


def reference_overrides(path: Path) -> list[str]:
    """The authors' ``params.yaml`` (dotted keys) as overrides of the preset of its data set, which has what the file lacks.

    Raises:
        ValueError: not such a file, or a data set that none of the presets is for, naming it.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    name = found.get("data.name") if isinstance(found, dict) else None
    if name not in REFERENCE_PRESETS:
        raise ValueError(f"{path}: data.name={name!r}: expected one of {', '.join(REFERENCE_PRESETS)}; or say preset=NAME")
    given = {ours: found[theirs] for theirs, ours in REFERENCE_KEYS.items() if theirs in found}
    if "mpi.use_alpha" in found:
        given["model.mode"] = "alpha" if found["mpi.use_alpha"] else "sigma"
    return [f"experiment={REFERENCE_PRESETS[name]}", *(override(key, value) for key, value in given.items())]


def _weights(saved: dict[str, Any]) -> dict[str, Any]:
    """The averaged weights of a checkpoint: ``best.pt`` holds them alone, ``last.pt`` beside those that are trained."""
    average = saved.get("ema")
    return {**saved["model"], **(average["weights"] if average else {})}
