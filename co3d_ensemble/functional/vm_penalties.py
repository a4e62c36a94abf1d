"""Total variation and L1 sparsity of a vector-matrix factorization (Chen et al., "TensoRF", ECCV 2022, section 4.1).

At high resolution the factors are most of the memory that a training step moves, so both penalties read a factor once, in
pieces that stay in the CPU's cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

REFERENCE_RESOLUTION = 128  # where both normalizations of the total variation agree
REFERENCE_TV_SCALE = 1e-2 * 2  # factors of the reference's TVLoss and of its sum over planes
TV_NORMALIZATIONS = ("content", "reference")
CACHE_BYTES = 1 << 18  # of a factor: with its differences, signs and gradient four times that stay in the second-level cache


def vm_penalties(
    planes: Sequence[Tensor],
    lines: Sequence[Tensor],
    *,
    tv: bool = True,
    l1: bool = True,
    normalization: str = "content",
    tv_lines: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Total variation and L1 sparsity of a factorization, unweighted scalars.

    TV is ``1e-2 * 2 * sum over planes and axes of mean(d^2)``, d being the differences between neighbouring vertices.
    ``"reference"`` takes d as it is: the same content then costs about 4 times less at twice the resolution.
    ``"content"`` (default) takes d per length, ``d * (n - 1) / (128 - 1)`` on an axis of n vertices: the same content
    costs the same at every resolution, and at 128 what it costs in the reference. (The length is that of the current
    box.) L1 is ``sum mean|plane| + sum mean|line|``.

    Differentiable once.

    Args:
        planes, lines: shapes (n_u, n_v, C) and (n_w, C).
        tv, l1: which are wanted; the other is None and costs nothing.
        tv_lines: count the lines in TV too, as an early version of the reference.

    Raises:
        ValueError: unknown normalization.
    """
    values = [
        _Penalties.apply(factor, scales, l1_scale)
        for factor, scales, l1_scale in _scaled(planes, lines, tv=tv, l1=l1, normalization=normalization, tv_lines=tv_lines)
    ]
    return _totals(values, tv=tv, l1=l1)


@torch.no_grad()
def add_vm_penalties(
    planes: Sequence[Tensor],
    lines: Sequence[Tensor],
    *,
    tv_weight: float | None,
    l1_weight: float | None,
    normalization: str = "content",
    tv_lines: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Adds the gradient of ``tv_weight * TV + l1_weight * L1`` to the factors' ``grad``; values as of :func:`vm_penalties`.

    To be called after the backward pass of the other losses. Values and gradient come from one pass over a factor, and
    there is no second buffer of its size whose pages must be mapped and which must be added: one plane of 48 components at
    1024^2 takes 0.20 s of CPU time (one thread of a Xeon), where autograd's way takes 0.50 s.

    Args:
        planes, lines: leaves that need a gradient; one without a ``grad`` gets one.
        tv_weight, l1_weight: None for what is not wanted. Others as for :func:`vm_penalties`.

    Raises:
        ValueError: unknown normalization.
    """
    tv, l1 = tv_weight is not None, l1_weight is not None
    values = []
    for factor, scales, l1_scale in _scaled(planes, lines, tv=tv, l1=l1, normalization=normalization, tv_lines=tv_lines):
        if factor.grad is None:
            factor.grad = torch.zeros_like(factor)
        values.append(_sweep(factor, scales, l1_scale, gradient=factor.grad, upstream=(tv_weight or 0.0, l1_weight or 0.0)))
    return _totals(values, tv=tv, l1=l1)


def _totals(values: list[Tensor], *, tv: bool, l1: bool) -> tuple[Tensor | None, Tensor | None]:
    total = torch.stack(values).sum(dim=0) if values else [None, None]
    return total[0] if tv else None, total[1] if l1 else None


def _scaled(
    planes: Sequence[Tensor], lines: Sequence[Tensor], *, tv: bool, l1: bool, normalization: str, tv_lines: bool
) -> list[tuple[Tensor, tuple[float, ...], float]]:
    """The factors that a penalty reads, with the factors on their sums: of squared differences per axis, of magnitudes."""
    if normalization not in TV_NORMALIZATIONS:
        raise ValueError(f"normalization={normalization!r}: expected one of {', '.join(TV_NORMALIZATIONS)}")
    found = []
    for factor in (*planes, *lines):
        with_tv = tv and (factor.dim() == 3 or tv_lines)
        if with_tv or l1:
            scales = _tv_scales(factor, normalization) if with_tv else (0.0,) * (factor.dim() - 1)
            found.append((factor, scales, 1 / factor.numel() if l1 else 0.0))
    return found


def _tv_scales(factor: Tensor, normalization: str) -> tuple[float, ...]:
    """Per axis, the factor on the sum of squared differences."""
    scales = []
    for n in factor.shape[:-1]:
        per_length = (n - 1) / (REFERENCE_RESOLUTION - 1) if normalization == "content" else 1.0
        scales.append(REFERENCE_TV_SCALE * per_length**2 / (factor.numel() / n * (n - 1)))
    return tuple(scales)


class _Penalties(torch.autograd.Function):
    """(TV, L1) of one factor, shape (2,)."""

    @staticmethod
    def forward(ctx, factor: Tensor, tv_scales: tuple[float, ...], l1_scale: float) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.scales = tv_scales, l1_scale
        return _sweep(factor, tv_scales, l1_scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = ctx.saved_tensors
        upstream = grad.tolist() if grad.device.type == "cpu" else grad.unbind()  # numbers where reading them waits for nothing
        result = torch.zeros_like(factor, memory_format=torch.contiguous_format)
        _sweep(factor, *ctx.scales, gradient=result, upstream=upstream)
        return result, None, None


def _sweep(
    factor: Tensor,
    tv_scales: tuple[float, ...],
    l1_scale: float,
    *,
    gradient: Tensor | None = None,
    upstream: Sequence[float | Tensor] = (0.0, 0.0),
) -> Tensor:
    """(TV, L1) of one factor, shape (2,); their gradient, times ``upstream``, is added to ``gradient`` on the way."""
    tv, l1 = [], []
    for first, last in _chunks(factor):
        rows = factor[first:last]
        for axis, scale in enumerate(tv_scales):
            if not scale:
                continue
            # along the rows' axis with the first row of the next chunk: that difference belongs to this one
            step = factor[first : last + 1].diff(dim=0) if axis == 0 else rows.diff(dim=axis)
            flat = step.view(-1)
            tv.append(scale * flat.dot(flat))
            if gradient is not None:
                start, end = (first, first + len(step) + 1) if axis == 0 else (first, last)
                out = gradient[start:end]
                _accumulate(out.narrow(axis, 1, step.shape[axis]), step, 2 * scale * upstream[0])
                _accumulate(out.narrow(axis, 0, step.shape[axis]), step, -2 * scale * upstream[0])
        if l1_scale:
            sign = rows.sign()
            l1.append(l1_scale * sign.view(-1).dot(rows.reshape(-1)))
            if gradient is not None:
                _accumulate(gradient[first:last], sign, l1_scale * upstream[1])
    zero = factor.new_zeros(())
    return torch.stack([torch.stack(part).sum() if part else zero for part in (tv, l1)])


def _accumulate(out: Tensor, values: Tensor, scale: float | Tensor) -> None:
    if isinstance(scale, Tensor):
        out.addcmul_(values, scale)
    else:
        out.add_(values, alpha=scale)


def _chunks(factor: Tensor) -> list[tuple[int, int]]:
    """Row ranges that fit the cache on the CPU; one elsewhere."""
    rows = factor.shape[0]
    step = rows if factor.device.type != "cpu" else max(1, CACHE_BYTES // (factor[0].numel() * factor.element_size()))
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]
