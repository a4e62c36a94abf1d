"""Frames against the files and annotations that they come from; cameras against PyTorch3D's own raysampler."""

import gzip
import json
import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image

import co3d_ensemble.plugin  # noqa: F401 - makes pytorch3d importable
from co3d_ensemble.functional.cameras import pixel_centers, pixel_rays, so3_exp
from co3d_ensemble.functional.types import PinholeCamera
from co3d_ensemble.plugin import frames
from co3d_ensemble.plugin.frames import area_average, load_frames, pinhole_camera, pytorch3d_cameras

ROTATION = so3_exp(torch.tensor([0.3, -1.1, 0.4]))
SIZES = {0: (12, 20), 1: (20, 12), 2: (16, 16), 3: (12, 20)}
DEPTH_SCALE = 1.5


def camera_of(height: int, width: int) -> PinholeCamera:
    focal, principal = torch.tensor([31.0, 29.0]), torch.tensor([0.4 * width, 0.55 * height])
    return PinholeCamera(ROTATION, torch.tensor([0.2, -0.3, 4.0]), focal, principal, height, width)


def annotation(number: int, intrinsics_format: str, depth: bool) -> dict:
    height, width = SIZES[number]
    camera = camera_of(height, width)
    half = [width / 2, height / 2] if intrinsics_format == "ndc_norm_image_bounds" else [min(height, width) / 2] * 2
    focal = [f / h for f, h in zip(camera.focal.tolist(), half)]
    principal = [(s / 2 - p) / h for p, s, h in zip(camera.principal.tolist(), (width, height), half)]
    path = f"thing/seq/{{}}/frame{number:06d}.png"
    return {
        "sequence_name": "seq",
        "frame_number": number,
        "frame_timestamp": float(number),
        "image": {"path": path.format("images"), "size": [height, width]},
        "depth": {
            "path": path.format("depths"),
            "scale_adjustment": DEPTH_SCALE,
            "mask_path": path.format("depth_masks"),
        }
        if depth
        else None,
        "mask": {"path": path.format("masks"), "mass": 0.0 if number == 3 else 10.0},
        "viewpoint": {
            "R": camera.R.tolist(),
            "T": camera.T.tolist(),
            "focal_length": focal,
            "principal_point": principal,
            "intrinsics_format": intrinsics_format,
        },
        "meta": {"frame_type": "dev_known", "frame_splits": [], "eval_batch_maps": []},
    }


def write_pictures(root, number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    height, width = SIZES[number]
    redacted = number == 3
    pictures = {
        "images": rng.integers(0, 1 if redacted else 256, (height, width, 3), dtype=np.uint8),
        "masks": rng.integers(0, 1 if redacted else 256, (height, width), dtype=np.uint8),
        "depths": rng.uniform(1, 5, (height, width)).astype(np.float16),
        "depth_masks": rng.integers(0, 2, (height, width), dtype=np.uint8) * 255,
    }
    for kind, values in pictures.items():
        folder = root / "thing" / "seq" / kind
        folder.mkdir(parents=True, exist_ok=True)
        stored = values.view(np.uint16) if kind == "depths" else values
        Image.fromarray(stored).save(folder / f"frame{number:06d}.png")
    return pictures


def write_annotations(root, annotations: list[dict]) -> None:
    sequence = {"sequence_name": "seq", "category": "thing"}
    for name, content in (("frame", annotations), ("sequence", [sequence])):
        with gzip.open(root / "thing" / f"{name}_annotations.jgz", "wt") as file:
            json.dump(content, file)


def write_set_lists(root, lists: dict) -> None:
    (root / "thing" / "set_lists").mkdir(exist_ok=True)
    (root / "thing" / "set_lists" / "set_lists_manyview_dev_0.json").write_text(json.dumps(lists))


def line(number: int) -> list:
    return ["seq", number, f"thing/seq/images/frame{number:06d}.png"]


@pytest.fixture
def root(tmp_path):
    """A subset of four frames: three sizes, both intrinsics formats, depth for two, the last one redacted."""
    for number in SIZES:
        write_pictures(tmp_path, number)
    formats = ["ndc_isotropic", "ndc_norm_image_bounds", "ndc_isotropic", "ndc_norm_image_bounds"]
    write_annotations(tmp_path, [annotation(n, formats[n], depth=n < 2) for n in SIZES])
    write_set_lists(tmp_path, {"train": [line(0), line(1)], "val": [line(2)], "test": [line(3)]})
    return tmp_path


def load(root, numbers, **kwargs):
    return load_frames(str(root), "thing", "manyview_dev_0", [("seq", n) for n in numbers], **kwargs)


@pytest.mark.parametrize("size", [(12, 20), (20, 12), (16, 16)])
def test_rays_equal_those_of_pytorch3ds_own_raysampler(size):
    from pytorch3d.renderer.implicit.raysampling import NDCMultinomialRaysampler

    height, width = size
    camera = camera_of(height, width)
    sampler = NDCMultinomialRaysampler(
        image_width=width, image_height=height, n_pts_per_ray=2, min_depth=1.0, max_depth=2.0, unit_directions=True
    )
    theirs = sampler(pytorch3d_cameras([camera]))
    origins, directions = pixel_rays(camera, pixel_centers(height, width))
    assert (theirs.origins.reshape(-1, 3) - origins).abs().max() <= 1e-5
    assert (theirs.directions.reshape(-1, 3) - directions).abs().max() <= 1e-5


def test_cameras_survive_the_way_to_pytorch3d_and_back():
    cameras = [camera_of(12, 20), camera_of(20, 12)]
    batch = pytorch3d_cameras(cameras)
    for index, camera in enumerate(cameras):
        back = pinhole_camera(batch, index, height=camera.height, width=camera.width)
        torch.testing.assert_close(back.focal, camera.focal)
        torch.testing.assert_close(back.principal, camera.principal)
        torch.testing.assert_close(back.R, camera.R)


def test_cameras_are_those_of_the_annotations_in_both_intrinsics_formats(root):
    for frame in load(root, SIZES):
        expected = camera_of(*SIZES[frame.frame_number])
        assert (frame.camera.height, frame.camera.width) == SIZES[frame.frame_number]
        torch.testing.assert_close(frame.camera.focal, expected.focal)
        torch.testing.assert_close(frame.camera.principal, expected.principal)
        torch.testing.assert_close(frame.camera.T, expected.T)


def test_pictures_are_the_files_in_the_order_of_the_keys(root):
    loaded = load(root, [2, 0, 1])
    assert [frame.name for frame in loaded] == ["seq/2", "seq/0", "seq/1"]
    for frame in loaded:
        stored = write_pictures(root, frame.frame_number)
        assert frame.rgb.dtype == frame.mask.dtype == torch.uint8
        assert np.array_equal(frame.rgb.permute(1, 2, 0).numpy(), stored["images"])
        assert np.array_equal(frame.mask[0].numpy(), stored["masks"])


def test_a_redacted_target_with_an_empty_mask_is_loaded(root):
    (frame,) = load(root, [3])
    assert frame.rgb.max() == 0 and frame.mask.max() == 0


def test_longest_side_halves_the_picture_by_means_of_blocks_and_the_camera_with_it(root):
    (full,), (half,) = load(root, [0]), load(root, [0], longest_side=10)
    blocks = full.rgb.double().reshape(3, 6, 2, 10, 2).mean(dim=(2, 4))
    assert half.rgb.shape == (3, 6, 10)
    assert (half.rgb - blocks).abs().max() <= 0.5 + 1e-3
    torch.testing.assert_close(half.camera.principal, full.camera.principal / 2)
    torch.testing.assert_close(half.camera.focal, full.camera.focal / 2)


def test_longest_side_never_enlarges(root):
    assert load(root, [0], longest_side=100)[0].rgb.shape == (3, 12, 20)


def test_area_average_matches_a_loop_over_covered_areas():
    picture = torch.rand(2, 7, 5, dtype=torch.float64)
    result = area_average(picture, 3, 4)
    for row in range(3):
        for column in range(4):
            total = torch.zeros(2, dtype=torch.float64)
            for y in range(7):
                for x in range(5):
                    high = max(0.0, min((row + 1) * 7 / 3, y + 1) - max(row * 7 / 3, y))
                    wide = max(0.0, min((column + 1) * 5 / 4, x + 1) - max(column * 5 / 4, x))
                    total += picture[:, y, x] * high * wide
            torch.testing.assert_close(result[:, row, column], total / (7 / 3 * 5 / 4))


def test_depth_is_the_stored_half_floats_times_the_scale(root):
    (frame,) = load(root, [1])
    stored = write_pictures(root, 1)
    np.testing.assert_allclose(frame.depth[0].numpy(), stored["depths"].astype(np.float32) * DEPTH_SCALE)
    assert np.array_equal(frame.depth_mask[0].numpy(), stored["depth_masks"] / 255.0)


def test_resized_depth_only_has_values_of_the_map(root):
    (full,), (small,) = load(root, [1]), load(root, [1], longest_side=7)
    assert small.depth.shape[1:] == small.rgb.shape[1:] == (7, 4)
    assert set(small.depth.flatten().tolist()) <= set(full.depth.flatten().tolist())


def test_depth_is_left_out_where_it_is_not_annotated_or_not_wanted(root):
    assert load(root, [2])[0].depth is None
    assert load(root, [0], load_depths=False)[0].depth is None
    with pytest.raises(ValueError, match="seq/2.*no depth map"):
        load(root, [2], load_depths=True)


def test_a_missing_depth_mask_costs_the_depth_and_is_reported(root, caplog):
    (root / "thing/seq/depth_masks/frame000000.png").unlink()
    with caplog.at_level(logging.WARNING):
        assert load(root, [0])[0].depth is None
    assert "depth_masks/frame000000.png" in caplog.text
    with pytest.raises(ValueError, match="depth_masks/frame000000.png"):
        load(root, [0], load_depths=True)


def spoil(root, kind, how):
    path = root / "thing" / "seq" / kind / "frame000001.png"
    height, width = SIZES[1]
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:50])
    else:
        shape, kind = ((height, width, 3), np.uint8) if how == "colored" else ((height, width), np.uint16)
        Image.fromarray(np.zeros(shape, kind)).save(path)


@pytest.mark.parametrize("kind", ["depths", "depth_masks"])
@pytest.mark.parametrize("how", ["truncated", "colored", "zero"])
def test_a_spoilt_depth_file_costs_the_depth_and_is_reported(root, kind, how, caplog):
    spoil(root, kind, how)
    with caplog.at_level(logging.WARNING):
        (frame,) = load(root, [1])
    assert frame.depth is None and frame.depth_mask is None and frame.rgb.max() > 0
    assert f"{kind}/frame000001.png" in caplog.text and "frame seq/1" in caplog.text
    with pytest.raises(ValueError, match=f"seq/1.*{kind}/frame000001.png"):
        load(root, [1], load_depths=True)


def test_a_16_bit_photograph_is_the_picture_that_it_shows(root):
    """Implicitron's reader makes it white."""
    gray = np.random.default_rng(0).integers(0, 256, SIZES[1]).astype(np.uint16)
    Image.fromarray(gray * 257).save(root / "thing/seq/images/frame000001.png")
    (frame,) = load(root, [1])
    assert (frame.rgb.numpy() == gray[None]).all() and frame.rgb.shape == (3, *SIZES[1])


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_truncated_file_is_an_error_that_names_frame_and_file(root, kind):
    spoil(root, kind, "truncated")
    with pytest.raises(ValueError, match=f"seq/1.*{kind}/frame000001.png"):
        load(root, [1])


def test_a_picture_of_another_size_than_annotated_is_an_error(root):
    Image.new("RGB", (5, 5)).save(root / "thing/seq/images/frame000001.png")
    with pytest.raises(ValueError, match="seq/1.*frame000001.png: is 5x5 .*annotated as 12x20"):
        load(root, [1])


def test_unknown_keys_roots_and_subsets_are_named(root):
    with pytest.raises(ValueError, match="seq/77"):
        load(root, [77])
    with pytest.raises(ValueError, match="nowhere"):
        load(root / "nowhere", [0])
    with pytest.raises(ValueError, match="manyview_dev_9"):
        load_frames(str(root), "thing", "manyview_dev_9", [("seq", 0)])


def test_wrong_lines_of_a_set_list_cost_only_themselves(root):
    wrong_path = ["seq", 1, "thing/seq/images/frame000002.png"]
    write_set_lists(root, {"train": [line(0), wrong_path, line(55)], "val": [], "test": [line(3)]})
    assert len(load(root, [0, 1, 3])) == 3
    with pytest.raises(ValueError, match="seq/55"):
        load(root, [55])


def test_a_set_list_without_validation_frames_or_with_a_byte_order_mark_is_read_as_the_index_reads_it(root):
    path = root / "thing/set_lists/set_lists_manyview_dev_0.json"
    lists = {"train": [line(0), line(1)], "val": None, "test": [line(3)]}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(lists).encode())
    assert [frame.name for frame in load(root, [0, 3])] == ["seq/0", "seq/3"]
    with pytest.raises(ValueError, match="seq/2: not among"):
        load(root, [2])


def test_a_malformed_frame_costs_only_itself(root):
    """Implicitron's own reader cuts the rotations of all frames to the rows that the shortest has."""
    annotations = [annotation(n, "ndc_isotropic", depth=False) for n in SIZES]
    annotations[1]["viewpoint"]["R"] = annotations[1]["viewpoint"]["R"][:2]
    annotations[2]["mask"] = None
    write_annotations(root, annotations)
    torch.testing.assert_close(load(root, [0])[0].camera.R, ROTATION)
    with pytest.raises(ValueError, match="seq/1: the camera of .*thing/seq/images/frame000001.png has no finite R"):
        load(root, [1])
    with pytest.raises(ValueError, match="seq/2: the annotation of .*thing/seq/images/frame000002.png gives no mask"):
        load(root, [2])


def test_the_annotations_of_sequences_are_not_needed(root):
    (root / "thing/sequence_annotations.jgz").write_bytes(b"damaged")
    assert load(root, [0])[0].name == "seq/0"


@pytest.mark.parametrize("name", ["..", "a/b", ""])
def test_categories_and_subsets_are_plain_names(root, name):
    with pytest.raises(ValueError, match="category="):
        load_frames(str(root), name, "manyview_dev_0", [("seq", 0)])
    with pytest.raises(ValueError, match="subset_name="):
        load_frames(str(root), "thing", name, [("seq", 0)])


def test_annotations_are_parsed_once_and_again_when_they_change(root, monkeypatch):
    built = []
    original = frames.CategoryAnnotations
    monkeypatch.setattr(frames, "CategoryAnnotations", lambda root, category: (built.append(category), original(root, category))[1])
    load(root, [0])
    load(root, [1])
    assert len(built) == 1
    write_annotations(root, [annotation(0, "ndc_isotropic", depth=False)])
    assert load(root, [0])[0].depth is None
    assert len(built) == 2


def test_isotropic_and_per_axis_intrinsics_differ_on_non_square_pictures():
    isotropic, per_axis = (annotation(0, f, depth=False)["viewpoint"] for f in ("ndc_isotropic", "ndc_norm_image_bounds"))
    assert not math.isclose(isotropic["focal_length"][0], per_axis["focal_length"][0])  # else the format tests show nothing
