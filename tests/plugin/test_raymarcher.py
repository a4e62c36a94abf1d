"""The raymarcher against a loop, alone and inside Implicitron's own multi-pass renderer."""

import math

import pytest
import torch
from pytorch3d.implicitron.models.renderer.base import EvaluationMode, ImplicitronRayBundle
from pytorch3d.implicitron.models.renderer.raymarcher import RaymarcherBase
from pytorch3d.implicitron.tools.config import expand_args_fields, get_default_args, registry

import co3d_ensemble.plugin  # noqa: F401 - registers the components
from co3d_ensemble.plugin.model import build_component


def marcher():
    return build_component(RaymarcherBase, "OpacityRaymarcher", {})


def samples():
    generator = torch.Generator().manual_seed(0)
    density = 2 * torch.rand(2, 5, 1, 7, 1, generator=generator)
    features = torch.rand(2, 5, 1, 7, 3, generator=generator)
    lengths = (4 * torch.rand(2, 5, 1, 7, generator=generator)).sort(dim=-1).values
    return density, features, lengths


def as_a_loop(density, features, deltas, lengths):
    color, distance, light, alphas = [0.0] * 3, 0.0, 1.0, []
    for sigma, feature, delta, length in zip(density.tolist(), features.tolist(), deltas, lengths.tolist()):
        alpha = 1 - math.exp(-sigma * delta)
        color = [c + light * alpha * f for c, f in zip(color, feature)]
        distance += light * alpha * length
        light *= 1 - alpha
        alphas.append(alpha)
    return color, distance, 1 - light, alphas


@pytest.mark.parametrize("given_deltas", [False, True])
def test_output_is_the_emission_absorption_sum_written_as_a_loop(given_deltas):
    density, features, lengths = samples()
    given = torch.full_like(lengths, 0.3) if given_deltas else None
    output = marcher()(density, features, {"key": 1}, lengths, ray_deltas=given, something_of_a_later_version=None)
    for b in range(2):
        for r in range(5):
            t = lengths[b, r, 0]
            deltas = [0.3] * 7 if given_deltas else [*t.diff().tolist(), 0.0]
            color, distance, alpha, alphas = as_a_loop(density[b, r, 0, :, 0], features[b, r, 0], deltas, t)
            assert output.features[b, r, 0].tolist() == pytest.approx(color, rel=1e-5)
            assert output.depths[b, r, 0].tolist() == pytest.approx([distance], rel=1e-5)
            assert output.masks[b, r, 0].tolist() == pytest.approx([alpha], rel=1e-5)
            assert output.aux["opacities"][b, r, 0].tolist() == pytest.approx(alphas, abs=1e-6)
            assert output.weights[b, r, 0].sum().item() == pytest.approx(alpha, rel=1e-5)
    assert output.aux["key"] == 1


def test_opacities_are_carried_in_training_only():
    evaluating = marcher().eval()(*samples()[:2], {"key": 1}, samples()[2])
    assert evaluating.aux == {"key": 1}


def test_what_is_empty_is_black_and_transparent():
    density, features, lengths = samples()
    output = marcher()(torch.zeros_like(density), features, {}, lengths)
    assert not output.features.any() and not output.masks.any() and not output.depths.any()


def test_noise_asked_of_the_raymarcher_is_refused():
    density, features, lengths = samples()
    with pytest.raises(ValueError, match="density_noise_std=0.5.*implicit function"):
        marcher()(density, features, {}, lengths, density_noise_std=0.5)


def test_it_marches_inside_implicitrons_own_multi_pass_renderer():
    from pytorch3d.implicitron.models.renderer.multipass_ea import MultiPassEmissionAbsorptionRenderer

    expand_args_fields(MultiPassEmissionAbsorptionRenderer)
    args = get_default_args(MultiPassEmissionAbsorptionRenderer)
    args.raymarcher_class_type = "OpacityRaymarcher"
    args.n_pts_per_ray_fine_training = 9
    renderer = MultiPassEmissionAbsorptionRenderer(**args)
    density, features, lengths = samples()
    seen = []

    def fog(*, ray_bundle, **kwargs):
        seen.append(ray_bundle.lengths)
        return torch.full((*ray_bundle.lengths.shape, 1), 0.7), torch.full((*ray_bundle.lengths.shape, 3), 0.5), {}

    bundle = ImplicitronRayBundle(
        origins=torch.zeros(2, 5, 1, 3), directions=torch.zeros(2, 5, 1, 3), lengths=lengths, xys=torch.zeros(2, 5, 1, 2)
    )
    output = renderer(ray_bundle=bundle, implicit_functions=[fog, fog], evaluation_mode=EvaluationMode.TRAINING)
    assert [t.shape[-1] for t in seen] == [7, 16]
    for stage, t in zip((output.prev_stage, output), seen):
        alpha = 1 - torch.exp(-0.7 * (t[..., -1:] - t[..., :1]))  # nothing beyond the last sample
        torch.testing.assert_close(stage.masks, alpha)
        torch.testing.assert_close(stage.features, (0.5 * alpha).expand(2, 5, 1, 3))
        assert stage.aux["opacities"].shape == t.shape
    assert registry.get(RaymarcherBase, "OpacityRaymarcher") is type(renderer.raymarcher)
