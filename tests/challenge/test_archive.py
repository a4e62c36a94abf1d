import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from co3d_ensemble.challenge import archive as archive_module
from co3d_ensemble.challenge.archive import ArchiveError, MissingTargets, check_archive, read_archive, write_archive
from co3d_ensemble.challenge.frame_io import KINDS, encode_view
from co3d_ensemble.challenge.targets import Target, archive_name
from co3d_ensemble.functional.types import RenderedView

TARGETS = [
    Target("cape", "manyview_dev_0", "110_13051_23361", 7, 6, 9),
    Target("cape", "manyview_dev_0", "110_13051_23361", 12, 6, 9),
    Target("toaster", "manyview_dev_1", "372_41229_82130", 7, 5, 4),
]


def view_of(target):
    """A view whose values all survive the file format."""
    g = torch.Generator().manual_seed(target.frame_number)
    integers = lambda high, channels: torch.randint(0, high, (channels, *target.size), generator=g).float()
    return RenderedView(rgb=integers(256, 3) / 255, depth=integers(1000, 1) / 64, mask=integers(2, 1))


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / archive_name("manyview", "dev")
    write_archive(path, ((target, view_of(target)) for target in TARGETS))
    return path


def entries_of(targets):
    """(path, PNG bytes) of every file, as the writer stores them."""
    return [(target.path(kind), encode_view(view_of(target))[kind]) for target in targets for kind in KINDS]


def write_raw(path, entries, index=None, *, paths=None, dtype=np.uint8):
    """An archive of any content, in the challenge's layout."""
    with h5py.File(path, "w", libver="latest") as file:
        data = file.create_dataset("binary_data", (len(entries),), dtype=h5py.vlen_dtype(dtype))
        for i, (_, content) in enumerate(entries):
            data[i] = np.frombuffer(content, np.uint8).astype(dtype)
        names = [name.encode() for name, _ in entries] if paths is None else paths
        file.create_dataset("filepaths", data=names, dtype=h5py.string_dtype("utf-8"))
        data.attrs.update({Path(name).name: i for i, (name, _) in enumerate(entries)} if index is None else index)
    return path


def test_views_survive_the_archive_in_the_order_of_the_targets(archive):
    order = [TARGETS[2], TARGETS[0], TARGETS[1]]
    read = list(read_archive(archive, order))
    assert [target for target, _ in read] == order
    for target, view in read:
        expected = view_of(target)
        assert all(torch.equal(getattr(view, plane), getattr(expected, plane)) for plane in ("rgb", "depth", "mask"))


def test_the_layout_is_the_challenges(archive):
    with h5py.File(archive) as file:
        assert set(file) == {"binary_data", "filepaths"}
        assert file["binary_data"].compression == "gzip"
        assert h5py.check_vlen_dtype(file["binary_data"].dtype) == np.uint8
        paths = [path.decode("UTF-8") for path in np.array(file["filepaths"])]
        assert paths[1] == "cape/manyview_dev_0/cape_110_13051_23361_7_mask.png"
        assert dict(file["binary_data"].attrs) == {Path(path).name: i for i, path in enumerate(paths)}
        assert h5py.check_string_dtype(file["filepaths"].dtype).encoding == "utf-8"


def test_thousands_of_file_names_fit(tmp_path):
    targets = [Target("cape", "manyview_dev_0", "sequence_with_a_long_name_" * 3, i, 1, 1) for i in range(400)]
    view = RenderedView(torch.zeros(3, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
    write_archive(tmp_path / "a.hdf5", ((target, view) for target in targets))
    assert check_archive(tmp_path / "a.hdf5", targets) == []


def test_the_file_is_of_the_latest_hdf5_format(archive):
    assert archive.read_bytes()[8] == 3  # version of the superblock; 0 without the bound "latest"


def test_frames_are_consumed_one_at_a_time(tmp_path, monkeypatch):
    order = []
    encode = archive_module.encode_view
    monkeypatch.setattr(archive_module, "encode_view", lambda view: order.append("written") or encode(view))

    def frames():
        for target in TARGETS:
            order.append("rendered")
            yield target, view_of(target)

    write_archive(tmp_path / "a.hdf5", frames())
    assert order == ["rendered", "written"] * 3


def broken_view(**planes):
    return RenderedView(**{"rgb": torch.zeros(3, 6, 9), "depth": torch.zeros(1, 6, 9), "mask": torch.zeros(1, 6, 9), **planes})


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "no frame"),
        ([(TARGETS[0], broken_view(depth=torch.full((1, 6, 9), float("nan"))))], r"_7_\*.png: depth: 54 non-finite"),
        ([(TARGETS[0], broken_view(rgb=torch.zeros(3, 9, 6)))], r"_7_image.png: expected \(6, 9\) .* has \(9, 6\)"),
        ([(TARGETS[0], view_of(TARGETS[0]))] * 2, "already holds a file of this name"),
        ([(Target("hot_dog", "manyview_dev_0", "1", 1, 6, 9), broken_view())], "category 'hot_dog'"),
    ],
)
def test_a_failed_write_leaves_the_previous_archive(archive, frames, message):
    before = archive.read_bytes()
    with pytest.raises(ValueError, match=message):
        write_archive(archive, iter(frames))
    assert archive.read_bytes() == before
    assert os.listdir(archive.parent) == [archive.name]


def test_the_same_file_name_in_two_subsets_is_refused(tmp_path):
    twins = [TARGETS[0], Target("cape", "manyview_dev_1", "110_13051_23361", 7, 6, 9)]
    with pytest.raises(ValueError, match="manyview_dev_1/.*already holds a file of this name, cape/manyview_dev_0/"):
        write_archive(tmp_path / "a.hdf5", ((target, view_of(target)) for target in twins))


def test_an_archive_over_the_limit_is_refused_before_it_replaces_anything(archive):
    before = archive.read_bytes()
    payload = sum(len(content) for _, content in entries_of(TARGETS))
    for limit in (payload - 1, len(before) - 1):  # while writing, and by the size of the finished file
        with pytest.raises(ValueError, match="exceeds|more than"):
            write_archive(archive, ((target, view_of(target)) for target in TARGETS), max_bytes=limit)
    assert archive.read_bytes() == before
    assert os.listdir(archive.parent) == [archive.name]
    assert write_archive(archive, ((target, view_of(target)) for target in TARGETS), max_bytes=len(before)) == len(before)
    with pytest.raises(ArchiveError, match="more than"):
        check_archive(archive, TARGETS, max_bytes=len(before) - 1)


def test_writing_stops_at_the_frame_that_exceeds_the_limit(tmp_path):
    frames = ((target, view_of(target)) for target in TARGETS)
    with pytest.raises(ValueError, match=r"exceeds 10 bytes at frame 1, cape/.*_7_"):
        write_archive(tmp_path / "a.hdf5", frames, max_bytes=10)
    assert next(frames)[0] == TARGETS[1]


def test_missing_frames_are_listed_before_the_first_frame_is_read(tmp_path):
    path = write_raw(tmp_path / "a.hdf5", [(name, b"never decoded") for name, _ in entries_of(TARGETS[1:2])])
    with pytest.raises(MissingTargets) as caught:
        next(read_archive(path, TARGETS))
    assert caught.value.targets == (TARGETS[0], TARGETS[2])
    assert all(target.path("*") in str(caught.value) for target in caught.value.targets)
    assert TARGETS[1].path("*") not in str(caught.value)


def test_missing_frames_may_be_allowed(tmp_path):
    path = write_raw(tmp_path / "a.hdf5", entries_of(TARGETS[1:2]))
    assert check_archive(path, TARGETS, allow_missing=True) == [TARGETS[0], TARGETS[2]]


def test_a_frame_without_one_of_its_files_is_never_allowed(tmp_path):
    path = write_raw(tmp_path / "a.hdf5", entries_of(TARGETS)[:-1])
    with pytest.raises(ArchiveError, match="372_41229_82130_7_.* lacks its depth"):
        check_archive(path, TARGETS, allow_missing=True)


IMAGE = TARGETS[0].path("image")


@pytest.mark.parametrize(
    ("hostile", "message"),
    [
        ("../../x", r"entry '../../x' leaves its folder"),
        ("cape/manyview_dev_0/../../../x.png", "leaves its folder"),
        ("cape\\..\\x.png", "leaves its folder"),
        ("/etc/x.png", "absolute"),
        ("C:\\x.png", "absolute"),
        (f"./{IMAGE}", "not of the form"),
        ("cape//x.png", "not of the form"),
        ("x.png", "not of the form"),
        (IMAGE.replace("manyview_dev_0", "manyview_dev_1"), "not among the files"),
        (IMAGE.replace("_7_", "_8_"), "not among the files"),
        (IMAGE.replace("_image", "_depth_mask"), "not among the files"),
    ],
)
def test_a_hostile_or_unknown_path_is_refused_by_name(tmp_path, hostile, message):
    entries = entries_of(TARGETS)
    entries[0] = (hostile, entries[0][1])
    path = write_raw(tmp_path / "a.hdf5", entries)
    with pytest.raises(ArchiveError, match=rf"a\.hdf5: .*{message}"):
        check_archive(path, TARGETS, allow_missing=True)
    assert os.listdir(tmp_path) == ["a.hdf5"]


def test_an_extra_file_is_refused(tmp_path):
    path = write_raw(tmp_path / "a.hdf5", [*entries_of(TARGETS), ("cape/manyview_dev_0/notes.txt", b"hello")])
    with pytest.raises(ArchiveError, match="has shape .10,., expected at most 9"):
        check_archive(path, TARGETS)


def test_a_path_that_stands_twice_is_refused(tmp_path):
    entries = entries_of(TARGETS)
    index = {Path(name).name: i for i, (name, _) in enumerate(entries)}
    names = [name.encode() for name, _ in entries]
    path = write_raw(tmp_path / "a.hdf5", entries, index, paths=[*names[:1], names[0], *names[2:]])
    with pytest.raises(ArchiveError, match=f"{IMAGE}' stands twice"):
        check_archive(path, TARGETS)


@pytest.mark.parametrize("value", [1, 99, -9, 0.0, [0, 1], "0"])
def test_an_index_that_contradicts_the_paths_is_refused(tmp_path, value):
    entries = entries_of(TARGETS)
    index = {Path(name).name: i for i, (name, _) in enumerate(entries)}
    path = write_raw(tmp_path / "a.hdf5", entries, {**index, Path(IMAGE).name: value})
    with pytest.raises(ArchiveError, match="is number 0, but the attribute"):
        check_archive(path, TARGETS)


def test_an_index_of_fewer_names_is_refused(tmp_path):
    path = write_raw(tmp_path / "a.hdf5", entries_of(TARGETS), {Path(IMAGE).name: 0})
    with pytest.raises(ArchiveError, match="9 entries, 9 paths and 1 indexed names"):
        check_archive(path, TARGETS)


def test_a_path_that_is_not_utf_8_is_refused(tmp_path):
    entries = entries_of(TARGETS)
    paths = [b"\xff\xfe", *(name.encode() for name, _ in entries[1:])]
    path = write_raw(tmp_path / "a.hdf5", entries, paths=paths)
    with pytest.raises(ArchiveError, match="not UTF-8"):
        check_archive(path, TARGETS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda png, other: png[: len(png) // 2], "truncated"),
        (lambda png, other: png[:50] + png[-12:], "(truncated|damaged)"),
        (lambda png, other: b"", "no PNG file"),
        (lambda png, other: other, "expected 6 x 9 .* has 5 x 4"),
    ],
)
def test_a_broken_picture_inside_is_refused_by_name(tmp_path, change, message):
    entries = entries_of(TARGETS)
    entries[0] = (IMAGE, change(entries[0][1], entries[6][1]))
    path = write_raw(tmp_path / "a.hdf5", entries)
    with pytest.raises(ArchiveError, match=f"a.hdf5: {IMAGE}: .*{message}"):
        check_archive(path, TARGETS)


def test_bytes_of_another_type_are_refused(tmp_path):
    path = write_raw(tmp_path / "a.hdf5", entries_of(TARGETS), dtype=np.int16)
    with pytest.raises(ArchiveError, match="expected variable-length uint8"):
        check_archive(path, TARGETS)


def test_a_link_to_another_file_is_refused(archive, tmp_path):
    path = tmp_path / "linked.hdf5"
    with h5py.File(path, "w") as file:
        for name in ("binary_data", "filepaths"):
            file[name] = h5py.ExternalLink(str(archive), name)
    with pytest.raises(ArchiveError, match="'binary_data' is missing or not stored in this file"):
        check_archive(path, TARGETS)


def test_paths_stored_in_another_file_are_refused(tmp_path):
    entries = entries_of(TARGETS)
    length = max(len(name) for name, _ in entries)
    (tmp_path / "elsewhere.bin").write_bytes(b"".join(name.encode().ljust(length, b"\0") for name, _ in entries))
    path = write_raw(tmp_path / "a.hdf5", entries)
    with h5py.File(path, "a") as file:
        del file["filepaths"]
        external = [(str(tmp_path / "elsewhere.bin"), 0, h5py.h5f.UNLIMITED)]
        file.create_dataset("filepaths", (len(entries),), dtype=h5py.string_dtype("utf-8", length), external=external)
        assert file["filepaths"][0].decode() == entries[0][0]
    with pytest.raises(ArchiveError, match="'filepaths' is missing or not stored in this file"):
        check_archive(path, TARGETS)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"truncated"])
def test_a_file_that_is_no_whole_hdf5_is_refused_by_name(archive, tmp_path, content):
    path = tmp_path / "x.hdf5"
    path.write_bytes(archive.read_bytes()[:3000] if content == b"truncated" else content)
    with pytest.raises(ArchiveError, match=r"x\.hdf5: it is no whole HDF5 file"):
        check_archive(path, TARGETS)


def test_damage_anywhere_is_an_archive_error_or_harmless(archive, tmp_path):
    good, path = archive.read_bytes(), tmp_path / "x.hdf5"
    random = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(good)
        damaged[random.integers(len(good))] ^= 0x55
        path.write_bytes(damaged)
        try:
            check_archive(path, TARGETS)
        except ArchiveError as error:
            assert str(path) in str(error)


def test_an_absent_archive_or_dataset_is_refused_by_name(tmp_path):
    with pytest.raises(ArchiveError, match="no such file"):
        check_archive(tmp_path / "nowhere.hdf5", TARGETS)
    with h5py.File(tmp_path / "empty.hdf5", "w"):
        pass
    with pytest.raises(ArchiveError, match=r"empty\.hdf5: the dataset 'binary_data' is missing"):
        check_archive(tmp_path / "empty.hdf5", TARGETS)


@pytest.mark.parametrize("part", ["..", "a/b", "a\\b", ""])
def test_a_target_whose_name_would_leave_its_folder_cannot_be_made(part):
    with pytest.raises(ValueError, match="must be one plain part"):
        Target("cape", "manyview_dev_0", part, 1, 6, 9)


def test_the_archives_name_is_the_challenges():
    assert archive_name("fewview", "test") == "submission_fewview_test.hdf5"
    with pytest.raises(ValueError, match="'train'"):
        archive_name("manyview", "train")


def test_the_official_reader_reads_the_archive(archive, tmp_path):
    io = pytest.importorskip("co3d.challenge.io", reason="the official co3d package is not installed")
    utils = pytest.importorskip("co3d.challenge.utils")
    cache = tmp_path / "cache"
    io.make_hdf5_file_links(str(archive), str(cache))
    for target in TARGETS:
        folder = cache / target.folder
        stems = utils.get_result_directory_file_names(str(folder))
        frame = io.load_rgbda_frame(stems[f"{target.category}_{target.sequence_name}_{target.frame_number}"])
        expected = view_of(target)
        assert np.array_equal(frame.image, expected.rgb.numpy())
        assert np.array_equal(frame.mask, expected.mask.numpy())
        assert np.array_equal(frame.depth, expected.depth.numpy())


def test_an_official_archive_is_read(tmp_path, monkeypatch):
    io = pytest.importorskip("co3d.challenge.io", reason="the official co3d package is not installed")
    data_types = pytest.importorskip("co3d.challenge.data_types")
    files = {}
    for target in TARGETS:
        view, stem = view_of(target), tmp_path / target.path("image").removesuffix("_image.png")
        stem.parent.mkdir(parents=True, exist_ok=True)
        # its writer truncates colours, so it is given values that truncate to the intended ones
        frame = data_types.RGBDAFrame(image=(view.rgb + 1e-4).clamp(0, 1).numpy(), mask=view.mask.numpy(), depth=view.depth.numpy())
        io.store_rgbda_frame(frame, str(stem))
        files.update({target.path(kind): str(tmp_path / target.path(kind)) for kind in KINDS})
    # np.fromstring(bytes, dtype), which it calls, is gone from NumPy
    monkeypatch.setattr(np, "fromstring", np.frombuffer)
    io.export_result_file_dict_to_hdf5(str(tmp_path / "official.hdf5"), files)
    for target, view in read_archive(tmp_path / "official.hdf5", TARGETS):
        assert all(torch.equal(getattr(view, plane), getattr(view_of(target), plane)) for plane in ("rgb", "depth", "mask"))
