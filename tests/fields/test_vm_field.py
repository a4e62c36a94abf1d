"""TensoRF's field: formulas written with plain tensors, changes of structure, and independence of the scene's scale."""

import copy
import shutil

import pytest
import torch

from co3d_ensemble.fields.encoding import harmonic_encoding
from co3d_ensemble.fields.vm_field import PENALTIES, VMField
from co3d_ensemble.functional import vm, vm_penalties

BOX = torch.tensor([[-1.0, -0.5, 0.25], [1.0, 0.75, 2.5]])
SMALL = {"resolution": (9, 6, 11), "n_density": 3, "n_appearance": 4, "n_features": 5, "n_hidden": 16, "density_shift": -1.0}
INNER = torch.tensor([[-0.4, -0.2, 0.9], [0.6, 0.4, 2.0]])


def small(box=BOX, **changes) -> VMField:
    torch.manual_seed(0)
    field = VMField(box, **{**SMALL, "init_std": 0.7, **changes})
    for parameter in field.network():  # biases count too
        torch.nn.init.normal_(parameter, std=0.3)
    return field


def samples(n=300, box=BOX):
    generator = torch.Generator().manual_seed(1)
    points = box[0] + torch.rand(n, 3, generator=generator) * (box[1] - box[0])
    directions = torch.nn.functional.normalize(torch.randn(7, 3, generator=generator), dim=-1)
    return points, directions, torch.randint(7, (n,), generator=generator)


def outputs(field, points, directions, ray):
    return field.density(points), field.color(points, directions, ray)


def assert_close(got, expected, tolerance=2e-5):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_density_is_the_softplus_of_the_factorization_in_units_of_the_box():
    field, (points, _, _) = small(distance_scale=25.0), samples()
    raw = vm.vm_sum(field.density_planes, field.density_lines, (points - BOX[0]) / (BOX[1] - BOX[0]))
    expected = (1 + (raw - 1).exp()).log() * 25 / (2.25 / 3)  # longest side 2.25
    torch.testing.assert_close(field.density(points), expected, rtol=1e-4, atol=1e-4)


def test_colour_is_the_network_of_the_reference_written_with_matrices():
    field, (points, directions, ray) = small(), samples(20)
    weights = dict(field.named_parameters())
    position = (points - BOX[0]) / (BOX[1] - BOX[0])
    products = vm.vm_project(field.appearance_planes, field.appearance_lines, position, torch.eye(12))
    got = field.color(points, directions, ray)
    for i in range(len(points)):
        features, view = weights["basis.weight"] @ products[i], directions[ray[i]]
        hidden = torch.cat((harmonic_encoding(features, 2), harmonic_encoding(view, 2)))
        for layer in range(2):
            hidden = (weights[f"mlp.{layer}.weight"] @ hidden + weights[f"mlp.{layer}.bias"]).clamp_min(0)
        expected = 1 / (1 + torch.exp(-weights["mlp.2.weight"] @ hidden - weights["mlp.2.bias"]))
        torch.testing.assert_close(got[i], expected, rtol=1e-4, atol=1e-5)


def test_the_default_sizes_are_those_of_the_reference():
    field = VMField(BOX, resolution=(4, 5, 6))
    assert field.mlp[0].in_features == 150 and field.mlp[1].in_features == 128 and field.basis.weight.shape == (27, 144)
    assert [tuple(p.shape) for p in field.density_planes] == [(4, 5, 16), (4, 6, 16), (5, 6, 16)]
    assert [tuple(p.shape) for p in field.appearance_lines] == [(6, 48), (5, 48), (4, 48)]
    assert field.resolution == (4, 5, 6) and (field.mlp[-1].bias == 0).all()
    assert len(field.factors()) == 12
    assert sorted(map(id, field.factors() + field.network())) == sorted(map(id, field.parameters()))


def test_density_is_zero_outside_the_box_without_a_gradient_and_its_faces_belong_to_it():
    field = small()
    outside = torch.tensor([[1.01, 0.0, 1.0], [0.0, -0.6, 1.0], [torch.nan, 0, 0], [torch.inf, 0, 0]])
    density = field.density(outside)
    assert (density == 0).all()
    density.sum().backward()
    assert all((p.grad == 0).all() for p in [*field.density_planes, *field.density_lines])
    assert (field.density(BOX) > 0).all()


def test_a_box_and_points_in_double_precision_are_taken_and_a_field_made_double_answers_in_it():
    batch = samples()
    expected = outputs(small(), *batch)
    assert_close(outputs(small(BOX.double()), batch[0].double(), *batch[1:]), expected)
    exact = outputs(small().double(), batch[0].double(), batch[1].double(), batch[2])
    assert all(x.dtype == torch.float64 for x in exact)
    assert_close([x.float() for x in exact], expected, 1e-4)


def test_every_one_of_very_many_samples_is_answered_in_its_place():
    field, (points, directions, ray) = small(), samples(40_001)
    with torch.no_grad():
        whole = outputs(field, points, directions, ray)
        for part in (slice(0, 5), slice(16_380, 16_390), slice(39_990, 40_001)):
            assert_close(outputs(field, points[part], directions, ray[part]), [x[part] for x in whole])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_sample_at_all_gives_zero_gradients(precision):
    field = small(precision=precision)
    density, color = outputs(field, torch.zeros(0, 3), torch.zeros(5, 3), torch.zeros(0, dtype=torch.long))
    assert density.shape == (0,) and color.shape == (0, 3)
    (density.sum() + color.sum()).backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in field.parameters())


@pytest.mark.parametrize("change", ["none", "crop", "upsample"])
@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_colours_and_opacities_do_not_depend_on_the_scale_of_the_scene(scale, change):
    results = []
    for factor in (1.0, scale):
        field = small(BOX * factor)
        if change == "crop":
            field.crop(INNER * factor)
        elif change == "upsample":
            field.upsample((12, 13, 9))
        points, directions, ray = samples()
        density, color = outputs(field, points * factor, directions, ray)
        results.append((-torch.expm1(-density * 0.05 * factor), color))
    assert_close(results[1], results[0], 1e-4)
    assert 0.05 < results[0][0].mean() < 0.95  # neither empty nor full, where nothing could differ


def test_a_crop_snaps_outward_to_vertices_and_changes_nothing_inside():
    field, (points, directions, ray) = small(), samples(2000)
    before = outputs(field, points, directions, ray)
    field.crop(INNER)
    spacing = (BOX[1] - BOX[0]) / torch.tensor([8.0, 5.0, 10.0])
    first, last = (INNER - BOX[0]) / spacing
    torch.testing.assert_close(field.box, BOX[0] + torch.stack((first.floor(), last.ceil())) * spacing)
    assert field.resolution == (6, 4, 7) and torch.equal(field.initial_box, BOX)
    inside = ((points >= field.box[0]) & (points <= field.box[1])).all(dim=-1)
    assert 200 < inside.sum() < 1000
    assert_close([x[inside] for x in outputs(field, points, directions, ray)], [x[inside] for x in before], 1e-4)
    assert (field.density(points)[~inside] == 0).all()


def test_a_crop_to_vertices_takes_just_those_whatever_the_rounding():
    for factor in (0.1, 1 / 3, 7.7):
        field = small(BOX * factor)
        spacing = (field.box[1] - field.box[0]) / torch.tensor([8.0, 5.0, 10.0])
        wanted = torch.stack((field.box[0] + 1 * spacing, field.box[0] + 3 * spacing))
        field.crop(wanted)
        assert field.resolution == (3, 3, 3)
        torch.testing.assert_close(field.box, wanted)


def test_a_crop_leaves_at_least_two_vertices_per_axis():
    for point in (BOX[0], BOX[1], BOX.mean(dim=0)):
        field = small()
        field.crop(torch.stack((point, point)))
        assert min(field.resolution) == 2 and max(field.resolution) <= 3
        assert (field.box[0] <= point).all() and (field.box[1] >= point).all() and (field.box[1] > field.box[0]).all()


@pytest.mark.parametrize("wanted", [INNER.flip(0), INNER + 10, BOX + torch.tensor([[-9.0], [9.0]]), BOX])
def test_an_empty_disjoint_or_enclosing_box_leaves_the_field_as_it_is(wanted):
    field = small()
    state = copy.deepcopy(field.state_dict())
    mapped = field.crop(wanted)
    assert all(torch.equal(value, state[name]) for name, value in field.state_dict().items())
    assert torch.equal(mapped("density_lines.0", state["density_lines.0"]), state["density_lines.0"])


def test_upsampling_to_a_multiple_changes_no_output():
    field, batch = small(), samples()
    before = outputs(field, *batch)
    field.upsample((17, 11, 31))
    assert field.resolution == (17, 11, 31)
    assert_close(outputs(field, *batch), before, 1e-4)


def test_the_returned_map_does_to_any_tensor_what_was_done_to_the_parameter():
    for change in (lambda field: field.crop(INNER), lambda field: field.upsample((12, 7, 20))):
        field = small()
        before = {name: parameter.detach().clone() for name, parameter in field.named_parameters()}
        mapped = change(field)
        for name, parameter in field.named_parameters():
            assert torch.equal(mapped(name, before[name]), parameter)
            other = torch.randn_like(before[name])
            torch.testing.assert_close(mapped(name, 2 * before[name] - other), 2 * parameter - mapped(name, other), rtol=1e-5, atol=1e-5)
            assert not mapped(name, before[name]).requires_grad
        assert mapped("mlp.0.weight", before["mlp.0.weight"]) is before["mlp.0.weight"]


def test_changes_of_structure_replace_factors_keep_their_flags_and_leave_the_network():
    field = small()
    field.density_planes[1].requires_grad_(False)
    old_factors, old_network = field.factors(), field.network()
    field.upsample((10, 7, 12))
    assert all(isinstance(new, torch.nn.Parameter) and new is not old for new, old in zip(field.factors(), old_factors))
    assert [p.requires_grad for p in field.factors()] == [p.requires_grad for p in old_factors]
    assert all(new is old for new, old in zip(field.network(), old_network))
    assert all(p.is_contiguous() for p in field.factors())


def test_a_state_saved_after_upsampling_and_cropping_loads_into_a_field_of_any_shape_with_the_same_outputs():
    field, batch = small(), samples()
    field.upsample((12, 13, 14))
    field.crop(INNER)
    other = small(BOX * 3 + 1, resolution=(4, 5, 6))
    other.appearance_lines[2].requires_grad_(False)
    parameters = list(other.parameters())
    outputs(other, *batch)[0].sum().backward()  # gradients of the old shapes must not stay
    other.load_state_dict(field.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outputs(other, *batch), outputs(field, *batch)))
    assert other.resolution == field.resolution and torch.equal(other.initial_box, BOX)
    assert all(a is b for a, b in zip(parameters, other.parameters()))  # an optimizer that holds them still does
    assert not other.appearance_lines[2].requires_grad and other.appearance_lines[1].requires_grad
    outputs(other, *batch)[0].sum().backward()
    assert all(p.grad.shape == p.shape for p in other.density_planes)


def test_a_state_of_another_number_of_components_is_refused():
    with pytest.raises(RuntimeError, match="density_planes.0"):
        small().load_state_dict(small(n_density=2).state_dict())


def test_penalties_are_those_of_the_functions_under_their_names():
    field = small(tv_normalization="reference", tv_lines=True)
    got = field.penalties()
    assert tuple(sorted(got)) == tuple(sorted(PENALTIES))
    for kind, planes, lines in (
        ("density", field.density_planes, field.density_lines),
        ("appearance", field.appearance_planes, field.appearance_lines),
    ):
        expected = vm_penalties.vm_penalties(planes, lines, normalization="reference", tv_lines=True)
        assert (got[f"tv_{kind}"], got[f"l1_{kind}"]) == expected


def test_penalties_are_added_to_gradients_as_those_of_their_weighted_sum():
    field, other = small(), small()
    weights = {"tv_density": 2.0, "l1_density": 0.1, "l1_appearance": 0.3}
    values = other.penalties(weights)
    sum(weights[name] * value for name, value in values.items()).backward()
    added = field.add_penalties(weights)
    assert added.keys() == values.keys()
    for name, value in values.items():
        torch.testing.assert_close(added[name], value.detach())
    for a, b in zip(field.factors(), other.factors(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-9)
    with pytest.raises(ValueError, match="tv_colour"):
        field.add_penalties({"tv_colour": 1.0})


def test_a_penalty_that_is_not_asked_for_is_not_computed(monkeypatch):
    field = small()
    touched = []
    original = vm_penalties._Penalties.apply
    monkeypatch.setattr(vm_penalties._Penalties, "apply", lambda factor, *rest: touched.append(factor) or original(factor, *rest))
    assert set(field.penalties(["l1_density"])) == {"l1_density"}
    assert {id(f) for f in touched} == {id(f) for f in [*field.density_planes, *field.density_lines]}
    assert field.penalties([]) == {}
    with pytest.raises(ValueError, match="tv_colour"):
        field.penalties(["tv_colour"])


def test_bfloat16_is_close_to_float32_in_outputs_and_gradients_and_returns_float32():
    batch, results = samples(400), []
    for precision in ("float32", "bfloat16"):
        field = small(precision=precision)
        density, color = outputs(field, *batch)
        color.square().mean().backward()
        assert density.dtype == color.dtype == torch.float32
        results.append((color, torch.cat([p.grad.flatten() for p in field.parameters() if p.grad is not None])))
    (exact, exact_gradient), (rough, rough_gradient) = results
    assert 0 < (rough - exact).abs().mean() < 0.02  # 0 would mean that the option does nothing
    assert torch.nn.functional.cosine_similarity(exact_gradient, rough_gradient, dim=0) > 0.99


# torch.compile looks for the gradient of its inputs and hides the warning, which it cannot where warnings are errors
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_compile_option_changes_neither_outputs_nor_gradients_for_any_number_of_samples(monkeypatch):
    # without a code generator: what is tested is the graph that is traced, and that 0 or other counts do not break it
    traced = []
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **options: traced.append(fn) or compiler(fn, **options, backend="aot_eager"))
    plain, compiled = small(), small(compile=True)
    assert len(traced) == 1
    for n in (50, 31, 0):
        batch = samples(n)
        for field in (plain, compiled):
            field.zero_grad()
            field.color(*batch).square().sum().backward()
        assert_close([compiled.color(*batch)], [plain.color(*batch)], 1e-4)
        for a, b in zip(compiled.network(), plain.network()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler itself
@pytest.mark.skipif(shutil.which("gcc") is None and shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_the_network_compiled_to_machine_code_gives_the_same_colours():
    plain, compiled = small(), small(compile=True)
    with torch.no_grad():
        assert_close([compiled.color(*samples())], [plain.color(*samples())], 1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": (1, 4, 4)}, r"resolution=\(1, 4, 4\)"),
        ({"n_density": 0}, "n_density=0"),
        ({"precision": "float8"}, "precision='float8'.*bfloat16"),
        ({"tv_normalization": "mean"}, "tv_normalization='mean'.*content"),
        ({"box": BOX.flip(0)}, "box="),
        ({"box": BOX[0]}, "box="),
        ({"box": BOX * torch.nan}, "box="),
    ],
)
def test_bad_arguments_are_refused_by_value(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_bad_changes_of_structure_are_refused_by_value_and_change_nothing():
    field = small()
    with pytest.raises(ValueError, match=r"resolution=\(4, 1, 4\)"):
        field.upsample((4, 1, 4))
    with pytest.raises(ValueError, match="box=.*nan"):
        field.crop(BOX * torch.nan)
    assert field.resolution == SMALL["resolution"]
