import pytest
import torch
from torch import nn

from co3d_ensemble.training.ema import EMA, update_weight


def make_model(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    return model


def walk(model, ema, n):
    """n random updates; returns the parameters after each."""
    history = []
    for _ in range(n):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        ema.update(model)
        history.append([parameter.detach().clone() for parameter in model.parameters()])
    return history


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.993, 0.9999])
@pytest.mark.parametrize("n", [1, 2, 30])
def test_equals_the_closed_form(decay, n):
    model = make_model()
    ema = EMA(model, decay)
    history = walk(model, ema, n)
    weights = [decay ** (n - 1 - i) for i in range(n)]
    for index, average in enumerate(ema.weights.values()):
        expected = sum(w * snapshot[index] for w, snapshot in zip(weights, history, strict=True)) / sum(weights)
        torch.testing.assert_close(average, expected, rtol=1e-10, atol=1e-12)


def test_the_first_update_copies_so_initial_weights_leave_no_trace():
    model = make_model()
    ema = EMA(model, 0.9999)
    (snapshot,) = walk(model, ema, 1)
    assert all(torch.equal(a, b) for a, b in zip(ema.weights.values(), snapshot, strict=True))


def test_weight_of_an_update_keeps_its_digits_at_the_published_decay():
    assert update_weight(0.9999, 10_000) == pytest.approx(1e-4 / (1 - 0.9999**10_000), rel=1e-9)


def test_applied_swaps_parameters_but_not_buffers_and_restores_exactly_after_an_exception():
    model = make_model()
    ema = EMA(model, 0.9)
    walk(model, ema, 5)
    model[1].running_mean.fill_(7.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), ema.applied(model):
        assert all(torch.equal(parameter, ema.weights[name]) for name, parameter in model.named_parameters())
        assert (model[1].running_mean == 7.0).all()
        raise RuntimeError("inside")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_goes_on_after_load_as_if_never_saved():
    model = make_model()
    ema = EMA(model, 0.9)
    walk(model, ema, 3)
    copy = EMA(make_model(1), 0.5)
    copy.load_state_dict(ema.state_dict())
    walk(model, ema, 1)
    copy.update(model)
    assert copy.n_updates == 4
    assert all(torch.equal(copy.weights[name], value) for name, value in ema.weights.items())


def test_a_saved_average_of_another_structure_is_refused_by_name():
    state = EMA(nn.Linear(3, 4), 0.9).state_dict()
    with pytest.raises(ValueError, match="weight"):
        EMA(nn.Linear(5, 4), 0.9).load_state_dict(state)


def test_rebuild_keeps_what_fits_takes_what_is_mapped_and_starts_the_rest_from_the_parameter():
    model = nn.ModuleDict({"kept": nn.Linear(2, 2, bias=False), "grown": nn.Linear(2, 2, bias=False)})
    ema = EMA(model, 0.9)
    walk(model, ema, 3)
    kept = ema.weights["kept.weight"].clone()
    model["grown"] = nn.Linear(4, 4, bias=False)
    ema.rebuild(model)
    assert torch.equal(ema.weights["kept.weight"], kept)
    assert torch.equal(ema.weights["grown.weight"], model["grown"].weight)
    ema.rebuild(model, {"kept.weight": kept, "grown.weight": torch.full((4, 4), 3.0)})
    assert (ema.weights["grown.weight"] == 3.0).all()
    ema.update(model)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_outside_zero_to_one_is_refused(decay):
    with pytest.raises(ValueError, match=str(decay)):
        EMA(nn.Linear(1, 1), decay)
