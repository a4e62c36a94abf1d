"""The radiance MLP against Figure 7 of the NeRF paper written with plain matrices."""

import shutil

import pytest
import torch

from co3d_ensemble.fields.encoding import harmonic_encoding
from co3d_ensemble.fields.radiance_mlp import RadianceMLP, density_activation

SMALL = {"n_layers": 4, "n_hidden": 16, "skip_layers": (2,), "n_hidden_color": 8, "n_harmonics_xyz": 3, "n_harmonics_dir": 2}


def small(**changes) -> RadianceMLP:
    torch.manual_seed(0)
    mlp = RadianceMLP(**{**SMALL, **changes})
    for parameter in mlp.parameters():  # biases count too
        torch.nn.init.normal_(parameter, std=0.3)
    return mlp


def samples(n=50, n_rays=7):
    generator = torch.Generator().manual_seed(1)
    points = 2 * torch.rand(n, 3, generator=generator) - 1
    directions = torch.nn.functional.normalize(torch.randn(n_rays, 3, generator=generator), dim=-1)
    return points, directions, torch.randint(n_rays, (n,), generator=generator)


def test_output_is_the_network_of_the_paper_written_with_matrices():
    mlp = small()
    points, directions, ray = samples()
    raw, color = mlp(points, directions, ray)
    weights = dict(mlp.named_parameters())

    def linear(name, x):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    for i in range(len(points)):
        xyz, view = harmonic_encoding(points[i], 3), harmonic_encoding(directions[ray[i]], 2)
        hidden = xyz
        for layer in range(4):
            hidden = linear(f"trunk.{layer}", torch.cat((hidden, xyz)) if layer == 2 else hidden).clamp_min(0)
        head = linear("color_hidden", torch.cat((linear("bottleneck", hidden), view))).clamp_min(0)
        torch.testing.assert_close(raw[i], linear("density", hidden)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(color[i], 1 / (1 + torch.exp(-linear("color", head))), rtol=1e-4, atol=1e-5)


def test_every_one_of_very_many_samples_is_answered_in_its_place():
    mlp, (points, directions, ray) = small(), samples(20_001)
    with torch.no_grad():
        whole = mlp(points, directions, ray)
        for part in (slice(0, 5), slice(8190, 8200), slice(16380, 16390), slice(19_990, 20_001)):
            for all_at_once, alone in zip(whole, mlp(points[part], directions, ray[part])):
                torch.testing.assert_close(all_at_once[part], alone, rtol=1e-4, atol=1e-5)


def test_density_does_not_depend_on_the_view_direction_and_colour_does():
    mlp, (points, directions, ray) = small(), samples()
    raw, color = mlp(points, directions, ray)
    turned_raw, turned_color = mlp(points, -directions, ray)
    assert torch.equal(raw, turned_raw) and (color - turned_color).abs().max() > 1e-3


def test_bfloat16_is_close_to_float32_and_returns_float32():
    points, directions, ray = samples(400)
    exact = small()(points, directions, ray)
    rough = small(precision="bfloat16")(points, directions, ray)
    assert all(x.dtype == torch.float32 for x in rough)
    scale = exact[0].std()
    assert 0 < (rough[0] - exact[0]).abs().mean() < 0.05 * scale  # 0 would mean that the option does nothing
    assert (rough[1] - exact[1]).abs().max() < 0.05


def test_bfloat16_gradients_are_close_to_float32():
    points, directions, ray = samples(400)
    gradients = []
    for precision in ("float32", "bfloat16"):
        mlp = small(precision=precision)
        raw, color = mlp(points, directions, ray)
        (raw.square().mean() + color.square().mean()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in mlp.parameters()]))
    exact, rough = gradients
    assert torch.nn.functional.cosine_similarity(exact, rough, dim=0) > 0.99
    assert rough.norm() == pytest.approx(exact.norm().item(), rel=0.05)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_sample_at_all_gives_zero_gradients(precision):
    mlp = small(precision=precision)
    raw, color = mlp(torch.zeros(0, 3), torch.zeros(5, 3), torch.zeros(0, dtype=torch.long))
    assert raw.shape == (0,) and color.shape == (0, 3)
    (raw.sum() + color.sum()).backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in mlp.parameters())


def test_the_compile_option_changes_neither_outputs_nor_gradients_for_any_number_of_samples(monkeypatch):
    # without a code generator: what is tested is the graph that is traced, and that 0 or other counts do not break it
    traced = []
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **options: traced.append(fn) or compiler(fn, **options, backend="aot_eager"))
    plain, compiled = small(), small(compile=True)
    assert len(traced) == 1
    for n in (50, 31, 0):
        points, directions, ray = samples(n)
        for mlp in (plain, compiled):
            mlp.zero_grad()
            raw, color = mlp(points, directions, ray)
            (raw.square().sum() + color.square().sum()).backward()
        torch.testing.assert_close(compiled(points, directions, ray), plain(points, directions, ray), rtol=1e-4, atol=1e-5)
        for a, b in zip(compiled.parameters(), plain.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler itself
@pytest.mark.skipif(shutil.which("gcc") is None and shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_the_mlp_compiled_to_machine_code_gives_the_same_outputs():
    sizes = {"n_layers": 2, "skip_layers": (1,), "n_harmonics_xyz": 1, "n_harmonics_dir": 1}
    plain, compiled = small(**sizes), small(compile=True, **sizes)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*samples()), plain(*samples()), rtol=1e-4, atol=1e-5)


def test_the_default_sizes_are_the_published_ones():
    mlp = RadianceMLP()
    assert [layer.in_features for layer in mlp.trunk] == [63, 256, 256, 256, 256, 256 + 63, 256, 256]
    assert mlp.color_hidden.in_features == 256 + 27 and mlp.color_hidden.out_features == 128


@pytest.mark.parametrize("skip", [0, 4, -1])
def test_a_skip_layer_outside_the_trunk_is_refused_by_value(skip):
    with pytest.raises(ValueError, match=rf"skip_layers=\({skip},\)"):
        small(skip_layers=(skip,))


def test_an_unknown_precision_is_refused_by_value():
    with pytest.raises(ValueError, match="precision='float8'.*bfloat16"):
        small(precision="float8")


def test_density_activations_by_hand_and_unknown_ones_refused():
    raw = torch.tensor([-2.0, 0.0, 3.0])
    assert density_activation(raw, "relu").tolist() == [0, 0, 3]
    torch.testing.assert_close(density_activation(raw, "softplus"), (1 + raw.exp()).log())
    with pytest.raises(ValueError, match="density_activation='exp'.*relu, softplus"):
        density_activation(raw, "exp")
