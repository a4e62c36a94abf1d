"""One layer of MINE's decoder, taken apart into what a plane, its picture and its disparity each contribute.

The layer is ELU(BN(conv(concat(x, s, e)))): x are the plane's features, after nearest x2 upsampling where the layer says so, s
features of the picture (the same for all planes) and e the encoded disparity (the same for all pixels); the 3x3 convolution pads
by reflection. A convolution is linear in its input, so that, exactly:

- conv of s is computed once per picture, not once per plane;
- conv of e is a number per channel, as the reflected border of a constant is the constant: the sum of the kernel's taps times e;
- nearest x2 upsampling and the 3x3 kernel are one transposed convolution of stride 2 whose 4x4 kernel is the 3x3 kernel convolved
  with a 2x2 box: 4 products per output instead of 9. The border that reflection adds to the upsampled map is the map's own
  border, repeated;
- in evaluation batch normalisation is a factor and an offset per channel, which go into the terms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerTerms(NamedTuple):
    """A layer's sum for one batch of pictures: ``conv(x, kernel, bias) + image + shift``; what is None is left out.

    Attributes:
        kernel: of the plane's features, (out, in, 3, 3), or (in, out, 4, 4) of the transposed convolution.
        bias: (out,).
        image: the picture's contribution, (B, out, h, w).
        shift: the disparities' contribution with the bias in it, (B, N, out).
    """

    kernel: Tensor | None
    bias: Tensor | None
    image: Tensor | None
    shift: Tensor | None

    def scaled(self, scale: Tensor, offset: Tensor) -> LayerTerms:
        """Terms whose sum is ``scale * sum + offset`` per channel, (out,) each."""
        kernel = self.kernel
        if kernel is not None:  # the transposed kernel has its outputs second
            kernel = kernel * (scale.view(1, -1, 1, 1) if kernel.shape[-1] == 4 else scale.view(-1, 1, 1, 1))
        image = None if self.image is None else self.image * scale.view(-1, 1, 1)
        bias = None if self.bias is None else self.bias * scale + offset
        shift = None if self.shift is None else self.shift * scale + offset
        return LayerTerms(kernel, bias, image, shift)

    def of_planes(self, planes: slice) -> LayerTerms:
        return self if self.shift is None else self._replace(shift=self.shift[:, planes])


class PlaneBlock(nn.Module):
    """The layer; parameters and buffers are those of a plain ``conv`` (inputs in the order x, s, e) and ``bn``.

    Args:
        n_plane, n_image, n_encoding: channels of x, s and e; any of them may be 0.
        n_out: channels of the result.
        upsample: x is upsampled.
    """

    def __init__(self, n_plane: int, n_image: int, n_encoding: int, n_out: int, *, upsample: bool) -> None:
        super().__init__()
        self.n_plane, self.n_image, self.n_encoding, self.upsample = n_plane, n_image, n_encoding, upsample
        self.conv = nn.Conv2d(n_plane + n_image + n_encoding, n_out, 3)
        self.bn = nn.BatchNorm2d(n_out)

    def terms(self, features: Tensor | None, encoding: Tensor) -> LayerTerms:
        """
        Args:
            features: s, (B, n_image, h, w); None where ``n_image`` is 0.
            encoding: (B, N, E); not looked at where ``n_encoding`` is 0.
        """
        plane, image, code = self.conv.weight.split((self.n_plane, self.n_image, self.n_encoding), dim=1)
        kernel = None
        if self.n_plane:
            kernel = upsampling_kernel(plane) if self.upsample else plane
        image = F.conv2d(F.pad(features, (1, 1, 1, 1), mode="reflect"), image) if self.n_image else None
        if not self.n_encoding:
            return LayerTerms(kernel, self.conv.bias, image, None)
        with torch.autocast(encoding.device.type, enabled=False):  # a few numbers: nothing to be gained from fewer digits
            shift = encoding @ code.sum(dim=(2, 3)).T + self.conv.bias
        return LayerTerms(kernel, None, image, shift)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Factor and offset per channel that batch normalisation is in evaluation."""
        scale = self.bn.weight * (self.bn.running_var + self.bn.eps).rsqrt()
        return scale, self.bn.bias - self.bn.running_mean * scale

    def sum_terms(self, x: Tensor | None, terms: LayerTerms, n_planes: int) -> Tensor:
        """The convolution of all inputs, (B * n_planes, out, h, w): before normalisation, unless that went into the terms.

        Args:
            x: (B * n_planes, n_plane, h, w), before upsampling; None where ``n_plane`` is 0.
        """
        if x is None:
            total = terms.image[:, None] + terms.shift[..., None, None]
            return total.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        if self.upsample:
            z = F.conv_transpose2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), terms.kernel, terms.bias, stride=2, padding=3)
        else:
            z = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), terms.kernel, terms.bias)
        by_image = z.unflatten(0, (-1, n_planes))
        for term in (None if terms.image is None else terms.image[:, None], None if terms.shift is None else terms.shift[..., None, None]):
            if term is not None:
                by_image += term.to(z.dtype)
        return z


def upsampling_kernel(kernel: Tensor) -> Tensor:
    """The transposed convolution's kernel (in, out, 4, 4), stride 2, of upsampling x2 and then ``kernel`` (out, in, 3, 3)."""
    flipped = F.pad(kernel.flip(2, 3), (1, 1, 1, 1))
    rows = flipped[:, :, 1:] + flipped[:, :, :-1]
    return (rows[..., 1:] + rows[..., :-1]).transpose(0, 1).contiguous(memory_format=torch.channels_last)


def batch_moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations from it per channel of (n, C, h, w), float32 or wider: (C,) each."""
    wide = z if z.dtype == torch.float64 else z.float()
    mean = wide.mean(dim=(0, 2, 3))
    return mean, (wide - mean.view(-1, 1, 1)).square().sum(dim=(0, 2, 3))


def normalisation(bn: nn.BatchNorm2d, moments: list[tuple[Tensor, Tensor]], counts: list[int]) -> tuple[Tensor, Tensor]:
    """Factor and offset per channel of batch normalisation over several chunks, and its running statistics brought up to date.

    Args:
        moments: :func:`batch_moments` of every chunk.
        counts: values per channel in every chunk.
    """
    count = sum(counts)
    mean = sum(m * n for (m, _), n in zip(moments, counts)) / count
    deviation = sum(square + n * (m - mean).square() for (m, square), n in zip(moments, counts))
    with torch.no_grad():
        bn.num_batches_tracked += 1
        bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), bn.momentum)
        bn.running_var.lerp_((deviation / (count - 1)).to(bn.running_var.dtype), bn.momentum)
    scale = bn.weight * (deviation / count + bn.eps).rsqrt()
    return scale, bn.bias - mean * scale
