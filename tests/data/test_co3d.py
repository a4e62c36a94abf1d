import gzip
import json
import logging
import math
import shutil
import time
from pathlib import Path

import pytest
import torch

from co3d_ensemble.data.co3d import CO3DIndex

IDENTITY = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
REAL_ROOT = Path(__file__).parents[2] / "../shared/data/co3d"


def annotation(category, sequence, number, size=(6, 8)):
    return {
        "sequence_name": sequence,
        "frame_number": number,
        "frame_timestamp": number / 30,
        "image": {"path": f"{category}/{sequence}/images/frame{number:06d}.jpg", "size": list(size)},
        "depth": None,
        "mask": {"path": f"{category}/{sequence}/masks/frame{number:06d}.png", "mass": 12.0},
        "viewpoint": {
            "R": IDENTITY,
            "T": [0.0, 0.0, 5.0],
            "focal_length": [2.0, 3.0],
            "principal_point": [0.0, 0.5],
            "intrinsics_format": "ndc_isotropic",
        },
        "meta": {"frame_type": "dev_known"},
    }


def entry(number, category="cup", sequence="s1", picture=None):
    return [sequence, number, picture or f"{category}/{sequence}/images/frame{number:06d}.jpg"]


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".jgz" else text.encode())


def write_root(
    root, *, category="cup", subset="manyview_dev_0", annotations=None, train=range(0, 6), val=(6, 7), test=(8, 9), batches=None
):
    """A CO3D root without pictures: the index must not need them."""
    as_entries = lambda items: [entry(item, category) if isinstance(item, int) else item for item in items]
    annotations = [annotation(category, "s1", number) for number in range(10)] if annotations is None else annotations
    lists = {"train": as_entries(train), "val": as_entries(val), "test": as_entries(test)}
    write_json(root / "category_to_subset_name_list.json", {category: [subset]})
    write_json(root / category / "frame_annotations.jgz", annotations)
    write_json(root / category / "set_lists" / f"set_lists_{subset}.json", lists)
    batches = [[item] for item in lists["test"]] if batches is None else [as_entries(batch) for batch in batches]
    write_json(root / category / "eval_batches" / f"eval_batches_{subset}.json", batches)
    return root


def numbers(records):
    return [record.frame_number for record in records]


def faults(subset):
    return [(fault.kind, fault.role, fault.key[1]) for fault in subset.list_faults]


def test_a_clean_subset_has_the_frames_of_its_lists_in_order_and_no_faults(tmp_path):
    subset = CO3DIndex(write_root(tmp_path)).subset("cup", "manyview_dev_0")
    assert (numbers(subset.known), numbers(subset.val), numbers(subset.targets)) == ([0, 1, 2, 3, 4, 5], [6, 7], [8, 9])
    assert subset.sequence_name == "s1" and subset.sequence_names == ("s1",)
    assert subset.list_faults == () and subset.scorable is None


def test_a_record_holds_the_annotation_and_its_camera_has_pixels(tmp_path):
    content = annotation("cup", "s1", 3)
    content["depth"] = {"path": "cup/s1/depths/a.png", "scale_adjustment": 2.5, "mask_path": "cup/s1/depth_masks/a.png"}
    record = CO3DIndex(write_root(tmp_path, annotations=[content])).frame("cup", "s1", 3)
    assert (record.name, record.key, record.category, record.frame_type) == ("s1/3", ("s1", 3), "cup", "dev_known")
    assert record.image_path == tmp_path / "cup/s1/images/frame000003.jpg"
    assert record.mask_path == tmp_path / "cup/s1/masks/frame000003.png" and record.mask_mass == 12.0
    assert (record.depth_path, record.depth_mask_path) == (tmp_path / "cup/s1/depths/a.png", tmp_path / "cup/s1/depth_masks/a.png")
    assert record.depth_scale_adjustment == 2.5 and record.frame_timestamp == 0.1 and (record.height, record.width) == (6, 8)
    camera = record.camera()
    assert camera.R.dtype == torch.float32 and (camera.height, camera.width) == (6, 8)
    assert camera.focal.tolist() == [6.0, 9.0]  # half the shorter side is 3 pixels
    assert camera.principal.tolist() == [4.0, 1.5]


def test_intrinsics_without_a_format_are_norm_image_bounds(tmp_path):
    content = annotation("cup", "s1", 0)
    del content["viewpoint"]["intrinsics_format"]
    camera = CO3DIndex(write_root(tmp_path, annotations=[content])).frame("cup", "s1", 0).camera()
    assert camera.focal.tolist() == [8.0, 9.0]


def test_optional_parts_may_be_missing_and_bad_numbers_become_nan(tmp_path):
    content = {"sequence_name": "s1", "frame_number": 0, "image": {"path": "cup/s1/images/a.jpg"}}
    broken = annotation("cup", "s1", 1)
    broken["viewpoint"]["R"] = [[1.0, None, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0]]
    index = CO3DIndex(write_root(tmp_path, annotations=[content, broken]))
    record = index.frame("cup", "s1", 0)
    assert (record.mask_path, record.mask_mass, record.depth_path, record.height, record.frame_type) == (None, None, None, 0, "")
    assert all(map(math.isnan, record.T + record.focal + record.principal + sum(record.R, ())))
    R = index.frame("cup", "s1", 1).R
    assert math.isnan(R[0][1]) and R[1] == (0.0, 1.0, 0.0) and all(map(math.isnan, R[2]))


def test_roles_are_disjoint_when_every_list_holds_the_same_frames_twice(tmp_path):
    everything = [*range(10), *range(10)]
    index = CO3DIndex(write_root(tmp_path, train=everything, val=everything, test=everything, batches=[[8], [9], [8]]))
    subset = index.subset("cup", "manyview_dev_0")
    assert (numbers(subset.targets), numbers(subset.known), numbers(subset.val)) == ([8, 9], list(range(8)), [])
    assert ("duplicate", "known", 8) in faults(subset) and ("duplicate", "known", 0) in faults(subset)
    assert ("duplicate", "val", 0) in faults(subset) and ("duplicate", "target", 8) in faults(subset)


def test_val_is_what_train_and_targets_leave(tmp_path):
    subset = CO3DIndex(write_root(tmp_path, train=[0, 1, 8], val=[1, 2, 8], test=[8])).subset("cup", "manyview_dev_0")
    assert (numbers(subset.known), numbers(subset.val), numbers(subset.targets)) == ([0, 1], [2], [8])
    assert {fault.message for fault in subset.list_faults} == {
        "cup/s1/images/frame000008.jpg: frame s1/8 is listed as known but stays target",
        "cup/s1/images/frame000001.jpg: frame s1/1 is listed as val but stays known",
        "cup/s1/images/frame000008.jpg: frame s1/8 is listed as val but stays target",
    }


def test_few_view_keeps_the_sources_of_each_batch_and_each_target_once(tmp_path):
    root = write_root(tmp_path, subset="fewview_dev", train=[0, 1], val=[2], batches=[[8, 3], [8, 3, 4], [9, 5]])
    subset = CO3DIndex(root).subset("cup", "fewview_dev")
    assert numbers(subset.targets) == [8, 9] and subset.list_faults == ()
    assert [(batch.target.frame_number, numbers(batch.sources)) for batch in subset.eval_batches] == [(8, [3]), (8, [3, 4]), (9, [5])]


def test_missing_eval_batches_fall_back_to_the_test_list_with_a_warning(tmp_path, caplog):
    write_root(tmp_path, train=[0, 1, 9])
    (tmp_path / "cup/eval_batches/eval_batches_manyview_dev_0.json").unlink()
    with caplog.at_level(logging.WARNING):
        subset = CO3DIndex(tmp_path).subset("cup", "manyview_dev_0")
    assert numbers(subset.targets) == [8, 9] and numbers(subset.known) == [0, 1]
    assert "eval_batches_manyview_dev_0.json is missing" in caplog.text


def test_an_unannotated_frame_is_a_fault_that_names_list_and_picture(tmp_path):
    subset = CO3DIndex(write_root(tmp_path, train=[0, 77])).subset("cup", "manyview_dev_0")
    assert numbers(subset.known) == [0] and faults(subset) == [("unknown_frame", "known", 77)]
    message = subset.list_faults[0].message
    assert "cup/s1/images/frame000077.jpg" in message and "set_lists_manyview_dev_0.json" in message


def test_a_listed_picture_other_than_the_annotated_one_is_a_label_mismatch(tmp_path):
    wrong = entry(1, picture="cup/s1/images/frame000002.jpg")
    subset = CO3DIndex(write_root(tmp_path, train=[0, wrong])).subset("cup", "manyview_dev_0")
    assert faults(subset) == [("label_mismatch", "known", 1)]
    assert "has the picture cup/s1/images/frame000001.jpg" in subset.list_faults[0].message


def test_a_picture_listed_under_an_unannotated_number_names_its_owner(tmp_path):
    wrong = entry(77, picture="cup/s1/images/frame000002.jpg")
    subset = CO3DIndex(write_root(tmp_path, train=[0, wrong])).subset("cup", "manyview_dev_0")
    assert faults(subset) == [("label_mismatch", "known", 77)] and "picture to s1/2" in subset.list_faults[0].message


def test_a_mislabelled_target_withholds_the_frame_whose_picture_it_names(tmp_path):
    wrong = entry(8, picture="cup/s1/images/frame000002.jpg")
    subset = CO3DIndex(write_root(tmp_path, batches=[[wrong]])).subset("cup", "manyview_dev_0")
    assert numbers(subset.targets) == [8] and 2 not in numbers(subset.known)
    assert faults(subset) == [("label_mismatch", "target", 8), ("duplicate", "known", 2)]


def test_entries_may_leave_the_picture_path_out(tmp_path):
    subset = CO3DIndex(write_root(tmp_path, train=[["s1", 0]], batches=[[["s1", 8]]])).subset("cup", "manyview_dev_0")
    assert numbers(subset.known) == [0] and numbers(subset.targets) == [8] and subset.list_faults == ()


def test_a_frame_annotated_twice_keeps_the_first_annotation_and_is_noted(tmp_path):
    twice = [annotation("cup", "s1", 0, size=(6, 8)), annotation("cup", "s1", 0, size=(60, 80))]
    subset = CO3DIndex(write_root(tmp_path, annotations=twice, train=[0], val=[], test=[])).subset("cup", "manyview_dev_0")
    assert subset.known[0].height == 6 and faults(subset) == [("duplicate", "known", 0)]


def test_subsets_match_their_set_with_and_without_an_index(tmp_path):
    names = {
        "cup": ["fewview_dev", "manyview_dev_0", "manyview_dev_1", "manyview_test_0", "manyview_development"],
        "car": ["manyview_test", "fewview_test"],
    }
    write_json(tmp_path / "category_to_subset_name_list.json", names)
    index = CO3DIndex(tmp_path)
    assert index.categories() == ["cup", "car"] and index.subsets("car") == names["car"]
    assert index.all_subsets(["dev"]) == [("cup", "manyview_dev_0"), ("cup", "manyview_dev_1")]
    assert index.all_subsets(["test"]) == [("cup", "manyview_test_0"), ("car", "manyview_test")]
    assert index.all_subsets(["dev", "test"], task="fewview") == [("cup", "fewview_dev"), ("car", "fewview_test")]
    with pytest.raises(ValueError, match=r"'dev': expected a list"):
        index.all_subsets("dev")


def test_annotations_are_parsed_once_per_category(tmp_path):
    index = CO3DIndex(write_root(tmp_path))
    first = index.subset("cup", "manyview_dev_0")
    (tmp_path / "cup/frame_annotations.jgz").unlink()
    assert index.subset("cup", "manyview_dev_0").known[0] is first.known[0]


@pytest.mark.parametrize(
    ("opened", "hint"),
    [
        ("data/cup", r"is a category folder.*use .*data$"),
        ("data/cup/set_lists", r"lies too deep, use .*data$"),
        ("", r"use .*data, one level deeper"),
        ("nowhere", "no such folder"),
    ],
)
def test_a_wrong_root_says_where_the_root_is(tmp_path, opened, hint):
    write_root(tmp_path / "data")
    with pytest.raises(ValueError, match=f"not a CO3Dv2 root: .*{hint}"):
        CO3DIndex(tmp_path / opened)


def test_a_lone_category_folder_says_that_it_is_one(tmp_path):
    write_root(tmp_path)
    (tmp_path / "category_to_subset_name_list.json").unlink()
    with pytest.raises(ValueError, match="is a category folder; the root is the folder above it"):
        CO3DIndex(tmp_path / "cup")


def test_unknown_names_list_what_there_is(tmp_path):
    index = CO3DIndex(write_root(tmp_path))
    with pytest.raises(ValueError, match=r"category 'cat' .*available: cup"):
        index.subset("cat", "manyview_dev_0")
    with pytest.raises(ValueError, match=r"subset 'manyview_dev_7' of 'cup'.*available: manyview_dev_0"):
        index.subset("cup", "manyview_dev_7")
    with pytest.raises(ValueError, match=r"frame_annotations.jgz: no frame 99 of sequence 's1'"):
        index.frame("cup", "s1", 99)


@pytest.mark.parametrize(
    "name", ["frame_annotations.jgz", "set_lists/set_lists_manyview_dev_0.json", "eval_batches/eval_batches_manyview_dev_0.json"]
)
@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_corrupt_file_is_named(tmp_path, name, damage):
    path = write_root(tmp_path) / "cup" / name
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "text": b"version https://git-lfs", "empty": b""}[damage])
    with pytest.raises(ValueError, match=f"{path.name} cannot be read"):
        CO3DIndex(tmp_path).subset("cup", "manyview_dev_0")


@pytest.mark.parametrize("name", ["frame_annotations.jgz", "set_lists/set_lists_manyview_dev_0.json"])
def test_a_missing_file_is_named(tmp_path, name):
    path = write_root(tmp_path) / "cup" / name
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name} is missing"):
        CO3DIndex(tmp_path).subset("cup", "manyview_dev_0")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cup/frame_annotations.jgz", [], "expected a non-empty list"),
        ("cup/frame_annotations.jgz", [{"sequence_name": "s1", "frame_number": 0}], "entry 0 lacks"),
        ("cup/set_lists/set_lists_manyview_dev_0.json", {"test": []}, "expected an object with the lists"),
        ("cup/set_lists/set_lists_manyview_dev_0.json", {"train": [["s1"]]}, r"entry \['s1'\] is not"),
        ("cup/set_lists/set_lists_manyview_dev_0.json", {"train": {"s1": 0}}, "expected a list of entries, got dict"),
        ("cup/eval_batches/eval_batches_manyview_dev_0.json", [[]], "batch 0 is not a non-empty list"),
        ("category_to_subset_name_list.json", {}, "expected a non-empty object"),
        ("category_to_subset_name_list.json", ["cup"], "expected a non-empty object"),
        ("category_to_subset_name_list.json", {"cup": None}, "category 'cup': expected a list"),
        ("category_to_subset_name_list.json", {"cup": [3]}, "category 'cup', subset name=3: expected a name"),
        ("category_to_subset_name_list.json", {"cup": ["../x"]}, "category 'cup', subset name='../x': must be one plain part"),
        ("category_to_subset_name_list.json", {"..": []}, "category='..': must be one plain part"),
        ("cup/set_lists/set_lists_manyview_dev_0.json", None, "expected an object with the lists"),
        ("cup/set_lists/set_lists_manyview_dev_0.json", {"train": None}, "expected a list of entries, got NoneType under 'train'"),
        ("cup/set_lists/set_lists_manyview_dev_0.json", {"train": [], "val": {}}, "expected a list of entries, got dict under 'val'"),
        ("cup/set_lists/set_lists_manyview_dev_0.json", {"train": [["s1", 3.7]]}, r"entry .*frame_number=3.7: expected an integer"),
        ("cup/set_lists/set_lists_manyview_dev_0.json", {"train": [["s1", True]]}, r"entry .*frame_number=True: expected an integer"),
        ("cup/set_lists/set_lists_manyview_dev_0.json", {"train": [["s1", "3"]]}, r"entry .*frame_number='3': expected an integer"),
        ("cup/set_lists/set_lists_manyview_dev_0.json", {"train": [[106, 3]]}, r"entry .*sequence_name=106: expected a name"),
        ("cup/set_lists/set_lists_manyview_dev_0.json", {"train": [["s1", 3, "/a.jpg"]]}, r"entry .*'/a.jpg' is no path relative to"),
        ("cup/set_lists/set_lists_manyview_dev_0.json", {"train": ["s1"]}, "entry 's1' is not"),
        ("cup/eval_batches/eval_batches_manyview_dev_0.json", None, "expected a list of entries, got NoneType"),
        ("cup/eval_batches/eval_batches_manyview_dev_0.json", [[["s1", 10**400]]], "entry .*expected an integer"),
    ],
)
def test_a_file_of_the_wrong_shape_is_named(tmp_path, name, content, message):
    write_json(write_root(tmp_path) / name, content)
    with pytest.raises(ValueError, match=f"{Path(name).name}: {message}"):
        CO3DIndex(tmp_path).subset("cup", "manyview_dev_0")


@pytest.mark.parametrize("where", ["image.path", "mask.path", "depth.path", "depth.mask_path"])
@pytest.mark.parametrize("path", ["../outside/a.png", "cup/../../a.png", "/etc/passwd", 3, ["cup/a.png"], "\ud800.png", "a\0.png"])
def test_a_path_out_of_the_root_is_refused_with_file_and_key(tmp_path, where, path):
    content = annotation("cup", "s1", 0)
    content["depth"] = {"path": "cup/s1/depths/a.png", "scale_adjustment": 1.0, "mask_path": "cup/s1/depth_masks/a.png"}
    section, key = where.split(".")
    content[section][key] = path
    write_root(tmp_path, annotations=[content], train=[0], val=[], test=[])
    with pytest.raises(ValueError, match=rf"frame_annotations\.jgz: (entry 0|frame s1/0).* {where}: ") as error:
        CO3DIndex(tmp_path).subset("cup", "manyview_dev_0")
    str(error.value).encode()


def test_paths_below_the_root_are_normalised_and_links_are_followed(tmp_path):
    content = annotation("cup", "s1", 0)
    content["image"]["path"] = "cup/./x/../s1//images/a.jpg"
    write_root(tmp_path / "root", annotations=[content], train=[["s1", 0, "cup/s1/images/a.jpg"]], val=[], test=[])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jpg").write_text("a picture")
    (tmp_path / "root" / "cup" / "s1").mkdir()
    (tmp_path / "root" / "cup" / "s1" / "images").symlink_to(tmp_path / "elsewhere")
    subset = CO3DIndex(tmp_path / "root").subset("cup", "manyview_dev_0")
    assert subset.list_faults == () and subset.known[0].image_path.read_text() == "a picture"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("sequence_name", "..", "sequence_name='..': must be one plain part"),
        ("sequence_name", 106, "sequence_name=106: expected a name"),
        ("frame_number", 3.7, "frame_number=3.7: expected an integer"),
        ("frame_number", True, "frame_number=True: expected an integer"),
        ("frame_number", math.inf, "frame_number=inf: expected an integer"),
        ("frame_number", 10**400, "frame_number=1.*expected an integer"),
        ("mask", [], r"frame s1/0: mask: expected an object or null, got \[\]"),
        ("meta", "dev", "frame s1/0: meta: expected an object or null"),
        ("viewpoint", {"intrinsics_format": 3}, "frame s1/0: viewpoint.intrinsics_format: expected text, got 3"),
    ],
)
def test_a_part_of_the_wrong_type_is_named_with_its_key(tmp_path, key, value, told):
    content = annotation("cup", "s1", 0)
    content[key] = value
    write_root(tmp_path, annotations=[content], train=[0], val=[], test=[])
    with pytest.raises(ValueError, match=rf"frame_annotations\.jgz: .*{told}"):
        CO3DIndex(tmp_path).subset("cup", "manyview_dev_0")


def test_a_frame_number_written_as_a_float_is_that_number(tmp_path):
    content = annotation("cup", "s1", 0)
    content["frame_number"] = 0.0
    subset = CO3DIndex(write_root(tmp_path, annotations=[content], train=[["s1", 0.0]], val=[], test=[])).subset("cup", "manyview_dev_0")
    assert [(record.frame_number, type(record.frame_number)) for record in subset.known] == [(0, int)]


def test_numbers_that_fit_no_float_and_sides_that_no_picture_has_become_nan_and_zero(tmp_path):
    content = annotation("cup", "s1", 0, size=(10**400, 24.5))
    content["viewpoint"]["T"] = [10**400, True, "3"]
    content["mask"]["mass"] = 10**400
    record = CO3DIndex(write_root(tmp_path, annotations=[content], train=[0], val=[], test=[])).frame("cup", "s1", 0)
    assert all(map(math.isnan, record.T)) and math.isnan(record.mask_mass) and (record.height, record.width) == (0, 0)


def test_null_validation_and_test_lists_are_empty_ones(tmp_path):
    write_root(tmp_path)
    path = tmp_path / "cup/set_lists/set_lists_manyview_dev_0.json"
    write_json(path, {**json.loads(path.read_text()), "val": None, "test": None})
    subset = CO3DIndex(tmp_path).subset("cup", "manyview_dev_0")
    assert subset.val == () and len(subset.known) == 6 and CO3DIndex(tmp_path).n_listed("cup", "manyview_dev_0") == 6


def test_a_subset_name_listed_twice_is_one_subset(tmp_path):
    write_json(write_root(tmp_path) / "category_to_subset_name_list.json", {"cup": ["manyview_dev_0", "manyview_dev_0"]})
    assert CO3DIndex(tmp_path).all_subsets(["dev"]) == [("cup", "manyview_dev_0")]


def test_a_subset_of_several_sequences_has_no_single_name(tmp_path):
    annotations = [annotation("cup", sequence, 0) for sequence in ("b", "a")]
    root = write_root(tmp_path, annotations=annotations, train=[entry(0, sequence="b"), entry(0, sequence="a")], val=[], test=[])
    subset = CO3DIndex(root).subset("cup", "manyview_dev_0")
    assert subset.sequence_names == ("a", "b")
    with pytest.raises(ValueError, match="has 2 sequences"):
        _ = subset.sequence_name


def test_88_categories_of_100_frames_are_indexed_within_seconds(tmp_path):
    annotations = [annotation("cup", "s1", number) for number in range(100)]
    write_root(tmp_path, annotations=annotations, train=range(80), val=range(80, 90), test=range(90, 100))
    names = ["cup", *(f"c{i}" for i in range(87))]
    for name in names[1:]:
        shutil.copytree(tmp_path / "cup", tmp_path / name)
    write_json(tmp_path / "category_to_subset_name_list.json", {name: ["manyview_dev_0"] for name in names})
    start = time.process_time()
    index = CO3DIndex(tmp_path)
    subsets = [index.subset(*which) for which in index.all_subsets(["dev"])]
    assert time.process_time() - start < 4
    assert sum(len(subset.known) for subset in subsets) == 88 * 80


@pytest.mark.skipif(not REAL_ROOT.is_dir(), reason="no CO3D sequences at ../shared/data/co3d")
@pytest.mark.parametrize(("category", "counts"), [("cape", (94, 12, 13)), ("apple", (16, 2, 2))])
def test_real_sequences_have_the_frames_of_their_lists(category, counts):
    subset = CO3DIndex(REAL_ROOT).subset(category, "manyview_dev_0")
    assert (len(subset.known), len(subset.val), len(subset.targets)) == counts
    assert subset.list_faults == ()
