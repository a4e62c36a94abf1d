"""Sparse points of the photographs of a CO3Dv2 sequence, for the unit of length of a multiplane image."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from co3d_ensemble.data.co3d import CO3DIndex
from co3d_ensemble.data.synthetic import SyntheticConfig, generate_dataset
from co3d_ensemble.functional.cameras import opencv_from_pinhole
from co3d_ensemble.mine.co3d_points import CALIBRATED_ON, POINTS_PER_FRAME, SequenceClouds, points_of_frames
from co3d_ensemble.plugin.frames import load_frames
from tests.mine.test_point_cloud import write_ply


@pytest.fixture
def root(tmp_path):
    config = SyntheticConfig(n_known=10, n_val=1, n_unseen=1, height=36, width=48, supersample=1, image_format="png", turns=0.5)
    return generate_dataset(tmp_path, {"mug": ["manyview_dev_0"]}, config)


def known(root, n=None, **how):
    records = CO3DIndex(root).subset("mug", "manyview_dev_0").known[:n]
    return records, load_frames(str(root), "mug", "manyview_dev_0", [record.key for record in records], **how)


def annotate(root, name, change):
    path = root / "mug" / name
    entries = json.loads(gzip.decompress(path.read_bytes()))
    for entry in entries:
        change(entry)
    path.write_bytes(gzip.compress(json.dumps(entries).encode()))


def test_depths_are_at_the_pixels_of_the_frames_size_and_a_few_frames_suffice(root):
    records, frames = known(root, longest_side=24)
    found = points_of_frames(frames, records, SequenceClouds(root))
    assert len(found) == CALIBRATED_ON < len(frames) and {frames[0].name, frames[-1].name} < found.keys()
    for frame in frames[:1]:
        x, y, z = found[frame.name].T
        assert z.min() > 0 and 0 < x.min() and x.max() < 24 and 0 < y.min() and y.max() < 18 and len(z) <= POINTS_PER_FRAME
        depth = (frame.depth * frame.depth_mask)[0, y.long(), x.long()]
        assert ((z / depth - 1).abs() < 0.05).float().mean() > 0.8  # a neighbouring pixel's, perhaps behind an edge


def test_the_cloud_stands_in_for_depth_and_what_has_neither_or_cannot_be_read_is_left_out(root, caplog):
    annotate(root, "frame_annotations.jgz", lambda entry: entry.update(depth=None))
    records, frames = known(root, n=2, load_depths=False)
    assert points_of_frames(frames, records, SequenceClouds(root)) == {}
    _, R, t = (part.double() for part in opencv_from_pinhole(frames[0].camera))
    ahead = torch.tensor([[0.0, 0.0, 4.0], [0.3, 0.1, 4.2]], dtype=torch.float64)
    cloud = write_ply(root / "mug" / "cloud.ply", ((ahead - t) @ R).numpy())
    annotate(root, "sequence_annotations.jgz", lambda entry: entry.update(point_cloud={"path": "mug/cloud.ply"}))
    found = points_of_frames(frames, records, SequenceClouds(root))
    torch.testing.assert_close(found[frames[0].name][:, 2], torch.tensor([4.0, 4.2]), atol=1e-4, rtol=0)
    cloud.write_bytes(b"ply\nbroken")
    assert points_of_frames(frames, records, SequenceClouds(root)) == {}
    assert f"frame {frames[0].name}: its points are left out" in caplog.text and "cloud.ply: not a PLY" in caplog.text
