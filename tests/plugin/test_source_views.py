"""The photographs that view-pooling models carry in their weights."""

import pytest
import torch

from co3d_ensemble.functional.cameras import pinhole_from_ndc, so3_exp
from co3d_ensemble.functional.types import Frame
from co3d_ensemble.plugin.source_views import SourceViews, spread_out

CENTER = torch.tensor([0.0, 0.0, 0.0])


def frame(degrees: float, *, size=(4, 6), distance=4.0) -> Frame:
    """A photograph from an orbit around the origin, its pixels as bright as its angle."""
    height, width = size
    rotation = so3_exp(torch.tensor([0.0, torch.deg2rad(torch.tensor(degrees)).item(), 0.0]))
    return Frame(
        name=f"thing/{degrees:g}",
        sequence_name="thing",
        frame_number=int(degrees),
        rgb=torch.full((3, height, width), int(degrees) % 256, dtype=torch.uint8),
        mask=torch.full((1, height, width), 255, dtype=torch.uint8),
        camera=pinhole_from_ndc(
            rotation, torch.tensor([0.0, 0.0, distance]), torch.tensor([2.0, 2.0]), torch.zeros(2), height=height, width=width
        ),
    )


ANGLES = (0.0, 30.0, 60.0, 90.0, 150.0, 200.0)


def angles_of(views: SourceViews, indices=None) -> list[int]:
    return [int(views.rgb[i, 0, 0, 0]) for i in (range(len(views)) if indices is None else indices.tolist())]


def test_the_nearest_views_are_those_from_the_closest_directions_whatever_their_distance():
    views = SourceViews([frame(angle, distance=4.0 + angle) for angle in ANGLES], kept=10)
    assert angles_of(views, views.nearest(frame(50.0).camera, 3, around=CENTER)) == [60, 30, 90]


def test_directions_are_seen_from_the_given_point():
    views = SourceViews([frame(angle) for angle in ANGLES], kept=10)
    far = torch.tensor([0.0, 0.0, 100.0])  # from there, all cameras are in nearly the same direction: the order changes
    order = angles_of(views, views.nearest(frame(50.0).camera, 6, around=far))
    assert order != angles_of(views, views.nearest(frame(50.0).camera, 6, around=CENTER))


def test_more_views_than_there_are_gives_all():
    views = SourceViews([frame(angle) for angle in ANGLES], kept=10)
    assert sorted(angles_of(views, views.nearest(frame(50.0).camera, 100, around=CENTER))) == sorted(map(int, ANGLES))


def test_a_kept_camera_is_the_frames_own():
    views = SourceViews([frame(angle) for angle in ANGLES], kept=10)
    kept, own = views.camera(2), frame(ANGLES[2]).camera
    assert (kept.height, kept.width) == (4, 6)
    for name in ("R", "T", "focal", "principal"):
        assert torch.equal(getattr(kept, name), getattr(own, name))


def test_kept_photographs_are_spread_out():
    crowded = [frame(angle) for angle in (0.0, 1.0, 2.0, 3.0, 90.0, 180.0)]
    assert angles_of(SourceViews(crowded, kept=3)) == [0, 90, 180]


def test_points_are_chosen_farthest_first_by_a_naive_search():
    points = torch.rand(12, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    chosen = [0]
    while len(chosen) < 5:
        gaps = [min(float((points[i] - points[j]).norm()) for j in chosen) for i in range(12)]
        chosen.append(gaps.index(max(gaps)))
    assert spread_out(points, 5) == sorted(chosen)


@pytest.mark.parametrize("count", [3, 50])
def test_points_at_one_place_are_chosen_once_each(count):
    assert spread_out(torch.zeros(3, 3), count) == [0, 1, 2]


def test_a_state_brings_its_own_photographs():
    source, target = SourceViews([frame(angle) for angle in ANGLES], kept=10), SourceViews([], kept=10)
    assert len(target) == 0
    target.load_state_dict(source.state_dict())
    assert angles_of(target) == angles_of(source) and target.rgb.dtype == torch.uint8
    fewer = SourceViews([frame(5.0, size=(2, 2))], kept=10)
    target.load_state_dict(fewer.state_dict())
    assert angles_of(target) == [5] and target.rgb.shape == (1, 3, 2, 2)


def test_photographs_of_different_sizes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"thing/0 has \(4, 6\), thing/30 \(6, 4\)"):
        SourceViews([frame(0.0), frame(30.0, size=(6, 4))], kept=10)
