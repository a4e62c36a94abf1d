"""Mirrored pairs are pairs: everything that holds between pictures, cameras and points still does."""

from __future__ import annotations

from dataclasses import fields

import torch

from co3d_ensemble.functional.mpi import render_target_view
from co3d_ensemble.functional.mpi_losses import values_at_points
from co3d_ensemble.mine.generated import GeneratedPairs
from co3d_ensemble.mine.mirror import mirrored
from co3d_ensemble.mine.pairs import Pair
from tests.mine.stacks import camera, random_stack


def generated() -> Pair:
    torch.manual_seed(0)
    return GeneratedPairs(1, height=32, width=48, supersample=1, n_points=64)[1]


def test_the_mirror_image_of_a_view_is_the_view_of_the_mirrored_planes():
    stack = random_stack(4)
    K = camera(24, 32)
    K[0, 1], K[0, 2] = 2.0, 12.5  # skewed, and not centred
    pair = Pair(
        "a",
        stack.rgb[0],
        stack.rgb[0],
        K,
        K,
        torch.linalg.matrix_exp(torch.tensor([[0, -0.05, 0.1], [0.05, 0, 0.02], [-0.1, -0.02, 0]])),
        torch.tensor([0.1, -0.2, 0.05]),
    )
    shown = []
    for rgb, sigma, one in ((stack.rgb, stack.sigma, pair), (stack.rgb.flip(-1), stack.sigma.flip(-1), mirrored(pair))):
        pose = {"K_source": one.K_source[None], "K_target": one.K_target[None], "R": one.R[None], "t": one.t[None]}
        shown.append(render_target_view(rgb[None], sigma[None], stack.disparity.reciprocal()[None], **pose, height=24, width=32))
    torch.testing.assert_close(shown[1].rgb.flip(-1), shown[0].rgb, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shown[1].depth.flip(-1), shown[0].depth, rtol=1e-4, atol=1e-5)


def test_points_stay_on_their_surfaces():
    pair = mirrored(generated())
    for points, depth in ((pair.source_points, pair.source_depth), (pair.target_points, pair.target_depth)):
        values, there = values_at_points(depth[None], points[None])
        assert there.all()
        torch.testing.assert_close(values[0], points[:, 2])


def test_points_on_the_right_edge_and_rows_without_a_point_are_kept():
    pair = generated()
    points = torch.tensor([[0.0, 5.0, 2.0], [47.9, 5.0, 2.0], [0.0, 0.0, 0.0]])
    found = mirrored(Pair("a", pair.source, pair.target, pair.K_source, pair.K_target, pair.R, pair.t, source_points=points)).source_points
    assert 47 < found[0, 0] < 48 and 0 < found[1, 0] < 1 and found[2].tolist() == [0, 0, 0]


def test_twice_is_the_pair_itself():
    pair = generated()
    back = mirrored(mirrored(pair))
    for entry in fields(Pair):
        first, second = getattr(pair, entry.name), getattr(back, entry.name)
        assert first == second if not isinstance(first, torch.Tensor) else torch.allclose(first, second, atol=1e-4), entry.name
