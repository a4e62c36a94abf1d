import math

import pytest
import torch

from co3d_ensemble.mine.views import View, ViewPairs, chosen_points, make_pair, visible_points


def view(name="a", *, R=None, t=(0.0, 0.0, 0.0), points=None, size=(4, 6)):
    K = torch.tensor([[5.0, 0, 3], [0, 5, 2], [0, 0, 1]], dtype=torch.float64)
    R = torch.eye(3, dtype=torch.float64) if R is None else R
    return View("s", name, torch.full((3, *size), 0.5), K, R, torch.tensor(t, dtype=torch.float64), points=points)


def test_a_pairs_pose_takes_points_from_the_source_camera_to_the_target_camera():
    c, s = math.cos(0.3), math.sin(0.3)
    R = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]], dtype=torch.float64)
    source, target = view("a", t=(1.0, 2.0, 3.0)), view("b", R=R, t=(0.5, 0.0, -1.0))
    pair = make_pair(source, target, n_points=0)
    X = torch.tensor([0.7, -0.2, 5.0], dtype=torch.float64)
    in_source, in_target = source.R @ X + source.t, target.R @ X + target.t
    torch.testing.assert_close(pair.R.double() @ in_source + pair.t.double(), in_target, atol=1e-6, rtol=1e-6)
    assert pair.name == "s/a->b" and pair.K_source.dtype == pair.R.dtype == torch.float32
    assert pair.source_points is None and pair.source_depth is None and pair.target_mask is None


def test_small_baselines_far_from_the_origin_keep_their_digits():
    source, target = view("a", t=(5000.0, 0.0, 0.0)), view("b", t=(5000.001, 0.0, 0.0))
    assert make_pair(source, target, n_points=0).t[0].item() == pytest.approx(0.001, rel=1e-5)


def test_points_are_drawn_from_many_and_few_are_followed_by_rows_of_zero_depth():
    points = torch.arange(30.0).reshape(10, 3) + 1
    torch.manual_seed(0)
    first = chosen_points(points, 4)
    torch.manual_seed(0)
    assert torch.equal(first, chosen_points(points, 4)) and first.shape == (4, 3)
    rows = {tuple(row) for row in points.tolist()}
    assert len({tuple(row) for row in first.tolist()} & rows) == 4
    padded = chosen_points(points, 12)
    assert torch.equal(padded[:10], points) and not padded[10:].any()
    assert chosen_points(points[:0], 3).shape == (3, 3)


def test_only_points_in_the_picture_and_in_front_are_visible():
    K = torch.tensor([[5.0, 0, 3], [0, 5, 2], [0, 0, 1]])
    xyz = torch.tensor([[0.0, 0, 2], [0, 0, -2], [10, 0, 2], [0.5, 0.25, 1], [0, 0, 0]])
    assert visible_points(xyz, K, height=4, width=6).tolist() == [[3, 2, 2], [5.5, 3.25, 1]]


class Numbers(ViewPairs):
    """Views 0 .. 9; the targets of each are the two after it."""

    def __init__(self, **settings):
        super().__init__(**{"n_points": 0, "random_target": True, "cache_megabytes": 1, **settings})
        self.loads = []

    def __len__(self):
        return 8

    def choices(self, index):
        return index, [index + 1, index + 2]

    def load(self, key):
        self.loads.append(key)
        return view(str(key), size=(100, 100))


def test_the_target_is_drawn_from_torchs_generator_or_is_the_first_choice():
    pairs = Numbers()
    torch.manual_seed(3)
    names = [pairs[2].name for _ in range(20)]
    torch.manual_seed(3)
    assert names == [pairs[2].name for _ in range(20)] and set(names) == {"s/2->3", "s/2->4"}
    assert {Numbers(random_target=False)[2].name for _ in range(20)} == {"s/2->3"}
    for index in (-1, 8):
        with pytest.raises(IndexError, match=str(index)):
            pairs[index]


@pytest.mark.parametrize("megabytes", [-1, float("nan")])
def test_a_cache_of_no_size_is_named(megabytes):
    with pytest.raises(ValueError, match=f"cache_megabytes={megabytes}"):
        Numbers(cache_megabytes=megabytes)


def test_views_are_loaded_once_until_the_cache_is_full_and_the_oldest_leave():
    pairs = Numbers(random_target=False, cache_megabytes=0.24)  # two views of 120 kB
    pairs[0], pairs[0]
    assert pairs.loads == [0, 1]
    pairs[1]  # 1 is used again, 2 takes the place of 0
    pairs[1]
    assert pairs.loads == [0, 1, 2]
    pairs[0]
    assert pairs.loads == [0, 1, 2, 0, 1]
    uncached = Numbers(random_target=False, cache_megabytes=0)
    uncached[0], uncached[0]
    assert uncached.loads == [0, 1, 0, 1]
