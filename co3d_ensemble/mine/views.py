"""One picture with its camera, how two of one scene make a pair, and what data sets of such pairs share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from co3d_ensemble.functional.cameras import relative_pose
from co3d_ensemble.mine.pairs import Pair


@dataclass(frozen=True)
class View:
    """A picture at the data set's size and what is known of it.

    Attributes:
        scene, name: for messages and ``Pair.name``.
        picture: colour in [0, 1], float32, shape (3, H, W).
        K: intrinsics in pixels of ``picture``, shape (3, 3).
        R, t: ``X_camera = R X_scene + t``, float64, (3, 3) and (3,); a pair's pose is their difference, so digits matter.
        points: all sparse points (x, y, z) of the picture, shape (n, 3); None where the data set has none.
        depth, mask: as in :class:`Pair`, shape (1, H, W).
    """

    scene: str
    name: str
    picture: Tensor
    K: Tensor
    R: Tensor
    t: Tensor
    points: Tensor | None = None
    depth: Tensor | None = None
    mask: Tensor | None = None


def make_pair(source: View, target: View, *, n_points: int) -> Pair:
    """A pair with ``n_points`` sparse points per picture (0: none), see :func:`chosen_points`."""
    R, t = relative_pose(source.R, source.t, target.R, target.t)
    source_points, target_points = (
        None if view.points is None or n_points == 0 else chosen_points(view.points, n_points) for view in (source, target)
    )
    return Pair(
        name=f"{source.scene}/{source.name}->{target.name}",
        source=source.picture,
        target=target.picture,
        K_source=source.K.float(),
        K_target=target.K.float(),
        R=R.float(),
        t=t.float(),
        source_points=source_points,
        target_points=target_points,
        source_depth=source.depth,
        target_depth=target.depth,
        source_mask=source.mask,
        target_mask=target.mask,
    )


def chosen_points(points: Tensor, n_points: int) -> Tensor:
    """``n_points`` rows (float32): of more, a subset drawn from torch's default generator; fewer are followed by rows of 0."""
    if len(points) > n_points:
        points = points[torch.randperm(len(points))[:n_points]]
    padding = points.new_zeros(n_points - len(points), 3)
    return torch.cat((points, padding)).float()


def visible_points(xyz: Tensor, K: Tensor, *, height: int, width: int) -> Tensor:
    """(x, y, z) of the points (n, 3) in camera space that fall into the picture, in front of the camera; float32."""
    projected = xyz.double() @ K.double().T
    z = projected[:, 2]
    x, y = projected[:, 0] / z, projected[:, 1] / z
    inside = (z > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return torch.stack((x, y, z), dim=1)[inside].float()


class ViewPairs(Dataset[Pair]):
    """What the data sets of photographs share: an item is a source view and one of its possible targets.

    Subclasses say which views belong together, in ``_pairs`` or by :meth:`choices` and a length of their own, and load them
    (:meth:`load`).

    Args:
        n_points: sparse points per picture, 0: none.
        random_target: draw the target from torch's default generator; False: always the first choice.
        cache_megabytes: loaded views that are kept, the least recently used leave first.
    """

    _pairs: Sequence[tuple[Hashable, Sequence[Hashable]]]  # source and targets of every item, as ``choices`` gives them

    def __init__(self, *, n_points: int, random_target: bool, cache_megabytes: float) -> None:
        if not cache_megabytes >= 0:
            raise ValueError(f"cache_megabytes={cache_megabytes}: must not be negative")
        self.n_points, self.random_target = n_points, random_target
        self._cache: OrderedDict[Hashable, View] = OrderedDict()
        self._cache_bytes, self._cache_limit = 0, cache_megabytes * 2**20

    def __len__(self) -> int:
        return len(self._pairs)

    def choices(self, index: int) -> tuple[Hashable, Sequence[Hashable]]:
        """Keys of the source of item ``index`` and of its targets, at least one, the most natural first."""
        return self._pairs[index]

    def load(self, key: Hashable) -> View:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        source, targets = self.choices(index)
        chosen = int(torch.randint(len(targets), ())) if self.random_target else 0
        return make_pair(self.view(source), self.view(targets[chosen]), n_points=self.n_points)

    def view(self, key: Hashable) -> View:
        """A view, from the cache where it is there."""
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        view = self.load(key)
        self._cache[key] = view
        self._cache_bytes += _bytes(view)
        while self._cache_bytes > self._cache_limit:
            self._cache_bytes -= _bytes(self._cache.popitem(last=False)[1])
        return view


def _bytes(view: View) -> int:
    tensors = (view.picture, view.points, view.depth, view.mask)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
