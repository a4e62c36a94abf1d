import dataclasses
import gzip
import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from co3d_ensemble.challenge.archive import MissingTargets, read_archive, write_archive
from co3d_ensemble.challenge.scoring import (
    GroundTruthError,
    aggregate,
    format_table,
    load_ground_truth,
    score_archive,
    score_view,
)
from co3d_ensemble.challenge.targets import Target, targets_with_records
from co3d_ensemble.data.co3d import CO3DIndex
from co3d_ensemble.functional.metrics import METRIC_NAMES
from co3d_ensemble.functional.types import RenderedView

SIZE = (16, 21)
SUBSETS = {("cape", "manyview_dev_0"): 2, ("cape", "manyview_dev_1"): 1, ("toaster", "manyview_dev_0"): 1, ("cape", "manyview_test_0"): 1}


def save_frame(folder, stem, random):
    """Pictures of one frame as CO3Dv2 stores them."""
    depth = random.uniform(1, 9, SIZE).astype(np.float16)
    depth[0, :4] = [np.inf, np.nan, 0, 5]
    depth[8, 8] = np.inf
    planes = {
        f"images/{stem}.jpg": Image.fromarray(random.integers(0, 256, (*SIZE, 3), dtype=np.uint8)),
        f"masks/{stem}.png": Image.fromarray(random.integers(0, 256, SIZE, dtype=np.uint8)),
        f"depths/{stem}.jpg.geometric.png": Image.fromarray(depth.view(np.uint16)),
        f"depth_masks/{stem}.png": Image.fromarray(random.random(SIZE) > 0.3),
    }
    for name, picture in planes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name)


def annotation(category, sequence, number):
    stem = f"{category}/{sequence}/{{}}/frame{number:06d}"
    return {
        "sequence_name": sequence,
        "frame_number": number,
        "image": {"path": stem.format("images") + ".jpg", "size": list(SIZE)},
        "mask": {"path": stem.format("masks") + ".png", "mass": 100.0},
        "depth": {
            "path": stem.format("depths") + ".jpg.geometric.png",
            "scale_adjustment": 2.0,
            "mask_path": stem.format("depth_masks") + ".png",
        },
        "viewpoint": {"R": np.eye(3).tolist(), "T": [0, 0, 5], "focal_length": [2, 2], "principal_point": [0, 0]},
    }


@pytest.fixture
def root(tmp_path):
    """A CO3Dv2 root of three dev subsets and a test subset, one sequence each."""
    root, random = tmp_path / "co3d", np.random.default_rng(0)
    names, frames = {}, {}
    for i, ((category, subset), n_targets) in enumerate(SUBSETS.items()):
        sequence = f"1{i}_2_3"
        annotations = [annotation(category, sequence, number) for number in range(n_targets)]
        for number in range(n_targets):
            save_frame(root / category / sequence, f"frame{number:06d}", random)
        frames.setdefault(category, []).extend(annotations)
        names.setdefault(category, []).append(subset)
        entries = [[sequence, number, entry["image"]["path"]] for number, entry in enumerate(annotations)]
        for kind, content in (("set_lists", {"train": [], "val": [], "test": entries}), ("eval_batches", [[entry] for entry in entries])):
            path = root / category / kind / f"{kind}_{subset}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
    for category, entries in frames.items():
        (root / category / "frame_annotations.jgz").write_bytes(gzip.compress(json.dumps(entries).encode()))
    (root / "category_to_subset_name_list.json").write_text(json.dumps(names))
    return root


@pytest.fixture
def records(root):
    return targets_with_records(CO3DIndex(root), task="manyview", sequence_set="dev")


def prediction(seed):
    g = torch.Generator().manual_seed(seed)
    return RenderedView(*(torch.rand(channels, *SIZE, generator=g) for channels in (3, 1, 1)))


@pytest.fixture
def archive(tmp_path, records):
    path = tmp_path / "submission_manyview_dev.hdf5"
    write_archive(path, ((target, prediction(i)) for i, target in enumerate(records)))
    return path


def test_targets_are_those_of_the_asked_set_alone(records):
    assert [(t.folder, t.sequence_name, t.frame_number) for t in records] == [
        ("cape/manyview_dev_0", "10_2_3", 0),
        ("cape/manyview_dev_0", "10_2_3", 1),
        ("cape/manyview_dev_1", "11_2_3", 0),
        ("toaster/manyview_dev_0", "12_2_3", 0),
    ]
    assert all(target.size == SIZE for target in records)


def test_a_size_that_is_not_annotated_is_that_of_the_picture(root):
    path = root / "toaster" / "frame_annotations.jgz"
    entries = json.loads(gzip.decompress(path.read_bytes()))
    del entries[0]["image"]["size"]
    path.write_bytes(gzip.compress(json.dumps(entries).encode()))
    assert list(targets_with_records(CO3DIndex(root), task="manyview", sequence_set="dev"))[-1].size == SIZE


def test_a_set_without_subsets_is_an_error(root):
    with pytest.raises(ValueError, match="no subset fewview_dev"):
        targets_with_records(CO3DIndex(root), task="fewview", sequence_set="dev")


def test_ground_truth_is_unmasked_soft_and_finite(records):
    record = next(iter(records.values()))
    truth = load_ground_truth(record)
    with Image.open(record.image_path) as picture, Image.open(record.mask_path) as mask, Image.open(record.depth_mask_path) as valid:
        assert torch.equal(truth.rgb, torch.tensor(np.array(picture)).permute(2, 0, 1) / 255)
        assert torch.equal(truth.mask, torch.tensor(np.array(mask))[None] / 255)
        assert torch.equal(truth.depth_mask, torch.tensor(np.array(valid))[None].float())
    assert truth.depth[0, 0, :4].tolist() == [0, 0, 0, 5]
    assert torch.equal(load_ground_truth(record, apply_scale_adjustment=True).depth, 2 * truth.depth)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_mean_runs_over_frames_then_subsets(archive, records, workers):
    result = score_archive(archive, records, workers=workers)
    frames = {t: score_view(view, load_ground_truth(records[t])) for t, view in read_archive(archive, records)}
    for metric in METRIC_NAMES:
        a, b, c, d = (frames[target][metric] for target in records)
        assert result["subsets"]["cape/manyview_dev_0"][metric] == pytest.approx((a + b) / 2, rel=1e-12)
        assert result["mean"][metric] == pytest.approx(((a + b) / 2 + c + d) / 3, rel=1e-12)
    assert result["subsets"]["cape/manyview_dev_0"]["n_frames"] == 2
    assert result["mean"]["reasons"] == {}
    json.dumps(result, allow_nan=False)


def test_missing_depth_is_null_with_its_reason_and_leaves_the_mean(archive, records):
    toaster = next(record for target, record in records.items() if target.category == "toaster")
    first = next(iter(records.values()))
    before = score_archive(archive, records)
    toaster.depth_path.unlink()
    first.depth_path.unlink()
    result = score_archive(archive, records)
    subset = result["subsets"]["toaster/manyview_dev_0"]
    assert subset["depth_abs_fg"] is None and subset["reasons"] == {"depth_abs_fg": "no ground-truth depth"}
    assert subset["iou"] == before["subsets"]["toaster/manyview_dev_0"]["iou"]
    partial = result["subsets"]["cape/manyview_dev_0"]
    assert partial["reasons"] == {"depth_abs_fg": "mean over 1 of 2 frames, the others have no ground-truth depth"}
    others = [partial["depth_abs_fg"], result["subsets"]["cape/manyview_dev_1"]["depth_abs_fg"]]
    assert result["mean"]["depth_abs_fg"] == pytest.approx(sum(others) / 2)
    assert "mean over 2 of 3 subsets" in result["mean"]["reasons"]["depth_abs_fg"]


def test_the_result_says_which_units_its_depth_is_in(archive, records):
    assert score_archive(archive, records)["depth_units"] == "png"
    assert score_archive(archive, records, apply_scale_adjustment=True)["depth_units"] == "world"


def test_a_missing_depth_mask_leaves_all_known_depth_valid(records):
    record = next(iter(records.values()))
    record.depth_mask_path.unlink()
    truth = load_ground_truth(record)
    assert truth.depth is not None and truth.depth_mask is None


def test_a_missing_subset_is_an_error_that_lists_its_frames(tmp_path, records):
    path = tmp_path / "part.hdf5"
    present = [target for target in records if target.category == "cape"]
    write_archive(path, ((target, prediction(0)) for target in present))
    with pytest.raises(MissingTargets, match=r"toaster/manyview_dev_0/toaster_12_2_3_0_\*.png"):
        score_archive(path, records)
    result = score_archive(path, records, allow_missing=True)
    assert result["subsets"]["toaster/manyview_dev_0"]["psnr_fg"] is None
    assert result["subsets"]["toaster/manyview_dev_0"]["n_missing"] == 1
    assert result["subsets"]["toaster/manyview_dev_0"]["reasons"]["psnr_fg"] == "no frame in the archive"
    cape = [result["subsets"][f"cape/manyview_dev_{i}"]["psnr_fg"] for i in range(2)]
    assert result["mean"]["psnr_fg"] == pytest.approx(sum(cape) / 2)
    assert result["mean"]["reasons"]["missing"] == "mean over 2 of 3 subsets, the others have no frame in the archive"


def test_a_redacted_test_frame_is_not_scored(tmp_path, root):
    records = targets_with_records(CO3DIndex(root), task="manyview", sequence_set="test")
    write_archive(tmp_path / "a.hdf5", ((target, prediction(0)) for target in records))
    assert score_archive(tmp_path / "a.hdf5", records)["mean"]["iou"] > 0  # unredacted
    path = next(iter(records.values())).image_path
    Image.new("RGB", SIZE[::-1]).save(path)
    subset = score_archive(tmp_path / "a.hdf5", records)["subsets"]["cape/manyview_test_0"]
    assert (subset["n_frames"], subset["n_missing"], subset["n_without_truth"]) == (0, 0, 1) and subset["iou"] is None
    assert "frame000000.jpg: black" in subset["reasons"]["without_truth"][0]


def broken(path):
    path.write_bytes(path.read_bytes()[:40])


def blackened(path):
    Image.new("RGB", SIZE[::-1]).save(path)


def resized(path):
    with Image.open(path) as picture:
        picture.resize((5, 4)).save(path)


def of_1_bit(path):
    Image.fromarray(np.indices(SIZE)[0] % 2 > 0).save(path)


def of_ones(path):
    Image.fromarray((np.indices(SIZE)[0] % 2).astype(np.uint8)).save(path)


def blackened_mask(path):
    Image.new("L", SIZE[::-1]).save(path)


def colored(path):
    Image.new("RGB", SIZE[::-1], (9, 9, 9)).save(path)


def zeroed(path):
    Image.fromarray(np.zeros(SIZE, np.uint16)).save(path)


def flipped(path):
    data = bytearray(path.read_bytes())
    data[-20] ^= 4  # in the compressed pixels
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("plane", "damage", "why"),
    [
        *[("depth_path", damage, "unreadable or truncated") for damage in (broken, flipped)],
        ("depth_path", colored, "has PIL mode 'RGB', expected a 16-bit PNG"),
        ("depth_path", resized, "is 5x4"),
        ("depth_path", zeroed, "has no value above 0"),
        ("depth_mask_path", broken, "unreadable or truncated"),
        ("depth_mask_path", blackened_mask, "has no value above 0 that .* calls valid"),
    ],
)
def test_a_spoilt_depth_file_costs_the_depth_and_not_the_frame(archive, records, caplog, plane, damage, why):
    """An empty map would score 0, as a perfect depth does."""
    whole = score_archive(archive, records)["subsets"]["toaster/manyview_dev_0"]
    record = next(record for target, record in records.items() if target.category == "toaster")
    damage(getattr(record, plane))
    scores = score_archive(archive, records)["subsets"]["toaster/manyview_dev_0"]
    assert scores == {**whole, "depth_abs_fg": None, "reasons": {"depth_abs_fg": "no ground-truth depth"}}
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert getattr(record, plane).name in warning and record.name in warning and re.search(why, warning)


def test_depth_outside_the_mask_alone_is_no_depth(archive, records):
    record = next(record for target, record in records.items() if target.category == "toaster")
    mask, depth = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.float16)
    mask[:, :10], depth[:, 12:] = 255, 2.5
    Image.fromarray(mask).save(record.mask_path)
    Image.fromarray(depth.view(np.uint16)).save(record.depth_path)
    scores = score_archive(archive, records)["subsets"]["toaster/manyview_dev_0"]
    assert scores["depth_abs_fg"] is None and scores["reasons"] == {"depth_abs_fg": "no ground-truth depth"} and scores["iou"] > 0


def test_a_16_bit_photograph_is_scored_as_the_picture_that_it_shows(records):
    record = next(iter(records.values()))
    gray = np.random.default_rng(0).integers(0, 256, SIZE).astype(np.uint16)
    path = record.image_path.with_suffix(".png")
    Image.fromarray(gray * 257).save(path)
    truth = load_ground_truth(dataclasses.replace(record, image_path=path))
    assert torch.equal(truth.rgb, torch.from_numpy(gray.astype(np.float32)).expand(3, -1, -1) / 255)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    ("plane", "damage", "why"),
    [
        ("image_path", blackened, "black"),
        ("image_path", broken, "is unreadable or truncated"),
        ("image_path", resized, r"is 5x4 (width x height), its annotation says 21x16"),
        ("mask_path", broken, "is unreadable or truncated"),
        ("mask_path", Path.unlink, "is missing"),
        ("mask_path", resized, r"is 5x4 (width x height), its picture 21x16"),
        ("mask_path", of_1_bit, "has PIL mode '1', expected 8-bit gray"),
        ("mask_path", of_ones, "values are 0..1"),
        ("mask_path", blackened_mask, "mask is empty"),
    ],
)
def test_a_frame_without_usable_ground_truth_is_left_out_and_named(archive, records, caplog, plane, damage, why, workers):
    whole = score_archive(archive, records)
    first, second, _, alone = records
    damage(getattr(records[first], plane))
    result = score_archive(archive, records, workers=workers)
    subset = result["subsets"]["cape/manyview_dev_0"]
    assert (subset["n_frames"], subset["n_missing"], subset["n_without_truth"]) == (1, 0, 1)
    (reason,) = subset["reasons"]["without_truth"]
    assert str(getattr(records[first], plane)) in reason and why in reason
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [f"{first.path('*')} is not scored: {reason}"]
    view = next(view for target, view in read_archive(archive, records) if target == second)
    expected = score_view(view, load_ground_truth(records[second]))
    assert {metric: subset[metric] for metric in METRIC_NAMES} == pytest.approx(expected, rel=1e-12)
    assert result["subsets"]["cape/manyview_dev_1"] == whole["subsets"]["cape/manyview_dev_1"]
    assert set(result["mean"]["reasons"]) == set()

    damage(getattr(records[alone], plane))
    result = score_archive(archive, records, workers=workers)
    subset = result["subsets"]["toaster/manyview_dev_0"]
    assert {subset[metric] for metric in METRIC_NAMES} == {None} and subset["reasons"]["iou"] == "no frame with ground truth"
    cape = [result["subsets"][f"cape/manyview_dev_{i}"]["psnr_fg"] for i in range(2)]
    assert result["mean"]["psnr_fg"] == pytest.approx(sum(cape) / 2)
    assert result["mean"]["reasons"] == {"missing": "mean over 2 of 3 subsets, the others have no frame with ground truth"}
    table = format_table(result)
    assert f"toaster/manyview_dev_0: not scored: {subset['reasons']['without_truth'][0]}" in table and "1/2" in table
    json.dumps(result, allow_nan=False)


def test_frames_that_are_missing_and_frames_without_ground_truth_are_told_apart(tmp_path, records):
    first, second, *_ = records
    path = tmp_path / "part.hdf5"
    write_archive(path, [(first, prediction(0))])
    blackened(records[first].image_path)
    blackened(records[second].image_path)
    result = score_archive(path, records, allow_missing=True)
    subset = result["subsets"]["cape/manyview_dev_0"]
    assert (subset["n_frames"], subset["n_missing"], subset["n_without_truth"]) == (0, 1, 1)
    assert result["mean"]["iou"] is None
    assert result["mean"]["reasons"]["iou"] == "no frame with ground truth or no frame in the archive"


def test_the_table_shortens_a_long_list_of_frames_without_ground_truth():
    targets = [Target("cape", "manyview_test_0", "s", i, 1, 1) for i in range(9)]
    table = format_table(aggregate({}, targets, {target: f"frame {target.frame_number}: black" for target in targets}))
    assert "not scored: frame 4: black" in table and "frame 5" not in table and "not scored: and 4 more" in table


def test_a_grey_photograph_has_three_equal_channels(records):
    record = next(iter(records.values()))
    Image.new("L", SIZE[::-1], 51).save(record.image_path)
    assert torch.allclose(load_ground_truth(record).rgb, torch.full((3, *SIZE), 0.2))


@pytest.mark.parametrize("plane", ["image_path", "mask_path"])
def test_missing_or_broken_ground_truth_is_an_error_that_names_the_file(records, plane):
    record = next(iter(records.values()))
    path = getattr(record, plane)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(GroundTruthError, match=path.name):
        load_ground_truth(record)
    path.unlink()
    with pytest.raises(GroundTruthError, match=path.name):
        load_ground_truth(record)


def test_ground_truth_of_different_sizes_is_an_error(records):
    record = next(iter(records.values()))
    Image.new("L", (5, 5)).save(record.mask_path)
    with pytest.raises(GroundTruthError, match=r"masks.*is 5x5 \(width x height\), its picture 21x16"):
        load_ground_truth(record)


def test_the_table_is_aligned_and_shows_what_is_missing():
    targets = [Target("cape", "manyview_dev_0", "s", i, 1, 1) for i in range(2)] + [Target("toaster", "manyview_dev_10", "s", 0, 1, 1)]
    frame = dict.fromkeys(METRIC_NAMES, 20.5) | {"depth_abs_fg": None}
    lines = format_table(aggregate({targets[0]: frame}, targets)).splitlines()
    assert lines[0].split() == ["subset", "frames", *METRIC_NAMES]
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[2].split() == ["cape/manyview_dev_0", "1/2", "20.5000", "20.5000", "20.5000", "-", "20.5000"]
    assert lines[3].split() == ["toaster/manyview_dev_10", "0/1", "-", "-", "-", "-", "-"]
    assert lines[4].split() == ["MEAN", "20.5000", "20.5000", "20.5000", "-", "20.5000"]
    assert "cape/manyview_dev_0: depth_abs_fg: no ground-truth depth" in lines


def test_the_official_evaluation_of_the_same_archive_agrees_to_1e_6(archive, records, root, tmp_path):
    submission = pytest.importorskip("co3d.challenge.co3d_submission", reason="the official co3d package is not installed")
    data_types = pytest.importorskip("co3d.challenge.data_types")
    official = submission.CO3DSubmission(
        task=data_types.CO3DTask.MANY_VIEW,
        sequence_set=data_types.CO3DSequenceSet.DEV,
        output_folder=str(tmp_path / "official"),
        dataset_root=str(root),
    ).evaluate_archive_file(str(archive))
    mine = score_archive(archive, records)
    for (category, subset), (scores, frames) in official.items():
        if category == "MEAN":
            ours = mine["mean"]
        else:
            ours = mine["subsets"][f"{category}/{subset}"]
            assert ours["n_frames"] == len(frames)
        assert {name: ours[name] for name in METRIC_NAMES} == pytest.approx(scores, abs=1e-6, rel=1e-6)


def run_script(*argv):
    path = Path(__file__).resolve().parents[2] / "launch" / "evaluate_submission.py"
    spec = importlib.util.spec_from_file_location("evaluate_submission", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in argv])


def test_the_script_prints_the_table_and_writes_the_scores(archive, records, root, tmp_path, capsys):
    output = tmp_path / "new" / "results.json"
    assert run_script(archive, f"dataset_root={root}", f"output={output}") == 0
    printed = capsys.readouterr().out
    assert "4 of 4 frames" in printed and "MEAN" in printed
    assert json.loads(output.read_text()) == score_archive(archive, records)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "dataset_root"),
        (["dataset_root=x", "alow_missing=true"], "alow_missing"),
        (["dataset_root=x", "workers=many"], "workers"),
        (["dataset_root=x", "workers=0"], "workers=0"),
        (["dataset_root=x", "second.hdf5"], "second.hdf5"),
        (["dataset_root=x", "task=manyviews"], "manyviews"),
    ],
)
def test_the_script_names_a_wrong_argument_and_exits_with_2(arguments, message, capsys):
    assert run_script("submission_manyview_dev.hdf5", *arguments) == 2
    assert message in capsys.readouterr().err


def test_the_scripts_exit_code_tells_broken_archive_missing_frames_and_data_set_apart(archive, records, root, tmp_path, capsys):
    here = f"dataset_root={root}"
    broken = tmp_path / "x" / "submission_manyview_dev.hdf5"
    broken.parent.mkdir()
    broken.write_bytes(archive.read_bytes()[:2000])
    assert run_script(broken, here) == 3
    write_archive(broken, ((target, prediction(0)) for target in list(records)[1:]))
    assert run_script(broken, here) == 4
    assert run_script(broken, here, "allow_missing=true") == 0
    assert "missing: cape/manyview_dev_0/cape_10_2_3_0_*.png" in capsys.readouterr().out
    assert run_script(archive, f"dataset_root={tmp_path}/nowhere") == 5
    first, *others = records.values()
    first.mask_path.unlink()
    assert run_script(archive, here) == 0
    assert f"not scored: {first.mask_path}" in capsys.readouterr().out
    for record in others:
        record.mask_path.unlink()
    assert run_script(archive, here, f"output={tmp_path / 'null.json'}") == 5
    assert "no frame with ground truth" in capsys.readouterr().err
    assert json.loads((tmp_path / "null.json").read_text())["mean"]["iou"] is None
    assert run_script(archive, here, "check_only=true") == 0


def test_the_script_reports_an_output_it_cannot_write_and_ctrl_c_without_a_traceback(archive, root, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    assert run_script(archive, f"dataset_root={root}", f"output={tmp_path}/file/results.json") == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and f"{tmp_path}/file" in message

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(CO3DIndex, "subset", interrupted)
    assert run_script(archive, f"dataset_root={root}") == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_script_takes_an_archive_of_any_name_and_wants_one(archive, root, tmp_path, capsys):
    odd = archive.rename(tmp_path / "[odd] {name}: it's 'quoted'.hdf5")
    assert run_script(odd, f"dataset_root={root}", "task=manyview", "sequence_set=dev") == 0
    assert f"{odd}: 4 of 4 frames" in capsys.readouterr().out
    assert run_script(f"dataset_root={root}") == 2 and run_script() == 2
    assert "expected one archive, got none" in capsys.readouterr().err
