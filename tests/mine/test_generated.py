import math

import numpy as np
import pytest
import torch

from co3d_ensemble.mine import generated
from co3d_ensemble.mine.generated import GeneratedPairs, plan_scene
from co3d_ensemble.mine.generated_room import KINDS, Look, Room, Thing, Wall, random_room, with_shuffled_looks
from co3d_ensemble.mine.generated_view import Viewpoints, photograph, trace_depth

SIZE = {"height": 24, "width": 36}
GRAY = Look("plain", ((0.5, 0.5, 0.5), (0.0, 0.0, 0.0)), 1.0, (1.0, 0.0, 0.0), (0.0, 0.0, 0.0))


def scene(index, **settings):
    return plan_scene(index, **{"seed": 3, "n_views": 4, **SIZE, **settings})


def signed_distance(room, point, *, walls=True):
    """Lower bound of the distance from a point to the nearest surface: an independent description of the same shapes."""
    distances = [np.dot(wall.normal, point) - wall.offset for wall in room.walls] if walls else []
    for thing in room.things:
        x, y, z = np.asarray(point) - thing.center
        c, s = math.cos(thing.turn), math.sin(thing.turn)
        local = np.array([c * x + s * z, y, -s * x + c * z])
        if thing.shape == "ball":
            distances.append(np.linalg.norm(local) - thing.half[0])
            continue
        outside = np.abs(local) - thing.half
        if thing.shape == "cylinder":
            outside = np.array([math.hypot(local[0], local[2]) - thing.half[0], outside[1]])
        distances.append(np.linalg.norm(outside.clip(0)) + min(outside.max(), 0))
    return min(distances)


def march(room, origin, direction, *, walls=True, limit=60.0):
    """Length of a unit ray to the first surface by sphere tracing, or None."""
    travelled = 1e-5
    while travelled < limit:
        step = signed_distance(room, origin + travelled * direction, walls=walls)
        if step < 1e-9:
            return travelled
        travelled += step
    return None


def test_depth_is_the_z_of_the_first_surface_found_by_sphere_tracing():
    for index in range(3):
        plan = scene(index)
        depth = trace_depth(plan.room, plan.views)
        v = index % 4
        R, K = plan.views.R[v].numpy(), plan.views.K.numpy()
        center = -R.T @ plan.views.t[v].numpy()
        for row, column in [(2, 3), (10, 20), (12, 7), (17, 30), (20, 18), (23, 35)]:
            direction = R.T @ np.linalg.inv(K) @ [column + 0.5, row + 0.5, 1.0]
            length = march(plan.room, center, direction / np.linalg.norm(direction))
            expected = length / np.linalg.norm(direction)
            assert depth[v, 0, row, column].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_thing_is_seen_where_it_stands_and_shades_the_floor(kind):
    shape, half = KINDS[kind]
    thing = Thing(shape, (0.2, -half[1], 3.0), half, 0.7, GRAY)
    height = math.radians(50)
    light = (math.cos(height), -math.sin(height), 0.0)
    walls = (Wall((0.0, -1.0, 0.0), 0.0, GRAY), Wall((0.0, 0.0, -1.0), -9.0, GRAY))
    room = Room(walls, (thing,), light, 0.4)
    R = torch.eye(3, dtype=torch.float64)[None]
    K = torch.tensor([[30.0, 0, 24], [0, 30, 16], [0, 0, 1]], dtype=torch.float64)
    views = Viewpoints(R, torch.tensor([[0.0, 1.4, 0.0]], dtype=torch.float64), K, 32, 48)
    depth, picture = trace_depth(room, views)[0, 0].numpy(), photograph(room, views, supersample=1)[0, 0].numpy()
    kinds_of_pixel = set()
    for row in range(1, 32, 2):
        for column in range(1, 48, 4):
            direction = np.linalg.inv(K.numpy()) @ [column + 0.5, row + 0.5, 1.0]
            point = np.array([0, -1.4, 0]) + depth[row, column] * direction
            assert march(room, np.array([0, -1.4, 0]), direction / np.linalg.norm(direction)) == pytest.approx(
                depth[row, column] * np.linalg.norm(direction), abs=1e-6
            )
            if abs(point[1]) < 1e-9:  # the floor
                shaded = march(room, point, np.array(light), walls=False) is not None
                lit = 0.4 if shaded else 0.4 + 0.6 * math.sin(height)
                assert picture[row, column] == pytest.approx(0.5 * lit, abs=1e-5)
                kinds_of_pixel.add(shaded)
            elif depth[row, column] < 8:
                kinds_of_pixel.add("thing")
    assert kinds_of_pixel == {True, False, "thing"}


def test_points_of_the_source_that_the_target_sees_have_the_depth_of_the_target_and_the_pose_is_the_pairs():
    pairs = GeneratedPairs(2, seed=3, height=48, width=72, n_points=0)
    shown = 0
    for i in range(8):
        pair = pairs[i]
        ys, xs = torch.meshgrid(torch.arange(48) + 0.5, torch.arange(72) + 0.5, indexing="ij")
        pixels = torch.stack((xs, ys, torch.ones_like(xs))).reshape(3, -1)
        source_points = torch.linalg.inv(pair.K_source) @ pixels * pair.source_depth.reshape(1, -1)
        target_points = pair.R @ source_points + pair.t[:, None]
        projected = pair.K_target @ target_points
        u, v = (projected[:2] / projected[2]).floor().long()
        inside = (u >= 1) & (u < 71) & (v >= 1) & (v < 47) & (target_points[2] > 0)
        z, u, v = target_points[2, inside], u[inside], v[inside]
        around = torch.stack([pair.target_depth[0, v + dv, u + du] for du in (-1, 0, 1) for dv in (-1, 0, 1)])
        flat = around.amax(0) / around.amin(0) < 1.15  # no edge near it
        ratio = z[flat] / around[4][flat]
        agrees = (ratio > 0.9) & (ratio < 1.12)
        assert (ratio > 0.9).float().mean() > 0.97  # nothing is in front of what the target sees, but for pixels' width
        assert agrees.float().mean() > 0.6
        shown += int(agrees.sum())
    assert shown > 8 * 500


def test_scenes_follow_from_seed_and_index_alone():
    first = GeneratedPairs(3, seed=5, random_target=False, n_points=0, **SIZE)
    later = GeneratedPairs(1, seed=5, first_scene=2, random_target=False, n_points=0, **SIZE)
    assert len(first) == 12 and len(later) == 4
    for i in range(4):  # in any order of access
        assert torch.equal(first[8 + i].source, later[i].source) and torch.equal(first[8 + i].source_depth, later[i].source_depth)
        assert first[8 + i].name == later[i].name == f"generated_5_2/{i}->{(i + 1) % 4}"
    other = GeneratedPairs(1, seed=6, first_scene=2, random_target=False, n_points=0, **SIZE)
    assert not torch.equal(other[0].source, later[0].source)
    assert not torch.equal(first[0].source_depth, first[4].source_depth)


def test_every_pair_keeps_the_promised_depth_spread_and_baseline():
    pairs = GeneratedPairs(6, seed=1, n_points=0, supersample=1, **SIZE)
    spans, counts = [], set()
    for i in range(len(pairs)):
        pair = pairs[i]
        low, middle, high = pair.source_depth.quantile(torch.tensor([0.02, 0.5, 0.98]))
        assert high / low >= 4
        assert 0.1 * middle <= pair.t.norm() <= 0.26 * middle
        assert generated.NEAREST_DEPTH * 0.9 < pair.source_depth.min() and pair.source_depth.max() < generated.FARTHEST_DEPTH * 1.1
        assert 0 <= pair.source.min() and pair.source.max() <= 1 and torch.isfinite(pair.source).all()
        spans.append(36 / (2 * float(pair.K_source[0, 0])))
    counts = {len(plan_scene(i, seed=1, n_views=2, **SIZE).room.things) for i in range(12)}
    assert min(spans) < math.tan(math.radians(30)) and max(spans) > math.tan(math.radians(33))  # fields of view differ
    assert len(counts) > 2  # and so do the numbers of things


def test_all_baselines_of_a_scene_have_one_length():
    views = scene(0).views
    centers = -(views.R.transpose(1, 2) @ views.t[:, :, None])[:, :, 0]
    distances = torch.pdist(centers)
    assert distances.min().item() == pytest.approx(distances.max().item(), rel=1e-9)


def test_shuffled_looks_change_the_picture_of_every_thing_and_no_depth():
    plain = GeneratedPairs(2, seed=4, random_target=False, n_points=0, **SIZE)
    shuffled = GeneratedPairs(2, seed=4, random_target=False, n_points=0, shuffle_looks=True, **SIZE)
    for i in (0, 4):
        assert torch.equal(plain[i].source_depth, shuffled[i].source_depth) and torch.equal(plain[i].t, shuffled[i].t)
        assert not torch.equal(plain[i].source, shuffled[i].source)
    room = random_room(np.random.default_rng(2))
    other = with_shuffled_looks(room)
    assert len(room.things) >= 2 and all(a.look != b.look for a, b in zip(room.things, other.things))
    assert {a.look for a in room.things} == {b.look for b in other.things} and other.walls == room.walls


def test_looks_are_independent_of_depth():
    looks, places = [], []
    for i in range(150):
        for thing in random_room(np.random.default_rng(i)).things:
            looks.append([*thing.look.colors[0], *thing.look.colors[1], thing.look.frequency])
            places.append(math.log(thing.center[2]))
    correlation = np.corrcoef(np.column_stack((looks, places)), rowvar=False)[-1, :-1]
    assert np.abs(correlation).max() < 4 / math.sqrt(len(places))  # four standard deviations of chance


def test_the_target_is_drawn_from_torchs_generator_and_is_never_the_source():
    pairs = GeneratedPairs(1, n_points=8, **SIZE)
    torch.manual_seed(0)
    first = [pairs[1] for _ in range(12)]
    torch.manual_seed(0)
    again = [pairs[1] for _ in range(12)]
    assert [p.name for p in first] == [p.name for p in again]
    assert {p.name.split("/")[1] for p in first} == {"1->0", "1->2", "1->3"}
    assert all(torch.equal(a.source_points, b.source_points) for a, b in zip(first, again))
    assert not torch.equal(first[0].source_points, first[1].source_points)


def test_sparse_points_are_depths_at_pixel_centres_and_none_are_given_for_zero():
    pair = GeneratedPairs(1, n_points=40, **SIZE)[0]
    assert pair.source_points.shape == pair.target_points.shape == (40, 3)
    for points, depth in ((pair.source_points, pair.source_depth), (pair.target_points, pair.target_depth)):
        x, y, z = points.T
        assert torch.equal(x - x.floor(), torch.full_like(x, 0.5))
        assert torch.equal(depth[0, y.long(), x.long()], z)
    assert GeneratedPairs(1, n_points=0, **SIZE)[0].source_points is None


@pytest.mark.parametrize(
    "settings", [{"n_views": 1}, {"n_views": 5}, {"n_scenes": 0}, {"seed": -1}, {"height": 8}, {"n_points": -1}, {"supersample": 0}]
)
def test_bad_settings_are_refused_by_name(settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        GeneratedPairs(**settings)


def test_an_index_outside_is_an_error():
    pairs = GeneratedPairs(1, **SIZE)
    for index in (-1, 4):
        with pytest.raises(IndexError, match=str(index)):
            pairs[index]
