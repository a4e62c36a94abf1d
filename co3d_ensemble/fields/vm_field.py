"""TensoRF's field: density and appearance as vector-matrix factorizations over the object's box, and a small colour MLP."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from co3d_ensemble.base.precision import autocast, check_precision, compute_dtype
from co3d_ensemble.fields.encoding import encoding_width, harmonic_encoding
from co3d_ensemble.fields.row_chunks import row_chunks
from co3d_ensemble.functional import vm
from co3d_ensemble.functional.vm_penalties import TV_NORMALIZATIONS, add_vm_penalties, vm_penalties

REFERENCE_LONGEST_SIDE = 3.0  # of the reference's Blender box, to whose unit its distance scale of 25 belongs
SNAP_TOLERANCE = 1e-3  # in vertex spacings: a wanted face this close to a vertex is that vertex, whatever the rounding
PENALTIES = ("tv_density", "tv_appearance", "l1_density", "l1_appearance")

Mapped = Callable[[str, Tensor], Tensor]


class VMField(nn.Module):
    """Density and colour of points in a box (Chen et al., "TensoRF", ECCV 2022; sizes of the reference).

    Density: ``softplus(sum of products + density_shift) * distance_scale / unit`` with unit = a third of the longest side
    of the initial box, which the reference's fixed Blender box makes 1; so nothing depends on the scale of the scene, and
    the density, being per world unit, is the same before and after a crop. Colour: products, a linear basis, then an MLP
    on the features, the direction and the harmonic encodings of both.

    Parameters: ``density_planes.{0,1,2}``, ``density_lines``, ``appearance_planes``, ``appearance_lines`` (see
    :mod:`co3d_ensemble.functional.vm` for their shapes), ``basis`` and ``mlp``. Buffers, in the state dict:
        box: the current box, lower and upper corner, (2, 3), world units.
        initial_box: the box at construction; fixes the unit of length.
    A state dict loads into a field of any resolution and box: the factors take the shapes of the stored ones.

    Args:
        box: lower and upper corner, shape (2, 3), world units.
        resolution: vertices per axis (x, y, z), each at least 2.
        n_density, n_appearance: components per mode.
        n_features: outputs of the basis.
        n_hidden: width of the two hidden layers.
        n_harmonics_features, n_harmonics_dir: octaves of the encodings.
        density_shift, distance_scale: see above.
        init_std: of the factors' normal initialization (torch's default generator).
        precision: ``auto`` (as the device has it), ``float32`` or ``bfloat16``: autocast of the MLP; outputs are float32. (The basis
            is part of the lookup, always float32.)
        compile: run the MLP through ``torch.compile`` with dynamic shapes.
        tv_normalization, tv_lines: see :func:`co3d_ensemble.functional.vm_penalties.vm_penalties`.

    Raises:
        ValueError: a box that is not finite or has no volume, a resolution below 2, a size below 1, or an unknown
            precision or normalization.
    """

    def __init__(
        self,
        box: Tensor,
        *,
        resolution: tuple[int, int, int],
        n_density: int = 16,
        n_appearance: int = 48,
        n_features: int = 27,
        n_hidden: int = 128,
        n_harmonics_features: int = 2,
        n_harmonics_dir: int = 2,
        density_shift: float = -10.0,
        distance_scale: float = 25.0,
        init_std: float = 0.1,
        precision: str = "float32",
        compile: bool = False,
        tv_normalization: str = "content",
        tv_lines: bool = False,
    ) -> None:
        super().__init__()
        _check_box(box)
        for name, size in (("n_density", n_density), ("n_appearance", n_appearance), ("n_features", n_features), ("n_hidden", n_hidden)):
            if size < 1:
                raise ValueError(f"{name}={size}: expected at least 1")
        check_precision(precision)
        if tv_normalization not in TV_NORMALIZATIONS:
            raise ValueError(f"tv_normalization={tv_normalization!r}: expected one of {', '.join(TV_NORMALIZATIONS)}")
        self.n_harmonics_features, self.n_harmonics_dir = n_harmonics_features, n_harmonics_dir
        self.density_shift, self.distance_scale = density_shift, distance_scale
        self.precision = precision
        self._tv_settings = {"normalization": tv_normalization, "tv_lines": tv_lines}
        box = box.detach().to(torch.get_default_dtype())  # the parameters' dtype
        self.register_buffer("box", box.clone())
        self.register_buffer("initial_box", box.clone())
        shapes = _factor_shapes(_check_resolution(resolution))
        for kind, width in (("density", n_density), ("appearance", n_appearance)):
            for part in ("planes", "lines"):
                factors = [nn.Parameter(init_std * torch.randn(*shape, width, device=box.device)) for shape in shapes[part]]
                setattr(self, f"{kind}_{part}", nn.ParameterList(factors))
        self.basis = nn.Linear(3 * n_appearance, n_features, bias=False)
        width = encoding_width(n_features, n_harmonics_features) + encoding_width(3, n_harmonics_dir)
        self.mlp = nn.ModuleList([nn.Linear(width, n_hidden), nn.Linear(n_hidden, n_hidden), nn.Linear(n_hidden, 3)])
        nn.init.zeros_(self.mlp[-1].bias)
        self._layers = torch.compile(self._forward_layers, dynamic=True) if compile else self._forward_layers
        self.to(box.device)

    @property
    def resolution(self) -> tuple[int, int, int]:
        """Vertices per axis (x, y, z)."""
        z, y, x = (line.shape[0] for line in self.density_lines)
        return x, y, z

    def factors(self) -> list[nn.Parameter]:
        """Planes and lines of density and appearance: the parameters that a change of structure replaces."""
        return [*self.density_planes, *self.density_lines, *self.appearance_planes, *self.appearance_lines]

    def network(self) -> list[nn.Parameter]:
        """Basis and MLP."""
        return [*self.basis.parameters(), *self.mlp.parameters()]

    def density(self, points: Tensor) -> Tensor:
        """
        Args:
            points: world units, shape (n, 3); taken as constants.

        Returns:
            Density per world unit, >= 0 and 0 outside the current box (faces belong to it), shape (n,).
        """
        positions, inside = self._positions(points)
        raw = vm.vm_sum(self.density_planes, self.density_lines, positions)
        per_unit = self.distance_scale * REFERENCE_LONGEST_SIDE / (self.initial_box[1] - self.initial_box[0]).max()
        return torch.where(inside, nn.functional.softplus(raw + self.density_shift) * per_unit, 0)

    def color(self, points: Tensor, directions: Tensor, ray: Tensor) -> Tensor:
        """
        Args:
            points: world units, shape (n, 3); taken as constants. Outside the box the colour is some colour: the density is 0.
            directions: unit directions of the rays, shape (n_rays, 3).
            ray: index into ``directions`` of every point, shape (n,).

        Returns:
            Colour in [0, 1], shape (n, 3).
        """
        encoded_dir = harmonic_encoding(directions, self.n_harmonics_dir)
        features = vm.vm_project(self.appearance_planes, self.appearance_lines, self._positions(points)[0], self.basis.weight)
        dtype = compute_dtype(self.precision, features.device)
        parts = [self._evaluate(f, encoded_dir, r, dtype) for f, r in row_chunks(features, ray, dtype=dtype)]
        return torch.cat(parts)[: len(points)]

    def penalties(self, names: Collection[str] = PENALTIES) -> dict[str, Tensor]:
        """The wanted ones of ``tv_density``, ``tv_appearance``, ``l1_density``, ``l1_appearance``: unweighted scalars.

        TV and L1 of the same factors share their pass over memory. What is not asked for costs nothing. Definitions and
        normalization: :func:`co3d_ensemble.functional.vm_penalties.vm_penalties`.

        Raises:
            ValueError: an unknown name.
        """
        _check_penalties(names)

        def of_kind(kind: str) -> tuple[Tensor | None, Tensor | None]:
            tv, l1 = f"tv_{kind}" in names, f"l1_{kind}" in names
            return vm_penalties(*self._planes_and_lines(kind), tv=tv, l1=l1, **self._tv_settings)

        return _by_name(of_kind)

    def add_penalties(self, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """Values of :meth:`penalties` for the names in ``weights``; the gradient of their weighted sum is added to the
        factors' ``grad`` in the same pass over memory. To be called after the backward pass of the other losses.

        Raises:
            ValueError: an unknown name.
        """
        _check_penalties(weights)

        def of_kind(kind: str) -> tuple[Tensor | None, Tensor | None]:
            tv, l1 = weights.get(f"tv_{kind}"), weights.get(f"l1_{kind}")
            return add_vm_penalties(*self._planes_and_lines(kind), tv_weight=tv, l1_weight=l1, **self._tv_settings)

        return _by_name(of_kind)

    def upsample(self, resolution: tuple[int, int, int]) -> Mapped:
        """Puts the factors on other vertices of the current box, by (bi)linear interpolation; the parameters are replaced.

        Returns:
            ``mapped(name, tensor)``: the same linear map of any tensor (EMA copy, one of Adam's moments) that belongs to
            the parameter ``name`` (relative to the field, ``"density_planes.0"``); others come back as they are.

        Raises:
            ValueError: a resolution below 2.
        """
        shapes = _factor_shapes(_check_resolution(resolution))
        return self._replace(lambda part, mode, tensor: vm.resize(tensor, shapes[part][mode]))

    def crop(self, box: Tensor) -> Mapped:
        """Cuts the grid to ``box``, snapped outward to vertices, at least 2 per axis; the parameters are replaced.

        ``self.box`` becomes the snapped box, so the field inside it is unchanged. A box that has no point in common with
        the current one, or whose upper corner lies below the lower, changes nothing. Waits for the device.

        Args:
            box: shape (2, 3), world units; what lies outside the current box is ignored.

        Returns:
            ``mapped`` as for :meth:`upsample`.

        Raises:
            ValueError: a box of another shape, or not finite.
        """
        if box.shape != (2, 3) or not bool(box.isfinite().all()):
            raise ValueError(f"box={box.tolist()}: expected finite corners of shape (2, 3)")
        lower, upper = self.box.double()
        wanted = box.to(lower)
        if bool((wanted[0] > wanted[1]).any() or (wanted[1] < lower).any() or (wanted[0] > upper).any()):
            return lambda name, tensor: tensor
        n_cells = torch.tensor(self.resolution, dtype=torch.float64, device=lower.device) - 1
        first, last = ((wanted - lower) / (upper - lower) * n_cells).tolist()
        ranges = [_outward(a, b, n) for a, b, n in zip(first, last, self.resolution)]
        shares = torch.tensor(ranges, dtype=torch.float64, device=lower.device).T / n_cells
        mapped = self._replace(lambda part, mode, tensor: vm.crop(tensor, [ranges[axis] for axis in _axes(part, mode)]))
        self.box.copy_(torch.lerp(lower, upper, shares))  # exact at both ends: a face that is not cut does not move
        return mapped

    def _replace(self, change: Callable[[str, int, Tensor], Tensor]) -> Mapped:
        """Applies ``change(part, mode, tensor)`` to every factor; returns it as a function of the parameter's name."""

        @torch.no_grad()
        def mapped(name: str, tensor: Tensor) -> Tensor:
            kind_part, _, mode = name.partition(".")
            kind, _, part = kind_part.partition("_")
            return change(part, int(mode), tensor) if kind in ("density", "appearance") else tensor

        for name, parameters in self._factor_lists():
            for mode, parameter in enumerate(parameters):
                parameters[mode] = nn.Parameter(mapped(f"{name}.{mode}", parameter), requires_grad=parameter.requires_grad)
        return mapped

    def _factor_lists(self) -> list[tuple[str, nn.ParameterList]]:
        names = [f"{kind}_{part}" for kind in ("density", "appearance") for part in ("planes", "lines")]
        return [(name, getattr(self, name)) for name in names]

    def _planes_and_lines(self, kind: str) -> tuple[nn.ParameterList, nn.ParameterList]:
        return getattr(self, f"{kind}_planes"), getattr(self, f"{kind}_lines")

    def _positions(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of the current box (n, 3), and which points lie in it; those that do not are put on its corner."""
        positions = (points.detach().to(self.box.dtype) - self.box[0]) / (self.box[1] - self.box[0])
        inside = ((positions >= 0) & (positions <= 1)).all(dim=-1)
        return torch.where(inside[:, None], positions, 0), inside

    def _evaluate(self, features: Tensor, encoded_dir: Tensor, ray: Tensor, dtype: torch.dtype) -> Tensor:
        with autocast(features.device, dtype):
            return self._layers(features, encoded_dir.index_select(0, ray))

    def _forward_layers(self, features: Tensor, encoded_dir: Tensor) -> Tensor:
        hidden = torch.cat((harmonic_encoding(features, self.n_harmonics_features), encoded_dir), dim=-1)
        for layer in self.mlp[:-1]:
            hidden = layer(hidden).relu()
        return self.mlp[-1](hidden).to(features.dtype).sigmoid()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Gives the factors the shapes of the stored ones before they are read; the parameters stay the same objects."""
        for name, parameters in self._factor_lists():
            for mode, parameter in enumerate(parameters):
                stored = state_dict.get(f"{prefix}{name}.{mode}")
                if stored is not None and stored.dim() == parameter.dim() and stored.shape[-1] == parameter.shape[-1]:
                    if stored.shape != parameter.shape:
                        parameter.data, parameter.grad = parameter.new_empty(stored.shape), None
        super()._load_from_state_dict(state_dict, prefix, *args)


def _axes(part: str, mode: int) -> tuple[int, ...]:
    """Axes of the box along the dimensions of a factor."""
    return vm.PLANE_AXES[mode] if part == "planes" else (vm.LINE_AXES[mode],)


def _factor_shapes(resolution: tuple[int, int, int]) -> dict[str, list[tuple[int, ...]]]:
    return {part: [tuple(resolution[axis] for axis in _axes(part, mode)) for mode in range(3)] for part in ("planes", "lines")}


def _outward(first: float, last: float, n: int) -> tuple[int, int]:
    """The vertices around ``[first, last]``, a range in vertex spacings that meets ``[0, n - 1]``."""
    lower = min(max(math.floor(first + SNAP_TOLERANCE), 0), n - 2)
    upper = max(min(math.ceil(last - SNAP_TOLERANCE), n - 1), lower + 1)
    return lower, upper


def _by_name(of_kind: Callable[[str], tuple[Tensor | None, Tensor | None]]) -> dict[str, Tensor]:
    """Penalties from the (TV, L1) of the density and of the appearance; what is None is left out."""
    result = {}
    for kind in ("density", "appearance"):
        tv, l1 = of_kind(kind)
        result |= {f"tv_{kind}": tv, f"l1_{kind}": l1}
    return {name: value for name, value in result.items() if value is not None}


def _check_penalties(names: Collection[str]) -> None:
    unknown = set(names) - set(PENALTIES)
    if unknown:
        raise ValueError(f"unknown penalties {sorted(unknown)}: expected some of {', '.join(PENALTIES)}")


def _check_box(box: Tensor) -> None:
    if box.shape != (2, 3) or not bool(box.isfinite().all()) or not bool((box[1] > box[0]).all()):
        raise ValueError(f"box={box.tolist()}: expected finite lower and upper corners of shape (2, 3), lower below upper")


def _check_resolution(resolution: tuple[int, int, int]) -> tuple[int, int, int]:
    if len(resolution) != 3 or min(resolution) < 2:
        raise ValueError(f"resolution={tuple(resolution)}: expected 3 numbers of vertices, each at least 2")
    return tuple(int(n) for n in resolution)
