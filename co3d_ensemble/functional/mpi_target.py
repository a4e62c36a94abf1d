"""The inner loop of ``mpi.render_target_view``: planes are warped and composited in chunks, front to back.

Both functions return, in the dtype of the hits,

- rgb: ``sum_i w_i c_i``, shape (B, 3, h, w);
- along: ``sum_i w_i (z_i - o_z)``, shape (B, 1, h, w), to be multiplied by ``hits.advance`` for the target's z;
- passing: the light that passes all planes, ``1 - sum_i w_i``, shape (B, 1, h, w);
- count: planes met inside the source picture, shape (B, 1, h, w), without gradient.

On a CPU a chunk is what its threads warp at once: one plane of 384 x 256 then stays in the second-level cache, while maps of many
planes go to memory and back, and every fresh block of memory is paid for in page faults (0.5 against 2.2 ms per plane for the
warp alone). A GPU wants few launches: a quarter of the planes at a time, compositing without a loop.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from co3d_ensemble.functional.mpi_warp import NOWHERE, PlaneHits

CPU_CHUNK_PIXELS = 1 << 17  # per thread: enough for the cost of a call not to count
GPU_CHUNKS = 4
MIN_GPU_CHUNK = 8

Rendered = tuple[Tensor, Tensor, Tensor, Tensor]


def render_planes(rgb: Tensor, sigma: Tensor, hits: PlaneHits, *, mode: str, chunk: int | None = None) -> Rendered:
    """With the warped planes computed again in the backward pass; differentiable once, in rgb and sigma only."""
    hits = PlaneHits(**{name: value.detach() for name, value in vars(hits).items()})
    parts = _chunks(hits, chunk)
    if torch.is_grad_enabled() and (rgb.requires_grad or sigma.requires_grad):
        return _RenderPlanes.apply(rgb, sigma, hits, mode, parts)
    with torch.no_grad():
        return _forward(rgb, sigma, hits, mode, parts, starts=None)


def render_planes_stored(rgb: Tensor, sigma: Tensor, hits: PlaneHits, *, mode: str, chunk: int | None = None) -> Rendered:
    """With everything kept by autograd, written plainly: differentiable in all tensors."""
    rgb_sum, along = torch.zeros_like(hits.positions[:, :1]).expand(-1, 3, -1, -1), torch.zeros_like(hits.length)
    passing, count = torch.ones_like(hits.length), torch.zeros_like(hits.length)
    for part in _chunks(hits, chunk):
        colour, value, seen, reach = _meet(rgb, sigma, hits, part)
        alpha = seen * value if mode == "alpha" else -torch.expm1(-value * reach)
        for i in range(alpha.shape[1]):
            weight = passing * alpha[:, i]
            rgb_sum = rgb_sum + weight * colour[:, i]
            along = along + weight * hits.ahead[:, part][:, i, None, None, None]
            passing = passing * (1 - alpha[:, i])
        count = count + seen.detach().sum(dim=1)
    return rgb_sum, along, passing, count


class _RenderPlanes(torch.autograd.Function):
    """Keeps the arguments and one map per chunk: the light that reaches it."""

    @staticmethod
    def forward(ctx, rgb: Tensor, sigma: Tensor, hits: PlaneHits, mode: str, parts: list[slice]) -> Rendered:
        starts: list[Tensor] = []
        result = _forward(rgb, sigma, hits, mode, parts, starts)
        ctx.save_for_backward(rgb, sigma, *vars(hits).values(), *starts)
        ctx.mode, ctx.parts = mode, parts
        ctx.mark_non_differentiable(result[3])
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        rgb, sigma, *rest = ctx.saved_tensors
        n_fields = len(PlaneHits.__dataclass_fields__)
        hits = PlaneHits(*rest[:n_fields])
        rgb_grad, sigma_grad = _backward(rgb, sigma, hits, ctx.mode, ctx.parts, rest[n_fields:], upstream)
        return rgb_grad, sigma_grad, None, None, None


def _forward(rgb: Tensor, sigma: Tensor, hits: PlaneHits, mode: str, parts: list[slice], starts: list[Tensor] | None) -> Rendered:
    along, count, passing = torch.zeros_like(hits.length), torch.zeros_like(hits.length), torch.ones_like(hits.length)
    rgb_sum = hits.length.new_zeros(hits.length.shape[0], 3, *hits.length.shape[2:])
    for part in parts:
        if starts is not None:
            starts.append(passing)
        colour, value, seen, reach = _meet(rgb, sigma, hits, part)
        through = _through(value, seen, reach, mode)
        ahead = hits.ahead[:, part, None, None, None]
        if _one_by_one(rgb):
            for i in range(through.shape[1]):
                after = passing * through[:, i]
                weight = passing - after  # differences of neighbours: rounding cancels in their sum
                rgb_sum.addcmul_(colour[:, i], weight)
                along.addcmul_(weight, ahead[:, i])
                count.add_(seen[:, i])
                passing = after
        else:
            light = torch.cat((passing[:, None], through), dim=1).cumprod(dim=1)
            weight = light[:, :-1] - light[:, 1:]
            rgb_sum += colour.mul_(weight).sum(dim=1)
            along += weight.mul_(ahead).sum(dim=1)
            count += seen.sum(dim=1)
            passing = light[:, -1].clone()  # not a view that would keep the whole chunk
    return rgb_sum, along, passing, count


def _backward(
    rgb: Tensor,
    sigma: Tensor,
    hits: PlaneHits,
    mode: str,
    parts: list[slice],
    starts: list[Tensor],
    upstream: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """Gradients of rgb and sigma, back to front.

    With ``v_i`` what a unit of weight on plane i is worth, and ``behind_i`` what a unit of light that has passed plane i earns,
    ``d / d alpha_i = T_i (v_i - behind_i)`` and ``behind_{i-1} = alpha_i v_i + (1 - alpha_i) behind_i``. There is no division:
    planes of opacity 1 have their exact gradient.
    """
    rgb_up, along_up, passing_up, _ = upstream
    rgb_grad, sigma_grad = torch.empty_like(rgb), torch.empty_like(sigma)
    first, last = (parts[0].start, parts[-1].stop) if parts else (0, 0)
    for gradient in (rgb_grad, sigma_grad):
        gradient[:, :first].zero_()  # planes that no pixel meets
        gradient[:, last:].zero_()
    behind = passing_up
    for part, start in zip(reversed(parts), reversed(starts)):
        with torch.enable_grad():
            planes = _together(rgb, sigma, hits, part).requires_grad_()
            grid, seen, reach = _positions(hits, part)
            warped = _sample(planes, grid)
        colour, value = warped.detach().split((3, 1), dim=2)
        through = _through(value, seen, reach, mode)
        light = _light(start, through)
        worth = (colour * rgb_up[:, None]).sum(dim=2, keepdim=True)
        worth.addcmul_(along_up[:, None], hits.ahead[:, part, None, None, None])
        gain = torch.empty_like(worth)
        for i in reversed(range(gain.shape[1])):
            torch.sub(worth[:, i], behind, out=gain[:, i])
            behind = torch.lerp(worth[:, i], behind, through[:, i])
        if mode == "sigma":
            gain.mul_(light[:, 1:]).mul_(reach)
        else:
            gain.mul_(light[:, :-1]).mul_(seen)
        up = torch.cat((rgb_up[:, None] * (light[:, :-1] - light[:, 1:]), gain), dim=2)
        (grad,) = torch.autograd.grad(warped, planes, up)
        rgb_grad[:, part], sigma_grad[:, part] = grad[:, :, :3], grad[:, :, 3:]
    return rgb_grad, sigma_grad


def _chunks(hits: PlaneHits, chunk: int | None) -> list[slice]:
    batch, n_planes = hits.ahead.shape
    device = hits.ahead.device
    first, last = _met(hits) if device.type == "cpu" else (0, n_planes)
    if chunk is None:
        if device.type == "cpu":
            pixels = batch * hits.length[0].numel()
            chunk = max(-(-torch.get_num_threads() // batch), CPU_CHUNK_PIXELS // max(1, pixels), 1)
        else:
            chunk = max(MIN_GPU_CHUNK, -(-n_planes // GPU_CHUNKS))
    return [slice(start, min(start + chunk, last)) for start in range(first, last, chunk)]


def _met(hits: PlaneHits) -> tuple[int, int]:
    """The first plane and the one after the last plane that any target pixel of any entry meets inside the source picture.

    Bounding boxes, so a plane in between may be met by none. Reads the tensors' values: for the CPU only.
    """
    somewhere = hits.positions.abs() < NOWHERE / 2
    low = torch.where(somewhere, hits.positions, NOWHERE).amin(dim=(2, 3))[:, None] * hits.scale[..., None] + hits.shift
    high = torch.where(somewhere, hits.positions, -NOWHERE).amax(dim=(2, 3))[:, None] * hits.scale[..., None] + hits.shift
    met = ((low <= 1) & (high >= -1)).all(dim=2).any(dim=0).nonzero()
    return (int(met[0]), int(met[-1]) + 1) if len(met) else (0, 0)


def _one_by_one(planes: Tensor) -> bool:
    return planes.device.type == "cpu"


def _positions(hits: PlaneHits, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Grid (B, n, 2, h, w), 1 where it is inside the source picture else 0, and how far the density reaches there; (B, n, 1, h, w)."""
    grid = torch.addcmul(hits.shift[:, part, :, None, None], hits.positions[:, None], hits.scale[:, part, None, None, None])
    distance = grid.detach().abs()
    seen = torch.maximum(distance[:, :, :1], distance[:, :, 1:]).le_(1)  # in place: stays a float, which vectorises
    reach = torch.addcmul(hits.rest[:, part, None, None, None], hits.length[:, None], hits.spacing[:, part, None, None, None])
    return grid, seen, reach * seen


def _meet(rgb: Tensor, sigma: Tensor, hits: PlaneHits, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Colour (B, n, 3, h, w), density or opacity, seen and reach (B, n, 1, h, w) of some planes as the target's pixels meet them."""
    grid, seen, reach = _positions(hits, part)
    if _one_by_one(rgb):  # two lookups cost less here than putting the planes together for one
        return _sample(rgb[:, part].to(grid.dtype), grid), _sample(sigma[:, part].to(grid.dtype), grid), seen, reach
    colour, value = _sample(_together(rgb, sigma, hits, part), grid).split((3, 1), dim=2)
    return colour, value, seen, reach


def _together(rgb: Tensor, sigma: Tensor, hits: PlaneHits, part: slice) -> Tensor:
    return torch.cat((rgb[:, part], sigma[:, part]), dim=2).to(hits.length.dtype)


def _sample(planes: Tensor, grid: Tensor) -> Tensor:
    """Bilinear values of planes (B, n, C, H, W) at a grid (B, n, 2, h, w): (B, n, C, h, w)."""
    flat = grid.flatten(0, 1).permute(0, 2, 3, 1)
    sampled = F.grid_sample(planes.flatten(0, 1), flat, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.unflatten(0, grid.shape[:2])


def _through(value: Tensor, seen: Tensor, reach: Tensor, mode: str) -> Tensor:
    """The share of the light that passes each plane: ``exp(-sigma delta)``, or 1 - alpha."""
    return torch.exp(-value * reach) if mode == "sigma" else 1 - value * seen


def _light(start: Tensor, through: Tensor) -> Tensor:
    """The light before every plane of a chunk and after its last one, (B, n + 1, 1, h, w)."""
    if not _one_by_one(through):
        return torch.cat((start[:, None], through), dim=1).cumprod(dim=1)
    light = [start]
    for factor in through.unbind(dim=1):
        light.append(light[-1] * factor)
    return torch.stack(light, dim=1)
