import gzip
import json
import logging
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from co3d_ensemble.base import pictures
from co3d_ensemble.data.audit import Problem, audit_subset, hold_out, usable_frames
from co3d_ensemble.data.co3d import CO3DIndex

REAL_ROOT = Path(__file__).parents[2] / "../shared/data/co3d"
HEIGHT, WIDTH = 24, 32
ROTATION = [[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


class TinyRoot:
    """A root of one sequence ``cup/s1``: frames 0-9 known, 10-11 val, 12-13 targets, with depth; each test damages it."""

    def __init__(self, root, subset="manyview_dev_0", n_frames=14):
        self.root, self.subset_name = root, subset
        self.annotations = [self.annotation(number) for number in range(n_frames)]
        names = [["s1", a["frame_number"], a["image"]["path"]] for a in self.annotations]
        self.lists = {"train": names[:-4], "val": names[-4:-2], "test": names[-2:]}
        rng = np.random.default_rng(0)
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[4:20, 8:24] = 255
        for number in range(n_frames):
            self.save("images", number, rng.integers(1, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
            self.save("masks", number, mask)
            self.save("depths", number, rng.uniform(1, 5, (HEIGHT, WIDTH)).astype(np.float16).view(np.uint16))
            self.save("depth_masks", number, mask)

    @staticmethod
    def relative(kind, number):
        return f"cup/s1/{kind}/frame{number:06d}.{'jpg' if kind == 'images' else 'png'}"

    def path(self, kind, number):
        return self.root / self.relative(kind, number)

    def save(self, kind, number, pixels):
        self.path(kind, number).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(self.path(kind, number))

    def annotation(self, number):
        return {
            "sequence_name": "s1",
            "frame_number": number,
            "frame_timestamp": 0.0,
            "image": {"path": self.relative("images", number), "size": [HEIGHT, WIDTH]},
            "depth": {
                "path": self.relative("depths", number),
                "scale_adjustment": 1.5,
                "mask_path": self.relative("depth_masks", number),
            },
            "mask": {"path": self.relative("masks", number), "mass": 256.0},
            "viewpoint": {
                "R": ROTATION,
                "T": [0.0, 0.0, 5.0],
                "focal_length": [2.0, 2.0],
                "principal_point": [0.0, 0.0],
                "intrinsics_format": "ndc_isotropic",
            },
            "meta": {"frame_type": "dev_known"},
        }

    def index(self):
        category = self.root / "cup"
        (category / "set_lists").mkdir(exist_ok=True)
        (category / "eval_batches").mkdir(exist_ok=True)
        (self.root / "category_to_subset_name_list.json").write_text(json.dumps({"cup": [self.subset_name]}))
        (category / "frame_annotations.jgz").write_bytes(gzip.compress(json.dumps(self.annotations).encode()))
        (category / "set_lists" / f"set_lists_{self.subset_name}.json").write_text(json.dumps(self.lists))
        batches = [[item] for item in self.lists["test"]]
        (category / "eval_batches" / f"eval_batches_{self.subset_name}.json").write_text(json.dumps(batches))
        return CO3DIndex(self.root)

    def subset(self):
        return self.index().subset("cup", self.subset_name)

    def audit(self, decode=True):
        index = self.index()
        return audit_subset(index, index.subset("cup", self.subset_name), decode=decode)


@pytest.fixture
def tiny(tmp_path):
    return TinyRoot(tmp_path)


def only(findings):
    assert len(findings) == 1, [finding.message for finding in findings]
    return findings[0]


def assert_finding(finding, problem, path, fatal, role="known"):
    assert (finding.problem, finding.path, finding.fatal_for_training, finding.role) == (problem, path, fatal, role), finding.message
    assert path in finding.message and finding.name in finding.message


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("decode", [False, True])
def test_a_clean_subset_has_no_findings_and_passes_unchanged(tiny, decode, caplog):
    subset = tiny.subset()
    findings = audit_subset(tiny.root, subset, decode=decode)
    assert findings == []
    with caplog.at_level(logging.INFO):
        usable = usable_frames(subset, findings)
    assert (usable.known, usable.val, usable.targets) == (subset.known, subset.val, subset.targets)
    assert usable.scorable == {("s1", 12), ("s1", 13)} and caplog.text == ""


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("kind", ["images", "masks"])
@pytest.mark.parametrize(("number", "role"), [(3, "known"), (10, "val"), (12, "target")])
def test_a_missing_file_is_fatal_except_for_targets(tiny, kind, decode, number, role):
    tiny.path(kind, number).unlink()
    finding = only(tiny.audit(decode))
    assert_finding(finding, Problem.MISSING_FILE, tiny.relative(kind, number), role != "target", role)
    assert finding.name == f"s1/{number}"


def test_an_annotation_without_a_mask_is_a_missing_file(tiny):
    tiny.annotations[3]["mask"] = None
    assert_finding(only(tiny.audit()), Problem.MISSING_FILE, tiny.relative("images", 3), True)


@pytest.mark.parametrize("kind", ["depths", "depth_masks"])
def test_a_missing_depth_file_leaves_the_frame_without_depth(tiny, kind, caplog):
    tiny.path(kind, 3).unlink()
    subset, findings = tiny.subset(), tiny.audit()
    assert_finding(only(findings), Problem.MISSING_FILE, tiny.relative(kind, 3), False)
    with caplog.at_level(logging.WARNING):
        usable = usable_frames(subset, findings)
    assert usable.known[3] == replace(subset.known[3], depth_path=None, depth_mask_path=None)
    assert usable.known[4] == subset.known[4]
    assert [tiny.relative(kind, 3) in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("kind", ["images", "masks", "depths"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98])
def test_decoding_finds_a_truncated_file(tiny, kind, share):
    cut(tiny.path(kind, 3), share)
    assert_finding(only(tiny.audit()), Problem.UNREADABLE, tiny.relative(kind, 3), kind != "depths")


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_decoding_finds_a_file_whose_second_half_is_zeros(tiny, kind):
    path = tiny.path(kind, 3)
    data = path.read_bytes()
    kept = len(data) * 4 // 5  # of the tiny JPEG, 60% is header: PIL decodes this one without complaint
    path.write_bytes(data[:kept] + bytes(len(data) - kept))
    assert_finding(only(tiny.audit()), Problem.UNREADABLE, tiny.relative(kind, 3), True)


def test_truncation_is_found_although_another_library_tolerates_it(tiny, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with Image.open(tiny.path("images", 3)) as picture:
        picture.save(tiny.path("images", 3), comment=b"\xff\xd9")  # an end marker ahead of the pixels, as a thumbnail has
    cut(tiny.path("images", 3), 0.8)
    assert_finding(only(tiny.audit()), Problem.UNREADABLE, tiny.relative("images", 3), True)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_headers_alone_show_empty_files_and_files_that_are_no_pictures(tiny, content):
    tiny.path("images", 3).write_bytes(content)
    assert_finding(only(tiny.audit(decode=False)), Problem.UNREADABLE, tiny.relative("images", 3), True)


def test_headers_alone_do_not_decode(tiny):
    cut(tiny.path("images", 3), 0.9)
    assert tiny.audit(decode=False) == []


def test_a_black_known_frame_is_fatal(tiny):
    tiny.save("images", 3, np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    assert_finding(only(tiny.audit()), Problem.REDACTED, tiny.relative("images", 3), True)


def test_a_frame_that_is_black_but_for_a_patch_at_the_right_is_not_redacted(tiny):
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[:, 16:] = 9
    tiny.save("images", 3, pixels)
    assert tiny.audit() == []


def test_redacted_targets_of_a_test_set_are_noted_not_scored_and_not_warned_about(tmp_path, caplog):
    tiny = TinyRoot(tmp_path, subset="manyview_test_0")
    tiny.save("images", 12, np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    tiny.save("masks", 12, np.zeros((HEIGHT, WIDTH), np.uint8))
    findings = tiny.audit()
    assert [f.problem for f in findings] == [Problem.REDACTED, Problem.EMPTY_MASK]
    assert_finding(findings[0], Problem.REDACTED, tiny.relative("images", 12), False, "target")
    with caplog.at_level(logging.WARNING):
        usable = usable_frames(tiny.subset(), findings)
    assert [r.frame_number for r in usable.targets] == [12, 13] and usable.scorable == {("s1", 13)}
    assert caplog.text == ""


def test_headers_alone_take_targets_of_a_test_set_for_redacted(tmp_path):
    tiny = TinyRoot(tmp_path, subset="manyview_test")
    findings = tiny.audit(decode=False)
    assert [(f.problem, f.role, f.fatal_for_training) for f in findings] == [(Problem.REDACTED, "target", False)] * 2
    assert usable_frames(tiny.subset(), findings).scorable == frozenset()


def test_a_black_target_of_a_dev_set_is_warned_about_and_not_scored(tiny, caplog):
    tiny.save("images", 12, np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    with caplog.at_level(logging.WARNING):
        usable = usable_frames(tiny.subset(), tiny.audit())
    assert usable.scorable == {("s1", 13)} and tiny.relative("images", 12) in caplog.text


def test_an_empty_mask_is_fatal(tiny):
    tiny.save("masks", 3, np.zeros((HEIGHT, WIDTH), np.uint8))
    assert_finding(only(tiny.audit()), Problem.EMPTY_MASK, tiny.relative("masks", 3), True)


def test_a_whole_foreground_mask_is_a_note(tiny):
    tiny.save("masks", 3, np.full((HEIGHT, WIDTH), 255, np.uint8))
    findings = tiny.audit()
    assert_finding(only(findings), Problem.WHOLE_MASK, tiny.relative("masks", 3), False)
    assert len(usable_frames(tiny.subset(), findings).known) == 10


def test_a_mask_of_zeros_and_ones_is_fatal(tiny):
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[4:9] = 1
    tiny.save("masks", 3, pixels)
    finding = only(tiny.audit())
    assert_finding(finding, Problem.MASK_VALUES, tiny.relative("masks", 3), True)
    assert "0..1" in finding.message


@pytest.mark.parametrize("mode", ["1", "P", "RGB", "LA", "I;16"])
@pytest.mark.parametrize("decode", [False, True])
def test_a_mask_that_is_not_8_bit_gray_is_fatal_and_its_mode_named(tiny, mode, decode):
    with Image.open(tiny.path("masks", 3)) as mask:
        gray = mask.copy()
    converted = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257) if mode == "I;16" else gray.convert(mode)
    converted.save(tiny.path("masks", 3))
    finding = only(tiny.audit(decode))
    assert_finding(finding, Problem.MASK_VALUES, tiny.relative("masks", 3), True)
    assert repr(mode) in finding.message


GRAY = np.random.default_rng(1).integers(1, 256, (HEIGHT, WIDTH), dtype=np.uint8)


def as_png(tiny, number, picture, **options):
    """The frame's photograph becomes a PNG."""
    relative = tiny.relative("images", number).replace(".jpg", ".png")
    picture.save(tiny.root / relative, **options)
    tiny.annotations[number]["image"]["path"] = relative
    for entries in tiny.lists.values():
        for entry in entries:
            if entry[1] == number:
                entry[2] = relative
    return relative


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize(
    ("picture", "told"),
    [
        (Image.fromarray(GRAY.astype(np.uint16) * 257), "16-bit gray, which is scaled"),
        (Image.fromarray(np.dstack([GRAY] * 4)), "alpha is left out"),
        (Image.fromarray(np.dstack([GRAY] * 2)), "alpha is left out"),
    ],
)
def test_a_photograph_that_is_read_as_less_than_it_holds_is_a_note(tiny, picture, told, decode):
    relative = as_png(tiny, 3, picture)
    findings = tiny.audit(decode)
    assert_finding(only(findings), Problem.PICTURE_MODE, relative, False)
    assert told in findings[0].message and len(usable_frames(tiny.subset(), findings).known) == 10


@pytest.mark.parametrize("mode", ["1", "P", "L"])
def test_photographs_of_other_8_bit_modes_are_no_finding(tiny, mode):
    as_png(tiny, 3, Image.fromarray(GRAY).convert(mode))
    assert tiny.audit() == []


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("picture", [Image.fromarray(GRAY.astype(np.float32)), Image.fromarray(GRAY.astype(np.int32))])
def test_a_photograph_whose_range_is_unknown_is_fatal(tiny, picture, decode):
    picture.save(tiny.path("images", 3), "TIFF")  # a wrong suffix is no fault
    finding = only(tiny.audit(decode))
    assert_finding(finding, Problem.PICTURE_MODE, tiny.relative("images", 3), True)
    assert repr(picture.mode) in finding.message


@pytest.mark.parametrize("decode", [False, True])
def test_a_turned_photograph_is_a_finding_only_where_its_camera_does_not_tell_which_way(tiny, decode):
    exif = Image.Exif()
    for orientation, problem in ((6, None), (3, Problem.EXIF_ORIENTATION)):
        exif[0x0112] = orientation
        relative = as_png(tiny, 3, Image.fromarray(GRAY), exif=exif)
        findings = tiny.audit(decode)
        assert [finding.problem for finding in findings] == ([problem] if problem else [])
    assert_finding(only(findings), Problem.EXIF_ORIENTATION, relative, True)


@pytest.mark.parametrize("kind", ["masks", "depths", "depth_masks"])
def test_one_flipped_bit_in_a_png_is_found(tiny, kind):
    rng = np.random.default_rng(0)
    whole = tiny.path(kind, 3).read_bytes()
    for bit in rng.choice(8 * len(whole), 12, replace=False):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << (bit % 8)
        tiny.path(kind, 3).write_bytes(data)
        finding = tiny.audit()[0]
        assert_finding(finding, Problem.UNREADABLE, tiny.relative(kind, 3), kind == "masks")


def test_a_picture_too_large_to_decode_is_refused_from_its_header(tiny, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", HEIGHT * WIDTH)
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(tiny.path("images", 3))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    findings = tiny.audit(decode=False)
    assert_finding(only(findings), Problem.PICTURE_SIZE, tiny.relative("images", 3), True)
    assert f"33x24 (width x height) pixels, more than {HEIGHT * WIDTH}" in findings[0].message


@pytest.mark.parametrize(
    ("depth", "mask"),
    [
        (np.zeros((HEIGHT, WIDTH), np.uint16), None),
        (None, np.zeros((HEIGHT, WIDTH), np.uint8)),
        (np.full((HEIGHT, WIDTH), -1, np.float16).view(np.uint16), None),
    ],
)
def test_a_depth_map_without_a_valid_value_is_no_depth(tiny, depth, mask):
    for kind, pixels in (("depths", depth), ("depth_masks", mask)):
        if pixels is not None:
            tiny.save(kind, 12, pixels)
    findings = tiny.audit()
    assert_finding(only(findings), Problem.DEPTH_VALUES, tiny.relative("depths", 12), False, "target")
    usable = usable_frames(tiny.subset(), findings)
    assert usable.targets[0].depth_path is None and usable.scorable == {("s1", 12), ("s1", 13)}


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("kind", ["depths", "depth_masks"])
def test_colour_in_place_of_depth_costs_the_depth(tiny, kind, decode):
    tiny.save(kind, 3, np.full((HEIGHT, WIDTH, 3), 9, np.uint8))
    assert_finding(only(tiny.audit(decode)), Problem.DEPTH_VALUES, tiny.relative(kind, 3), False)


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("kind", ["masks", "depths", "depth_masks"])
def test_a_size_other_than_the_pictures_is_found(tiny, kind, decode):
    with Image.open(tiny.path(kind, 3)) as picture:
        turned = picture.transpose(Image.Transpose.ROTATE_90)
    turned.save(tiny.path(kind, 3))
    finding = only(tiny.audit(decode))
    assert_finding(finding, Problem.PICTURE_SIZE, tiny.relative(kind, 3), kind == "masks")
    assert "24x32" in finding.message and "32x24" in finding.message


def test_a_picture_of_another_size_than_annotated_is_found(tiny):
    tiny.annotations[3]["image"]["size"] = [WIDTH, HEIGHT]
    tiny.annotations[3]["depth"] = None
    finding = only(tiny.audit(decode=False))
    assert_finding(finding, Problem.PICTURE_SIZE, tiny.relative("images", 3), True)
    assert "32x24" in finding.message and "24x32" in finding.message


@pytest.mark.parametrize("value", [math.nan, math.inf, None, 1e30, 10**400, True])
@pytest.mark.parametrize("name", ["T", "focal_length", "principal_point"])
def test_a_camera_that_is_not_finite_is_fatal(tiny, name, value):
    tiny.annotations[3]["viewpoint"][name][0] = value
    assert_finding(only(tiny.audit(decode=False)), Problem.CAMERA_NOT_FINITE, tiny.relative("images", 3), True)


def test_a_path_that_the_system_takes_for_too_long_is_a_finding(tiny):
    tiny.annotations[3]["mask"]["path"] = "/".join(["cup/s1"] + ["x" * 200] * 30)
    finding = only(tiny.audit(decode=False))
    assert finding.problem is Problem.UNREADABLE and finding.name == "s1/3"


def test_a_frame_without_a_viewpoint_is_fatal(tiny):
    tiny.annotations[3]["viewpoint"] = None
    finding = only(tiny.audit(decode=False))
    assert_finding(finding, Problem.CAMERA_NOT_FINITE, tiny.relative("images", 3), True)
    assert "R, T, focal length, principal point" in finding.message


@pytest.mark.parametrize(
    "R",
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, -1]],
        [[1, 0.01, 0], [0, 1, 0], [0, 0, 1]],
        [[1.001, 0, 0], [0, 1.001, 0], [0, 0, 1.001]],
        [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
    ],
    ids=["reflection", "shear", "scale", "zero"],
)
def test_an_R_that_is_no_rotation_is_fatal(tiny, R):
    tiny.annotations[3]["viewpoint"]["R"] = R
    assert_finding(only(tiny.audit(decode=False)), Problem.NOT_A_ROTATION, tiny.relative("images", 3), True)


def test_float32_rounding_of_R_is_no_finding(tiny):
    c, s = math.cos(0.3) + 2e-5, math.sin(0.3)
    tiny.annotations[3]["viewpoint"]["R"] = [[c, -s, 0], [s, c, 0], [0, 0, 1]]
    assert tiny.audit(decode=False) == []


@pytest.mark.parametrize("focal", [0.0, -2.0])
def test_a_focal_length_that_is_not_positive_is_fatal(tiny, focal):
    tiny.annotations[3]["viewpoint"]["focal_length"] = [2.0, focal]
    assert_finding(only(tiny.audit(decode=False)), Problem.FOCAL_NOT_POSITIVE, tiny.relative("images", 3), True)


def test_an_unknown_intrinsics_format_is_fatal(tiny):
    tiny.annotations[3]["viewpoint"]["intrinsics_format"] = "pixels"
    assert_finding(only(tiny.audit(decode=False)), Problem.INTRINSICS_FORMAT, tiny.relative("images", 3), True)


def test_a_camera_fault_of_a_target_keeps_it_but_not_for_scoring(tiny):
    tiny.annotations[12]["viewpoint"]["T"] = [math.nan] * 3
    findings = tiny.audit()
    assert_finding(only(findings), Problem.CAMERA_NOT_FINITE, tiny.relative("images", 12), False, "target")
    usable = usable_frames(tiny.subset(), findings)
    assert len(usable.targets) == 2 and usable.scorable == {("s1", 13)}


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_depth_scale_that_is_not_positive_spoils_the_depth_only(tiny, scale):
    tiny.annotations[3]["depth"]["scale_adjustment"] = scale
    assert_finding(only(tiny.audit(decode=False)), Problem.DEPTH_VALUES, tiny.relative("depths", 3), False)


def test_an_8_bit_depth_spoils_the_depth_only(tiny):
    tiny.save("depths", 3, np.ones((HEIGHT, WIDTH), np.uint8))
    assert_finding(only(tiny.audit(decode=False)), Problem.DEPTH_VALUES, tiny.relative("depths", 3), False)


def test_a_list_with_another_picture_than_annotated_drops_the_frame(tiny):
    tiny.lists["train"][3] = ["s1", 3, tiny.relative("images", 12)]
    findings = tiny.audit()
    assert_finding(only(findings), Problem.LABEL_MISMATCH, tiny.relative("images", 12), True)
    assert findings[0].name == "s1/3"
    assert 3 not in [record.frame_number for record in usable_frames(tiny.subset(), findings).known]


def test_a_listed_frame_without_annotation_is_named(tiny):
    tiny.lists["train"].append(["s1", 99, "cup/s1/images/gone.jpg"])
    assert_finding(only(tiny.audit()), Problem.UNKNOWN_FRAME, "cup/s1/images/gone.jpg", True)


def test_a_picture_of_another_sequence_is_a_label_mismatch(tiny):
    other = "cup/s2/images/frame000003.jpg"
    (tiny.root / other).parent.mkdir(parents=True)
    shutil.copy(tiny.path("images", 3), tiny.root / other)
    tiny.annotations[3]["image"]["path"] = tiny.lists["train"][3][2] = other
    finding = only(tiny.audit())
    assert_finding(finding, Problem.LABEL_MISMATCH, other, True)
    assert "'s1'" in finding.message


@pytest.mark.parametrize(("other", "role"), [(4, "known"), (12, "target")])
def test_two_frames_of_one_picture_are_both_mislabelled(tiny, other, role):
    shared = tiny.relative("images", other)
    tiny.annotations[3]["image"]["path"] = tiny.lists["train"][3][2] = shared
    findings = {f.name: f for f in tiny.audit() if f.problem is Problem.LABEL_MISMATCH}
    assert findings.keys() == {"s1/3", f"s1/{other}"}
    assert_finding(findings["s1/3"], Problem.LABEL_MISMATCH, shared, True)
    assert_finding(findings[f"s1/{other}"], Problem.LABEL_MISMATCH, shared, role == "known", role)
    assert f"with s1/{other}" in findings["s1/3"].message


@pytest.mark.parametrize("other", [3, 4, 12])
def test_a_mask_that_is_taken_for_a_photograph_is_named_with_its_frame(tiny, other):
    path = tiny.relative("masks", other)
    tiny.annotations[3]["image"]["path"] = tiny.lists["train"][3][2] = path
    finding = next(f for f in tiny.audit(decode=False) if f.problem is Problem.LABEL_MISMATCH)
    assert_finding(finding, Problem.LABEL_MISMATCH, path, True)
    assert f"the picture is also the mask of s1/{other}" in finding.message and finding.name == "s1/3"


def test_two_frames_of_one_mask_are_both_named(tiny):
    tiny.annotations[3]["mask"]["path"] = tiny.relative("masks", 12)
    findings = tiny.audit()
    for finding, role, other in zip(findings, ("known", "target"), (12, 3), strict=True):
        assert_finding(finding, Problem.LABEL_MISMATCH, tiny.relative("masks", 12), role == "known", role)
        assert f"the mask is also that of s1/{other}" in finding.message


def test_a_known_frame_with_the_picture_of_a_target_is_withheld_even_without_an_audit(tiny):
    tiny.annotations[3]["image"]["path"] = tiny.lists["train"][3][2] = tiny.relative("images", 12)
    assert 3 not in [record.frame_number for record in tiny.subset().known]


def test_a_frame_in_all_lists_is_noted_and_stays_a_target(tiny):
    tiny.lists["train"].append(tiny.lists["test"][0])
    tiny.lists["val"].append(tiny.lists["test"][0])
    findings = tiny.audit()
    assert [f.role for f in findings] == ["known", "val"]
    for finding, role in zip(findings, ("known", "val"), strict=True):
        assert_finding(finding, Problem.DUPLICATE, tiny.relative("images", 12), False, role)
    usable = usable_frames(tiny.subset(), findings)
    assert ("s1", 12) in usable.scorable and ("s1", 12) not in {record.key for record in usable.known + usable.val}


def test_each_dropped_frame_is_one_warning_with_its_file(tiny, caplog):
    tiny.path("images", 2).unlink()
    tiny.path("masks", 2).unlink()
    tiny.path("masks", 11).unlink()
    with caplog.at_level(logging.WARNING):
        usable = usable_frames(tiny.subset(), tiny.audit())
    assert [r.frame_number for r in usable.known] == [0, 1, 3, 4, 5, 6, 7, 8, 9] and [r.frame_number for r in usable.val] == [10]
    known, val = (record.getMessage() for record in caplog.records)
    assert tiny.relative("images", 2) in known and tiny.relative("masks", 2) in known and tiny.relative("masks", 11) in val


def test_too_few_usable_frames_raise_with_counts_and_files(tiny):
    for number in range(7):
        tiny.path("images", number).unlink()
    subset, findings = tiny.subset(), tiny.audit(decode=False)
    with pytest.raises(ValueError, match=r"cup/manyview_dev_0: 3 of 10 known frames are usable, need 8") as error:
        usable_frames(subset, findings)
    shown = [tiny.relative("images", number) in str(error.value) for number in range(7)]
    assert shown == [True] * 5 + [False] * 2 and "(and 2 more)" in str(error.value)
    assert len(usable_frames(subset, findings, min_known_frames=3).known) == 3


def test_hold_out_spreads_evenly_and_keeps_every_frame_once(tiny, caplog):
    subset = replace(tiny.subset(), val=())
    with caplog.at_level(logging.INFO):
        split = hold_out(subset, 0.3)
    assert [r.frame_number for r in split.val] == [1, 5, 8]
    assert [r.frame_number for r in split.known] == [0, 2, 3, 4, 6, 7, 9]
    assert "3 of 10 known frames held out: s1/1, s1/5, s1/8" in caplog.text
    shuffled = hold_out(replace(subset, known=subset.known[::-1]), 0.3)
    assert {r.key for r in shuffled.val} == {r.key for r in split.val}


def test_hold_out_leaves_a_subset_with_val_frames_alone(tiny):
    subset = tiny.subset()
    assert hold_out(subset, 0.3) is subset


@pytest.mark.parametrize(
    ("n_known", "share", "most", "expected"), [(10, 0.01, None, 1), (10, 0.9, 2, 2), (2, 0.99, None, 1), (5, 0.5, 0, 1)]
)
def test_hold_out_takes_at_least_one_frame_and_leaves_one(tiny, n_known, share, most, expected):
    subset = tiny.subset()
    split = hold_out(replace(subset, known=subset.known[:n_known], val=()), share, max_val_frames=most)
    assert (len(split.val), len(split.known)) == (expected, n_known - expected)


def test_hold_out_rejects_what_it_cannot_split(tiny):
    subset = replace(tiny.subset(), val=())
    with pytest.raises(ValueError, match="val_share=1.0"):
        hold_out(subset, 1.0)
    with pytest.raises(ValueError, match="of 1 known frames"):
        hold_out(replace(subset, known=subset.known[:1]), 0.5)


def test_sources_of_few_view_are_audited(tmp_path):
    tiny = TinyRoot(tmp_path, subset="fewview_dev")
    source = tiny.lists["train"].pop(9)
    index = tiny.index()
    path = tiny.root / "cup/eval_batches/eval_batches_fewview_dev.json"
    path.write_text(json.dumps([[target, source] for target in tiny.lists["test"]]))
    tiny.path("images", 9).unlink()
    findings = audit_subset(index, index.subset("cup", "fewview_dev"), decode=False)
    assert_finding(only(findings), Problem.MISSING_FILE, tiny.relative("images", 9), False, "source")


def test_headers_of_1000_frames_take_under_a_second(tmp_path):
    tiny = TinyRoot(tmp_path, n_frames=100)  # 88 categories of 100 frames, a ninth of it
    for annotation in tiny.annotations:
        annotation["depth"] = None
    index = tiny.index()
    subset = index.subset("cup", "manyview_dev_0")
    start = time.process_time()
    for _ in range(10):
        assert audit_subset(index, subset, decode=False) == []
    assert time.process_time() - start < 1


@pytest.mark.skipif(not REAL_ROOT.is_dir(), reason="no CO3D sequences at ../shared/data/co3d")
@pytest.mark.parametrize(("category", "counts"), [("cape", (94, 12, 13)), ("apple", (16, 2, 2))])
def test_real_sequences_have_no_fatal_findings(category, counts):
    index = CO3DIndex(REAL_ROOT)
    subset = index.subset(category, "manyview_dev_0")
    findings = audit_subset(index, subset, decode=True)
    assert [f.message for f in findings if f.fatal_for_training] == []
    usable = usable_frames(subset, findings)
    assert (len(usable.known), len(usable.val), len(usable.targets)) == counts
    assert usable.scorable == {record.key for record in subset.targets}
