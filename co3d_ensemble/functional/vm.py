"""Vector-matrix factorization of a 3D grid (Chen et al., "TensoRF", ECCV 2022, eq. 3): evaluate, resize, crop, penalize.

Three modes, each a plane and the line across it: planes (n_u, n_v, C) over the axes (x, y), (x, z), (y, z), lines (n_w, C)
over z, y, x. The channel is last, so a lookup reads C neighbouring numbers. Vertex i of n lies at i / (n - 1) of the box
(``align_corners=True``); in between, values are bilinear and linear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

PLANE_AXES = ((0, 1), (0, 2), (1, 2))
LINE_AXES = (2, 1, 0)
CACHE_BYTES = 1 << 20  # what a pass over points keeps in the CPU's second-level cache
INT16_VALUES = 1 << 15

Bags = tuple[Tensor, Tensor]  # per point: vertices that it reads (n, k) int32, and their weights (n, k)


def vm_sum(planes: Sequence[Tensor], lines: Sequence[Tensor], positions: Tensor) -> Tensor:
    """Sum over modes and components of plane times line: the density's use of the factorization.

    Args:
        planes: three of shape (n_u, n_v, C).
        lines: three of shape (n_w, C).
        positions: share of the box per axis, in [0, 1] (clamped), shape (n, 3). Has no gradient: positions are taken as
            constants, for cameras and boxes are not trained here.

    Returns:
        Shape (n,). Differentiable once in the factors.
    """
    return _Products.apply(positions.detach(), None, *planes, *lines)[:, 0]


def vm_project(planes: Sequence[Tensor], lines: Sequence[Tensor], positions: Tensor, basis: Tensor) -> Tensor:
    """The products of all modes side by side, (n, 3 C), times a basis: the appearance's use.

    The products themselves are never stored: at 48 components they and their gradient would cost more memory traffic than
    the lookups. The identity as basis returns them.

    Args:
        basis: shape (n_features, 3 C). Others as for :func:`vm_sum`.

    Returns:
        Shape (n, n_features). Differentiable once in the factors and the basis.
    """
    return _Products.apply(positions.detach(), basis, *planes, *lines)


class _Products(torch.autograd.Function):
    """Both lookups are embedding bags; so is their adjoint, over the points sorted by vertex.

    Forward and backward of 120,000 points along rays in ms of CPU time (one thread of a busy Xeon), beside ``grid_sample``
    on channel-first factors: density (16 components) 99 : 125 at 128^3, 137 : 265 at 512^3, 246 : 589 at 1024^3; appearance
    (48, to 27 features) 195 : 638, 318 : 1296 and 575 : 2298.
    """

    @staticmethod
    def forward(ctx, positions: Tensor, basis: Tensor | None, *factors: Tensor) -> Tensor:
        bags = _all_bags(positions, _resolution(factors[3:]))
        ctx.save_for_backward(basis, *factors, *(tensor for bag in bags for tensor in bag))
        result = positions.new_zeros(len(positions), 1 if basis is None else len(basis))
        for part in _point_chunks(factors[0], len(positions)):
            for mode in range(3):
                products = _gather(factors[mode], *bags[mode], part).mul_(_gather(factors[3 + mode], *bags[3 + mode], part))
                if basis is None:
                    result[part].add_(products.sum(dim=1, keepdim=True))
                else:
                    result[part].addmm_(products, _basis_of(basis, mode).T)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        basis, *rest = ctx.saved_tensors
        factors, bags = rest[:6], list(zip(rest[6::2], rest[7::2]))
        gradients: list[Tensor] = [None] * 6
        basis_gradient = None if basis is None else torch.zeros_like(basis)
        plane_values, line_values = (grad.new_empty(len(grad), factors[0].shape[-1]) for _ in range(2))
        for mode in range(3):
            for part in _point_chunks(factors[0], len(grad)):
                # looked up again: as fast as reading a stored copy, and nothing per component is kept between the passes
                plane, line = (_gather(factors[i], *bags[i], part) for i in (mode, 3 + mode))
                upstream = grad[part]
                if basis is not None:
                    _basis_of(basis_gradient, mode).addmm_(upstream.T, plane * line)
                    upstream = upstream @ _basis_of(basis, mode)
                torch.mul(line, upstream, out=plane_values[part])
                torch.mul(plane, upstream, out=line_values[part])
            gradients[mode] = _scatter(plane_values, *bags[mode], factors[mode])
            gradients[3 + mode] = _scatter(line_values, *bags[3 + mode], factors[3 + mode])
        return None, basis_gradient, *gradients


def _basis_of(basis: Tensor, mode: int) -> Tensor:
    """The columns of one mode: (n_features, C), a view."""
    width = basis.shape[1] // 3
    return basis[:, mode * width : (mode + 1) * width]


def _point_chunks(factor: Tensor, n_points: int) -> list[slice]:
    """Points whose components fit the cache on the CPU; all elsewhere."""
    step = max(1, n_points) if factor.device.type != "cpu" else max(1, CACHE_BYTES // (factor.shape[-1] * factor.element_size()))
    return [slice(first, first + step) for first in range(0, n_points, step)]


def _resolution(lines: Sequence[Tensor]) -> tuple[int, int, int]:
    return lines[2].shape[0], lines[1].shape[0], lines[0].shape[0]


def _all_bags(positions: Tensor, resolution: tuple[int, int, int]) -> list[Bags]:
    """Vertices and weights of every point in the three planes, then in the three lines."""
    cells, upper = [], []
    for axis, n in enumerate(resolution):
        scaled = (positions[:, axis] * (n - 1)).clamp_(0, n - 1)
        cells.append(scaled.int().clamp_(0, n - 2))  # the upper face belongs to the last cell; the clamp also catches NaN
        upper.append(scaled.sub_(cells[-1]))
    bags = []
    for u, v in PLANE_AXES:
        n_v, uv = resolution[v], upper[u] * upper[v]
        corner = cells[u] * n_v + cells[v]
        index = torch.stack((corner, corner + 1, corner + n_v, corner + n_v + 1), dim=1)
        bags.append((index, torch.stack((1 - upper[u] - upper[v] + uv, upper[v] - uv, upper[u] - uv, uv), dim=1)))
    for w in LINE_AXES:
        bags.append((torch.stack((cells[w], cells[w] + 1), dim=1), torch.stack((1 - upper[w], upper[w]), dim=1)))
    return bags


def _gather(factor: Tensor, index: Tensor, weight: Tensor, part: slice) -> Tensor:
    """Weighted sums of ``k`` vertices for some of the points: (n, C)."""
    index, weight = index[part], weight[part]
    n, k = index.shape
    # int32 offsets beside int32 indices: otherwise torch converts every index
    offsets = torch.arange(0, n * k + 1, k, dtype=torch.int32, device=index.device)
    return _bag_sums(factor.reshape(-1, factor.shape[-1]), index.reshape(-1), offsets, weight.reshape(-1))


def _bag_sums(table: Tensor, index: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    return F.embedding_bag(index, table, offsets, mode="sum", per_sample_weights=weight, include_last_offset=True)


def _scatter(values: Tensor, index: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """The adjoint of :func:`_gather`: values (n, C) to the shape of ``factor``."""
    n_vertices = factor.numel() // factor.shape[-1]
    add = _scatter_sorted if values.device.type == "cpu" else _scatter_atomic
    return add(values, index, weight, n_vertices).view(factor.shape)


def _scatter_sorted(values: Tensor, index: Tensor, weight: Tensor, n_vertices: int) -> Tensor:
    """One bag per vertex: every row of the result is written once, in the same order on every run."""
    vertices = index.reshape(-1)
    # stable: torch's radix sort, whose passes are as many as the key has bytes
    order = (vertices.short() if n_vertices <= INT16_VALUES else vertices).sort(stable=True).indices
    offsets = F.pad(torch.bincount(vertices, minlength=n_vertices).cumsum(0, dtype=torch.int32), (1, 0))
    points = order.int() >> (index.shape[1] // 2)  # entry to point: 2 or 4 entries each
    return _bag_sums(values, points, offsets, weight.reshape(-1).index_select(0, order))


def _scatter_atomic(values: Tensor, index: Tensor, weight: Tensor, n_vertices: int) -> Tensor:
    """Corner by corner with atomic additions: on CUDA bags of a line's vertices would be long and few, and nothing waits."""
    result = values.new_zeros(n_vertices, values.shape[1])
    for corner in range(index.shape[1]):
        result.index_add_(0, index[:, corner], values * weight[:, corner, None])
    return result


def resize(factor: Tensor, shape: Sequence[int]) -> Tensor:
    """A plane or line at other vertices of the same box: (bi)linear, ``align_corners=True``.

    Linear in ``factor`` with weights >= 0 that sum to 1, so it also maps an EMA copy and both of Adam's moments; exact for
    linear functions.

    Args:
        factor: shape (*old, C).
        shape: vertices per axis, at least 2.

    Raises:
        ValueError: a shape of another dimension, or with less than 2 vertices.
    """
    if len(shape) != factor.dim() - 1 or min(shape) < 2:
        raise ValueError(f"shape={tuple(shape)}: expected {factor.dim() - 1} sizes of at least 2")
    for dim, n in enumerate(shape):
        old = factor.shape[dim]
        if old == n:
            continue
        # in float64: a vertex that lies on an old one must not miss it by a rounding error
        position = torch.arange(n, dtype=torch.float64, device=factor.device) * (old - 1) / (n - 1)
        lower = position.long().clamp_(max=old - 2)
        weight = (position - lower).to(factor.dtype).view(-1, *[1] * (factor.dim() - 1 - dim))
        factor = torch.lerp(factor.index_select(dim, lower), factor.index_select(dim, lower + 1), weight)
    return factor.clone(memory_format=torch.contiguous_format)


def crop(factor: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """A copy of the vertices ``first .. last`` (inclusive) per axis.

    Args:
        factor: shape (*old, C).
        ranges: (first, last) per axis, 0 <= first < last < old.

    Raises:
        ValueError: a range outside the factor or with less than 2 vertices.
    """
    if len(ranges) != factor.dim() - 1:
        raise ValueError(f"ranges={tuple(ranges)}: expected {factor.dim() - 1}")
    for dim, (first, last) in enumerate(ranges):
        if not 0 <= first < last < factor.shape[dim]:
            raise ValueError(f"vertices {first} .. {last} of {factor.shape[dim]} on axis {dim}: expected 0 <= first < last < size")
        factor = factor.narrow(dim, first, last - first + 1)
    return factor.clone(memory_format=torch.contiguous_format)


def grid_resolution(n_voxels: int, sides: Sequence[float]) -> tuple[int, int, int]:
    """Vertices per axis of a grid with about ``n_voxels`` cubic voxels in a box; at least 2.

    Rounded to the nearest: truncation, as in the reference, can make 127 of 128^3.

    Args:
        sides: lengths of the box, > 0, any unit.

    Raises:
        ValueError: no voxel, or a side that is not positive and finite.
    """
    sides = [float(side) for side in sides]
    if n_voxels < 1:
        raise ValueError(f"n_voxels={n_voxels}: expected at least 1")
    if len(sides) != 3 or not all(0 < side < math.inf for side in sides):
        raise ValueError(f"sides={sides}: expected 3 positive finite lengths")
    voxel = math.exp((sum(math.log(side) for side in sides) - math.log(n_voxels)) / 3)
    return tuple(max(2, round(side / voxel)) for side in sides)


def voxel_counts(first: int, last: int, n_changes: int) -> list[int]:
    """Voxels after each of ``n_changes`` upsamplings from ``first``: equal factors, the last exactly ``last``.

    Raises:
        ValueError: counts below 1, or no change.
    """
    if first < 1 or last < 1 or n_changes < 1:
        raise ValueError(f"first={first}, last={last}, n_changes={n_changes}: expected at least 1 of each")
    ratio = math.log(last / first)
    return [round(first * math.exp(ratio * i / n_changes)) for i in range(1, n_changes)] + [last]
