"""Penalties on the factors of a VM field, as Implicitron regularization metrics."""

from __future__ import annotations

from typing import Any

from pytorch3d.implicitron.models.metrics import RegularizationMetricsBase
from pytorch3d.implicitron.tools.config import registry
from torch import nn

from co3d_ensemble.fields.vm_field import PENALTIES, VMField


@registry.register
class VMRegularization(RegularizationMetricsBase):
    """Component: ``loss_tv_density``, ``loss_tv_appearance``, ``loss_l1_density``, ``loss_l1_appearance``.

    Total variation of the planes and L1 sparsity of planes and lines (CO3D many-view solution, "At a glance": on densities
    and features); normalisation as in :class:`~co3d_ensemble.fields.vm_field.VMField`. Of several VM fields in a model the
    penalties add up.

    Args:
        penalties: those to compute, among ``vm_field.PENALTIES``: one that has no weight need not be paid for.
    """

    penalties: tuple[str, ...] = PENALTIES

    def forward(self, model: nn.Module, keys_prefix: str = "loss_", **kwargs: Any) -> dict[str, Any]:
        """Unweighted scalars of the VM fields in ``model``; nothing where it has none."""
        losses: dict[str, Any] = {}
        for field in model.modules():
            if isinstance(field, VMField):
                for name, value in field.penalties(self.penalties).items():
                    losses[keys_prefix + name] = losses.get(keys_prefix + name, 0) + value
        return losses
