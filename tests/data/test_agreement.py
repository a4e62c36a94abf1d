"""Sound scenes pass, whatever their errors; every usual mistake is named, whatever the scene."""

import functools
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from co3d_ensemble.data.agreement import SOUND, Agreement, agreement_of_records, check_agreement, judge_agreement, strictest
from co3d_ensemble.data.co3d import CO3DIndex
from co3d_ensemble.data.synthetic import SyntheticConfig, plan_sequence, render_views
from co3d_ensemble.data.synthetic import _with_mask_noise as with_mask_noise
from co3d_ensemble.data.synthetic_plan import random_numbers
from co3d_ensemble.functional.cameras import pixel_centers, pixel_rays
from co3d_ensemble.functional.silhouettes import Silhouette
from tests.functional.test_conventions import MADE
from tests.functional.test_visual_hull import ring

REAL_ROOT = Path(__file__).parents[2] / "../shared/data/co3d"
ERRORS = {  # of configs/ablation
    "mug": {},
    "bear": {"mask_noise": 0.02},
    "truck": {"pose_noise": 0.005, "height": 52},
    "plant": {"mask_noise": 0.01, "pose_noise": 0.003, "width": 52},
}


@functools.cache
def scene(name, n=12, zoom=1.0, **settings):
    """Masks as a root has them, with its annotated cameras."""
    config = SyntheticConfig(**{"n_known": n, "n_val": 0, "n_unseen": 1, "height": 64, "width": 64, "object": name, **settings})
    plan = plan_sequence(name, "s", config)
    kept = [i for i, split in enumerate(plan.splits) if split == "train"]
    zoomed = [replace(plan.cameras[i], focal=zoom * plan.cameras[i].focal) for i in kept]
    frames = []
    for i, view in zip(kept, render_views(plan.scene, zoomed, supersample=1), strict=True):
        mask = with_mask_noise(view.mask, config.mask_noise, random_numbers(0, name, str(i)))
        noisy = plan.annotated_cameras[i]
        camera = replace(
            noisy, R=noisy.R.float(), T=noisy.T.float(), focal=zoom * noisy.focal.float(), principal=noisy.principal.float()
        )
        frames.append(Silhouette(f"s/{i}", (255 * mask).to(torch.uint8), camera))
    return tuple(frames)


def ablation_scene(name, **settings):
    return scene(name, **{**ERRORS[name], **settings})


def spoilt(frames, mistake):
    return [replace(f, camera=MADE[mistake](f.camera)) for f in frames]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in ERRORS),
        ("bear", {"n": 8}),
        ("plant", {"n": 8}),
        ("truck", {"n": 30}),
        ("bear", {"zoom": 1.8}),
        ("plant", {"zoom": 3.0}),
        ("truck", {"zoom": 0.5}),
        ("plant", {"scene_scale": 50.0}),
    ],
)
def test_sound_scenes_with_the_errors_of_the_ablation_agree(name, settings):
    found = judge_agreement(ablation_scene(name, **settings))
    assert found.sound and not found.refused and found.verdict("error") == (None, [])


def test_thin_objects_agree():
    """A frame of rods half a pixel to a pixel thick."""

    def rods(origins, directions):
        near = []
        for axis in range(3):
            for u in (-0.7, 0.7):
                for v in (-0.7, 0.7):
                    start = torch.zeros(3)
                    start[(axis + 1) % 3], start[(axis + 2) % 3] = u, v
                    along = torch.zeros(3)
                    along[axis] = 1.0
                    normal = torch.linalg.cross(directions, along.expand_as(directions))
                    gap = ((start - origins) * normal).sum(-1).abs() / normal.norm(dim=-1)
                    # where the ray is nearest to the rod's line, in rod lengths
                    offset = torch.linalg.cross(directions, normal)
                    place = -((start - origins) * offset).sum(-1) / (along * offset).sum(-1)
                    near.append((gap < 0.03) & (place.abs() < 0.7))
        return torch.stack(near).any(dim=0)

    frames = []
    for i, camera in enumerate(ring(torch.zeros(3), 1.0, n=16, sizes=((90, 90),))):
        mask = rods(*pixel_rays(camera, pixel_centers(90, 90))).reshape(1, 90, 90)
        assert 0.01 < mask.float().mean() < 0.2
        frames.append(Silhouette(f"s/{i}", mask.to(torch.uint8) * 255, camera))
    assert judge_agreement(frames).sound


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        *((name, mistake) for name in ERRORS for mistake in ("OpenCV's axes", "R is meant for column vectors")),
        ("mug", "OpenGL's or Blender's axes"),
        ("truck", "T is the camera's position"),
        ("mug", "transpose it, then the cameras have OpenCV's axes"),
        ("plant", "times R, then the cameras have OpenGL's or Blender's axes"),
        ("truck", "set intrinsics_format to ndc_norm_image_bounds"),
        ("truck", "set intrinsics_format to ndc_isotropic"),
    ],
)
def test_cameras_with_a_usual_mistake_are_refused_and_the_mistake_is_named(name, mistake):
    n = 24 if "intrinsics_format" in mistake else 12  # the subtlest of them
    found = judge_agreement(spoilt(ablation_scene(name, n=n), mistake))
    assert found.refused and mistake in found.mistake
    assert found.share < SOUND <= found.mended
    refusal, _ = found.verdict("error")
    assert mistake in refusal and f"{100 * found.mended:.0f} %" in refusal and "data.check_agreement=warn" in refusal
    assert found.share == 0 or f"{100 * found.share:.0f} %" in refusal


@pytest.mark.parametrize(("name", "zoom"), [*((name, 1.0) for name in ERRORS), ("truck", 0.5), ("bear", 2.0)])
def test_inverted_masks_are_refused(name, zoom):
    found = judge_agreement([frame.inverted() for frame in ablation_scene(name, zoom=zoom)])
    assert found.refused and found.mistake == "they are inverted" and found.mended >= SOUND


def test_inverted_masks_with_wrong_cameras_are_both_named():
    wrong = [frame.inverted() for frame in spoilt(ablation_scene("truck"), "OpenCV's axes")]
    found = judge_agreement(wrong)
    assert found.refused and found.mistake.startswith("they are inverted, and the cameras have OpenCV's axes")


def test_masks_of_other_frames_are_not_explained_by_a_mistake_and_told_as_doubtful():
    frames = ablation_scene("truck")
    mixed = [replace(frame, mask=frames[(5 * i + 3) % len(frames)].mask) for i, frame in enumerate(frames)]
    found = judge_agreement(mixed)
    assert not found.sound and found.mistake is None and "None of the usual mistakes" in found.told()


def test_poses_with_twice_the_ablations_errors_are_warned_of_and_trained():
    found = judge_agreement(scene("bear", pose_noise=0.01))
    refusal, warnings = found.verdict("error")
    assert not found.sound and refusal is None and "inaccurate" in warnings[0]


def test_nothing_is_refused_where_masks_have_no_outlines():
    found = judge_agreement([replace(frame, mask=torch.full_like(frame.mask, 255)) for frame in scene("mug")])
    assert found.share is None and found.sound


@pytest.mark.parametrize("n_bad", [1, 3])
def test_single_frames_that_disagree_are_named_and_do_not_end_the_training(n_bad):
    frames = list(ablation_scene("truck", n=16))
    bad = [2 + 5 * i for i in range(n_bad)]
    for i in bad:
        frames[i] = replace(frames[i], camera=replace(frames[i].camera, T=frames[i].camera.T + torch.tensor([0.4, 0.0, 0.0])))
    found = judge_agreement(frames)
    assert found.sound
    assert sorted(line.split()[1] for line in found.strays) == sorted(frames[i].name for i in bad)


def test_modes(caplog):
    caplog.set_level(logging.INFO)
    wrong = [frame.inverted() for frame in scene("mug")]
    with pytest.raises(ValueError, match="cup/dev: the masks are foreground along .* 100 % of the outlines fit if they are inverted"):
        check_agreement(wrong, mode="error", place="cup/dev")
    check_agreement(wrong, mode="off", place="cup/dev")
    assert not caplog.records
    check_agreement(wrong, mode="warn", place="cup/dev")
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "they are inverted" in caplog.text
    caplog.clear()
    check_agreement(scene("mug"), mode="error", place="cup/dev")
    assert [record.levelname for record in caplog.records] == ["INFO"] and "100 % of the masks' outlines" in caplog.text
    assert strictest(["off", "warn", "error"]) == "error" and strictest(["off", "warn"]) == "warn"


def test_many_strays_are_counted():
    refusal, warnings = Agreement(1.0, strays=tuple(f"frame {i}" for i in range(13))).verdict("error")
    assert refusal is None and len(warnings) == 11 and "3 more" in warnings[-1]


@pytest.mark.parametrize(("category", "n"), [("cape", 94), ("cape", 12), ("apple", 16)])
def test_real_sequences_agree_and_their_spoilt_copies_do_not(category, n):
    if not (REAL_ROOT / category).is_dir():
        pytest.skip(f"{category} is not at ../shared/data/co3d")
    records = CO3DIndex(REAL_ROOT).subset(category, "manyview_dev_0").known[:: max(1, 94 // n) if category == "cape" else 1]
    assert agreement_of_records(records, mode="error", most=24) == (None, [])
    for mistake, flip in (("OpenCV", (-1, -1, 1)), ("OpenGL", (-1, 1, -1))):
        wrong = [
            replace(r, R=tuple(tuple(a * b for a, b in zip(row, flip)) for row in r.R), T=tuple(a * b for a, b in zip(r.T, flip)))
            for r in records
        ]
        refusal, _ = agreement_of_records(wrong, mode="error", most=12)
        assert mistake in refusal
