"""MINE's network (Li et al., ICCV 2021): a picture and any disparities to the multiplane image at those disparities."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from co3d_ensemble.base.precision import autocast, check_precision, compute_dtype
from co3d_ensemble.fields.disparity_encoding import disparity_encoding, disparity_encoding_width
from co3d_ensemble.fields.plane_block import LayerTerms, PlaneBlock, batch_moments, normalisation
from co3d_ensemble.fields.resnet_encoder import ResNetEncoder

MODES = ("sigma", "alpha")
DENSITY_UNITS = ("depth", "disparity")
SCALES = 4
STAGES = (256, 128, 64, 32, 16)  # channels of the decoder's stages, coarsest first
BOTTLENECK = (512, 256)
LEAK = 0.1  # slope of the bottleneck's leaky ReLUs
DENSITY_FLOOR = 1e-4  # of the reference: no plane is quite empty
MULTIPLE, SMALLEST = 32, 64  # of the encoder's input: five halvings, and a last map that reflection padding can extend

MPI = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ImageFeatures:
    """What the encoder saw in a batch of pictures.

    Attributes:
        maps: at 1/2 .. 1/32 of the padded size, then the bottleneck's map at 1/32.
        height, width: of the pictures.
    """

    maps: tuple[Tensor, ...]
    height: int
    width: int


class MPINetwork(nn.Module):
    """ResNet encoder, once per picture, and the reference's decoder, per plane, at four scales.

    One set of weights serves any number of planes. What does not depend on the plane is computed once per picture, see
    :mod:`~co3d_ensemble.fields.plane_block`. The parameters are those of the plain network:
    :mod:`~co3d_ensemble.fields.mpi_reference_weights` maps the authors' onto them.

    A picture whose sides are no multiples of 32 is extended to the right and below by repeating its border, and the results are
    cut to ``ceil(side / 2^scale)``; the bottleneck's two poolings may have any size (the reference takes multiples of 128 only;
    there the two agree).

    Args:
        encoder: resnet18 | resnet34 | resnet50 | resnet101.
        weights: of the encoder: torchvision's file, ``hub`` or None, see :class:`ResNetEncoder`.
        n_harmonics, encoding: of the disparity: octaves, and ``reference`` or ``slides``.
        scales: number of outputs: at 1, 1/2, 1/4, 1/8 of the size.
        mode: what a plane holds besides colour: ``sigma`` (density) or ``alpha``.
        poolings: how many of the bottleneck's two poolings are done. The reference does both; they leave one pixel of a picture of
            128 x 128, and batch normalisation over one pixel per picture learns little: fewer are for smaller pictures.
        density_unit: what the network's density counts, in mode ``sigma``; what it returns is density per world unit either way.
            ``depth``: the absolute value of its output, per world unit, as the reference has it. A surface that is opaque to the next
            plane then needs an output of 30 where planes stand a tenth of a unit apart, near the camera, and of 0.3 where they are ten
            units apart. ``disparity``: the softplus of its output, per unit of disparity, of which all neighbouring planes are equally
            far apart: one scale for near and far, and empty planes are reached without the absolute value's corner. With the planes'
            ``d = 1 / z`` the two differ by ``|dd / dz| = d^2``.
        density_scale: density in that unit that an output (``depth``) or a softplus (``disparity``) of 1 stands for. For
            ``disparity`` about 10 over the range of disparities makes a plane of a dozen half transparent at the start.
        precision: ``auto`` (as the device of the pictures has it), ``float32`` or ``bfloat16``: autocast of the convolutions; outputs are
            float32.
        compile: run the decoder's layers through ``torch.compile`` with dynamic shapes, where planes are not chunked.

    Raises:
        ValueError: a setting out of its range, naming it; what the encoder raises.
    """

    def __init__(
        self,
        encoder: str = "resnet50",
        weights: Path | str | None = None,
        *,
        n_harmonics: int = 10,
        encoding: str = "reference",
        scales: int = SCALES,
        mode: str = "sigma",
        poolings: int = 2,
        density_unit: str = "depth",
        density_scale: float = 1.0,
        precision: str = "float32",
        compile: bool = False,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
        check_precision(precision)
        if not 1 <= scales <= SCALES:
            raise ValueError(f"scales={scales}: must lie in 1 .. {SCALES}")
        if not 0 <= poolings <= 2:
            raise ValueError(f"poolings={poolings}: must be 0, 1 or 2")
        if density_unit not in DENSITY_UNITS:
            raise ValueError(f"density_unit={density_unit!r}: expected one of {', '.join(DENSITY_UNITS)}")
        if not density_scale > 0:
            raise ValueError(f"density_scale={density_scale}: must be positive")
        self.n_harmonics, self.encoding, self.scales, self.mode = n_harmonics, encoding, scales, mode
        self.poolings, self.density_unit, self.density_scale = poolings, density_unit, density_scale
        self.precision = precision
        width = disparity_encoding_width(n_harmonics, encoding)
        self.encoder = ResNetEncoder(encoder, weights)
        channels = self.encoder.channels
        self.bottleneck = nn.ModuleDict(
            {
                "down1": _conv_bn(channels[-1], BOTTLENECK[0], 1),
                "down2": _conv_bn(*BOTTLENECK, 3),
                "up1": _conv_bn(BOTTLENECK[1], BOTTLENECK[1], 3),
                "up2": _conv_bn(BOTTLENECK[1], channels[-1], 1),
            }
        )
        # two layers per stage: one at the size of the stage before, then one on its upsampled result and the encoder's map
        layers = []
        for stage, n_out in enumerate(STAGES):
            skip = channels[3 - stage] if stage < 4 else 0
            first = (0, channels[-1], width) if stage == 0 else (STAGES[stage - 1], 0, 0)
            layers.append(PlaneBlock(*first, n_out, upsample=False))
            layers.append(PlaneBlock(n_out, skip, width if skip else 0, n_out, upsample=True))
        self.layers = nn.ModuleList(layers)
        self.heads = nn.ModuleList(nn.Conv2d(STAGES[4 - scale], 4, 3) for scale in range(scales))
        self._planes = _compiled(self._forward_planes) if compile else self._forward_planes

    def forward(self, image: Tensor, disparity: Tensor, *, plane_chunk: int | None = None, n_scales: int | None = None) -> list[MPI]:
        """:meth:`encode`, then :meth:`decode`."""
        return self.decode(self.encode(image), disparity, plane_chunk=plane_chunk, n_scales=n_scales)

    def encode(self, image: Tensor) -> ImageFeatures:
        """One pass over pictures in [0, 1], shape (B, 3, H, W), of any size; see the class."""
        height, width = image.shape[-2:]
        padded = [max(SMALLEST, -(-side // MULTIPLE) * MULTIPLE) for side in (height, width)]
        image = F.pad(image, (0, padded[1] - width, 0, padded[0] - height), mode="replicate")
        with self._autocast(image):
            maps = self.encoder(image.contiguous(memory_format=torch.channels_last))
            return ImageFeatures((*maps, self._bottleneck(maps[-1])), height, width)

    def decode(
        self, features: ImageFeatures, disparity: Tensor, *, plane_chunk: int | None = None, n_scales: int | None = None
    ) -> list[MPI]:
        """The planes at the given disparities.

        With ``plane_chunk`` planes are decoded so many at a time, and what a backward pass needs is computed again there: less
        memory, the same result. In evaluation chunks are independent of each other. In training batch normalisation couples all
        planes of the batch: then every layer is run over all chunks before the next one, its statistics are taken over all of
        them, and only its sums (before normalisation) are kept, one tensor per layer.

        Args:
            features: of B pictures.
            disparity: 1 / depth of every plane, shape (B, N), in any order.
            n_scales: compute only so many of the outputs, finest first; None: all.

        Returns:
            For scales 0, 1, .. the colour (B, N, 3, h, w) in [0, 1] and the density, at least ``DENSITY_FLOOR`` per world unit, or
            alpha in [0, 1], (B, N, 1, h, w); h = ceil(H / 2^scale).

        Raises:
            ValueError: disparities of another batch size, a ``plane_chunk`` below 1, or one in training where the statistics
                of batch normalisation come from several processes (``SyncBatchNorm``).
        """
        n_images, n_planes = features.maps[0].shape[0], disparity.shape[-1]
        if disparity.dim() != 2 or len(disparity) != n_images or n_planes == 0:
            raise ValueError(f"disparity of shape {tuple(disparity.shape)}: expected ({n_images}, N) with N >= 1")
        if plane_chunk is not None and plane_chunk < 1:
            raise ValueError(f"plane_chunk={plane_chunk}: must be at least 1")
        n_scales = self.scales if n_scales is None else min(n_scales, self.scales)
        step = n_planes if plane_chunk is None else min(plane_chunk, n_planes)
        chunks = [slice(start, min(start + step, n_planes)) for start in range(0, n_planes, step)]
        with self._autocast(disparity):
            terms = self._terms(features, disparity)
            if len(chunks) > 1 and any(layer.bn.training for layer in self.layers):
                return self._by_layers(terms, chunks, features, disparity, n_scales)
            return self._by_chunks(terms, chunks, features, disparity, n_scales)

    def _terms(self, features: ImageFeatures, disparity: Tensor) -> list[LayerTerms]:
        encoding = disparity_encoding(disparity, self.n_harmonics, self.encoding)
        skips = {0: features.maps[5]} | {2 * stage + 1: features.maps[3 - stage] for stage in range(4)}
        terms = [layer.terms(skips.get(i), encoding) for i, layer in enumerate(self.layers)]
        return [own if layer.bn.training else own.scaled(*layer.affine()) for own, layer in zip(terms, self.layers)]

    def _by_chunks(
        self, terms: list[LayerTerms], chunks: Sequence[slice], features: ImageFeatures, disparity: Tensor, n_scales: int
    ) -> list[MPI]:
        """Every chunk through all layers."""
        results = _Results(chunks)
        for planes in chunks:
            own = [layer.of_planes(planes) for layer in terms]
            if len(chunks) > 1 and torch.is_grad_enabled():
                maps = checkpoint(self._planes, own, planes.stop - planes.start, n_scales, use_reentrant=False, preserve_rng_state=False)
            else:
                maps = self._planes(own, planes.stop - planes.start, n_scales)
            for scale, raw in maps.items():
                results.add(scale, planes, self._activate(raw, scale, disparity[:, planes], features))
        return results.joined()

    def _forward_planes(self, terms: list[LayerTerms], n_planes: int, n_scales: int) -> dict[int, Tensor]:
        x, outputs = None, {}
        for i, layer in enumerate(self.layers):
            z = layer.sum_terms(x, terms[i], n_planes)
            x = F.elu(layer.bn(z) if layer.bn.training else z, inplace=True)
            if i % 2 and self._scale(i) < n_scales:
                outputs[self._scale(i)] = self._head(x, self._scale(i))
        return outputs

    def _by_layers(
        self, terms: list[LayerTerms], chunks: Sequence[slice], features: ImageFeatures, disparity: Tensor, n_scales: int
    ) -> list[MPI]:
        """Every layer over all chunks; ``sums`` are those of the layer before, with what normalises them."""
        results = _Results(chunks)
        sums: list[Tensor | None] = [None] * len(chunks)
        affine: tuple[Tensor, Tensor] | None = None
        for i in range(len(self.layers) + 1):
            layer = self.layers[i] if i < len(self.layers) else None
            if layer is not None and layer.bn.training and type(layer.bn) is not nn.BatchNorm2d:
                raise ValueError(f"plane_chunk: {type(layer.bn).__name__} in training takes its statistics itself; leave plane_chunk out")
            moments, counts = [], []
            for number, planes in enumerate(chunks):
                own = None if layer is None else terms[i].of_planes(planes)
                z, found, head = checkpoint(
                    self._one_layer, sums[number], affine, i, own, planes.stop - planes.start, n_scales,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
                if head is not None:
                    scale = self._scale(i - 1)
                    results.add(scale, planes, self._activate(head, scale, disparity[:, planes], features))
                sums[number] = z
                if z is not None:
                    moments.append(found)
                    counts.append(z.numel() // z.shape[1])
            if layer is not None:
                affine = normalisation(layer.bn, moments, counts) if layer.bn.training else None
        return results.joined()

    def _one_layer(
        self, z: Tensor | None, affine: tuple[Tensor, Tensor] | None, i: int, terms: LayerTerms | None, n_planes: int, n_scales: int
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None, Tensor | None]:
        """From the sums of layer i - 1: the sums of layer i with their moments, and the head behind layer i - 1, if any."""
        x, head = None, None
        if z is not None:
            if affine is not None:
                scale, offset = (value.view(-1, 1, 1) for value in affine)
                z = (z * scale + offset).to(z.dtype)
            x = F.elu(z)
            if i % 2 == 0 and self._scale(i - 1) < n_scales:
                head = self._head(x, self._scale(i - 1))
        if terms is None:
            return None, None, head
        z = self.layers[i].sum_terms(x, terms, n_planes)
        return z, batch_moments(z) if self.layers[i].bn.training else None, head

    @staticmethod
    def _scale(layer: int) -> int:
        """The scale of the map behind the second layer of a stage: 1/16 of the size is scale 4."""
        return 4 - layer // 2

    def _head(self, x: Tensor, scale: int) -> Tensor:
        head = self.heads[scale]
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), head.weight, head.bias)

    def _activate(self, raw: Tensor, scale: int, disparity: Tensor, features: ImageFeatures) -> MPI:
        """From a head's output (B * n, 4, h, w) for planes at ``disparity`` (B, n)."""
        height, width = (-(-side // 2**scale) for side in (features.height, features.width))
        raw = raw[..., :height, :width].unflatten(0, (-1, disparity.shape[1]))
        raw = raw if raw.dtype == torch.float64 else raw.float()
        rgb, last = raw[:, :, :3].contiguous().sigmoid(), raw[:, :, 3:].contiguous()
        if self.mode == "alpha":
            return rgb, last.sigmoid()
        if self.density_unit == "disparity":
            per_depth = self.density_scale * disparity.to(raw.dtype).square()
            return rgb, F.softplus(last) * per_depth[..., None, None, None] + DENSITY_FLOOR
        density = last.abs()
        return rgb, (density if self.density_scale == 1 else density * self.density_scale) + DENSITY_FLOOR

    def _bottleneck(self, x: Tensor) -> Tensor:
        sizes = []
        for number, name in enumerate(("down1", "down2")):
            sizes.append(x.shape[-2:])
            if number < self.poolings:
                x = F.max_pool2d(x, 3, stride=2, padding=1)
            if self.bottleneck[name][1].training and x.numel() == x.shape[1]:
                raise ValueError(
                    "the bottleneck has one pixel of one picture, which has no batch statistics to train with: take larger batches, "
                    f"larger pictures or poolings < {self.poolings}"
                )
            x = self.bottleneck[name](x)
        for name in ("up1", "up2"):
            x = self.bottleneck[name](F.interpolate(x, size=sizes.pop(), mode="nearest"))
        return x

    def _autocast(self, like: Tensor) -> AbstractContextManager:
        return autocast(like.device, compute_dtype(self.precision, like.device))


class _Results:
    """Collects chunks of planes per scale; where no gradient is needed they are written in place, so that no copy is made."""

    def __init__(self, chunks: Sequence[slice]) -> None:
        self._chunks = chunks
        self._parts: dict[int, list[MPI]] = {}
        self._whole: dict[int, MPI] = {}

    def add(self, scale: int, planes: slice, mpi: MPI) -> None:
        if len(self._chunks) == 1 or torch.is_grad_enabled():
            self._parts.setdefault(scale, []).append(mpi)
            return
        if scale not in self._whole:
            shapes = ([part.shape[0], self._chunks[-1].stop, *part.shape[2:]] for part in mpi)
            self._whole[scale] = tuple(part.new_empty(shape) for part, shape in zip(mpi, shapes))
        for whole, part in zip(self._whole[scale], mpi):
            whole[:, planes] = part

    def joined(self) -> list[MPI]:
        """Finest first."""
        joined = {
            scale: tuple(torch.cat(part, dim=1) if len(part) > 1 else part[0] for part in zip(*parts))
            for scale, parts in self._parts.items()
        }
        return [mpi for _, mpi in sorted((joined | self._whole).items())]


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(function, dynamic=True)

    def run(*args: Any) -> Any:
        with warnings.catch_warnings():  # the compiler looks at .grad of what it is given, which is no parameter here
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf", category=UserWarning)
            return compiled(*args)

    return run


def _conv_bn(n_in: int, n_out: int, size: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n_in, n_out, size, padding=size // 2, bias=False), nn.BatchNorm2d(n_out), nn.LeakyReLU(LEAK))
