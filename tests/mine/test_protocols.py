"""Which pairs are scored, and what of them."""

from __future__ import annotations

import torch

from co3d_ensemble.mine.clip_pairs import CLIP_ROWS, ClipPair
from co3d_ensemble.mine.pairs import Pair
from co3d_ensemble.mine.protocols import RULES, ClipTasks, PairTasks, evenly_spread, inner_box, rules_of
from co3d_ensemble.mine.views import View


def test_five_percent_of_the_sides_are_cut_off_all_around_rounded_up():
    assert RULES["kitti_raw"].border == 0.05 and rules_of("realestate10k").border == rules_of("generated").border == 0
    assert inner_box(256, 384, 0.05) == (slice(13, 243), slice(20, 364))  # ceil(12.8), ceil(19.2)
    assert inner_box(128, 384, 0.05) == (slice(7, 121), slice(20, 364))
    assert inner_box(100, 100, 0.07) == (slice(7, 93), slice(7, 93))
    assert inner_box(5, 7, 0.0) == (slice(0, 5), slice(0, 7))


# Tasks


class Drawing:
    """A data set that draws its target from torch's default generator."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        picture = torch.full((3, 4, 4), float(index))
        return Pair(f"{index}", picture, torch.rand(3, 4, 4), torch.eye(3), torch.eye(3), torch.eye(3), torch.zeros(3))


def test_what_a_data_set_draws_is_the_same_every_time_and_leaves_the_generator_alone():
    tasks, other = PairTasks(Drawing(), row="pairs"), PairTasks(Drawing(), row="pairs", seed=1)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = tasks[1], tasks[0]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(tasks[1].pairs[0][1].target, first.pairs[0][1].target)
    assert not torch.equal(first.pairs[0][1].target, second.pairs[0][1].target)
    assert not torch.equal(other[1].pairs[0][1].target, first.pairs[0][1].target)
    assert first.pairs[0][0] == "pairs" and first.name == "1" and len(tasks) == 3


def test_a_limit_spreads_over_all_items():
    assert evenly_spread(10, None) == evenly_spread(10, 20) == list(range(10))
    assert evenly_spread(10, 4) == [0, 3, 6, 9] and evenly_spread(10, 1) == [0] and evenly_spread(5, 5) == [0, 1, 2, 3, 4]


def test_a_clips_source_keeps_its_points_for_all_of_its_targets():
    def view(clip, frame):
        picture = torch.full((3, 4, 4), frame / 10)
        pose = {"R": torch.eye(3, dtype=torch.float64), "t": torch.tensor([float(frame), 0, 0], dtype=torch.float64)}
        return View(
            clip, str(frame), picture, torch.eye(3), points=torch.rand(50, 3, generator=torch.Generator().manual_seed(frame)), **pose
        )

    tasks = ClipTasks(view, [ClipPair("aa", 2, {"n=5": 7, "n=10": 9, "random": 1})], n_points=8)
    task = tasks[0]
    assert [row for row, _ in task.pairs] == list(CLIP_ROWS) and task.name == "aa/2" and len(tasks) == 1
    assert [pair.t[0].item() for _, pair in task.pairs] == [5, 7, -1] and [pair.name for _, pair in task.pairs][0] == "aa/2->7"
    assert task.points.shape == (8, 3) and all(torch.equal(pair.source_points, task.points) for _, pair in task.pairs)
    assert torch.equal(tasks[0].points, task.points) and torch.equal(task.image, torch.full((3, 4, 4), 0.2))
