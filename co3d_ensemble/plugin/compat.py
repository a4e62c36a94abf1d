"""Makes ``pytorch3d`` importable where no compiled build exists, and hides the differences between 0.7.4 and 0.7.9.

``install()`` must run before anything else of PyTorch3D is imported; ``co3d_ensemble.plugin`` does so. A compiled
PyTorch3D is left untouched. Where ``pytorch3d._C`` is missing, a stand-in module takes its place: it has the ops that
Implicitron's rendering and training really call (``sample_pdf``, ``packed_to_padded``, ``padded_to_packed``,
``knn_points_idx``); every other op raises ``MissingCompiledOp``, which names the op.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any, NoReturn

import torch
from torch import Tensor

from co3d_ensemble.fields.torchvision_import import import_torchvision


class MissingCompiledOp(RuntimeError):
    """An op of ``pytorch3d._C`` was called that only a compiled PyTorch3D has."""


def sample_pdf(bins: Tensor, weights: Tensor, outputs: Tensor, eps: float) -> None:
    """Inverse-transform sampling of piecewise constant densities, in place, as the compiled op does it.

    Args:
        bins: bin edges, shape (n_rays, n_bins + 1).
        weights: unnormalised bin probabilities, shape (n_rays, n_bins).
        outputs: uniform numbers in [0, 1) on entry, samples on return, shape (n_rays, n_samples).
        eps: added once to the total weight; bins lighter than this return their lower edge.
    """
    cdf = weights.cumsum(dim=-1)
    u = outputs * (cdf[:, -1:] + eps)
    index = torch.searchsorted(cdf[:, :-1].contiguous(), u)
    before = torch.where(index > 0, cdf.gather(1, (index - 1).clamp_min(0)), torch.zeros_like(u))
    remainder = u - before
    weight = weights.gather(1, index)
    low, high = bins.gather(1, index), bins.gather(1, index + 1)
    inside = low + remainder / weight.clamp_min(torch.finfo(weight.dtype).tiny) * (high - low)
    sample = torch.where(weight > eps, inside, low)
    outputs.copy_(torch.where(remainder > weight, high, sample))


def packed_to_padded(inputs: Tensor, first_idxs: Tensor, max_size: int) -> Tensor:
    """(total, D) rows of consecutive groups starting at ``first_idxs`` -> (n_groups, max_size, D), zero padded."""
    total = inputs.shape[0]
    ends = torch.cat((first_idxs[1:], first_idxs.new_tensor([total])))
    rows = first_idxs[:, None] + torch.arange(max_size, device=inputs.device)
    valid = rows < ends[:, None]
    return inputs[rows.clamp(max=max(total - 1, 0))] * valid[..., None].to(inputs.dtype)


def padded_to_packed(inputs: Tensor, first_idxs: Tensor, num_inputs: int) -> Tensor:
    """(n_groups, max_size, D) -> (num_inputs, D): the inverse of :func:`packed_to_padded`."""
    rows = torch.arange(num_inputs, device=inputs.device)
    group = torch.searchsorted(first_idxs.contiguous(), rows, right=True) - 1
    return inputs[group, rows - first_idxs[group]]


def knn_points_idx(p1: Tensor, p2: Tensor, lengths1: Tensor, lengths2: Tensor, norm: int, k: int, version: int) -> tuple[Tensor, Tensor]:
    """K nearest neighbours by brute force: indices and (squared, for norm 2) distances, each (N, P1, K).

    Rows beyond ``lengths1`` and neighbours beyond ``lengths2`` are 0, as in the compiled op.
    """
    difference = p1[:, :, None] - p2[:, None]
    distance = difference.abs().sum(-1) if norm == 1 else difference.square().sum(-1)
    columns = torch.arange(p2.shape[1], device=p2.device)
    distance = distance.masked_fill(columns[None, None] >= lengths2[:, None, None], torch.inf)
    best, index = distance.topk(min(k, p2.shape[1]), dim=-1, largest=False)
    if best.shape[-1] < k:
        padding = (0, k - best.shape[-1])
        best = torch.nn.functional.pad(best, padding, value=torch.inf)
        index = torch.nn.functional.pad(index, padding)
    rows = torch.arange(p1.shape[1], device=p1.device)
    invalid = (rows[None, :, None] >= lengths1[:, None, None]) | torch.isinf(best)
    return index.masked_fill(invalid, 0), best.masked_fill(invalid, 0.0)


class _StandIn(types.ModuleType):
    """Module whose missing attributes are functions that raise, so that importing PyTorch3D succeeds."""

    # read as default arguments when PyTorch3D's pulsar module is imported
    MAX_UINT = 2**32 - 1
    MAX_INT = 2**31 - 1
    EPS = 1e-6

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> NoReturn:
            raise MissingCompiledOp(
                f"pytorch3d._C.{name} has no stand-in: this needs a compiled PyTorch3D, and the installed one is pure Python"
            )

        missing.__name__ = name
        return missing


def install() -> bool:
    """Prepares the process for ``import pytorch3d``; idempotent.

    Returns:
        True where PyTorch3D runs on the stand-ins, False where it is compiled.

    Raises:
        ModuleNotFoundError: PyTorch3D is not installed; the message says how to get it.
    """
    if isinstance(sys.modules.get("pytorch3d._C"), _StandIn):
        return True
    if importlib.util.find_spec("pytorch3d") is None:
        raise ModuleNotFoundError("pytorch3d is not installed: run `make env`, or install a compiled PyTorch3D (0.7.4 or newer)")
    import_torchvision()  # PyTorch3D imports it
    package = importlib.import_module("pytorch3d")
    try:
        importlib.import_module("pytorch3d._C")
        return False
    except ImportError:
        pass
    module = _StandIn("pytorch3d._C")
    for op in (sample_pdf, packed_to_padded, padded_to_packed, knn_points_idx):
        setattr(module, op.__name__, op)
    sys.modules["pytorch3d._C"] = module
    package._C = module  # type: ignore[attr-defined]
    return True


def pytorch3d_version() -> tuple[int, ...]:
    """Installed version, e.g. (0, 7, 4)."""
    import pytorch3d

    return tuple(int(part) for part in pytorch3d.__version__.split(".")[:3])
