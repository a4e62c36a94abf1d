import pytest
import torch

from co3d_ensemble.config import ModelConfig
from co3d_ensemble.functional.types import RayTargets
from co3d_ensemble.plugin.model import build_nerf


def make_model():
    config = ModelConfig()
    config.nerf.n_layers, config.nerf.n_hidden, config.nerf.skip_layers, config.nerf.n_hidden_color = 2, 16, (), 8
    config.nerf.density_noise_std = 0.0  # padding draws numbers of its own
    config.renderer.n_pts_per_ray_coarse, config.renderer.n_pts_per_ray_fine = 12, 8
    hull = torch.zeros(4, 4, 4, dtype=torch.bool)
    hull[1:3, 1:3] = True
    torch.manual_seed(0)
    return build_nerf(config, box=torch.tensor([[-1.0, -1, -1], [1, 1, 1]]), hull=hull, near_far=None).train()


def rays(n):
    generator = torch.Generator().manual_seed(1)
    origins = torch.nn.functional.normalize(torch.randn(n, 3, generator=generator), dim=-1) * 4
    directions = torch.nn.functional.normalize(0.5 * torch.randn(n, 3, generator=generator) - origins, dim=-1)
    return origins, directions, RayTargets(torch.rand(n, 3, generator=generator), (torch.rand(n, generator=generator) > 0.5).float())


def losses_and_gradients(model, batch):
    torch.manual_seed(2)
    model.zero_grad()
    losses = model.losses(*batch)
    sum(losses.values()).backward()
    return {name: loss.item() for name, loss in losses.items()}, [p.grad.clone() for p in model.parameters()]


def test_a_fixed_capacity_changes_neither_losses_nor_gradients():
    model, batch = make_model(), rays(64)
    losses, gradients = losses_and_gradients(model, batch)
    model.adapt_capacity()
    padded_losses, padded_gradients = losses_and_gradients(model, batch)
    assert all(function._compaction.capacity is not None for function in model.functions)
    assert padded_losses == pytest.approx(losses, rel=1e-5)
    for padded, exact in zip(padded_gradients, gradients, strict=True):
        # matrix products of another size round differently: an error of a gradient's largest entries, not of each by itself
        torch.testing.assert_close(padded, exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())


def test_rendering_ignores_the_capacity_of_training():
    model, (origins, directions, _) = make_model(), rays(4000)
    model.losses(*rays(8))
    model.adapt_capacity()
    model.eval()
    with torch.no_grad():
        everything, _ = model(origins, directions)
        some, _ = model(origins[3900:], directions[3900:])
    torch.testing.assert_close(everything.masks[3900:], some.masks)
    assert everything.masks[3900:].max() > 0
