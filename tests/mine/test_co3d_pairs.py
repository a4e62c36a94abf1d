import gzip
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from co3d_ensemble.data.co3d import CO3DIndex
from co3d_ensemble.data.synthetic import SyntheticConfig, generate_dataset
from co3d_ensemble.functional.cameras import opencv_from_pinhole, pixel_centers
from co3d_ensemble.mine.co3d_pairs import CO3DPairs
from co3d_ensemble.plugin.frames import load_frames
from tests.mine.test_point_cloud import write_ply

SIZE = {"height": 24, "width": 32}
SUBSET = "mug/manyview_dev_0"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    config = SyntheticConfig(n_known=8, n_val=2, n_unseen=2, height=36, width=48, supersample=1, image_format="png", turns=0.5)
    return generate_dataset(tmp_path_factory.mktemp("co3d"), {"mug": ["manyview_dev_0"]}, config)


def copied(root, target):
    import shutil

    return shutil.copytree(root, target / "root")


def warped(pair):
    """Pixel positions and z in the target of all source pixels with a depth."""
    height, width = pair.source.shape[-2:]
    z = pair.source_depth.reshape(-1)
    pixels = torch.cat((pixel_centers(height, width), torch.ones(height * width, 1)), dim=1)[z > 0]
    X = pair.R @ (torch.linalg.inv(pair.K_source) @ pixels.T * z[z > 0]) + pair.t[:, None]
    projected = pair.K_target @ X
    return projected[:2] / projected[2], X[2]


def test_depth_of_the_source_lands_on_the_depth_of_the_target(root):
    pairs = CO3DPairs(root, [SUBSET], max_frame_distance=12, random_target=False, height=36, width=48)
    agree = before = total = 0
    for i in range(len(pairs)):
        pair = pairs[i]
        (x, y), z = warped(pair)
        inside = (x >= 0) & (x < 48) & (y >= 0) & (y < 36)
        there = pair.target_depth[0, y[inside].long(), x[inside].long()]
        ratio = z[inside] / there
        agree += int(((ratio - 1).abs() < 0.03)[there > 0].sum())
        before += int((ratio < 0.97)[there > 0].sum())
        total += int((there > 0).sum())
    assert total > 1000 and before / total < 0.08  # at edges; what is neither is hidden in the target
    assert agree / total > 0.75


def test_views_equal_what_implicitrons_dataset_classes_read(root):
    pairs = CO3DPairs(root, [SUBSET], height=36, width=48, max_frame_distance=12)
    record = pairs._pairs[2][0]
    view = pairs.view(record)
    frame = load_frames(str(root), "mug", "manyview_dev_0", [record.key])[0]
    assert torch.equal((view.picture * 255).round().to(torch.uint8), frame.rgb)
    assert torch.equal((view.mask * 255).round().to(torch.uint8), frame.mask)
    torch.testing.assert_close(view.depth, frame.depth * frame.depth_mask)
    K, R, t = opencv_from_pinhole(frame.camera)
    for mine, theirs in ((view.K, K), (view.R, R), (view.t, t)):
        torch.testing.assert_close(mine.float(), theirs)


def test_sparse_points_are_known_depths_of_the_resized_picture(root):
    pair = CO3DPairs(root, [SUBSET], n_points=30, max_frame_distance=12, **SIZE)[0]
    x, y, z = pair.source_points.T
    assert (z > 0).all() and torch.equal(pair.source_depth[0, y.long(), x.long()], z)
    assert CO3DPairs(root, [SUBSET], n_points=0, max_frame_distance=12, **SIZE)[0].source_points is None


def test_train_pairs_known_frames_and_val_sources_are_val_frames(root):
    subset = CO3DIndex(root).subset("mug", "manyview_dev_0")
    known, val = ({r.frame_number for r in records} for records in (subset.known, subset.val))
    train = CO3DPairs(root, [SUBSET], max_frame_distance=6, **SIZE)
    held_out = CO3DPairs(root, [SUBSET], split="val", max_frame_distance=6, **SIZE)
    for pairs, sources, targets in ((train, known, known), (held_out, val, known | val)):
        assert {source.frame_number for source, _ in pairs._pairs} <= sources and len(pairs) > 0
        for source, near in pairs._pairs:
            distances = [abs(target.frame_number - source.frame_number) for target in near]
            assert distances == sorted(distances) and 0 < min(distances) and max(distances) <= 6
            assert {target.frame_number for target in near} <= targets


def test_all_subsets_of_a_root_are_taken_where_none_are_named(tmp_path):
    config = SyntheticConfig(n_known=4, n_val=1, n_unseen=1, height=24, width=32, supersample=1, turns=0.3)
    root = generate_dataset(tmp_path, {"mug": ["manyview_dev_0"], "vase": ["manyview_dev_0", "manyview_dev_1"]}, config)
    pairs = CO3DPairs(root, max_frame_distance=20, **SIZE)
    assert len({pairs[i].name.rsplit("/", 1)[0] for i in range(len(pairs))}) == 3 and len(pairs) == 12


def test_points_come_from_the_sequences_cloud_where_asked_or_where_there_is_no_depth(root, tmp_path):
    root = copied(root, tmp_path)
    record = CO3DIndex(root).subset("mug", "manyview_dev_0").known[0]
    K, R, t = opencv_from_pinhole(record.camera())
    ahead = torch.tensor([[0.0, 0.0, 4.0], [0.3, 0.1, 4.2]], dtype=torch.float64)
    world = (ahead - t.double()) @ R.double()  # R^T (X - t) of rows
    write_ply(root / "mug" / "cloud.ply", world.numpy())
    path = root / "mug" / "sequence_annotations.jgz"
    entries = json.loads(gzip.decompress(path.read_bytes()))
    entries[0]["point_cloud"] = {"path": "mug/cloud.ply", "n_points": 2, "quality_score": 1.0}
    path.write_bytes(gzip.compress(json.dumps(entries).encode()))
    pairs = CO3DPairs(root, [SUBSET], points="cloud", n_points=4, max_frame_distance=12, **SIZE)
    points = pairs.view(record).points
    expected = ahead @ pairs.view(record).K.T
    torch.testing.assert_close(points[:, :2], (expected[:, :2] / expected[:, 2:]).float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(points[:, 2], torch.tensor([4.0, 4.2]), atol=1e-4, rtol=0)
    (root / "mug" / "cloud.ply").write_bytes(b"ply\nbroken")
    with pytest.raises(ValueError, match="cloud.ply: not a PLY"):
        CO3DPairs(root, [SUBSET], points="cloud", max_frame_distance=12, **SIZE)[0]


def test_frames_without_points_are_left_out_where_others_have_them(root, tmp_path, caplog):
    root = copied(root, tmp_path)
    records = CO3DIndex(root).subset("mug", "manyview_dev_0").known
    whole = CO3DPairs(root, [SUBSET], max_frame_distance=12, **SIZE)
    path = root / "mug" / "frame_annotations.jgz"
    entries = json.loads(gzip.decompress(path.read_bytes()))
    for entry in entries:
        if entry["frame_number"] == records[1].frame_number:
            entry["depth"] = None
    path.write_bytes(gzip.compress(json.dumps(entries).encode()))
    pairs = CO3DPairs(root, [SUBSET], max_frame_distance=12, **SIZE)
    shown = {record.frame_number for source, targets in pairs._pairs for record in (source, *targets)}
    assert len(pairs) == len(whole) - 1 and records[1].frame_number not in shown
    assert "1 of 8 frames have neither depth nor point cloud" in caplog.text
    assert all(pair.source_points is not None and pair.target_points is not None for pair in pairs)
    assert len(CO3DPairs(root, [SUBSET], n_points=0, max_frame_distance=12, **SIZE)) == len(whole)


def test_a_root_without_subsets_or_with_lonely_frames_is_named(root, tmp_path):
    with pytest.raises(ValueError, match=f"{SUBSET}: no two val frames within max_frame_distance=1"):
        CO3DPairs(root, [SUBSET], split="val", max_frame_distance=1, **SIZE)
    (tmp_path / "category_to_subset_name_list.json").write_text('{"mug": []}')
    with pytest.raises(ValueError, match="category_to_subset_name_list.json lists no subset"):
        CO3DPairs(tmp_path, **SIZE)


def test_asking_for_points_that_are_not_there_is_an_error_at_once(root):
    with pytest.raises(ValueError, match="points='cloud': .*sequence_annotations.jgz gives sequence .* no point cloud"):
        CO3DPairs(root, [SUBSET], points="cloud", max_frame_distance=12, **SIZE)


def test_broken_frames_are_dropped_with_a_warning_that_names_them(root, tmp_path, caplog):
    root = copied(root, tmp_path)
    broken = CO3DIndex(root).subset("mug", "manyview_dev_0").known[3]
    broken.image_path.write_bytes(broken.image_path.read_bytes()[:200])
    with caplog.at_level(logging.WARNING):
        pairs = CO3DPairs(root, [SUBSET], check="decode", max_frame_distance=12, **SIZE)
    assert broken.image_path.name in caplog.text
    assert broken not in {record for source, targets in pairs._pairs for record in (source, *targets)}
    with pytest.raises(ValueError, match=f"{broken.image_path.name}: is unreadable or truncated"):
        CO3DPairs(root, [SUBSET], max_frame_distance=12, **SIZE).view(broken)  # headers only: found when it is read


def test_a_spoilt_depth_map_is_named_where_points_need_it_and_costs_the_depth_where_they_do_not(root, tmp_path, caplog):
    root = copied(root, tmp_path)
    record = CO3DIndex(root).subset("mug", "manyview_dev_0").known[0]
    record.depth_path.write_bytes(record.depth_path.read_bytes()[:-30])

    def pairs(**settings):
        found = CO3DPairs(root, [SUBSET], max_frame_distance=12, **{**SIZE, **settings})
        return found, found.load(record)

    with pytest.raises(ValueError, match=f"{record.depth_path.name}: is unreadable or truncated.*; check=decode leaves such frames out"):
        pairs()
    with caplog.at_level(logging.WARNING):
        assert pairs(n_points=0)[1].depth is None
    assert f"frame {record.name} has no depth: " in caplog.text


def test_a_picture_that_disagrees_with_its_annotation_is_not_used(root, tmp_path):
    root = copied(root, tmp_path)
    records = CO3DIndex(root).subset("mug", "manyview_dev_0").known
    for record in records:
        Image.fromarray(np.zeros((10, 10, 3), np.uint8) + 9).save(record.image_path)
    with pytest.raises(ValueError, match="picture is 10x10"):
        CO3DPairs(root, [SUBSET], max_frame_distance=12, **SIZE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "test"}, "split='test'"),
        ({"points": "some"}, "points='some'"),
        ({"max_frame_distance": 0}, "max_frame_distance=0"),
        ({"height": 2}, "height=2"),
        ({"fit": "pad"}, "fit='pad'"),
        ({"subsets": "mug/manyview_dev_0"}, "subsets='mug/manyview_dev_0'"),
        ({"subsets": ["mug/manyview_dev_7"]}, "manyview_dev_7"),
        ({"subsets": ["mug/manyview_dev_0"], "max_frame_distance": 1}, "max_frame_distance=1"),
    ],
)
def test_bad_settings_are_named(root, settings, message):
    with pytest.raises(ValueError, match=message):
        CO3DPairs(root, **{**SIZE, **settings})
    with pytest.raises(ValueError, match="not a CO3Dv2 root"):
        CO3DPairs(root / "nowhere", **SIZE)


def test_pairs_of_real_photographs(shared_data):
    pairs = CO3DPairs(shared_data, ["cape/manyview_dev_0"], height=48, width=48, random_target=False)
    assert len(pairs) > 80
    pair = pairs[10]
    assert pair.source.shape == (3, 48, 48) and 0.05 < pair.source_mask.mean() < 0.95
    assert pair.source_points is None and pair.source_depth is None
    torch.testing.assert_close(pair.R @ pair.R.T, torch.eye(3), atol=1e-5, rtol=0)
    assert 0.05 < pair.t.norm() < 4
