"""Generated picture pairs with exact depth: MINE's embedded data set.

Every scene is a room of its own (``generated_room.py``) seen from the corners of a regular tetrahedron, so that all pairs of
a scene have the same baseline, 10 to 25 per cent of the median depth. Scenes follow from ``(seed, scene index)`` alone and are
made when they are first asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from co3d_ensemble.functional.cameras import pixel_centers, so3_exp
from co3d_ensemble.mine.generated_room import Room, random_room, with_shuffled_looks
from co3d_ensemble.mine.generated_view import Viewpoints, photograph, trace_depth
from co3d_ensemble.mine.pairs import Pair
from co3d_ensemble.mine.views import View, make_pair

FIELDS_OF_VIEW = (50.0, 75.0)  # degrees, horizontal
EYE_HEIGHTS = (1.3, 1.7)  # metres
PITCHES, ROLLS = (4.0, 20.0), (-4.0, 4.0)  # degrees; a positive pitch looks down
VIEW_TURN = 2.0  # degrees, standard deviation of a view's rotation about each axis
BASELINES = (0.12, 0.15)  # shares of the median depth
VIEW_BASELINES = (0.105, 0.25)  # of the median depth of every single view: one beside a pillar sees much less far
MIN_SPREAD = 4.2  # 98th over 2nd percentile of depth, in every view
NEAREST_DEPTH, FARTHEST_DEPTH = 1.0, 30.0  # metres; nothing lies outside
MAX_VIEWS = 4
MIN_SIDE = 16  # pixels
TRIES = 200
PLANNING_STEP = 4  # the baseline is chosen by the depth of every fourth row and column at the eye


@dataclass(frozen=True)
class Scene:
    """A room, its cameras and the depth that they see, float64, shape (V, 1, H, W)."""

    room: Room
    views: Viewpoints
    depth: Tensor


class GeneratedPairs(Dataset[Pair]):
    """Pairs of neighbouring views of many generated rooms.

    Item i has view ``i % n_views`` of scene ``i // n_views`` as its source; the target is another view of that scene.

    Args:
        n_scenes: how many.
        first_scene: index of the first one; training and unseen scenes are disjoint ranges of one seed.
        n_views: photographs per scene, 2 to 4.
        height, width: picture size in pixels.
        n_points: sparse points per picture, the depths of pixels drawn from torch's default generator at every access; 0: none.
        random_target: draw the target from torch's default generator; False: always the next view.
        shuffle_looks: give every thing of a room the look of another one, geometry as before: whoever has learnt depth from
            colours errs.
        supersample: s x s colour samples per pixel.

    Raises:
        ValueError: naming the setting and its value.
    """

    def __init__(
        self,
        n_scenes: int = 200,
        *,
        first_scene: int = 0,
        n_views: int = 4,
        height: int = 64,
        width: int = 96,
        seed: int = 0,
        n_points: int = 256,
        random_target: bool = True,
        shuffle_looks: bool = False,
        supersample: int = 2,
    ) -> None:
        least = {
            "n_scenes": (n_scenes, 1),
            "first_scene": (first_scene, 0),
            "n_views": (n_views, 2),
            "height": (height, MIN_SIDE),
            "width": (width, MIN_SIDE),
            "seed": (seed, 0),
            "n_points": (n_points, 0),
            "supersample": (supersample, 1),
        }
        for name, (value, low) in least.items():
            if value < low:
                raise ValueError(f"{name}={value}: must be at least {low}")
        if n_views > MAX_VIEWS:
            raise ValueError(f"n_views={n_views}: at most {MAX_VIEWS}, the corners of a tetrahedron")
        self.n_scenes, self.first_scene, self.n_views, self.seed = n_scenes, first_scene, n_views, seed
        self.height, self.width, self.supersample = height, width, supersample
        self.n_points, self.random_target, self.shuffle_looks = n_points, random_target, shuffle_looks
        self._scenes: dict[int, tuple[Scene, Tensor]] = {}

    def __len__(self) -> int:
        return self.n_scenes * self.n_views

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        scene, source = divmod(index, self.n_views)
        step = 1 + int(torch.randint(self.n_views - 1, ())) if self.random_target else 1
        views = (self.view(scene, v) for v in (source, (source + step) % self.n_views))
        return make_pair(*views, n_points=self.n_points)

    def view(self, scene: int, index: int) -> View:
        """View ``index`` of scene ``scene``, both from 0."""
        if scene not in self._scenes:
            self._scenes[scene] = self._photographed(self.first_scene + scene)
        plan, pictures = self._scenes[scene]
        depth = plan.depth[index]
        return View(
            f"generated_{self.seed}_{self.first_scene + scene}",
            str(index),
            pictures[index].float() / 255,
            plan.views.K,
            plan.views.R[index],
            plan.views.t[index],
            points=_every_pixel(depth),
            depth=depth,
        )

    def _photographed(self, index: int) -> tuple[Scene, Tensor]:
        """The scene and its pictures, in 8 bits as photographs are; few bytes, for all that were asked for stay in memory."""
        plan = plan_scene(index, seed=self.seed, n_views=self.n_views, height=self.height, width=self.width)
        room = with_shuffled_looks(plan.room) if self.shuffle_looks else plan.room
        pictures = photograph(room, plan.views, supersample=self.supersample)
        return replace(plan, depth=plan.depth.float()), (pictures * 255).round().to(torch.uint8)


def plan_scene(index: int, *, seed: int, n_views: int, height: int, width: int) -> Scene:
    """The room and cameras of scene ``index``; a draw that misses the promised depth spread or baseline is drawn again."""
    for attempt in range(TRIES):
        rng = np.random.default_rng([seed, index, attempt])
        room, eye = random_room(rng), -float(rng.uniform(*EYE_HEIGHTS))
        focal = width / (2 * math.tan(math.radians(rng.uniform(*FIELDS_OF_VIEW)) / 2))
        K = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], dtype=torch.float64)
        R = _orientations(rng, n_views)
        corners = _tetrahedron()[:n_views] @ so3_exp(torch.from_numpy(rng.normal(size=3) * math.pi)).T
        at_the_eye = Viewpoints(R[:1], _translations(R[:1], corners[:1] * 0, eye), K, height, width)
        baseline = float(rng.uniform(*BASELINES) * trace_depth(room, at_the_eye, step=PLANNING_STEP).median())
        views = Viewpoints(R, _translations(R, corners * baseline, eye), K, height, width)
        depth = trace_depth(room, views)
        if _keeps_promises(depth, baseline):
            return Scene(room, views, depth)
    raise ValueError(f"scene {index} of seed {seed}: no room with the promised depth spread in {TRIES} draws")


def _orientations(rng: np.random.Generator, n_views: int) -> Tensor:
    """World-to-camera rotations (V, 3, 3): one direction, level but for pitch and roll, that each view turns a little."""
    pitch, roll = (torch.tensor(math.radians(rng.uniform(*degrees)), dtype=torch.float64) for degrees in (PITCHES, ROLLS))
    axes = torch.eye(3, dtype=torch.float64)
    turns = torch.from_numpy(rng.normal(0, math.radians(VIEW_TURN), (n_views, 3)))
    return so3_exp(turns) @ so3_exp(roll * axes[2]) @ so3_exp(pitch * axes[0])


def _keeps_promises(depth: Tensor, baseline: float) -> bool:
    flat = depth.flatten(1)
    low, middle, high = flat.quantile(flat.new_tensor([0.02, 0.5, 0.98]), dim=1)
    share = baseline / middle
    return bool(
        (flat.amin() >= NEAREST_DEPTH)
        & (flat.amax() <= FARTHEST_DEPTH)
        & (high / low >= MIN_SPREAD).all()
        & ((share >= VIEW_BASELINES[0]) & (share <= VIEW_BASELINES[1])).all()
    )


def _tetrahedron() -> Tensor:
    """Corners of a regular tetrahedron of edge 1 about the origin, shape (4, 3), float64."""
    corners = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    return corners / math.sqrt(8)


def _translations(R: Tensor, offsets: Tensor, eye: float) -> Tensor:
    """t (V, 3) of cameras at ``offsets`` from the eye, which is at height y = ``eye``."""
    centers = offsets + torch.tensor([0.0, eye, 0.0], dtype=torch.float64)
    return -(R @ centers[:, :, None])[:, :, 0]


def _every_pixel(depth: Tensor) -> Tensor:
    """(x, y, z) of all pixels of a depth map (1, H, W), shape (H W, 3)."""
    return torch.cat((pixel_centers(*depth.shape[-2:]), depth.reshape(-1, 1)), dim=1)
