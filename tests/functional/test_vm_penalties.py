"""The penalties on a factorization against plain autograd in float64."""

import pytest
import torch

from co3d_ensemble.functional import vm_penalties as module
from co3d_ensemble.functional.vm_penalties import add_vm_penalties, vm_penalties
from tests.functional.test_vm import as_functions_of_the_factors, factors, gradients


def reference_penalties(planes, lines, *, content, tv_lines):
    """Plain autograd: TensoRF's TVLoss times 1e-2 and its L1, with the differences per length where wanted."""
    tv = l1 = 0.0
    for factor in (*planes, *lines):
        l1 = l1 + factor.abs().mean()
        if factor.dim() == 3 or tv_lines:
            for axis in range(factor.dim() - 1):
                scale = (factor.shape[axis] - 1) / 127 if content else 1.0
                tv = tv + 1e-2 * 2 * (factor.diff(dim=axis) * scale).square().mean()
    return tv, l1


@pytest.mark.parametrize("tv_lines", [False, True])
@pytest.mark.parametrize("normalization", ["content", "reference"])
@pytest.mark.parametrize("cache_bytes", [1 << 20, 400, 1])  # all rows at once, some, and one by one
def test_penalties_and_their_gradients_are_those_of_plain_autograd(monkeypatch, cache_bytes, normalization, tv_lines):
    monkeypatch.setattr(module, "CACHE_BYTES", cache_bytes)
    planes, lines = factors()
    expected = reference_penalties(planes, lines, content=normalization == "content", tv_lines=tv_lines)
    got = vm_penalties(planes, lines, normalization=normalization, tv_lines=tv_lines)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(3 * got[0] - 2 * got[1], [*planes, *lines]), gradients(3 * expected[0] - 2 * expected[1], [*planes, *lines])):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_penalty_gradients_are_those_of_finite_differences():
    planes, lines = factors(2, (3, 4, 2))
    both = as_functions_of_the_factors(lambda p, l: vm_penalties(p, l, tv_lines=True))
    assert torch.autograd.gradcheck(both, (*planes, *lines))


def test_a_penalty_scaled_by_a_tensor_scales_its_gradient():
    planes, lines = factors()
    once = gradients(vm_penalties(planes, lines)[0], planes)
    weight = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    scaled = gradients(weight * vm_penalties(planes, lines)[0], planes)
    assert all(torch.equal(0.25 * a, b) or torch.allclose(0.25 * a, b, rtol=1e-12) for a, b in zip(once, scaled))


def test_what_is_not_asked_for_is_none_and_reaches_no_factor():
    planes, lines = factors()
    tv, nothing = vm_penalties(planes, lines, l1=False)
    assert nothing is None
    assert all(g is None for g in torch.autograd.grad(tv, lines, allow_unused=True))
    assert vm_penalties(planes, lines, tv=False)[0] is None
    assert vm_penalties(planes, lines, tv=False, l1=False) == (None, None)


def test_the_content_normalization_prices_the_same_content_alike_at_every_resolution_and_the_reference_does_not():
    def price(n, normalization):
        u = torch.linspace(0, 1, n, dtype=torch.float64)
        plane = torch.sin(4 * u)[:, None, None] * torch.cos(3 * u)[:, None]
        return vm_penalties([plane] * 3, [u[:, None]] * 3, l1=False, normalization=normalization)[0].item()

    assert price(64, "content") == pytest.approx(price(512, "content"), rel=0.02)
    assert price(128, "content") == pytest.approx(price(128, "reference"), rel=1e-12)
    assert price(128, "reference") == pytest.approx(4 * price(255, "reference"), rel=0.02)


def test_a_constant_plane_has_no_total_variation_and_exactly_no_gradient():
    planes = [torch.full((6, 5, 2), 0.37, requires_grad=True) for _ in range(3)]
    tv, _ = vm_penalties(planes, factors(2)[1], l1=False)
    assert tv.item() == 0
    assert all((g == 0).all() for g in gradients(tv, planes))


def test_an_unknown_normalization_is_refused_by_value():
    with pytest.raises(ValueError, match="normalization='mean'.*content, reference"):
        vm_penalties(*factors(), normalization="mean")


# Added to what the backward pass left


@pytest.mark.parametrize(("tv_weight", "l1_weight"), [(3.0, -2.0), (0.5, None), (None, 2.0), (None, None)])
@pytest.mark.parametrize("cache_bytes", [1 << 20, 400, 1])
def test_gradients_are_added_to_those_of_the_other_losses(monkeypatch, cache_bytes, tv_weight, l1_weight):
    monkeypatch.setattr(module, "CACHE_BYTES", cache_bytes)
    planes, lines = factors()
    every = [*planes, *lines]
    tv, l1 = reference_penalties(planes, lines, content=True, tv_lines=True)
    other = sum((i + 1) * factor.sin().sum() for i, factor in enumerate(every))
    expected = gradients(other + (tv_weight or 0) * tv + (l1_weight or 0) * l1, every)
    other = sum((i + 1) * factor.sin().sum() for i, factor in enumerate(every))
    other.backward()
    got = add_vm_penalties(planes, lines, tv_weight=tv_weight, l1_weight=l1_weight, tv_lines=True)
    for value, reference, weight in zip(got, (tv, l1), (tv_weight, l1_weight)):
        assert value is None if weight is None else value.item() == pytest.approx(reference.item(), rel=1e-12)
    for a, b in zip(every, expected):
        torch.testing.assert_close(a.grad, b, rtol=1e-12, atol=1e-12)


def test_a_factor_that_the_other_losses_do_not_reach_gets_a_gradient():
    planes, lines = factors()
    add_vm_penalties(planes, lines, tv_weight=1.0, l1_weight=None)
    expected = gradients(vm_penalties(planes, lines)[0], planes)
    assert all(torch.allclose(plane.grad, b, rtol=1e-12) for plane, b in zip(planes, expected))
    assert all(line.grad is None for line in lines)
