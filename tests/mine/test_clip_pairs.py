"""RealEstate10K's test pairs: drawn as the published ones were, and read in both forms of the published lists."""

from __future__ import annotations

import json

import pytest

from co3d_ensemble.mine.clip_pairs import CLIP_ROWS, ClipFrames, ClipPair, draw_clip_pairs, read_clip_pairs

TIMES = {"aa": ClipFrames(range(40), [1000 * frame for frame in range(40)]), "bb": ClipFrames([0, 1], [7, 8])}


def clip_of(length):
    return ClipFrames(range(length), range(length))


def test_targets_are_5_and_10_frames_after_the_source_and_one_within_30_but_the_source():
    pairs = draw_clip_pairs({f"clip{number}": clip_of(100) for number in range(60)})
    assert len(pairs) == 300 and len({(pair.clip, pair.source) for pair in pairs}) == 300
    offsets = [pair.targets["random"] - pair.source for pair in pairs]
    assert min(offsets) >= -30 and max(offsets) <= 30 and 0 not in offsets
    assert min(offsets) < -20 and max(offsets) > 20
    for pair in pairs:
        assert list(pair.targets) == list(CLIP_ROWS)
        assert pair.targets["n=5"] == min(pair.source + 5, 99) and pair.targets["n=10"] == min(pair.source + 10, 99)
        assert 0 <= pair.targets["random"] <= 99 and pair.source < 99


def test_a_clips_pairs_depend_on_the_seed_and_on_no_other_clip():
    alone, among = draw_clip_pairs({"aa": clip_of(50)}), draw_clip_pairs({"a": clip_of(50), "aa": clip_of(50), "zz": clip_of(3)})
    assert alone == [pair for pair in among if pair.clip == "aa"]
    assert alone == draw_clip_pairs({"aa": clip_of(50)}) and alone != draw_clip_pairs({"aa": clip_of(50)}, seed=1)
    assert [pair.source for pair in alone] != [pair.source for pair in among if pair.clip == "a"]


def test_short_clips_give_what_they_have():
    assert draw_clip_pairs({"none": clip_of(0), "one": clip_of(1)}) == []
    assert draw_clip_pairs({"two": clip_of(2)}) == [ClipPair("two", 0, {"n=5": 1, "n=10": 1, "random": 1})]


def test_frames_that_are_not_there_are_no_targets_and_distances_count_lines_of_the_camera_file():
    numbers = [0, 3, 4, 9, 60, 64]
    (first, *rest) = sorted(draw_clip_pairs({"gaps": ClipFrames(numbers, numbers)}, per_clip=9), key=lambda pair: pair.source)
    assert [pair.source for pair in (first, *rest)] == [0, 1, 2, 4]  # nothing within 5 lines after 9, nor after 64
    assert first.targets["n=5"] == 2 and first.targets["n=10"] == 3 and first.targets["random"] in (1, 2, 3)
    assert rest[-1].targets == {"n=5": 5, "n=10": 5, "random": 5}


# Lists


def published(clip, *times):
    keys = ("src_img_obj", "tgt_img_obj_5_frames", "tgt_img_obj_10_frames", "tgt_img_obj_random")
    return json.dumps({"sequence_id": clip} | {key: {"frame_ts": str(time), "camera_pose": []} for key, time in zip(keys, times)})


def test_both_published_forms_are_read(tmp_path):
    lists = {"json": published("aa", 3000, 8000, 13000, 1000), "txt": "aa 3 8 13 1"}
    for suffix, line in lists.items():
        path = tmp_path / f"pairs.{suffix}"
        path.write_text(f"{line}\n\n")
        assert read_clip_pairs(path, TIMES) == ([ClipPair("aa", 3, {"n=5": 8, "n=10": 13, "random": 1})], 0)


def test_pairs_whose_clip_or_frames_are_gone_are_counted(tmp_path):
    path = tmp_path / "pairs.json"
    lines = [published("aa", 0, 5000, 10000, 2000), published("gone", 0, 1, 2, 3), published("aa", 0, 5000, 10000, 2001), "bb 0 1 1 5"]
    path.write_text("\n".join(lines))
    pairs, n_missing = read_clip_pairs(path, TIMES)
    assert [pair.source for pair in pairs] == [0] and n_missing == 3
    path.write_text(lines[1])
    with pytest.raises(ValueError, match="none of its 1 pairs"):
        read_clip_pairs(path, TIMES)


@pytest.mark.parametrize(
    "line", ["aa 1 2 3", "aa 1 2 x 4", "aa 1 2 3 -4", '{"sequence_id": "aa"}', "{broken", '{"sequence_id": 3}', "\xff\xfe"]
)
def test_a_line_of_another_form_is_named(tmp_path, line):
    path = tmp_path / "pairs.txt"
    path.write_text(f"aa 3 8 13 1\n{line}\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"pairs.txt:2: not a line of a pair list"):
        read_clip_pairs(path, TIMES)


def test_a_list_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.json: no such file"):
        read_clip_pairs(tmp_path / "nowhere.json", TIMES)
