"""Comparison sheets, false colours and training curves, read back from their pixels."""

from __future__ import annotations

import stat

import numpy as np
import pytest
import torch
from PIL import Image

from co3d_ensemble.functional.types import RenderedView
from co3d_ensemble.report import pictures
from co3d_ensemble.report.pictures import (
    COLUMNS,
    comparison_sheet,
    depth_to_rgb,
    ensemble_sheet,
    error_to_rgb,
    save_picture,
    training_curve,
)

RED, BLUE = 0, 2


def frame(height: int, width: int, *, rgb: float = 0.5):
    """A picture whose left half is foreground, rendered without error."""
    photograph = torch.full((3, height, width), rgb)
    mask = torch.zeros(1, height, width)
    mask[..., : width // 2] = 1.0
    view = RenderedView(rgb=photograph * mask, depth=mask * torch.linspace(1, 2, height)[None, :, None], mask=mask)
    return photograph, view, mask


def cells_of_row(sheet: torch.Tensor, height: int, width: int) -> list[torch.Tensor]:
    """The six cells of a one-row sheet whose cells are height x width."""
    top = pictures._HEADER + pictures._CAPTION
    left = [pictures._GAP + column * (width + pictures._GAP) for column in range(len(COLUMNS))]
    return [sheet[:, top : top + height, x : x + width] for x in left]


def test_a_row_shows_photograph_target_render_depth_mask_and_error():
    photograph, view, mask = frame(200, 240)
    shown = cells_of_row(comparison_sheet([("a", photograph, view, mask)]), 200, 240)
    assert torch.equal(shown[0], pictures.to_uint8(photograph))
    assert torch.equal(shown[1], pictures.to_uint8(photograph * mask))
    assert torch.equal(shown[2], pictures.to_uint8(view.rgb))
    assert torch.equal(shown[3], depth_to_rgb(view.depth, view.mask))
    assert torch.equal(shown[4], pictures.to_uint8(view.mask))
    assert shown[5].unique().numel() <= 3 and shown[5].max() < 8  # no error: inferno's near black


@pytest.mark.parametrize("members", [("nerf", "tensorf"), ("a", "b", "a name that is far too long for its column")])
def test_an_ensemble_s_row_shows_target_members_fusion_depth_mask_error_and_disagreement(members):
    photograph, view, mask = frame(200, 240)
    views = [RenderedView(view.rgb * (0.5 + i / 10), view.depth, view.mask) for i in range(len(members))]
    deviation = torch.linspace(0, pictures.DISAGREEMENT_RANGE, 240).expand(1, 200, 240)
    sheet = ensemble_sheet(members, [("s/1", photograph, mask, views, view, deviation)])
    count = len(members) + 6
    assert sheet.shape[2] == pictures._GAP + count * (240 + pictures._GAP)
    top = pictures._HEADER + pictures._CAPTION
    left = [pictures._GAP + column * (240 + pictures._GAP) for column in range(count)]
    target, *shown, fused, depth, opacity, error, uncertain = (sheet[:, top : top + 200, x : x + 240] for x in left)
    assert torch.equal(target, pictures.to_uint8(photograph * mask)) and torch.equal(fused, pictures.to_uint8(view.rgb))
    assert all(torch.equal(cell, pictures.to_uint8(member.rgb)) for cell, member in zip(shown, views))
    assert torch.equal(depth, depth_to_rgb(view.depth, view.mask)) and torch.equal(opacity, pictures.to_uint8(view.mask))
    assert error.max() < 8 and uncertain[..., -1].int().sum(dim=0).min() > 600 > uncertain[..., 0].int().sum(dim=0).max()


def test_an_ensemble_s_sheet_without_rows_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        ensemble_sheet(("a", "b"), [])


def test_uint8_photographs_and_masks_give_the_same_sheet():
    photograph, view, mask = frame(40, 50, rgb=51 / 255)
    expected = comparison_sheet([("a", photograph, view, mask)])
    assert torch.equal(comparison_sheet([("a", (photograph * 255).round().byte(), view, (mask * 255).byte())]), expected)


def test_tiny_frames_are_enlarged_by_a_whole_factor_without_smoothing():
    photograph, view, mask = frame(3, 5)
    photograph = torch.rand(3, 3, 5, generator=torch.Generator().manual_seed(0))
    factor = pictures._SMALLEST_SIDE // 5
    shown = cells_of_row(comparison_sheet([("a", photograph, view, mask)]), 3 * factor, 5 * factor)[0]
    assert torch.equal(shown[:, ::factor, ::factor], pictures.to_uint8(photograph))
    assert torch.equal(shown[:, factor - 1 :: factor, factor - 1 :: factor], pictures.to_uint8(photograph))


def test_large_frames_are_reduced_and_keep_their_shape():
    photograph, view, mask = frame(1000, 500)
    cell = pictures._fit(pictures.to_uint8(photograph))
    assert cell.shape == (3, pictures._LARGEST_SIDE, pictures._LARGEST_SIDE // 2)


def test_frames_of_different_sizes_share_a_sheet():
    rows = [("wide", *frame(170, 300)), ("tall", *frame(300, 170)), ("one pixel", *frame(1, 1)), ("long", *frame(2, 900))]
    sheet = comparison_sheet(rows)
    assert sheet.dtype == torch.uint8 and sheet.shape[0] == 3
    assert sheet.shape[2] == pictures._GAP + len(COLUMNS) * (384 + pictures._GAP)  # the long frame's cells are the widest


def test_the_caption_has_title_and_score():
    photograph, view, mask = frame(20, 20)
    assert pictures._row_cells("seq/12", photograph, view, mask)[0] == "seq/12   psnr_masked 100.0 dB"
    off = RenderedView(rgb=view.rgb + 0.1 * mask, depth=view.depth, mask=view.mask)
    # an error of 0.1 on half of the pixels: mse = 0.005
    assert pictures._row_cells("a", photograph, off, mask)[0].endswith(f"{-10 * np.log10(0.005):.1f} dB")


def test_a_render_with_nan_is_still_shown_and_said():
    photograph, view, mask = frame(20, 20)
    broken = RenderedView(rgb=view.rgb * torch.nan, depth=view.depth * torch.nan, mask=view.mask * torch.nan)
    caption, cells = pictures._row_cells("a", photograph, broken, mask)
    assert caption.endswith("not finite")
    assert cells[2].max() == 0 and cells[3].max() == 0


def test_a_sheet_without_rows_or_with_mismatched_sizes_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        comparison_sheet([])
    photograph, view, mask = frame(20, 20)
    with pytest.raises(ValueError, match=r"seq/3.*\(10, 20\)"):
        comparison_sheet([("seq/3", photograph[:, :10], view, mask)])


def test_depth_is_red_where_near_blue_where_far_and_black_without_surface():
    depth = torch.tensor([[[1.0, 1.1, 1.9, 2.0, 0.0, float("nan")]]])
    colors = depth_to_rgb(depth).int()
    assert colors[RED, 0, 0] > colors[BLUE, 0, 0] and colors[RED, 0, 1] > colors[BLUE, 0, 1]
    assert colors[BLUE, 0, 2] > colors[RED, 0, 2] and colors[BLUE, 0, 3] > colors[RED, 0, 3]
    assert colors[..., 4:].max() == 0


def test_depth_outside_the_mask_neither_shows_nor_changes_the_colours():
    depth = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) + 1
    mask = torch.ones(1, 8, 8)
    mask[:, :, 4:] = 0.0
    far_away = torch.where(mask > 0, depth, 1e6)
    assert torch.equal(depth_to_rgb(depth, mask), depth_to_rgb(far_away, mask))
    assert depth_to_rgb(depth, mask)[:, :, 4:].max() == 0


def test_depth_colours_do_not_depend_on_the_unit():
    depth = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) + 1
    difference = depth_to_rgb(depth).int() - depth_to_rgb(depth * 100).int()
    assert difference.abs().max() <= 10  # one step of the colour map, where rounding falls the other way


@pytest.mark.parametrize("depth", [torch.zeros(1, 4, 4), torch.full((1, 4, 4), 2.0)])
def test_depth_without_surface_or_span_has_one_colour(depth):
    assert depth_to_rgb(depth).flatten(1).unique(dim=1).shape[1] == 1


def test_error_grows_brighter_and_saturates():
    target = torch.zeros(3, 1, 4)
    predicted = torch.tensor([0.0, 0.1, pictures.ERROR_RANGE, 1.0]).expand(3, 1, 4)
    brightness = error_to_rgb(predicted, target).int().sum(dim=0)[0]
    assert brightness[0] < brightness[1] < brightness[2] == brightness[3]


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "b.jpg"])
def test_pictures_are_written_whole_and_readable(tmp_path, name):
    image = torch.rand(3, 6, 9, generator=torch.Generator().manual_seed(0))
    path = save_picture(tmp_path / "new" / name, image)
    with Image.open(path) as read:
        pixels = torch.from_numpy(np.array(read)).permute(2, 0, 1)
    assert pixels.shape == (3, 6, 9)
    if name.lower().endswith("png"):
        assert torch.equal(pixels, pictures.to_uint8(image))
    assert [entry.name for entry in path.parent.iterdir()] == [name]
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444


def test_a_failed_write_leaves_the_old_picture_and_no_temporary_file(tmp_path, monkeypatch):
    path = save_picture(tmp_path / "a.png", torch.zeros(3, 4, 4))
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(pictures.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_picture(path, torch.ones(3, 4, 4))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_unknown_picture_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match=".txt"):
        save_picture(tmp_path / "a.txt", torch.zeros(3, 4, 4))


def test_the_curve_is_a_png_and_leaves_out_what_has_no_value(tmp_path):
    quality = {"psnr_masked": [(step, 10.0 + step) for step in range(5)], "psnr_fg": [(0, None)]}
    path = training_curve(quality, {"loss_roi_rgb": [(step, 1 / (step + 1)) for step in range(5)]}, tmp_path / "curve.png")
    with Image.open(path) as picture:
        assert picture.format == "PNG" and np.array(picture.convert("RGB")).std() > 1
    assert pictures._with_values(quality) == {"psnr_masked": quality["psnr_masked"]}


def test_nothing_to_plot_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nothing to plot"):
        training_curve({"psnr_masked": [(1, None)]}, {}, tmp_path / "curve.png")
