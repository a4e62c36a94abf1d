import gzip
import importlib
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from co3d_ensemble.data.synthetic import OBJECTS, SyntheticConfig, generate_dataset, generate_sequence, plan_sequence
from co3d_ensemble.data.synthetic_objects import make_scene
from co3d_ensemble.data.synthetic_scene import Scene, Solid, Surfaces, Texture, Tracer, surface_points
from co3d_ensemble.data.synthetic_view import render_view, render_views
from co3d_ensemble.functional.cameras import camera_center, pinhole_from_ndc, pixel_centers, pixel_rays, project, so3_exp

SMALL = SyntheticConfig(n_known=8, n_val=2, n_unseen=3, height=24, width=32, image_format="png", supersample=1)
GREY = Texture((0.5, 0.5, 0.5))


def is_inside(points, solid):
    """Points (n, 3) in a solid, from the definition: undo shift, rotation and stretch, then test the unit shape."""
    rotation = so3_exp(torch.tensor(solid.rotation, dtype=torch.float64)).numpy()
    x, y, z = (((points - np.array(solid.center)) @ rotation) / np.array(solid.size)).T
    inside = {
        "ellipsoid": x * x + y * y + z * z < 1,
        "box": (abs(x) < 1) & (abs(y) < 1) & (abs(z) < 1),
        "cylinder": (x * x + z * z < 1) & (abs(y) < 1),
    }[solid.shape]
    return inside if solid.cut is None else inside & ~is_inside(points, solid.cut)


def march(origin, direction, solids, start, end, n_steps=1500):
    """First parameter at which a ray is inside any solid: fixed steps, then bisection; inf if it never is."""

    def inside(t):
        points = origin + np.atleast_1d(t)[:, None] * direction
        return np.any([is_inside(points, solid) for solid in solids], axis=0)

    grid = np.linspace(start, end, n_steps)
    found = inside(grid)
    if not found.any():
        return math.inf
    low, high = grid[found.argmax() - 1], grid[found.argmax()]
    for _ in range(35):
        middle = (low + high) / 2
        low, high = (low, middle) if inside(middle)[0] else (middle, high)
    return high


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("synthetic")
    return generate_dataset(root, {"mug": ["manyview_dev_0", "manyview_test_0"]}, SMALL)


def load(path):
    return json.loads(gzip.decompress(path.read_bytes()))


@pytest.mark.parametrize("name", OBJECTS)
def test_first_hits_equal_marching_into_the_union_of_solids(name):
    scene = make_scene(name, np.random.default_rng(0))
    solids, rng = scene.solids[: scene.n_object], np.random.default_rng(1)
    origins = rng.normal(size=(10, 3))
    origins *= 3.0 / np.linalg.norm(origins, axis=1, keepdims=True)
    directions = rng.uniform(-0.5, 0.5, size=(10, 3)) - origins
    first, _ = Surfaces(solids).first_hit(torch.from_numpy(origins), torch.from_numpy(directions))
    assert 3 <= first.isfinite().sum()
    for origin, direction, t in zip(origins, directions, first.tolist()):
        marched = march(origin, direction, solids, 0.5, 1.5)
        grazing = t < marched and any(is_inside((origin + (t + 1e-6) * direction)[None], solid)[0] for solid in solids)
        assert grazing or t == pytest.approx(marched, abs=1e-9)  # fixed steps may jump over a chord shorter than a step


@pytest.mark.parametrize("shape", ["ellipsoid", "box", "cylinder"])
def test_intervals_of_a_cut_solid_are_its_interval_minus_the_cuts(shape):
    cut = Solid(shape, (0, 0, 0), (0.5, 2.0, 0.5), GREY)
    surfaces = Surfaces((Solid("box", (0, 0, 0), (1, 1, 1), GREY, cut=cut),))
    origin, direction = torch.tensor([[-3.0, 0, 0]], dtype=torch.float64), torch.tensor([[1.0, 0, 0]], dtype=torch.float64)
    enter, leave = surfaces.intervals(origin, direction)
    found = sorted((a, b) for a, b in zip(enter[:, 0].tolist(), leave[:, 0].tolist()) if a < b)
    assert found == [(pytest.approx(2.0), pytest.approx(2.5)), (pytest.approx(3.5), pytest.approx(4.0))]
    through_the_hole = torch.tensor([[0.0, 3.0, 0.0]], dtype=torch.float64), torch.tensor([[0.0, -1, 0]], dtype=torch.float64)
    assert surfaces.first_hit(*through_the_hole)[0].isinf().all()


def test_a_ray_along_a_cylinders_axis_hits_its_cap_and_misses_beside_it():
    surfaces = Surfaces((Solid("cylinder", (0, 0, 0), (1, 2, 1), GREY),))
    origins = torch.tensor([[0.3, 5.0, 0.2], [0.9, 5.0, 0.9], [0.0, 5.0, 0.0]], dtype=torch.float64)
    first, _ = surfaces.first_hit(origins, torch.tensor([[0.0, -1.0, 0.0]], dtype=torch.float64))
    assert first.tolist() == [3.0, math.inf, 3.0]


def test_a_ball_shades_the_points_behind_it_and_not_its_lit_side():
    surfaces = Surfaces((Solid("ellipsoid", (0, 0, 0), (1, 1, 1), GREY),))
    points = torch.tensor([[0.0, -2, 0], [0, 2, 0], [0, 1, 0], [1.5, -2, 0], [0, -1, 0]], dtype=torch.float64)
    up = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    assert surfaces.occluded(points, up).tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_are_not_convex_a_ray_hits_leaves_and_hits_again(name):
    scene = make_scene(name, np.random.default_rng(0))
    rng = np.random.default_rng(2)
    origins = torch.from_numpy(rng.normal(size=(400, 3)))
    origins = 3 * origins / origins.norm(dim=1, keepdim=True)
    directions = torch.from_numpy(rng.uniform(-0.6, 0.6, size=(400, 3))) - origins
    enter, leave = Surfaces(scene.solids[: scene.n_object]).intervals(origins, directions)
    n_reentering = 0
    for ray in range(400):
        spans = sorted((a, b) for a, b in zip(enter[:, ray].tolist(), leave[:, ray].tolist()) if a < b)
        reached = spans[0][1] if spans else math.inf
        for a, b in spans:
            if a > reached + 0.02:
                n_reentering += 1
                break
            reached = max(reached, b)
    assert n_reentering > 20


def test_normals_are_the_gradient_of_depth_and_point_at_the_camera():
    plan = plan_sequence("mug", "s", SMALL)
    tracer, camera = Tracer(plan.scene), plan.cameras[0]
    origins, directions = pixel_rays(camera, pixel_centers(24, 32).double())
    origins, step = origins / plan.scene.scale, 1e-6
    first, row = tracer.first_hit(origins, directions)
    hit = first.isfinite()
    points = origins + first[:, None] * directions
    normals = tracer.normals(points[hit], row[hit])
    assert ((normals * directions[hit]).sum(dim=1) < 0).all()
    for shift in torch.eye(3, dtype=torch.float64) * step:
        moved, moved_row = tracer.first_hit(origins + shift, directions)
        tangent = (points + shift + (moved - first)[:, None] * directions - points)[hit] / step
        # curved surfaces leave their tangent plane by ~ step / radius; rays next to an edge land on another surface
        smooth = (moved_row == row)[hit] & (tangent.norm(dim=1) < 10)
        assert smooth.float().mean() > 0.95
        assert (tangent[smooth] * normals[smooth]).sum(dim=1).abs().quantile(0.98) < 1e-3


@pytest.mark.parametrize("category", OBJECTS)
def test_culling_by_the_bounding_sphere_changes_no_hit_and_no_shadow(category):
    plan = plan_sequence(category, "s", SMALL)
    tracer, everything = Tracer(plan.scene), Surfaces(plan.scene.solids)
    origins, directions = pixel_rays(plan.cameras[3], pixel_centers(24, 32).double())
    first, row = tracer.first_hit(origins, directions)
    expected, expected_row = everything.first_hit(origins, directions)
    assert torch.equal(first.isfinite(), expected.isfinite())
    assert torch.allclose(first, expected, atol=1e-12)
    assert torch.equal(tracer.owner[row][first.isfinite()], everything.owner[expected_row][first.isfinite()])
    points = (origins + first[:, None] * directions)[first.isfinite()]
    light = torch.tensor([[0.45, 0.8, 0.4]], dtype=torch.float64)
    assert torch.equal(tracer.occluded(points, light), everything.occluded(points, light))


def test_depth_of_one_view_predicts_mask_and_depth_of_another():
    config = SyntheticConfig(n_known=8, n_val=0, n_unseen=1, height=32, width=32)
    plan = plan_sequence("bear", "s", config)
    first, second = plan.cameras[0], plan.cameras[1]
    view = render_view(plan.scene, first, supersample=1)
    origins, directions = pixel_rays(first, pixel_centers(32, 32).double())
    distance = view.depth.flatten() / (directions @ first.R[:, 2])
    points = (origins + distance[:, None] * directions)[view.mask.flatten() > 0]
    pixels, z = project(points, second)
    tracer, center = Tracer(plan.scene), camera_center(second.R, second.T)[None]
    reached, row = tracer.first_hit(center, points - center)
    visible = reached > 1 - 1e-9
    assert 0.3 < visible.double().mean() < 1  # some of it is hidden from the second camera: the object is not flat
    assert (reached < 1 + 1e-9).all()  # nothing is ever seen behind a point that the first camera saw
    # the second photograph at exactly those pixels: a one-pixel camera around each
    for pixel, depth in list(zip(pixels[visible], z[visible]))[::40]:
        spot = type(second)(second.R, second.T, second.focal, second.principal - pixel + 0.5, 1, 1)
        seen = render_view(plan.scene, spot, supersample=1)
        assert seen.mask.item() == 1
        assert seen.depth.item() == pytest.approx(depth.item(), rel=1e-9)


@pytest.mark.parametrize("category", OBJECTS)
def test_the_object_covers_15_to_50_percent_of_every_frame_and_is_inside_it(category):
    config = SyntheticConfig(n_known=10, n_val=1, n_unseen=1, height=40, width=40, seed=3)
    plan = plan_sequence(category, "s", config)
    for view in render_views(plan.scene, plan.cameras, supersample=1):
        assert 0.15 < view.mask.mean() < 0.5
        edge = view.mask.clone()
        edge[:, 1:-1, 1:-1] = 0
        assert edge.sum() == 0
        assert (view.depth[view.mask > 0] > 0).all()
        assert ((view.mask == 0) & (view.depth > 0)).float().mean() > 0.2  # clutter is photographed but is not the object


def test_solids_lie_in_the_unit_sphere_that_scene_scale_multiplies():
    for name in OBJECTS:
        scene = make_scene(name, np.random.default_rng(0))
        assert surface_points(scene.solids[: scene.n_object]).norm(dim=1).max() == pytest.approx(1)


def test_scene_scale_multiplies_depth_and_changes_no_picture():
    small, large = (SyntheticConfig(4, 1, 1, 16, 16, scene_scale=scale) for scale in (0.125, 8.0))
    plans = [plan_sequence("plant", "s", config) for config in (small, large)]
    first, second = (render_view(plan.scene, plan.cameras[2]) for plan in plans)
    assert torch.equal(first.depth * 64, second.depth)  # powers of two: bit for bit
    assert torch.equal(first.rgb, second.rgb)
    assert torch.equal(first.mask, second.mask)
    assert first.depth.max() > 0


def test_supersampling_averages_rays_at_the_subpixels():
    plan = plan_sequence("truck", "s", SMALL)
    camera = plan.cameras[0]
    fine = render_view(plan.scene, camera.resized(48, 64), supersample=1).rgb
    coarse = render_view(plan.scene, camera, supersample=2).rgb
    assert torch.allclose(coarse, torch.nn.functional.avg_pool2d(fine[None], 2)[0], atol=1e-12)


def test_implicitron_reads_what_was_rendered(dataset):
    importlib.import_module("co3d_ensemble.plugin")  # before PyTorch3D: brings the stand-ins of compiled ops
    from pytorch3d.implicitron.dataset.json_index_dataset_map_provider_v2 import JsonIndexDatasetMapProviderV2
    from pytorch3d.implicitron.tools.config import expand_args_fields

    expand_args_fields(JsonIndexDatasetMapProviderV2)
    options = {"load_depths": True, "load_depth_masks": True, "box_crop": False, "image_height": None, "image_width": None}
    maps = JsonIndexDatasetMapProviderV2(
        category="mug", subset_name="manyview_dev_0", dataset_root=str(dataset), dataset_JsonIndexDataset_args=options
    ).get_dataset_map()
    plan = plan_sequence("mug", "synthetic_manyview_dev_0", SMALL)
    assert (len(maps.train), len(maps.val), len(maps.test)) == (8, 2, 3)
    for split in ("train", "val", "test"):
        frame = getattr(maps, split)[1]
        i = plan.frame_numbers.index(int(frame.frame_number))
        assert plan.splits[i] == split
        view, camera = render_view(plan.scene, plan.cameras[i], supersample=SMALL.supersample), plan.cameras[i]
        assert torch.allclose(torch.as_tensor(frame.image_rgb).double(), view.rgb, atol=0.5 / 255 + 1e-6)
        assert torch.equal(torch.as_tensor(frame.fg_probability).double(), view.mask)
        assert torch.allclose(torch.as_tensor(frame.depth_map).double(), view.depth, rtol=2**-11)
        assert torch.equal(torch.as_tensor(frame.depth_mask) > 0, view.depth > 0)
        points = torch.tensor([[0.1, 0.2, -0.3], [0.5, -0.4, 0.2]], dtype=torch.float64)
        pixels, z = project(points, camera)
        theirs = frame.camera.transform_points_screen(points.float()[None], image_size=((24, 32),))[0]
        assert torch.allclose(theirs[:, :2].double(), pixels, atol=1e-4)
        assert torch.allclose(frame.camera.get_world_to_view_transform().transform_points(points.float())[..., 2].double(), z)


def test_splits_are_disjoint_and_annotations_complete(dataset):
    frames = {(f["sequence_name"], f["frame_number"]): f for f in load(dataset / "mug" / "frame_annotations.jgz")}
    assert len(frames) == 2 * 13
    assert len(load(dataset / "mug" / "sequence_annotations.jgz")) == 2
    assert json.loads((dataset / "category_to_subset_name_list.json").read_text()) == {"mug": ["manyview_dev_0", "manyview_test_0"]}
    for subset in ("manyview_dev_0", "manyview_test_0"):
        lists = json.loads((dataset / f"mug/set_lists/set_lists_{subset}.json").read_text())
        entries = [tuple(entry) for split in ("train", "val", "test") for entry in lists[split]]
        assert len(entries) == len(set(entries)) == 13
        batches = json.loads((dataset / f"mug/eval_batches/eval_batches_{subset}.json").read_text())
        assert [batch[0] for batch in batches] == lists["test"]
        for sequence_name, frame_number, path in entries:
            frame = frames[sequence_name, frame_number]
            assert frame["image"]["path"] == path
            assert frame_number != int(path[-10:-4])
            assert all((dataset / p).exists() for p in (path, frame["mask"]["path"], frame["depth"]["path"]))
        assert all(frames[s, n]["meta"]["frame_type"].endswith("known") for s, n, _ in lists["train"])
        assert all(frames[s, n]["meta"]["frame_type"].endswith("unseen") for s, n, _ in lists["test"])


def test_targets_of_test_sequences_are_black_and_nothing_else_is(dataset):
    for frame in load(dataset / "mug" / "frame_annotations.jgz"):
        redacted = frame["meta"]["frame_type"] == "test_unseen"
        for path in (frame["image"]["path"], frame["mask"]["path"], frame["depth"]["path"], frame["depth"]["mask_path"]):
            assert (np.asarray(Image.open(dataset / path)).max() == 0) == redacted


def test_equal_seeds_give_equal_files_and_other_seeds_others(tmp_path):
    files = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = SyntheticConfig(3, 1, 1, 12, 12, seed=seed, mask_noise=0.1, pose_noise=0.01)
        generate_sequence(tmp_path / name, "bear", "s", "manyview_dev_0", config)
        paths = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        files[name] = {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in paths}
    assert files["a"] == files["b"]
    assert files["a"]["bear/s/images/frame000001.jpg"] != files["c"]["bear/s/images/frame000001.jpg"]


def test_pose_and_mask_noise_touch_known_frames_only_and_not_the_pictures(tmp_path):
    clean = SyntheticConfig(10, 3, 3, 32, 32, supersample=1, image_format="png")
    noisy = SyntheticConfig(10, 3, 3, 32, 32, supersample=1, image_format="png", mask_noise=0.08, pose_noise=0.05)
    for name, config in (("clean", clean), ("noisy", noisy)):
        generate_sequence(tmp_path / name, "bear", "s", "manyview_dev_0", config)
    n_changed, angles = 0, []
    for a, b in zip(load(tmp_path / "clean/bear/frame_annotations.jgz"), load(tmp_path / "noisy/bear/frame_annotations.jgz")):
        assert (tmp_path / "clean" / a["image"]["path"]).read_bytes() == (tmp_path / "noisy" / b["image"]["path"]).read_bytes()
        masks = [np.asarray(Image.open(tmp_path / n / f["mask"]["path"])) > 0 for n, f in (("clean", a), ("noisy", b))]
        assert b["mask"]["mass"] == masks[1].sum()
        if a["meta"]["frame_type"] == "dev_known":
            n_changed += int((masks[0] != masks[1]).any())
            difference = np.array(a["viewpoint"]["R"]).T @ np.array(b["viewpoint"]["R"])
            angles.append(math.acos(min(1.0, (np.trace(difference) - 1) / 2)))
            changed = (masks[0] != masks[1]).mean()
            assert changed < 0.25  # the boundary moves, the object stays
        else:
            assert a["viewpoint"] == b["viewpoint"]
            assert (masks[0] == masks[1]).all()
    assert n_changed == 10
    assert 0.02 < math.sqrt(np.mean(np.square(angles))) < 0.1


def test_both_intrinsics_formats_describe_the_same_camera(tmp_path):
    plan = plan_sequence("mug", "s", SMALL)
    for intrinsics_format in ("ndc_isotropic", "ndc_norm_image_bounds"):
        config = SyntheticConfig(8, 2, 3, 24, 32, supersample=1, intrinsics_format=intrinsics_format)
        root = generate_sequence(tmp_path / intrinsics_format, "mug", "s", "manyview_dev_0", config)
        viewpoint = load(root / "mug/frame_annotations.jgz")[4]["viewpoint"]
        R, T, focal, principal = (
            torch.tensor(viewpoint[key], dtype=torch.float64) for key in ("R", "T", "focal_length", "principal_point")
        )
        camera = pinhole_from_ndc(R, T, focal, principal, height=24, width=32, intrinsics_format=intrinsics_format)
        assert torch.allclose(camera.focal, plan.cameras[4].focal)
        assert torch.allclose(camera.principal, plan.cameras[4].principal)
        assert not torch.equal(camera.principal, torch.tensor([16.0, 12.0], dtype=torch.float64))


def test_objects_differ_and_an_unknown_category_gets_one():
    views = [render_view((p := plan_sequence(name, "s", SMALL)).scene, p.cameras[0]).mask for name in OBJECTS]
    assert all(not torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])
    assert len(plan_sequence("skateboard", "s", SMALL).cameras) == 13


def test_a_subset_of_another_sequence_is_not_replaced(dataset):
    with pytest.raises(ValueError, match="belongs to sequence"):
        generate_sequence(dataset, "mug", "other", "manyview_dev_0", SMALL)


@pytest.mark.parametrize(
    "setting, value",
    [("object", "cube"), ("texture", "fur"), ("n_known", 0), ("width", 4), ("mask_noise", -0.1), ("pose_noise", 9.0)]
    + [("scene_scale", 0.0), ("scene_scale", 1e6), ("intrinsics_format", "pixels"), ("image_format", "gif"), ("supersample", 0)],
)
def test_a_bad_setting_is_named_with_its_value(setting, value):
    with pytest.raises(ValueError, match=f"{setting}={value!r}"):
        SyntheticConfig(**{setting: value})


@pytest.mark.parametrize(
    "names, key",
    [(("../mug", "s", "manyview_dev_0"), "category"), (("mug", "a/b", "manyview_dev_0"), "sequence_name")]
    + [(("mug", "s", "fewview_dev"), "subset_name")],
)
def test_a_bad_name_is_refused_before_anything_is_written(tmp_path, names, key):
    with pytest.raises(ValueError, match=key):
        generate_sequence(tmp_path, *names, SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_scene_without_clutter_has_depth_exactly_on_its_mask():
    plan = plan_sequence("truck", "s", SMALL)
    bare = Scene(plan.scene.solids[: plan.scene.n_object], plan.scene.n_object)
    view = render_view(bare, plan.cameras[5])
    assert torch.equal(view.depth > 0, view.mask > 0)
    assert 0 < view.mask.mean() < 1
