"""What a generated sequence shows and from where: settings, scene, camera path, splits and the errors put into cameras."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from co3d_ensemble.data.synthetic_objects import OBJECTS, make_scene
from co3d_ensemble.data.synthetic_scene import PATTERNS, Scene, surface_points
from co3d_ensemble.functional.cameras import NDC_FORMATS, camera_center, pinhole_from_ndc, so3_exp
from co3d_ensemble.functional.types import PinholeCamera

FRAME_MARGIN = 0.95  # share of the half frame that the object reaches in its tightest photograph
DISTANCES = (3.7, 4.2)  # of the camera from the object's centre, object radii
ELEVATIONS = (16.0, 46.0)  # degrees; above the clutter, so that nothing hides the object
FLOAT16_RANGE = (6.2e-5, 65504.0)  # smallest normal and largest half float: what a depth file can hold


@dataclass(frozen=True)
class SyntheticConfig:
    """What is generated.

    Attributes:
        n_known, n_val, n_unseen: frames to train on, to validate on, and targets.
        height, width: picture size in pixels.
        seed: with the names of category and sequence it decides everything random.
        object: one of ``OBJECTS``, or ``auto``: the category's name where it is one of them, else chosen by it.
        texture: pattern of the object's main part, one of ``PATTERNS``, or ``auto``: chosen by the seed.
        scene_scale: radius of the object in world units; multiplies every world length.
        mask_noise: largest shift of the boundary of known masks, share of the shorter picture side.
        pose_noise: std of the error written into known cameras: of the rotation angle in radians, and of the camera's
            position along each axis in camera distances. Pictures are taken with the true cameras.
        supersample: s x s colour samples per pixel.
        turns: how often the camera path goes around the object.
        principal_offset: largest offset of the principal point from the centre, in NDC.
        intrinsics_format: of the annotated cameras.
        image_format: ``jpg`` or, without loss, ``png``.

    Raises:
        ValueError: naming the setting and its value.
    """

    n_known: int = 40
    n_val: int = 5
    n_unseen: int = 5
    height: int = 128
    width: int = 128
    seed: int = 0
    object: str = "auto"
    texture: str = "auto"
    scene_scale: float = 1.0
    mask_noise: float = 0.0
    pose_noise: float = 0.0
    supersample: int = 2
    turns: float = 1.0
    principal_offset: float = 0.03
    intrinsics_format: str = "ndc_isotropic"
    image_format: str = "jpg"

    def __post_init__(self) -> None:
        choices = {
            "object": ("auto", *OBJECTS),
            "texture": ("auto", *PATTERNS),
            "intrinsics_format": NDC_FORMATS,
            "image_format": ("jpg", "png"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        least = {"n_known": 1, "n_val": 0, "n_unseen": 1, "height": 8, "width": 8, "supersample": 1, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {low}")
        ranges = {"mask_noise": 0.25, "pose_noise": 0.5, "principal_offset": 0.3}
        for name, high in ranges.items():
            if not 0 <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)}: must lie in [0, {high}]")
        if not (math.isfinite(self.turns) and self.turns != 0):
            raise ValueError(f"turns={self.turns}: must be finite and not 0")
        low, high = FLOAT16_RANGE
        if not low < self.scene_scale < high / (2 * DISTANCES[1]):  # the table reaches twice as far as the object
            raise ValueError(f"scene_scale={self.scene_scale}: depths must fit half floats, {low} to {high}")


@dataclass(frozen=True)
class SequencePlan:
    """A sequence before it is photographed, in the order of its path.

    Attributes:
        scene: what is photographed.
        cameras: true cameras, float64.
        annotated_cameras: what the annotations say; differs for known frames under ``pose_noise``.
        splits: ``train`` (known), ``val`` or ``test`` (target) per frame.
        frame_numbers: as annotated; not the numbers in the file names, which count from 1.
    """

    scene: Scene
    cameras: list[PinholeCamera]
    annotated_cameras: list[PinholeCamera]
    splits: list[str]
    frame_numbers: list[int]


def plan_sequence(category: str, sequence_name: str, config: SyntheticConfig) -> SequencePlan:
    """Scene, cameras and splits of a sequence: the ground truth that ``render_view`` can photograph from anywhere."""
    rng = random_numbers(config.seed, category, sequence_name)
    name = config.object
    if name == "auto":
        name = category if category in OBJECTS else sorted(OBJECTS)[zlib.crc32(category.encode()) % len(OBJECTS)]
    scene = make_scene(name, rng, texture=config.texture, scale=config.scene_scale)
    cameras = camera_path(scene, config, rng)
    splits = _interleaved_splits(config)
    offset, stride = int(rng.integers(2, 10)), int(rng.integers(2, 4))
    noisy = [_with_pose_noise(camera, config.pose_noise, rng) for camera in cameras]
    return SequencePlan(
        scene=scene,
        cameras=cameras,
        annotated_cameras=[b if split == "train" else a for a, b, split in zip(cameras, noisy, splits)],
        splits=splits,
        frame_numbers=[offset + stride * i for i in range(len(cameras))],
    )


def camera_path(scene: Scene, config: SyntheticConfig, rng: np.random.Generator) -> list[PinholeCamera]:
    """A hand-held walk around the object; the focal length is the longest that keeps all of it in every frame."""
    n = config.n_known + config.n_val + config.n_unseen
    share = np.arange(n) / n
    middle, swing = (DISTANCES[0] + DISTANCES[1]) / 2, (DISTANCES[1] - DISTANCES[0]) / 2
    distance = middle + swing * _wobble(share, rng)
    low, high = np.radians(ELEVATIONS)
    elevation = (low + high) / 2 + (high - low) / 2 * _wobble(share, rng)
    azimuth = rng.uniform(0, 2 * math.pi) + 2 * math.pi * config.turns * share + 0.04 * _wobble(share, rng)
    aim = 0.04 * np.stack([_wobble(share, rng) for _ in range(3)], axis=1)
    roll = 0.04 * _wobble(share, rng)
    flat = np.cos(elevation)
    eye = distance[:, None] * np.stack((flat * np.sin(azimuth), np.sin(elevation), flat * np.cos(azimuth)), axis=1)
    R = torch.stack([_look_at(e, a, r) for e, a, r in zip(torch.from_numpy(eye), torch.from_numpy(aim), roll.tolist())])
    T = -(torch.from_numpy(eye)[:, None] @ R)[:, 0]
    view = surface_points(list(scene.solids[: scene.n_object])) @ R + T[:, None]
    slope = (view[..., :2] / view[..., 2:]).abs().amax(dim=(0, 1))
    principal = torch.from_numpy(rng.uniform(-1, 1, size=2)) * config.principal_offset
    side = torch.tensor([config.width, config.height], dtype=torch.float64) / min(config.width, config.height)
    focal = ((FRAME_MARGIN * side - principal.abs()) / slope).min().expand(2)
    return [
        pinhole_from_ndc(r, t * config.scene_scale, focal, principal, height=config.height, width=config.width)
        for r, t in zip(R, T)
    ]


def random_numbers(seed: int, *names: str) -> np.random.Generator:
    """A generator that depends on the seed and on names, the same on every machine."""
    return np.random.default_rng([seed, zlib.crc32("/".join(names).encode())])


def _wobble(share: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Smooth motion in [-1, 1] along the path: slow waves plus a little of the hand's."""
    phases = rng.uniform(0, 2 * math.pi, size=3)
    waves = [np.sin(2 * math.pi * k * share + phase) for k, phase in zip((1, 2.3, 9), phases)]
    return 0.55 * waves[0] + 0.35 * waves[1] + 0.1 * waves[2]


def _look_at(eye: Tensor, aim: Tensor, roll: float) -> Tensor:
    """Rotation (3, 3), X_view = X_world @ R, of a camera at ``eye`` that looks at ``aim``, tilted by ``roll`` radians."""
    forward = torch.nn.functional.normalize(aim - eye, dim=0)
    left = torch.nn.functional.normalize(torch.linalg.cross(forward.new_tensor([0.0, 1.0, 0.0]), forward), dim=0)
    R = torch.stack((left, torch.linalg.cross(forward, left), forward), dim=1)
    return R @ so3_exp(R.new_tensor([0.0, 0.0, roll]))


def _interleaved_splits(config: SyntheticConfig) -> list[str]:
    """Validation frames and targets evenly spread over the path, alternating, between the known frames."""
    held_out, n = config.n_val + config.n_unseen, config.n_known + config.n_val + config.n_unseen
    splits = ["train"] * n
    for i in range(held_out):
        # the i-th held-out frame is a target when the targets' share of the first i + 1 rounds up here
        is_target = (i + 1) * config.n_unseen // held_out > i * config.n_unseen // held_out
        splits[(2 * i + 1) * n // (2 * held_out)] = "test" if is_target else "val"
    return splits


def _with_pose_noise(camera: PinholeCamera, pose_noise: float, rng: np.random.Generator) -> PinholeCamera:
    axis, angle, shift = rng.normal(size=3), rng.normal(), rng.normal(size=3)
    if pose_noise == 0:
        return camera
    R = camera.R @ so3_exp(camera.R.new_tensor(axis / np.linalg.norm(axis) * angle * pose_noise))
    center = camera_center(camera.R, camera.T)
    center = center + center.norm() * pose_noise * camera.R.new_tensor(shift)
    return replace(camera, R=R, T=-center @ R)
