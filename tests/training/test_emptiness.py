from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from co3d_ensemble.functional.silhouettes import Silhouette
from co3d_ensemble.training.emptiness import EMPTY_IOU, empty_model
from tests.functional.test_visual_hull import ball, frame, ring

HULL, FIXED = SimpleNamespace(mode="visual_hull", near=3.0, far=24.0), SimpleNamespace(mode="near_far", near=3.0, far=24.0)
WEIGHTS = {"loss_roi_rgb": 1.0, "loss_alpha_bce": 1.0}


def validations(*ious):
    return [{"kind": "validation", "step": 10 * i, "metrics": {"psnr_masked": 5.0, "iou": value}} for i, value in enumerate(ious, start=1)]


def found(*, iou=0.0, history=(0.0, 0.0), bounds=HULL, kind="nerf", loss_weights=WEIGHTS, steps=20):
    return empty_model(iou=iou, validations=validations(*history), bounds=bounds, kind=kind, loss_weights=loss_weights, steps=steps)


@pytest.fixture(scope="module")
def frames():
    return [Silhouette.of(frame(camera, ball(torch.zeros(3), 1.0))) for camera in ring(torch.zeros(3), 1.0, n=12)]


def test_a_model_that_shows_the_object_is_not_empty():
    assert found(iou=EMPTY_IOU) is None
    assert found(iou=None, history=(0.0, 0.4)) is None
    assert found(iou=None, history=()) is None


def test_without_ground_truth_the_last_validation_counts():
    assert found(iou=None, history=(0.4, 0.01)).iou == 0.01


def test_contradicting_masks_are_the_first_cause(frames):
    told = found(bounds=FIXED, history=(0.9, 0.0)).told([f.inverted() for f in frames])
    assert told.startswith("the model is empty") and "IoU of 0.000" in told and "they are inverted" in told


def test_distances_that_miss_the_object_are_named_with_its_own(frames):
    beyond = SimpleNamespace(mode="near_far", near=30.0, far=40.0)
    told = found(bounds=beyond).told(frames)
    assert "data.bounds.near=30, far=40" in told
    low, high = told.partition("the object is ")[2].partition(" from the cameras")[0].split(" to ")
    distance = frames[0].camera.T.norm()
    assert 1.0 < float(low) < distance < float(high) < 8.0
    assert "data.bounds" not in found(bounds=beyond, kind="tensorf").told(frames)  # its rays are clipped to its box
    reaching = SimpleNamespace(mode="near_far", near=0.5, far=40.0)
    assert "data.bounds" not in found(bounds=reaching).told(frames)


def test_an_object_that_was_shown_and_lost_is_a_collapse(frames):
    assert "at step 10 (IoU 0.80) and lost it later" in found(history=(0.8, 0.0)).told(frames)


def test_a_missing_mask_loss_is_named(frames):
    for weights in ({"loss_rgb": 1.0}, {"loss_rgb": 1.0, "loss_alpha_bce": None}, {"loss_alpha_bce": 0.0}):
        assert "loss_alpha_bce has no weight" in found(loss_weights=weights).told(frames)
    assert "loss_alpha_bce" not in found(loss_weights=WEIGHTS).told(frames)
    assert "loss_alpha_bce" not in found(loss_weights={"loss_rgb": 1.0}, kind="implicitron").told(frames)


def test_else_it_never_came_off_its_start(frames):
    told = found(steps=123).told(frames)
    assert "never showed the object in 123 steps" in told and "training.max_steps" in told
    assert "never showed" in found(steps=123).told([replace(f, mask=torch.full_like(f.mask, 255)) for f in frames])
