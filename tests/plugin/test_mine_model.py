"""MINE as an Implicitron model: views of a painted wall against PyTorch3D's own rays, choice of sources, state, losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from co3d_ensemble.functional.cameras import so3_exp
from co3d_ensemble.functional.fusion import FusionRule, fuse
from co3d_ensemble.functional.types import Frame, PinholeCamera
from co3d_ensemble.plugin.frames import pytorch3d_cameras
from co3d_ensemble.plugin.implicitron_args import model_class_named
from co3d_ensemble.plugin.mine_model import MINEModel, build_mine_model
from co3d_ensemble.plugin.mine_views import camera_distance
from co3d_ensemble.rendering import read_view, write_view

from pytorch3d.implicitron.dataset.frame_data import FrameData  # isort: skip
from pytorch3d.implicitron.models.renderer.base import EvaluationMode  # isort: skip

HEIGHT, WIDTH = 40, 56
WALL = 2.5  # z of the painted wall in front of the first camera
PLANES = {"n_planes": 3, "near_disparity": 0.7, "far_disparity": 0.1}  # centres 0.6, 0.4, 0.2: the wall is the middle one
EMPTY, OPAQUE = 0.0, 1e4


class Wall(nn.Module):
    """In place of the network: the photograph on one plane, nothing on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.calls = 0

    def encode(self, image):
        self.calls += 1
        return image

    def decode(self, image, disparity, *, plane_chunk=None, n_scales=None):
        self.disparity = disparity
        on_wall = (disparity * WALL - 1).abs() < 1e-5
        assert on_wall.any() and n_scales == 1
        sigma = torch.where(on_wall, OPAQUE, EMPTY)[..., None, None, None].expand(-1, -1, 1, *image.shape[-2:])
        return [(self.weight * image[:, None].expand(-1, disparity.shape[1], -1, -1, -1), sigma)]


def wall_model(**settings) -> MINEModel:
    model = build_mine_model(encoder="resnet18", **{**PLANES, **settings})
    model.network = Wall()
    return model.eval()


def camera(*, turn=(0.0, 0.0, 0.0), move=(0.0, 0.0, 0.0), height=HEIGHT, width=WIDTH, scale=1.0) -> PinholeCamera:
    """In a world whose axes are not those of any camera."""
    world = so3_exp(torch.tensor([0.4, -0.8, 0.3]))
    R = world @ so3_exp(torch.tensor(turn))
    T = (torch.tensor([0.5, -0.7, 1.1]) @ so3_exp(torch.tensor(turn)) + torch.tensor(move)) * scale
    focal, principal = torch.tensor([52.0, 47.0]), torch.tensor([27.0, 21.5])
    if (height, width) != (HEIGHT, WIDTH):
        focal = focal * 1.5
        principal = torch.tensor([width, height]) / 2
    return PinholeCamera(R, T, focal, principal, height=height, width=width)


SOURCE = camera()
TARGET = camera(turn=(0.05, -0.08, 0.1), move=(0.15, -0.1, 0.2), height=30, width=44)


def paint(points: torch.Tensor) -> torch.Tensor:
    """Colour (..., 3) at world points (..., 3)."""
    return 0.5 + 0.4 * torch.sin(points @ torch.tensor([[1.0, 2.0, -1.0], [-2.0, 1.0, 1.0], [1.0, 1.0, 2.0]]))


def disc(points: torch.Tensor) -> torch.Tensor:
    """A soft foreground mask (..., 1) around the wall's point before the first camera."""
    middle = torch.linalg.inv(SOURCE.R.T) @ (torch.tensor([0.0, 0.0, WALL]) - SOURCE.T)
    return torch.sigmoid(12 * (0.5 - (points - middle).norm(dim=-1, keepdim=True)))


def wall_seen_by(viewer: PinholeCamera):
    """World points of the wall under every pixel, and their z: by PyTorch3D's own cameras. (H, W, 3), (H, W)."""
    first, own = pytorch3d_cameras([SOURCE]), pytorch3d_cameras([viewer])
    y, x = torch.meshgrid(torch.arange(viewer.height) + 0.5, torch.arange(viewer.width) + 0.5, indexing="ij")
    half = min(viewer.height, viewer.width) / 2
    ndc = torch.stack(((viewer.width / 2 - x) / half, (viewer.height / 2 - y) / half), dim=-1).reshape(-1, 2)
    near, far = (own.unproject_points(torch.cat((ndc, torch.full_like(ndc[:, :1], z)), dim=-1), world_coordinates=True) for z in (1.0, 2.0))
    before = [first.get_world_to_view_transform().transform_points(points)[:, 2] for points in (near, far)]
    share = (WALL - before[0]) / (before[1] - before[0])
    points = near + share[:, None] * (far - near)
    z = own.get_world_to_view_transform().transform_points(points)[:, 2]
    shape = (viewer.height, viewer.width)
    return points.reshape(*shape, 3), z.reshape(shape)


def photograph(viewer: PinholeCamera, number: int = 0) -> Frame:
    points, _ = wall_seen_by(viewer)
    rgb, mask = ((255 * part(points)).round().to(torch.uint8).permute(2, 0, 1) for part in (paint, disc))
    return Frame(f"s/{number}", "s", number, rgb, mask, viewer)


def batch(*viewers: PinholeCamera, sequences=None) -> FrameData:
    """As Implicitron's collate makes it: one size, masks, cameras in NDC."""
    frames = [photograph(viewer) for viewer in viewers]
    return FrameData(
        frame_number=torch.arange(len(frames)),
        sequence_name=sequences or ["s"] * len(frames),
        sequence_category=["wall"] * len(frames),
        image_rgb=torch.stack([frame.rgb for frame in frames]).float() / 255,
        fg_probability=torch.stack([frame.mask for frame in frames]).float() / 255,
        mask_crop=torch.ones(len(frames), 1, HEIGHT, WIDTH),
        camera=pytorch3d_cameras(viewers),
    )


def inside(picture: torch.Tensor, margin: int = 6) -> torch.Tensor:
    return picture[..., margin:-margin, margin:-margin]


def test_a_view_shows_what_pytorch3ds_rays_meet():
    model = wall_model(foreground=False)
    model.set_sources([photograph(SOURCE)])
    view = model.render_view(TARGET, 1000)
    points, z = wall_seen_by(TARGET)
    assert view.rgb.shape == (3, 30, 44)
    assert (inside(view.rgb) - inside(paint(points).permute(2, 0, 1))).abs().max() < 0.02
    assert (inside(view.depth[0]) - inside(z)).abs().max() < 1e-3
    assert inside(view.mask).min() > 0.999


def test_frame_data_give_the_same_view_on_black_with_the_objects_mask():
    model, target = wall_model(), camera(turn=(0.05, -0.08, 0.1), move=(0.15, -0.1, 0.2))
    data = batch(target, SOURCE)
    data.image_rgb[0], data.fg_probability[0] = torch.nan, torch.nan  # the target's own picture is not looked at
    with torch.no_grad():
        predictions = model(**data, evaluation_mode=EvaluationMode.EVALUATION)
    render, (points, z) = predictions["implicitron_render"], wall_seen_by(target)
    mask = disc(points).permute(2, 0, 1)
    assert render.image_render.shape == (1, 3, HEIGHT, WIDTH) and render.mask_render.shape == (1, 1, HEIGHT, WIDTH)
    assert (inside(render.mask_render[0]) - inside(mask)).abs().max() < 0.03
    assert (inside(render.image_render[0]) - inside(paint(points).permute(2, 0, 1) * mask)).abs().max() < 0.04
    shown = inside(mask) > 0.1
    assert (inside(render.depth_render[0])[shown] - inside(z[None])[shown]).abs().max() < 1e-3
    model.set_sources([photograph(SOURCE)])
    view = model.render_view(target)
    torch.testing.assert_close(view.rgb, render.image_render[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(view.mask, render.mask_render[0], atol=1e-5, rtol=0)


def test_targets_without_photographs_of_their_own_are_rendered_from_the_models():
    model = wall_model()
    with pytest.raises(ValueError, match="no photograph"):
        model.render_view(TARGET)
    model.set_sources([photograph(SOURCE)])
    with torch.no_grad():
        render = model(image_rgb=None, camera=pytorch3d_cameras([TARGET]))["implicitron_render"]
    torch.testing.assert_close(render.image_render[0], model.render_view(TARGET).rgb, atol=1e-5, rtol=0)


def test_a_state_dict_renders_the_same_views_without_the_photographs():
    model = wall_model()
    model.set_sources([photograph(SOURCE), photograph(camera(move=(1.0, 0.0, 0.0)), 1)])
    model.world_unit.fill_(1.0)
    other = wall_model(scene_scale=3.0)
    other.load_state_dict(model.state_dict())
    for name in ("rgb", "depth", "mask"):
        torch.testing.assert_close(getattr(other.render_view(TARGET), name), getattr(model.render_view(TARGET), name))


def test_the_view_is_a_member_like_any_other_for_files_and_fusion(tmp_path):
    model = wall_model()
    model.set_sources([photograph(SOURCE)])
    view = model.render_view(TARGET).cpu()
    write_view(tmp_path / "view.npz", view)
    read = read_view(tmp_path / "view.npz")
    fused = fuse([read, read], FusionRule(), FusionRule())
    torch.testing.assert_close(fused.rgb, view.rgb, atol=1e-3, rtol=0)
    torch.testing.assert_close(fused.depth, view.depth, atol=1e-3, rtol=0)


def test_another_unit_of_length_scales_depth_and_nothing_else():
    unit, scaled = wall_model(), wall_model(scene_scale=7.0)
    unit.set_sources([photograph(SOURCE)])
    frame = photograph(SOURCE)
    grown = [PinholeCamera(c.R, 7 * c.T, c.focal, c.principal, height=c.height, width=c.width) for c in (SOURCE, TARGET)]
    scaled.set_sources([Frame(frame.name, "s", 0, frame.rgb, frame.mask, grown[0])])
    small, large = unit.render_view(TARGET), scaled.render_view(grown[1])
    torch.testing.assert_close(large.rgb, small.rgb, atol=1e-4, rtol=0)
    torch.testing.assert_close(large.depth, 7 * small.depth, atol=1e-2, rtol=1e-3)


def test_the_unit_of_length_is_fitted_to_the_points_of_the_photographs(caplog):
    known, fitted = wall_model(scene_scale=7.0), wall_model(longest_side=28)
    first, second = camera(), camera(move=(0.2, 0.0, 0.0))
    frames = []
    for number, c in enumerate((first, second)):
        frame = photograph(c, number)
        grown = PinholeCamera(c.R, 7 * c.T, c.focal, c.principal, height=c.height, width=c.width)
        frames.append(Frame(frame.name, "s", number, frame.rgb, frame.mask, grown))
    known.set_sources(frames, points={"s/0": torch.tensor([[10.0, 10.0, 1.0]])})
    assert known.world_unit == 7  # what is said counts
    # the network has a wall at WALL everywhere; the mean of logarithms; what lies outside or is no point does not count
    points = torch.tensor([[WIDTH - 1.0, 10.5, 7 * WALL * 1.1], [20.0, HEIGHT - 1.0, 7 * WALL / 1.1], [WIDTH + 1.0, 3.0, 99.0], [0, 0, 0]])
    with caplog.at_level("INFO"):
        fitted.set_sources(frames, points={"s/1": points})
    assert fitted.world_unit.item() == pytest.approx(7, rel=1e-5) and not fitted.training
    assert "sequence s: 7 world units per unit of the network, by the points of 1 photographs" in caplog.text
    fitted.set_sources(frames, points={"s/0": 2 * points[:2] - points[:2] * torch.tensor([1.0, 1.0, 0.0]), "s/1": points})
    assert fitted.world_unit.item() == pytest.approx(7 * 2**0.5, rel=1e-5)


def test_a_sequence_without_points_keeps_the_networks_unit_and_is_named_once(caplog):
    model = wall_model()
    for points in (None, {}, {"s/0": torch.tensor([[-1.0, 3.0, 9.0]])}):
        model.world_unit.fill_(3.0)  # of the sequence before
        model.set_sources([photograph(SOURCE)], points=points)
        assert model.world_unit == 1
    assert caplog.text.count("sequence s: no depth and no point cloud") == 1


def test_large_photographs_are_averaged_down_for_the_network():
    model = wall_model(longest_side=28, foreground=False)
    model.set_sources([photograph(SOURCE)])
    view, (points, _) = model.render_view(TARGET), wall_seen_by(TARGET)
    assert model._stacks[0].rgb.shape[-2:] == (20, 28)
    assert (inside(view.rgb) - inside(paint(points).permute(2, 0, 1))).abs().mean() < 0.03


@pytest.mark.parametrize("training", [False, True])
def test_fine_planes_are_added_where_the_surface_is(training):
    class Slab(Wall):
        def decode(self, image, disparity, *, plane_chunk=None, n_scales=None):
            self.disparity = disparity
            sigma = torch.where((disparity > 0.3) & (disparity < 0.5), OPAQUE, EMPTY)[..., None, None, None]
            return [(image[:, None].expand(-1, disparity.shape[1], -1, -1, -1), sigma.expand(-1, -1, 1, *image.shape[-2:]))]

    model = wall_model(n_fine_planes=4)
    model.network = Slab()
    data = batch(camera(move=(0.1, 0.0, 0.0)), SOURCE)
    model(**data, evaluation_mode=EvaluationMode.TRAINING if training else EvaluationMode.EVALUATION)
    (found,) = model.network.disparity.tolist()
    assert len(found) == 3 + 4 and found == sorted(found, reverse=True) and model.network.calls == 1
    if not training:  # between the middles of the coarse planes 0.6, 0.4 and 0.2, at equal steps
        assert found == pytest.approx([0.6, 0.475, 0.425, 0.4, 0.375, 0.325, 0.2])
    else:  # drawn, coarse ones included
        assert not any(plane == pytest.approx(centre) for plane in found for centre in (0.6, 0.4, 0.2))
    with pytest.raises(ValueError, match="n_fine_planes=-1"):
        build_mine_model(encoder="resnet18", n_fine_planes=-1)


@pytest.mark.parametrize("blend_source", [True, False])
def test_what_the_photograph_sees_has_its_colours_and_without_blending_the_networks(blend_source):
    class Grey(Wall):
        def decode(self, image, disparity, **how):
            ((rgb, sigma),) = super().decode(image, disparity, **how)
            return [(torch.full_like(rgb, 0.25), sigma)]

    model, frame = wall_model(foreground=False, blend_source=blend_source), photograph(SOURCE)
    model.network = Grey()
    model.set_sources([frame])
    expected = frame.rgb.float() / 255 if blend_source else torch.full((3, HEIGHT, WIDTH), 0.25)
    torch.testing.assert_close(model.render_view(SOURCE).rgb, expected, atol=1e-4, rtol=0)


def test_the_nearest_photograph_is_shown_and_those_of_other_sequences_never():
    near, far = camera(move=(0.05, 0.0, 0.0)), camera(move=(0.4, 0.0, 0.0))
    data = batch(SOURCE, far, near, SOURCE, sequences=["s", "s", "s", "another"])
    data.image_rgb[1:] = torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1, 1)
    model = wall_model(foreground=False)
    with torch.no_grad():
        shown = model(**data)["images_render"][0]
    torch.testing.assert_close(inside(shown), torch.full_like(inside(shown), 0.4), atol=1e-3, rtol=0)


def test_several_photographs_are_averaged_by_nearness_where_they_see_the_pixel():
    near, far = camera(move=(0.1, 0.0, 0.0)), camera(move=(-0.9, 0.0, 0.0))
    data = batch(SOURCE, near, far)
    data.image_rgb[1:] = torch.tensor([0.2, 0.8]).view(2, 1, 1, 1)
    model = wall_model(n_sources=2, foreground=False)
    with torch.no_grad():
        rendered = model(**data)
    shown, depth = rendered["images_render"][0, 0], rendered["depths_render"][0, 0]
    ratio = 0.9 / 0.1  # of the distances: neither camera is turned
    expected = (0.2 * math.exp(-1) + 0.8 * math.exp(-ratio)) / (math.exp(-1) + math.exp(-ratio))
    middle = shown[HEIGHT // 2, WIDTH // 2]
    assert float(middle) == pytest.approx(expected, abs=1e-3)
    assert float(depth[HEIGHT // 2, WIDTH // 2]) == pytest.approx(WALL, abs=1e-3)
    row = shown[HEIGHT // 2]
    assert float(row[0]) == pytest.approx(0.8)  # the near one has nothing there
    assert float(row[-1]) == pytest.approx(0.2)  # nor the far one there


def test_distance_between_cameras_counts_translation_at_the_scenes_depth_and_turning():
    turn = so3_exp(torch.tensor([0.0, 0.3, 0.0]))
    turned = PinholeCamera(SOURCE.R @ turn, SOURCE.T @ turn, SOURCE.focal, SOURCE.principal, height=4, width=4)
    assert float(camera_distance(SOURCE, turned, 2.0)) == pytest.approx(0.3, abs=1e-5)
    assert float(camera_distance(SOURCE, camera(move=(0.3, 0.0, 0.4)), 2.0)) == pytest.approx(0.25, abs=1e-5)
    assert float(camera_distance(SOURCE, SOURCE, 2.0)) == pytest.approx(0.0, abs=1e-6)


def test_one_pass_of_the_network_serves_any_number_of_views_until_weights_or_photographs_change():
    model = wall_model()
    model.set_sources([photograph(SOURCE)])
    first = model.render_view(TARGET).rgb
    model.render_view(SOURCE)
    assert model.network.calls == 1
    with torch.no_grad():
        model.network.weight.mul_(0.5)
    model.blend_source = False
    assert model.render_view(TARGET).rgb.max() < 0.6 * first.max() and model.network.calls == 2
    model.set_sources([photograph(TARGET)])
    model.render_view(TARGET)
    assert model.network.calls == 3


def test_training_gives_losses_over_what_the_source_saw_and_their_gradients():
    torch.manual_seed(0)
    model = build_mine_model(encoder="resnet18", **PLANES, poolings=0, loss_weights={"loss_rgb_target": 2.0}).train()
    data = batch(camera(move=(0.1, 0.0, 0.0)), SOURCE)
    predictions = model(**data, evaluation_mode=EvaluationMode.TRAINING)
    torch.testing.assert_close(predictions["objective"], 2 * predictions["loss_rgb_target"])
    assert 0 < predictions["loss_ssim_target"].item() < 2
    predictions["objective"].backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(torch.isfinite(gradients[name]).all() for name in ("network.encoder.conv1.weight", "network.heads.0.weight"))
    assert gradients["network.encoder.conv1.weight"].abs().max() > 0
    assert gradients["network.heads.1.weight"] is None  # coarser scales are not rendered here


def test_the_registry_knows_the_model_and_its_settings_are_checked():
    assert model_class_named("MINEModel") is MINEModel
    with pytest.raises(ValueError, match="no setting n_plane; it has: .*n_planes"):
        build_mine_model(n_plane=3)
    for settings, message in (
        ({"n_sources": 0}, "n_sources=0"),
        ({"plane_chunk": 0}, "plane_chunk=0: must be positive"),
        ({"longest_side": 0}, "longest_side=0: must be positive"),
        ({"scene_scale": float("nan")}, "scene_scale=nan: must be positive"),
        ({"loss_weights": {"loss_rgb": 1.0}}, "loss_rgb: this model computes loss_rgb_target"),
        ({"near_disparity": 0.1, "far_disparity": 0.2}, "near=0.1, far=0.2"),
    ):
        with pytest.raises(ValueError, match=message):
            build_mine_model(encoder="resnet18", **settings)


def test_the_network_of_a_run_is_where_it_starts(tmp_path):
    torch.manual_seed(0)
    trained = build_mine_model(encoder="resnet18", **PLANES).network.state_dict()
    torch.save({"model": trained, "step": 3, "metric": 20.0}, tmp_path / "best.pt")
    started = build_mine_model(encoder="resnet18", checkpoint=str(tmp_path / "best.pt"), **PLANES).network.state_dict()
    assert all(torch.equal(started[name], value) for name, value in trained.items())
    torch.save({"weights": trained}, tmp_path / "other.pt")
    for settings, message in (
        ({"checkpoint": str(tmp_path / "absent.pt")}, "absent.pt: cannot be read"),
        ({"checkpoint": str(tmp_path / "other.pt")}, "other.pt: is not a best.pt of MINE"),
        ({"checkpoint": str(tmp_path / "best.pt"), "encoding": "slides"}, "best.pt is no checkpoint of the network"),
    ):
        with pytest.raises(ValueError, match=message):
            build_mine_model(encoder="resnet18", **PLANES, **settings)
