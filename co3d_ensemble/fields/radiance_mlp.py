"""The radiance MLP of NeRF: encoded points and directions to raw density and colour."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from co3d_ensemble.base.precision import autocast, check_precision, compute_dtype
from co3d_ensemble.fields.encoding import encoding_width, harmonic_encoding
from co3d_ensemble.fields.row_chunks import row_chunks

DENSITY_ACTIVATIONS = ("relu", "softplus")


class RadianceMLP(nn.Module):
    """Trunk of ``n_layers`` with the encoded point fed in again at ``skip_layers``; a linear density output; a colour
    head on the trunk's features and the encoded direction (Mildenhall et al. 2020, Fig. 7).

    ReLUs work in place on the fresh result of a linear layer, which saves a pass over memory; on views, as in
    Implicitron's MLP, they would cost 1.1-1.2x in the backward pass.

    Args:
        n_layers, n_hidden, skip_layers, n_hidden_color: sizes.
        n_harmonics_xyz, n_harmonics_dir: octaves of the encodings.
        precision: ``auto`` (as the device of the points has it), ``float32`` or ``bfloat16``: autocast of the linear layers; outputs
            are float32.
        compile: run the layers through ``torch.compile`` with dynamic shapes.

    Raises:
        ValueError: a skip layer outside the trunk, or an unknown precision.
    """

    def __init__(
        self,
        *,
        n_layers: int = 8,
        n_hidden: int = 256,
        skip_layers: Sequence[int] = (5,),
        n_hidden_color: int = 128,
        n_harmonics_xyz: int = 10,
        n_harmonics_dir: int = 4,
        precision: str = "float32",
        compile: bool = False,
    ) -> None:
        super().__init__()
        if any(not 0 < layer < n_layers for layer in skip_layers):
            raise ValueError(f"skip_layers={tuple(skip_layers)}: each must lie in 1 .. n_layers - 1 = {n_layers - 1}")
        check_precision(precision)
        self.n_harmonics_xyz, self.n_harmonics_dir = n_harmonics_xyz, n_harmonics_dir
        self.skip_layers = frozenset(skip_layers)
        self.precision = precision
        width_xyz, width_dir = encoding_width(3, n_harmonics_xyz), encoding_width(3, n_harmonics_dir)
        self.trunk = nn.ModuleList(
            nn.Linear((width_xyz if i == 0 else n_hidden) + (width_xyz if i in self.skip_layers else 0), n_hidden) for i in range(n_layers)
        )
        self.density = nn.Linear(n_hidden, 1)
        self.bottleneck = nn.Linear(n_hidden, n_hidden)
        self.color_hidden = nn.Linear(n_hidden + width_dir, n_hidden_color)
        self.color = nn.Linear(n_hidden_color, 3)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self._layers = torch.compile(self._forward_layers, dynamic=True) if compile else self._forward_layers

    def forward(self, points: Tensor, directions: Tensor, ray: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            points: box coordinates, shape (n, 3).
            directions: unit directions of the rays, shape (n_rays, 3).
            ray: index into ``directions`` of every point, shape (n,).

        Returns:
            Raw density (before noise, bias and activation), shape (n,); colour in [0, 1], shape (n, 3); both float32.
        """
        dtype = compute_dtype(self.precision, points.device)
        encoded_dir = harmonic_encoding(directions, self.n_harmonics_dir).to(dtype)
        n_points = len(points)
        parts = [self._evaluate(p, encoded_dir, r, dtype) for p, r in row_chunks(points, ray, dtype=dtype)]
        return torch.cat([raw for raw, _ in parts])[:n_points], torch.cat([color for _, color in parts])[:n_points]

    def _evaluate(self, points: Tensor, encoded_dir: Tensor, ray: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        encoded_xyz = harmonic_encoding(points, self.n_harmonics_xyz).to(dtype)
        with autocast(points.device, dtype):
            raw, color = self._layers(encoded_xyz, encoded_dir.index_select(0, ray))
        return raw.float(), color.float()

    def _forward_layers(self, encoded_xyz: Tensor, encoded_dir: Tensor) -> tuple[Tensor, Tensor]:
        hidden = encoded_xyz
        for i, layer in enumerate(self.trunk):
            if i in self.skip_layers:
                hidden = torch.cat((hidden, encoded_xyz), dim=-1)
            hidden = layer(hidden).relu_()
        features = torch.cat((self.bottleneck(hidden), encoded_dir), dim=-1)
        return self.density(hidden)[:, 0], self.color(self.color_hidden(features).relu_()).float().sigmoid()


def density_activation(raw: Tensor, kind: str) -> Tensor:
    """Non-negative density of the raw output: ``relu`` (the paper's) or ``softplus`` (never dies).

    Raises:
        ValueError: unknown kind.
    """
    if kind == "relu":
        return raw.relu()
    if kind == "softplus":
        return torch.nn.functional.softplus(raw)
    raise ValueError(f"density_activation={kind!r}: expected one of {', '.join(DENSITY_ACTIVATIONS)}")
