import os
import random
import re
from pathlib import Path

import pytest

from co3d_ensemble.base.messages import shown
from co3d_ensemble.base.paths import inside, listed, plain_part


@pytest.mark.parametrize(
    ("relative", "kept"),
    [
        ("a/b.png", "a/b.png"),
        ("./a//b.png", "a/b.png"),
        ("a/../b.png", "b.png"),
        ("...", "..."),
        ("..a/b", "..a/b"),
        ("a b/é#[=].png", "a b/é#[=].png"),
    ],
)
def test_a_path_below_the_root_is_kept_normalised(tmp_path, relative, kept):
    assert inside(tmp_path, relative) == tmp_path / kept


@pytest.mark.parametrize(
    "relative",
    [
        *["..", "../x", "a/../../x", "a/b/../../../x", "./../x", "/etc/passwd", "//x"],
        *["", ".", "a/..", "a\0b", "\ud800.png", "x" * 256, None, 3, [], {}],
    ],
)
def test_what_leads_out_or_is_no_path_is_refused_by_name(tmp_path, relative):
    with pytest.raises(ValueError, match="is no path|leads out of|cannot be a file") as error:
        inside(tmp_path, relative)
    assert shown(relative) in str(error.value)
    str(error.value).encode()  # can be printed


def test_no_path_of_any_parts_leads_out(tmp_path):
    generator = random.Random(0)
    refused = 0
    for _ in range(2000):
        text = "/".join(generator.choice(["..", ".", "", "a", "b", "..a", "a.."]) for _ in range(generator.randint(1, 6)))
        depths = []
        for part in os.path.normpath(text).split("/"):
            depths.append((depths[-1] if depths else 0) + (-1 if part == ".." else 1))
        try:
            found = inside(tmp_path, text)
        except ValueError:
            refused += 1
            assert text.startswith("/") or not text or min(depths) < 0 or os.path.normpath(text) == "."
        else:
            assert Path(os.path.abspath(found)).is_relative_to(tmp_path) and ".." not in found.parts
    assert 100 < refused < 1900


def test_symbolic_links_below_the_root_keep_working(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("here")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    assert inside(tmp_path / "root", "link/a.txt").read_text() == "here"


def test_the_way_up_out_of_a_link_is_taken_in_the_text_not_behind_the_link(tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "secret").write_text("secret")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    assert (tmp_path / "root" / "link" / ".." / "secret").exists()  # what the system makes of it
    assert inside(tmp_path / "root", "link/../secret") == tmp_path / "root" / "secret"


@pytest.mark.parametrize("name", ["cape", "manyview_dev_0", "a b", "é=,#'\"[]", "..a", "a.."])
def test_a_plain_name_is_kept(name):
    assert plain_part(name, "category") == name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../a", "a\\b", "a\0", "a\nb", "a\x7f", "\ud800", "x" * 256, None, 1, []])
def test_a_name_that_is_no_plain_part_is_refused_with_what_gave_it(name):
    with pytest.raises(ValueError, match=r"category=.*(must be one plain part|expected a name)"):
        plain_part(name, "category")


def test_values_are_shown_short_and_printable_whatever_they_are():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    for value in ("x" * 10_000, deep, {"a": list(range(1000))}, "\ud800", 10**100, None, 1.5):
        text = shown(value)
        text.encode()
        assert len(text) <= 1000
    assert shown("a") == "'a'" and shown(["s1", 3]) == "['s1', 3]"


def test_what_systems_leave_behind_is_not_listed(tmp_path):
    kept = ["0001.jpg", "a/0002.jpg", "thumbs.jpg"]
    clutter = [".DS_Store", "._0001.jpg", "Thumbs.db", "desktop.ini", "__MACOSX/0001.jpg", "a/.hidden/0003.jpg", "a/@eaDir/0004.jpg"]
    for name in kept + clutter:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert listed(tmp_path) == [tmp_path / name for name in ("0001.jpg", "a", "thumbs.jpg")]
    assert listed(tmp_path, "*.jpg") == [tmp_path / name for name in ("0001.jpg", "thumbs.jpg")]
    assert {path.relative_to(tmp_path).as_posix() for path in listed(tmp_path, "*.jpg", deep=True)} == set(kept)


def test_a_folder_that_lies_in_a_hidden_one_is_listed(tmp_path):
    folder = tmp_path / ".cache" / "photographs"
    folder.mkdir(parents=True)
    (folder / "0001.jpg").touch()
    assert listed(folder, deep=True) == listed(folder) == [folder / "0001.jpg"]


PACKAGE = Path(__file__).resolve().parents[2] / "co3d_ensemble"
# temporaries and pictures that it removes, checkpoints that it wrote
LISTS_ITS_OWN_FILES = {"files.py", "mine/mpi_export.py", "pipeline.py", "base/paths.py", "training/run_directory.py"}


def test_folders_are_listed_by_the_one_function_that_leaves_clutter_out():
    listing = re.compile(r"\.(iterdir|glob|rglob|listdir|scandir|walk)\(")
    found = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if listing.search(path.read_text(encoding="utf-8"))}
    assert found <= LISTS_ITS_OWN_FILES
