import gzip
import json
import resource

import pytest

from co3d_ensemble.data.json_files import ALWAYS_UNPACKED, MAX_UNPACKED, read_json

CONTENT = {"train": [["s1", 3, "cup/s1/images/é.jpg"]], "val": None}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["lists.json", "lists.jgz"])
def test_what_editors_save_is_read_with_or_without_a_byte_order_mark(tmp_path, name, encoding):
    data = json.dumps(CONTENT, ensure_ascii=False).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("jgz") else data)
    assert read_json(tmp_path / name) == CONTENT


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "cannot be read"),
        (b'{"train": [', "cannot be read"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff\xfe\xfa", "cannot be read"),
        (b"1" * 5000, "cannot be read"),  # more digits than Python turns into an integer
    ],
)
@pytest.mark.parametrize("name", ["lists.json", "lists.jgz"])
def test_what_is_no_json_is_one_line_with_the_files_name(tmp_path, name, data, told):
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("jgz") else data)
    with pytest.raises(ValueError, match=rf"{name}.*{told}") as error:
        read_json(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:20], lambda data: b"PK" + data, lambda data: data + b"more"])
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    (tmp_path / "a.jgz").write_bytes(damage(gzip.compress(json.dumps(CONTENT).encode())))
    with pytest.raises(ValueError, match=r"a\.jgz cannot be read"):
        read_json(tmp_path / "a.jgz")


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json is missing"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").mkdir()
    with pytest.raises(ValueError, match=r"a\.json cannot be read"):
        read_json(tmp_path / "a.json")


def test_a_gzip_bomb_is_refused_after_its_limit_not_after_all_of_it(tmp_path):
    member = gzip.compress(b" " * (16 * 2**20))
    bomb = member * 64  # a megabyte that unpacks to one gigabyte
    (tmp_path / "bomb.jgz").write_bytes(bomb)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"bomb\.jgz cannot be read: .* unpack to more than"):
        read_json(tmp_path / "bomb.jgz")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 4 * max(ALWAYS_UNPACKED, MAX_UNPACKED * len(bomb)) < 2**30
