"""Batches of points cut into pieces that small networks on the CPU take well."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CPU_ROWS = 1024  # reduced-precision products on the CPU compile and keep a kernel per number of rows: use few of them
CPU_CHUNK = 16_384  # points whose activations stay in the cache; larger batches are bound by memory traffic


def row_chunks(*tensors: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """Tensors of n rows each, (n, ...), cut alike: on the CPU into chunks, elsewhere not at all.

    For a network in reduced precision on the CPU zeros follow the last row, so that results must be cut to n again.

    Args:
        dtype: that the network computes in.
    """
    n_rows, on_cpu = len(tensors[0]), tensors[0].device.type == "cpu"
    if on_cpu and dtype != torch.float32:
        padding = -n_rows % CPU_ROWS
        tensors = tuple(nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, padding)) for tensor in tensors)
    chunk = CPU_CHUNK if on_cpu else max(1, n_rows)
    return list(zip(*(tensor.split(chunk) for tensor in tensors), strict=True))
