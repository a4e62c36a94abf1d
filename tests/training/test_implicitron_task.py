"""The task that feeds whole photographs to Implicitron's own models."""

import pytest
import torch

import co3d_ensemble.plugin  # noqa: F401 - makes pytorch3d importable
from co3d_ensemble.config import TrainingConfig
from co3d_ensemble.functional.cameras import pinhole_from_ndc, so3_exp
from co3d_ensemble.functional.types import Frame
from co3d_ensemble.plugin.implicitron_model import ImplicitronModel
from co3d_ensemble.plugin.source_views import SourceSettings
from co3d_ensemble.training.implicitron_task import ImplicitronTask

N_RAYS = 24


def frame(number: int, *, size=(6, 8), depth=False) -> Frame:
    height, width = size
    generator = torch.Generator().manual_seed(number)
    mask = (torch.rand(1, height, width, generator=generator) > 0.4).to(torch.uint8) * 255
    return Frame(
        name=f"thing/{number}",
        sequence_name="thing",
        frame_number=number,
        rgb=torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8),
        mask=mask,
        camera=pinhole_from_ndc(
            so3_exp(torch.tensor([0.0, 0.7 * number, 0.0])), torch.tensor([0.0, 0.0, 4.0]),
            torch.tensor([2.0, 2.0]), torch.zeros(2), height=height, width=width,
        ),
        depth=torch.full((1, height, width), 4.0) if depth else None,
        depth_mask=torch.ones(1, height, width) if depth else None,
    )


def task(train=None, val=None, *, frames_per_step=1, sources=None, **model_args) -> ImplicitronTask:
    torch.manual_seed(0)
    args = {
        "num_passes": 2,
        "n_train_target_views": 0,
        "loss_weights": {"loss_mask_bce": 1.0, "loss_prev_stage_mask_bce": 1.0},
        "implicit_function_NeuralRadianceFieldImplicitFunction_args": {
            "n_layers_xyz": 2, "n_hidden_neurons_xyz": 16, "n_hidden_neurons_dir": 8, "append_xyz": [1],
        },
        "raysampler_AdaptiveRaySampler_args": {
            "n_rays_per_image_sampled_from_mask": N_RAYS, "n_pts_per_ray_training": 6, "n_pts_per_ray_evaluation": 6,
        },
        "renderer_MultiPassEmissionAbsorptionRenderer_args": {
            "n_pts_per_ray_fine_training": 6, "n_pts_per_ray_fine_evaluation": 6,
        },
        **model_args,
    }
    train = [frame(n) for n in range(4)] if train is None else train
    return ImplicitronTask(
        ImplicitronModel(
            "GenericModel", args, render_size=(6, 8), scene_sphere=((0.0, 0.0, 0.0), 1.5),
            training_frames=train if args.get("view_pooler_enabled") else (), source_settings=sources,
        ),
        train_frames=train,
        val_frames=[frame(9)] if val is None else val,
        training=TrainingConfig(lr=0.01),
        frames_per_step=frames_per_step,
        chunk_rays=20,
    )


def optimise(trained: ImplicitronTask, steps: int) -> list[float]:
    """The loop reduced to its core: one seed per step, weights of the task."""
    optimizer = torch.optim.Adam(trained.parameter_groups())
    objectives = []
    for step in range(steps):
        torch.manual_seed(1000 + step)
        losses = trained.losses(trained.batch(step))
        objective = sum(weight * losses[name] for name, weight in trained.loss_weights.items())
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        objectives.append(objective.item())
    return objectives


def test_a_batch_holds_the_drawn_frame_unmasked_with_its_camera_and_an_open_crop():
    frames = [frame(n) for n in range(4)]
    batch = task(frames).batch(0)
    drawn = [f for f in frames if torch.equal(batch["image_rgb"][0], f.rgb.float() / 255)]
    assert len(drawn) == 1
    assert torch.equal(batch["fg_probability"][0], drawn[0].mask.float() / 255)
    assert torch.equal(batch["camera"].R[0], drawn[0].camera.R)
    assert batch["mask_crop"].shape == batch["fg_probability"].shape and (batch["mask_crop"] == 1).all()
    assert batch["sequence_name"] == ["thing"]


def test_frames_are_drawn_by_torchs_generator_and_all_of_them_in_time():
    trained = task()

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return trained.batch(0)["image_rgb"]

    assert torch.equal(draw(1), draw(1))
    assert len({float(draw(seed).sum()) for seed in range(40)}) == 4


def test_frames_of_one_step_differ():
    batch = task(frames_per_step=4).batch(0)
    assert len({float(picture.sum()) for picture in batch["image_rgb"]}) == 4


def test_optimisation_lowers_the_objective():
    objectives = optimise(task(train=[frame(0)]), steps=60)
    assert sum(objectives[-10:]) < 0.8 * sum(objectives[:10])


def test_mixed_sizes_train_one_frame_at_a_time():
    trained = task(train=[frame(0), frame(1, size=(9, 5))])
    assert all(torch.isfinite(torch.tensor(optimise(trained, steps=6))))


def test_mixed_sizes_in_one_batch_are_refused_by_name():
    with pytest.raises(ValueError, match=r"thing/0 has \(6, 8\), thing/1 \(9, 5\)"):
        task(train=[frame(0), frame(1, size=(9, 5))], frames_per_step=2)


@pytest.mark.parametrize("frames_per_step", [0, 5])
def test_more_frames_per_step_than_frames_are_refused(frames_per_step):
    with pytest.raises(ValueError, match=f"frames_per_step={frames_per_step}"):
        task(frames_per_step=frames_per_step)


def test_a_task_without_validation_frames_is_refused():
    with pytest.raises(ValueError, match="validation frame"):
        task(val=[])


def test_rays_per_step_counts_the_rays_of_all_targets():
    assert task().rays_per_step == N_RAYS
    assert task(frames_per_step=2).rays_per_step == 2 * N_RAYS
    assert task(frames_per_step=2, n_train_target_views=1).rays_per_step == N_RAYS


def test_the_loss_weights_are_those_of_the_models_own_settings():
    assert task().loss_weights == {
        "loss_rgb_mse": 1.0, "loss_prev_stage_rgb_mse": 1.0, "loss_mask_bce": 1.0, "loss_prev_stage_mask_bce": 1.0,
    }


def test_parameter_groups_hold_every_parameter_at_the_configured_rate():
    trained = task()
    (group,) = trained.parameter_groups()
    assert group["lr"] == 0.01 and group["name"] == "implicitron"
    assert {id(p) for p in group["params"]} == {id(p) for p in trained.model.parameters()}


def test_validation_averages_over_frames_and_depth_over_those_that_have_it():
    first, second = frame(9), frame(8, size=(17, 15), depth=True)  # depth is scored 5 pixels away from the border
    both, alone = task(val=[first, second]).validate(), [task(val=[f]).validate() for f in (first, second)]
    assert both["psnr_masked"] == pytest.approx((alone[0]["psnr_masked"] + alone[1]["psnr_masked"]) / 2)
    assert "depth_abs_fg" not in alone[0]
    assert both["depth_abs_fg"] == pytest.approx(alone[1]["depth_abs_fg"])


def test_validation_repeats_to_the_bit_and_draws_nothing():
    trained = task()
    state = torch.get_rng_state()
    assert trained.validate() == trained.validate()
    assert torch.equal(torch.get_rng_state(), state)


def test_pictures_show_target_render_depth_and_mask_side_by_side():
    trained = task(val=[frame(9)])
    assert list(trained.pictures()) == []
    trained.validate()
    ((tag, picture),) = trained.pictures()
    assert tag == "val/thing/9" and picture.dtype == torch.uint8 and picture.shape == (3, 6, 4 * 8)
    assert torch.equal(picture[:, :, :8], frame(9).rgb)


def test_the_structure_never_changes():
    assert task().structure(0) is False


# Models that pool features

POOLING = {
    "n_train_target_views": 1,
    "view_pooler_enabled": True,
    "image_feature_extractor_class_type": "ResNetFeatureExtractor",
    "image_feature_extractor_ResNetFeatureExtractor_args": {"name": "resnet18", "stages": [1], "proj_dim": 4, "image_rescale": 1.0},
}


def pooling_task(train=None, *, views=3, min_views=2, frames_per_step=1, **changes) -> ImplicitronTask:
    train = [frame(n) for n in range(6)] if train is None else train
    return task(train, frames_per_step=frames_per_step, sources=SourceSettings(views=views, min_views=min_views), **{**POOLING, **changes})


def test_a_step_of_a_pooling_model_has_its_target_and_then_a_drawn_number_of_sources():
    trained = pooling_task()
    counts = []
    for seed in range(30):
        torch.manual_seed(seed)
        batch = trained.batch(0)
        counts.append(len(batch["sequence_name"]))
        pictures = batch["image_rgb"].flatten(1)
        assert len({float(picture.sum()) for picture in pictures}) == len(pictures) == batch["camera"].R.shape[0]
    assert set(counts) == {3, 4}  # the target and 2 or 3 sources


def test_no_more_sources_are_drawn_than_there_are_frames():
    trained = pooling_task([frame(n) for n in range(3)], views=9)
    assert {len(trained.batch(step)["sequence_name"]) for step in range(10)} == {3}


def test_a_pooling_model_learns_and_validates_from_its_own_photographs():
    trained = pooling_task()
    before = trained.validate()
    objectives = optimise(trained, steps=3)
    assert all(torch.isfinite(torch.tensor(objectives)))
    assert trained.validate() != before and trained.rays_per_step == N_RAYS
    assert frame(9).rgb.tolist() not in trained.model.source_views.rgb.tolist()  # the validation frame is not among them


def test_a_pooling_model_goes_on_from_its_state_as_if_never_interrupted():
    whole, first, second = pooling_task(), pooling_task(), pooling_task()
    for trained, steps in ((whole, (0, 1, 2)), (first, (0, 1))):
        sgd(trained, steps)
    second.model.load_state_dict(first.model.state_dict())
    sgd(second, (2,))
    assert all(torch.equal(value, second.model.state_dict()[name]) for name, value in whole.model.state_dict().items())


def sgd(trained: ImplicitronTask, steps) -> None:
    """Steps without an optimizer's state."""
    optimizer = torch.optim.SGD(trained.parameter_groups(), lr=1e-3)
    for step in steps:
        torch.manual_seed(1000 + step)
        losses = trained.losses(trained.batch(step))
        optimizer.zero_grad()
        sum(weight * losses[name] for name, weight in trained.loss_weights.items()).backward()
        optimizer.step()


def test_targets_that_a_pooling_model_would_take_for_sources_are_refused():
    with pytest.raises(ValueError, match="frames_per_step=2: this model pools features and renders n_train_target_views=1"):
        pooling_task(frames_per_step=2)
    assert len(pooling_task(frames_per_step=2, n_train_target_views=2).batch(0)["sequence_name"]) in (4, 5)


def test_too_few_frames_to_pool_from_are_refused():
    with pytest.raises(ValueError, match="min_source_views=2 need 3 training frames, there are 2"):
        pooling_task([frame(0), frame(1)])


def test_photographs_of_mixed_sizes_cannot_be_pooled_from():
    with pytest.raises(ValueError, match=r"pooling features.*thing/0 has \(6, 8\), thing/1 \(9, 5\)"):
        pooling_task([frame(0), frame(1, size=(9, 5)), frame(2)])
