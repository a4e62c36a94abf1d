import itertools

import pytest
import torch

from co3d_ensemble.config import ModelConfig
from co3d_ensemble.fields import compaction
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


@pytest.fixture
def first_ray(monkeypatch):
    """Sets the ray after which a batch without room for all begins, without a draw that would change later ones."""
    chosen = []
    monkeypatch.setattr(compaction, "random_ray", lambda n_rays, device: torch.tensor(chosen or [0]))
    return lambda ray: chosen.__setitem__(slice(None), [ray])


def test_a_fixed_capacity_changes_neither_losses_nor_gradients(first_ray):
    model, batch = make_model(), rays(64)
    losses, gradients = losses_and_gradients(model, batch)
    model.follow_counts()
    padded_losses, padded_gradients = losses_and_gradients(model, batch)
    assert all(function._compaction.capacity is not None for function in model.functions)
    assert padded_losses == pytest.approx(losses, rel=1e-5)
    for padded, exact in zip(padded_gradients, gradients, strict=True):
        # matrix products of another size round differently: an error of a gradient's largest entries, not of each by itself
        torch.testing.assert_close(padded, exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())


def test_rendering_ignores_the_capacity_of_training():
    model, (origins, directions, _) = make_model(), rays(4000)
    model.losses(*rays(8))
    model.follow_counts()
    model.eval()
    with torch.no_grad():
        everything, _ = model(origins, directions)
        some, _ = model(origins[3900:], directions[3900:])
    torch.testing.assert_close(everything.masks[3900:], some.masks)
    assert everything.masks[3900:].max() > 0


def without_room_for_all(model, share):
    """Rooms that hold a share of what the last step took."""
    for function in model.functions:
        for room in function.rooms():
            room.capacity = int(share * room._peak)
    return model


def test_a_batch_without_room_for_all_has_the_gradient_of_all_on_average_and_counts_what_it_left_out(first_ray):
    model, batch = make_model(), rays(400)
    model.bounded = True
    losses, gradients = losses_and_gradients(model, batch)
    assert losses["samples_left_out"] == 0
    counts = [int(room._peak) for function in model.functions for room in function.rooms()]
    without_room_for_all(model, 0.4)
    found, means = [], [torch.zeros_like(gradient) for gradient in gradients]
    for ray in range(0, 400, 10):
        first_ray(ray)
        partial, own = losses_and_gradients(model, batch)
        found.append(partial)
        for mean, gradient in zip(means, own, strict=True):
            mean += gradient / 40
    left_out = sum(count - int(0.4 * count) for count in counts)
    assert all(partial["samples_left_out"] == pytest.approx(left_out, rel=0.1) for partial in found)
    for name in losses.keys() - {"samples_left_out"}:
        values = torch.tensor([partial[name] for partial in found])
        assert values.mean().item() == pytest.approx(losses[name], rel=0.03) and values.std() > 0.01 * values.mean()
    whole, mean = (torch.cat([gradient.flatten() for gradient in side]) for side in (gradients, means))
    assert torch.nn.functional.cosine_similarity(whole, mean, dim=0) > 0.99
    assert mean.norm().item() == pytest.approx(whole.norm().item(), rel=0.1)


def test_a_ray_without_its_samples_has_no_say(first_ray):
    model, (origins, directions, targets) = make_model(), rays(64)
    losses_and_gradients(model, (origins, directions, targets))
    without_room_for_all(model, 0.4)
    first_ray(10)
    seen = {}
    for name, function in zip(("coarse", "fine"), model.functions):
        function.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output[2]["counted"]}))
    losses, gradients = losses_and_gradients(model, (origins, directions, targets))
    nobody = ~(seen["coarse"] | seen["fine"])
    assert nobody.any() and not nobody.all()
    other = RayTargets(torch.where(nobody[:, None], 1 - targets.rgb, targets.rgb), torch.where(nobody, 1 - targets.mask, targets.mask))
    assert losses_and_gradients(model, (origins, directions, other))[0] == losses


def test_rooms_follow_the_counts_of_a_model_within_a_few_steps():
    model = make_model()
    model.bounded = True
    left_out = []
    for step, n in zip(range(8), itertools.chain([64, 64], itertools.repeat(1000))):
        if step:
            model.follow_counts()
        left_out.append(losses_and_gradients(model, rays(n))[0]["samples_left_out"])
    assert left_out[:2] == [0, 0] and left_out[2] > 0 and left_out[3:] == [0] * 5
