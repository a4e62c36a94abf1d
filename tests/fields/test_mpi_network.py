"""MINE's network against the same network written plainly: everything repeated per plane and concatenated."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from co3d_ensemble.fields.disparity_encoding import disparity_encoding
from co3d_ensemble.fields.mpi_network import DENSITY_FLOOR, MPINetwork
from co3d_ensemble.fields.mpi_reference_weights import from_reference

CHANNELS = (64, 64, 128, 256, 512)


def plain_conv(n_in, n_out, size):
    return nn.Sequential(nn.Conv2d(n_in, n_out, size, padding=size // 2, bias=False), nn.BatchNorm2d(n_out), nn.LeakyReLU(0.1))


def padded_conv(n_in, n_out):
    return nn.ModuleDict({"conv": nn.Conv2d(n_in, n_out, 3, padding=1, padding_mode="reflect")})


class PlainDecoder(nn.Module):
    """The decoder as the specification words it, with the names of the authors' state dict; sizes are multiples of 128."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_down1, self.conv_down2 = plain_conv(512, 512, 1), plain_conv(512, 256, 3)
        self.conv_up1, self.conv_up2 = plain_conv(256, 256, 3), plain_conv(256, 512, 1)
        self.convs = nn.ModuleDict()
        decoder = {0: 16, 1: 32, 2: 64, 3: 128, 4: 256}
        for i in decoder:
            before = 512 + width if i == 4 else decoder[i + 1]
            skip = CHANNELS[i - 1] + width if i else 0
            for half, n_in in enumerate((before, decoder[i] + skip)):
                block = nn.ModuleDict({"conv": padded_conv(n_in, decoder[i]), "bn": nn.BatchNorm2d(decoder[i])})
                self.convs[self.key("upconv", i, half)] = block
        for i in range(4):
            self.convs[self.key("dispconv", i)] = padded_conv(decoder[i], 4)

    @staticmethod
    def key(*entries):
        return "-".join(str(entries))

    def block(self, i, half, x):
        block = self.convs[self.key("upconv", i, half)]
        return F.elu(block["bn"](block["conv"]["conv"](x)))

    def forward(self, maps, encoding):
        n_images, n_planes, width = encoding.shape

        def planes(picture):
            """The picture's map and the encoding of the disparity at every plane and pixel."""
            repeated = picture.repeat_interleave(n_planes, dim=0)
            code = encoding.reshape(-1, width, 1, 1).expand(-1, -1, *picture.shape[-2:])
            return torch.cat((repeated, code), dim=1)

        def up(picture):
            return F.interpolate(picture, scale_factor=2, mode="nearest")

        pooled = [self.conv_down1(F.max_pool2d(maps[4], 3, 2, 1))]
        pooled.append(self.conv_down2(F.max_pool2d(pooled[0], 3, 2, 1)))
        x = planes(self.conv_up2(up(self.conv_up1(up(pooled[1])))))
        outputs = {}
        for i in range(4, -1, -1):
            x = up(self.block(i, 0, x))
            x = self.block(i, 1, torch.cat((x, planes(maps[i - 1])), dim=1) if i else x)
            if i < 4:
                raw = self.convs[self.key("dispconv", i)]["conv"](x).unflatten(0, (n_images, n_planes))
                outputs[i] = raw[:, :, :3].sigmoid(), raw[:, :, 3:].abs() + 1e-4
        return [outputs[i] for i in range(4)]


def randomised(module: nn.Module) -> nn.Module:
    """With statistics and gains as after some training, so that every one of them counts."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(std=0.2)
                part.running_mean.normal_(std=0.2)
                part.running_var.uniform_(0.5, 2.0)
    return module


@functools.cache
def made(**settings) -> MPINetwork:
    torch.manual_seed(0)
    return randomised(MPINetwork("resnet18", **settings)).double()


def network(**settings) -> MPINetwork:
    return copy.deepcopy(made(**settings))


@pytest.fixture(scope="module")
def pair() -> tuple[PlainDecoder, MPINetwork]:
    """The plain decoder, and the network with its weights, loaded as the authors' file would be."""
    model = network()
    plain = randomised(PlainDecoder(21)).double()
    backbone = {f"module.encoder.{name}": value for name, value in model.encoder.state_dict().items()}
    backbone["module.encoder.fc.weight"] = torch.zeros(1000, 512)
    decoder = {f"module.{name}": value for name, value in plain.state_dict().items()}
    model.load_state_dict(from_reference({"backbone": backbone, "decoder": decoder, "optimizer": {}}))
    return plain, model


def inputs(height=128, width=128, n_planes=3, n_images=2):
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(n_images, 3, height, width, dtype=torch.float64, generator=generator)
    disparity = torch.rand(n_images, n_planes, dtype=torch.float64, generator=generator).sort(descending=True).values
    return image, disparity


def flat(mpis):
    return [part for mpi in mpis for part in mpi]


@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_are_those_of_the_plain_network(pair, training):
    plain, model = (copy.deepcopy(module).train(training) for module in pair)
    image, disparity = inputs()
    ours = model(image, disparity)
    encoder = copy.deepcopy(pair[1].encoder).train(training)
    theirs = plain(encoder(image), disparity_encoding(disparity, 10))
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-9, atol=1e-9)
    for outputs in (ours, theirs):
        sum((part * torch.linspace(-1, 1, part.shape[-1])).sum() for part in flat(outputs)).backward()
    named = from_reference(
        {
            "backbone": {f"encoder.{name}": p.grad for name, p in encoder.named_parameters()},
            "decoder": {name: p.grad for name, p in plain.named_parameters()},
        }
    )
    for name, parameter in model.named_parameters():
        scale = float(named[name].abs().max())
        # a bias before batch normalisation has no gradient but rounding
        torch.testing.assert_close(parameter.grad, named[name], rtol=1e-6, atol=1e-9 * max(1.0, scale))
    if training:
        for name, value in from_reference({"backbone": encoder.state_dict(), "decoder": plain.state_dict()}).items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("plane_chunk", [1, 2, 5])
def test_planes_in_chunks_give_the_same_outputs_gradients_and_statistics(training, plane_chunk):
    whole = network().train(training)
    chunked = copy.deepcopy(whole)
    image, disparity = inputs(64, 64, n_planes=3)
    image.requires_grad_()
    results = []
    for model, chunk in ((whole, None), (chunked, plane_chunk)):
        outputs = model(image, disparity, plane_chunk=chunk)
        loss = sum((part * torch.linspace(-1, 1, part.shape[-1])).sum() for part in flat(outputs))
        gradients = torch.autograd.grad(loss, [image, *model.parameters()])
        results.append((flat(outputs), gradients, list(model.buffers())))
    torch.testing.assert_close(results[1], results[0], rtol=1e-7, atol=1e-8)
    with torch.no_grad():
        torch.testing.assert_close(flat(chunked(image, disparity, plane_chunk=plane_chunk)), results[0][0], rtol=1e-7, atol=1e-8)


def test_chunks_in_training_save_memory_for_the_backward_pass():
    model, (image, disparity) = network().train(), inputs(64, 64, n_planes=8)

    def saved_bytes(chunk):
        held = {}

        def note(tensor):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        features = model.encode(image)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            outputs = model.decode(features, disparity, plane_chunk=chunk)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for place, size in held.items() if place not in weights), outputs

    whole, _kept = saved_bytes(None)
    chunked, _kept_too = saved_bytes(1)
    assert chunked < 0.5 * whole


def test_chunks_in_training_are_refused_where_statistics_come_from_several_processes():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network()).train()
    with pytest.raises(ValueError, match="SyncBatchNorm"):
        model(*inputs(64, 64), plane_chunk=1)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (75, 101), (33, 20), (128, 200)])
def test_pictures_of_any_size_give_planes_of_that_size_at_every_scale(height, width):
    model = network().eval()
    image, disparity = inputs(height, width, n_planes=2, n_images=1)
    with torch.no_grad():
        outputs = model(image, disparity)
        for scale, (rgb, sigma) in enumerate(outputs):
            size = (-(-height // 2**scale), -(-width // 2**scale))
            assert rgb.shape == (1, 2, 3, *size) and sigma.shape == (1, 2, 1, *size)
            assert rgb.is_contiguous() and sigma.is_contiguous()
        # the repeated border is what stands for what there is not
        extended = F.pad(image, (0, -width % 32, 0, -height % 32), mode="replicate")
        extended = F.pad(extended, (0, max(0, 64 - extended.shape[-1]), 0, max(0, 64 - extended.shape[-2])), mode="replicate")
        for cut, full in zip(flat(outputs), flat(model(extended, disparity))):
            torch.testing.assert_close(cut, full[..., : cut.shape[-2], : cut.shape[-1]])


def test_a_plane_depends_on_its_own_disparity_only_in_evaluation():
    model, (image, disparity) = network().eval(), inputs(64, 64, n_planes=5)
    with torch.no_grad():
        together, alone = flat(model(image, disparity)), flat(model(image, disparity[:, 2:3]))
    torch.testing.assert_close([part[:, 2:3] for part in together], alone)
    assert (together[1][:, 2] - together[1][:, 3]).abs().max() > 1e-3  # and on that it does depend


def test_alpha_mode_gives_opacities_of_the_same_raw_output():
    sigma, alpha = network().eval(), network(mode="alpha").eval()
    image, disparity = inputs(64, 64)
    with torch.no_grad():
        density, opacity = sigma(image, disparity)[0][1], alpha(image, disparity)[0][1]
    raw = torch.logit(opacity)
    torch.testing.assert_close(raw.abs() + 1e-4, density)
    assert float(density.min()) >= 1e-4 and (raw < 0).any() and (raw > 0).any()


def test_fewer_scales_are_the_finest_ones():
    model, (image, disparity) = network().eval(), inputs(64, 64)
    with torch.no_grad():
        every, two = model(image, disparity), model(image, disparity, n_scales=2)
    assert len(every) == 4 and len(network(scales=1).eval()(image, disparity)) == 1
    torch.testing.assert_close(flat(two), flat(every[:2]))


def test_the_slides_encoding_has_weights_of_its_own_width():
    model, (image, disparity) = network(encoding="slides", n_harmonics=4).eval(), inputs(64, 64)
    assert model.layers[0].conv.in_channels == 512 + 8
    assert torch.isfinite(model(image, disparity)[0][0]).all()


@pytest.mark.parametrize("plane_chunk", [None, 2])
@pytest.mark.parametrize("training", [False, True])
def test_bfloat16_stays_close_and_returns_float32(training, plane_chunk):
    exact, rough = network().float().train(training), network(precision="bfloat16").float().train(training)
    image, disparity = (value.float() for value in inputs(64, 64))
    outputs = rough(image, disparity, plane_chunk=plane_chunk)
    assert all(part.dtype == torch.float32 for part in flat(outputs))
    assert (outputs[0][0] - exact(image, disparity)[0][0]).abs().mean() < 0.02
    sum(part.sum() for part in flat(outputs)).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in rough.parameters())


def test_the_compile_option_changes_neither_outputs_nor_gradients(monkeypatch):
    # the graph is captured as for any backend and then run as it is: compiling it takes a minute
    traced, compiler = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **options: traced.append(fn) or compiler(fn, **options, backend="eager"))
    plain, compiled = network().train(), made.__wrapped__(compile=True).train()
    assert traced
    image, disparity = inputs(64, 64, n_planes=2)
    results = []
    for model in (plain, compiled):
        outputs = flat(model(image, disparity, n_scales=1))  # tracing takes seconds per stage
        gradients = torch.autograd.grad(sum(part.square().sum() for part in outputs), list(model.parameters()), allow_unused=True)
        results.append((outputs, gradients))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


def test_small_pictures_can_do_without_the_bottlenecks_poolings():
    image, disparity = inputs(64, 64, n_planes=2, n_images=1)
    with pytest.raises(ValueError, match="poolings < 2"):
        network().train()(image, disparity)
    with torch.no_grad():
        pooled, not_pooled = (network(poolings=n).train()(image.tile(2, 1, 1, 1), disparity.tile(2, 1)) for n in (2, 0))
    assert not_pooled[0][0].shape == pooled[0][0].shape and (not_pooled[0][0] - pooled[0][0]).abs().max() > 1e-3
    network(poolings=0).train()(image, disparity)


def test_the_density_scale_multiplies_densities_and_nothing_else():
    image, disparity = inputs(64, 64, n_planes=2)
    with torch.no_grad():
        (rgb, sigma), (same_rgb, scaled) = (network(density_scale=factor).eval()(image, disparity, n_scales=1)[0] for factor in (1.0, 10.0))
        opacity = [network(density_scale=factor, mode="alpha").eval()(image, disparity, n_scales=1)[0][1] for factor in (1.0, 10.0)]
    assert torch.equal(rgb, same_rgb) and torch.equal(*opacity)
    torch.testing.assert_close(scaled - DENSITY_FLOOR, 10 * (sigma - DENSITY_FLOOR))


def test_density_per_unit_of_disparity_is_the_same_opacity_near_and_far():
    image, disparity = inputs(64, 64, n_planes=3)
    settings = {"density_unit": "disparity", "density_scale": 5.0}
    with torch.no_grad():
        untrained = network(**settings).eval()
        for head in untrained.heads:
            head.weight.zero_()
            head.bias.fill_(0.3)
        whole = untrained(image, disparity)
        for rgb, sigma in whole:
            per_disparity = (sigma[:, :, 0] - DENSITY_FLOOR) / disparity[:, :, None, None].square()
            torch.testing.assert_close(per_disparity, torch.full_like(per_disparity, 5 * math.log1p(math.exp(0.3))), atol=1e-3, rtol=1e-4)
            torch.testing.assert_close(rgb, torch.full_like(rgb, 0.3).sigmoid())
        for (_, sigma), (_, chunked) in zip(whole, untrained(image, disparity, plane_chunk=2)):
            torch.testing.assert_close(sigma, chunked)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"poolings": 3}, "poolings=3"),
        ({"density_unit": "metre"}, "density_unit='metre'"),
        ({"density_scale": 0.0}, "density_scale=0.0: must be positive"),
        ({"mode": "depth"}, "mode='depth'"),
        ({"precision": "float16"}, "precision='float16'"),
        ({"scales": 5}, "scales=5"),
        ({"encoding": "pi"}, "encoding='pi'"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        MPINetwork("resnet18", **settings)


def test_wrong_disparities_and_chunks_are_named():
    model, (image, disparity) = network().eval(), inputs(64, 64)
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        model(image, disparity[:1])
    with pytest.raises(ValueError, match="plane_chunk=0"):
        model(image, disparity, plane_chunk=0)


def test_foreign_checkpoints_are_refused():
    with pytest.raises(ValueError, match="no 'decoder'"):
        from_reference({"backbone": {}})
    with pytest.raises(ValueError, match="'convs.x.weight'"):
        from_reference({"backbone": {}, "decoder": {"convs.x.weight": torch.zeros(1)}})
