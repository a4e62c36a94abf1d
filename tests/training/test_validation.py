"""Validation: what is scored, what is missing rather than made up, and the pictures."""

from dataclasses import replace

import pytest
import torch

from co3d_ensemble.config import TrainingConfig
from co3d_ensemble.functional.metrics import depth_abs_fg, iou, psnr_fg, psnr_full_image, psnr_masked, ssim
from co3d_ensemble.functional.types import Frame, PinholeCamera, RenderedView
from co3d_ensemble.training.validation import MAX_PICTURES, MIN_STRIDED_SIDE, FrameValidation, mean_scores, score_frame, view_strip

HEIGHT, WIDTH = 14, 20


def frame(number=0, *, depth=True) -> Frame:
    generator = torch.Generator().manual_seed(number)
    mask = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.uint8)
    mask[:, 3:-3, 4:-2] = 255
    mask[:, 4, 4] = 127  # not foreground
    return Frame(
        name=f"thing/{number}",
        sequence_name="thing",
        frame_number=number,
        rgb=torch.randint(0, 256, (3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8),
        mask=mask,
        camera=PinholeCamera(torch.eye(3), torch.tensor([0.0, 0.0, float(number)]), torch.ones(2), torch.ones(2), HEIGHT, WIDTH),
        depth=3 + torch.rand(1, HEIGHT, WIDTH, generator=generator) if depth else None,
        depth_mask=torch.ones(1, HEIGHT, WIDTH) if depth else None,
    )


def render(camera: PinholeCamera) -> RenderedView:
    generator = torch.Generator().manual_seed(100 + int(camera.T[2]))
    return RenderedView(*(torch.rand(c, camera.height, camera.width, generator=generator) for c in (3, 1, 1)))


def test_a_frame_is_scored_by_the_challenges_metrics_and_ssim_on_black():
    f = frame()
    view = render(f.camera)
    scores = score_frame(view, f)
    rgb, mask = f.rgb / 255, f.mask / 255
    assert set(scores) == {"psnr_masked", "psnr_fg", "psnr_full_image", "depth_abs_fg", "iou", "ssim"}
    assert scores["psnr_masked"] == pytest.approx(float(psnr_masked(view.rgb, rgb, mask)))
    assert scores["psnr_fg"] == pytest.approx(float(psnr_fg(view.rgb, rgb, mask)))
    assert scores["psnr_full_image"] == pytest.approx(float(psnr_full_image(view.rgb, rgb)))
    assert scores["iou"] == pytest.approx(float(iou(view.mask, mask)))
    assert scores["ssim"] == pytest.approx(float(ssim(view.rgb, rgb * (f.mask > 127))))
    expected = depth_abs_fg(view.depth, f.depth, mask, f.depth_mask)
    assert scores["depth_abs_fg"] == pytest.approx(float(expected))


def test_a_perfect_render_scores_best():
    f = frame()
    foreground = (f.mask > 127).float()
    scores = score_frame(RenderedView(f.rgb / 255 * foreground, f.depth, foreground), f)
    assert scores["psnr_masked"] == 100 and scores["ssim"] == pytest.approx(1)
    assert scores["iou"] == pytest.approx(1, abs=1e-5) and scores["depth_abs_fg"] == pytest.approx(0, abs=1e-5)


def test_depth_without_ground_truth_is_none():
    assert score_frame(render(frame().camera), frame(depth=False))["depth_abs_fg"] is None


def test_the_mean_is_over_the_frames_that_have_the_metric():
    per_frame = [{"a": 1.0, "b": None}, {"a": 2.0, "b": 5.0}, {"a": 6.0, "b": None}]
    assert mean_scores(per_frame) == {"a": 3.0, "b": 5.0}
    assert mean_scores([{"a": 1.0, "b": None}]) == {"a": 1.0}
    assert mean_scores([]) == {}


def test_a_run_is_the_mean_of_every_frame_at_its_own_camera():
    frames = [frame(0), frame(1, depth=False), frame(2)]
    found = FrameValidation(frames).run(render)
    scores = [score_frame(render(f.camera), f) for f in frames]
    assert found["psnr_masked"] == pytest.approx(sum(s["psnr_masked"] for s in scores) / 3)
    assert found["depth_abs_fg"] == pytest.approx((scores[0]["depth_abs_fg"] + scores[2]["depth_abs_fg"]) / 2)


def test_pictures_are_of_the_first_frames_of_the_last_run():
    frames = [frame(i) for i in range(MAX_PICTURES + 2)]
    validation = FrameValidation(frames)
    assert list(validation.pictures()) == []
    for _ in range(2):
        validation.run(render)
    pictures = list(validation.pictures())
    assert [tag for tag, _ in pictures] == [f"val/thing/{i}" for i in range(MAX_PICTURES)]
    assert torch.equal(pictures[1][1], view_strip(render(frames[1].camera), frames[1]))


def test_a_strip_shows_target_render_depth_and_mask_side_by_side_with_near_bright():
    f = frame()
    depth = torch.zeros(1, HEIGHT, WIDTH)
    depth[0, 0, :3] = torch.tensor([2.0, 4.0, 3.0])
    strip = view_strip(RenderedView(torch.full((3, HEIGHT, WIDTH), 0.2), depth, torch.ones(1, HEIGHT, WIDTH)), f)
    assert strip.dtype == torch.uint8 and strip.shape == (3, HEIGHT, 4 * WIDTH)
    target, picture, near_is_bright, mask = strip.split(WIDTH, dim=-1)
    assert torch.equal(target, f.rgb) and (picture == 51).all() and (mask == 255).all()
    assert near_is_bright[0, 0, :4].tolist() == [255, 51, 153, 0]


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_strip_of_constant_depth_is_finite(value):
    view = replace(render(frame().camera), depth=torch.full((1, HEIGHT, WIDTH), value))
    depth = view_strip(view, frame()).split(WIDTH, dim=-1)[2]
    assert (depth == (255 if value else 0)).all()


def test_no_frame_to_validate_on_is_refused():
    with pytest.raises(ValueError, match="no validation frame"):
        FrameValidation([])


@pytest.mark.parametrize("max_pixels", [1, 300, 700, 1500, 4000, 1e9])
def test_a_validation_has_at_most_so_many_pixels_or_one_small_frame(max_pixels):
    frames = [sized(i, 60, 50) for i in range(5)]
    validation = FrameValidation(frames, max_pixels=max_pixels)
    pixels = [frame.rgb[0].numel() for frame in validation.frames]
    assert sum(pixels) <= max_pixels or len(pixels) == 1
    assert min(min(frame.rgb.shape[1:]) for frame in validation.frames) >= MIN_STRIDED_SIDE
    assert {frame.name for frame in validation.frames} <= {frame.name for frame in frames}
    if max_pixels >= 5 * 3000:
        assert pixels == [3000] * 5
    if max_pixels >= 5 * 750:
        assert len(pixels) == 5  # all frames at fewer pixels before fewer frames


def test_a_strided_validation_scores_its_pixels_and_leaves_out_ssim():
    frames = [sized(i, 60, 50) for i in range(2)]
    validation = FrameValidation(frames, max_pixels=2 * 750)
    found = validation.run(render)
    assert validation.stride == 2 and "ssim" not in found
    expected = [score_frame(render(frame.strided(2).camera), frame.strided(2), with_ssim=False)["psnr_masked"] for frame in frames]
    assert found["psnr_masked"] == pytest.approx(sum(expected) / 2)
    assert "ssim" in FrameValidation(frames, max_pixels=6000).run(render)


def test_a_runs_validation_follows_the_rays_between_two():
    frames = [sized(i, 60, 50) for i in range(2)]
    training = TrainingConfig(max_steps=100, validate_every=0.2, validation_share=0.25)  # 20 steps between two
    assert FrameValidation.of_run(frames, training, 1200).stride == 1  # 6,000 pixels
    assert FrameValidation.of_run(frames, training, 1199).stride == 2
    training.validation_share = None
    assert FrameValidation.of_run(frames, training, 1).stride == 1


def sized(number, height, width):
    """A frame large enough to be strided."""
    focal, principal = torch.tensor([40.0, 40.0]), torch.tensor([25.0, 30.0])
    camera = PinholeCamera(torch.eye(3), torch.tensor([0.0, 0.0, 4.0]), focal, principal, height, width)
    rgb = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(number)).to(torch.uint8)
    mask = torch.full((1, height, width), 255, dtype=torch.uint8)
    return Frame(name=f"thing/{number}", sequence_name="thing", frame_number=number, rgb=rgb, mask=mask, camera=camera)
