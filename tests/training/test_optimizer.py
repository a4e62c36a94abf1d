import pytest
import torch
from torch import nn

from co3d_ensemble.training.optimizer import build_adam, clip_gradients, load_moments, moments_by_name, set_learning_rates


def make(model=None):
    model = model or nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    groups = [
        {"params": model[0].parameters(), "name": "trunk", "lr": 0.1},
        {"params": model[1].parameters(), "name": "head", "lr": 0.01},
    ]
    return model, build_adam(groups, model, betas=(0.9, 0.999), eps=1e-8)


def with_gradients(*values):
    parameters = []
    for value in values:
        parameter = nn.Parameter(torch.zeros_like(value))
        parameter.grad = value.clone()
        parameters.append(parameter)
    return parameters


def test_rates_are_a_function_of_the_multiplier_not_of_the_past():
    _, optimizer = make()
    set_learning_rates(optimizer, 0.3)
    assert set_learning_rates(optimizer, 0.5) == pytest.approx({"trunk": 0.05, "head": 0.005})


def test_clipping_scales_the_norm_of_all_gradients_to_the_limit():
    first, second = torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])
    parameters = with_gradients(first, second)
    assert clip_gradients(parameters, 1.0).item() == pytest.approx(5.0)
    torch.testing.assert_close(parameters[0].grad, first / 5)
    torch.testing.assert_close(parameters[1].grad, second / 5)


@pytest.mark.parametrize("max_norm", [None, 5.0, 6.0])
def test_gradients_within_the_limit_stay_exact(max_norm):
    value = torch.tensor([3.0, 4.0]) * 0.999
    (parameter,) = with_gradients(value)
    clip_gradients([parameter], max_norm)
    assert torch.equal(parameter.grad, value)


def test_zero_gradients_stay_finite():
    (parameter,) = with_gradients(torch.zeros(3))
    assert clip_gradients([parameter], 1.0) == 0
    assert torch.equal(parameter.grad, torch.zeros(3))


def test_a_step_that_reached_no_parameter_is_an_error():
    with pytest.raises(ValueError, match="no parameter"):
        clip_gradients([nn.Parameter(torch.zeros(1))], 1.0)


def test_moments_follow_names_through_a_rebuild_and_start_anew_where_the_shape_changed():
    model, optimizer = make()
    model(torch.ones(5, 3)).sum().backward()
    optimizer.step()
    moments = moments_by_name(optimizer)
    grown = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    _, rebuilt = make(grown)
    load_moments(rebuilt, moments)
    assert list(moments_by_name(rebuilt)) == ["1.bias"]
    assert torch.equal(rebuilt.state[grown[1].bias]["exp_avg"], optimizer.state[model[1].bias]["exp_avg"])
    assert rebuilt.state[grown[1].bias]["step"] == 1
    grown(torch.ones(5, 3)).sum().backward()
    rebuilt.step()
    assert all(parameter.isfinite().all() for parameter in grown.parameters())


@pytest.mark.parametrize(("params", "reason"), [([], "'x' is empty"), ([nn.Parameter(torch.zeros(1))], "'x' holds a tensor")])
def test_bad_groups_are_refused_by_name(params, reason):
    with pytest.raises(ValueError, match=reason):
        build_adam([{"params": params, "name": "x", "lr": 0.1}], nn.Linear(1, 1), betas=(0.9, 0.999), eps=1e-8)
