"""What needs no learning, on scenes where the best answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from co3d_ensemble.functional.mpi import render_target_view
from co3d_ensemble.mine.baselines import best_single_depths, candidate_depths, constant_depth_errors, warp_scores, warped
from co3d_ensemble.mine.pairs import Pair
from tests.mine.stacks import camera, smooth_picture

DEPTHS = candidate_depths(1.0, 16.0, 5)  # 1, 2, 4, 8, 16


def wall(depth: float, seed: int = 0) -> Pair:
    """A picture on a wall at ``depth``, from two places."""
    picture, K, R, t = smooth_picture(32, 48, seed), camera(32, 48), torch.eye(3), torch.tensor([0.3, -0.1, 0.1])
    pose = {"K_source": K[None], "K_target": K[None], "R": R[None], "t": t[None], "height": 32, "width": 48, "mode": "alpha"}
    target = render_target_view(picture[None, None], torch.ones(1, 1, 1, 32, 48), torch.tensor([[depth]]), **pose)
    return Pair("wall", picture, target.rgb[0], K, K, R, t, source_depth=torch.full((1, 32, 48), depth))


def test_candidates_are_equally_far_apart_on_a_logarithmic_scale():
    assert DEPTHS == pytest.approx([1, 2, 4, 8, 16])


def test_a_wall_is_warped_onto_itself_at_its_depth():
    pair = wall(4.0)
    rgb, valid = warped(pair, DEPTHS)
    assert rgb.shape == (5, 3, 32, 48) and valid.shape == (5, 1, 32, 48) and valid.dtype == torch.bool
    torch.testing.assert_close(rgb[2] * valid[2], pair.target * valid[2])
    scores = warp_scores(pair, DEPTHS)
    assert max(range(5), key=scores.__getitem__) == 2 and scores[2] > 60 > 40 > scores[1]


def test_a_plane_that_covers_nothing_has_no_score_to_win_with():
    pair = wall(4.0)
    away = Pair("away", pair.source, pair.target, pair.K_source, pair.K_target, pair.R, torch.tensor([100.0, 0.0, 0.0]))
    assert warp_scores(away, [1.0]) == [-math.inf]


def test_abs_rel_of_a_constant_leaves_unknown_depth_out():
    depth = torch.tensor([[[2.0, 4.0, 0.0]]])
    assert constant_depth_errors(depth, [2.0, 4.0]) == pytest.approx([0.25, 0.5])


def test_the_best_single_depths_are_of_all_pairs_together():
    chosen = best_single_depths([wall(4.0), wall(4.0, 1), wall(8.0, 2)], DEPTHS)
    assert chosen.warp == pytest.approx(4.0) and chosen.constant == pytest.approx(4.0)
    blind = wall(2.0)
    assert (
        best_single_depths(
            [Pair(*(getattr(blind, name) for name in ("name", "source", "target", "K_source", "K_target", "R", "t")))], DEPTHS
        ).constant
        is None
    )
