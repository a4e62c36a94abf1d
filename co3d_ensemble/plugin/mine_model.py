"""MINE as an Implicitron model: photographs with cameras in, colour, depth and mask at any other camera out.

Several photographs of a scene: each target camera takes the ``n_sources`` that were taken nearest to it (:func:`camera_distance`),
renders the multiplane image of each, and averages the pictures pixel by pixel with weights
``valid exp(-distance / smallest distance)``: a source says nothing of pixels that it did not see (fewer than two of its planes), and
a farther one counts less, as a multiplane image is worse the farther one moves away (Mildenhall et al., "Local Light Field
Fusion", SIGGRAPH 2019, weigh alike). With ``n_sources`` 1, the default, the nearest photograph alone is shown: nothing is averaged,
so nothing is blurred where two multiplane images disagree about depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from typing import Any

import torch
from pytorch3d.implicitron.models.base_model import ImplicitronModelBase, ImplicitronRender
from pytorch3d.implicitron.models.renderer.base import EvaluationMode
from pytorch3d.implicitron.tools.config import expand_args_fields, get_default_args, registry
from pytorch3d.renderer.cameras import PerspectiveCameras
from torch import Tensor

from co3d_ensemble.fields.mpi_network import MPINetwork
from co3d_ensemble.functional.mpi_losses import l1_loss, ssim_loss
from co3d_ensemble.functional.mpi_sampling import fixed_disparities
from co3d_ensemble.functional.types import Frame, PinholeCamera, RenderedView
from co3d_ensemble.plugin.frames import pinhole_camera
from co3d_ensemble.plugin.implicitron_args import plain
from co3d_ensemble.plugin.mine_planes import NETWORK_SETTINGS, PlaneSettings, load_network, scene_mpi
from co3d_ensemble.plugin.mine_unit import frame_source, log_unit, tell_unit
from co3d_ensemble.plugin.mine_views import SceneMPI, SourceImage, blended_views, nearest_sources, view_of_scene
from co3d_ensemble.plugin.source_views import SourceSettings, SourceViews

LOSSES = {"loss_rgb_target": l1_loss, "loss_ssim_target": ssim_loss}


@registry.register
class MINEModel(ImplicitronModelBase):
    """Component: :class:`~co3d_ensemble.fields.mpi_network.MPINetwork` and the rendering of its planes.

    It renders from the source views of a batch (``forward``), or from photographs of its own (:meth:`set_sources`,
    :meth:`render_view`), which are a part of the state dict: a checkpoint renders the same views wherever it is loaded.

    With ``foreground`` and masks of the sources, what is shown is the object on black: each plane takes the mask of its own
    photograph's pixel, as it takes that pixel's colour. What the object hides from the photograph counts as the object there.
    Without, the scene is shown whole and the mask is the opacity.

    Settings: those of the network; then
        checkpoint: ``best.pt`` of a run of MINE, or a checkpoint of MINE's authors, whose network this one starts as.
        n_planes, near_disparity, far_disparity: the planes, in 1 / the network's unit of length; in evaluation at the centres of
            equal intervals, in training drawn in them.
        n_fine_planes: so many more, where a first pass over those finds surfaces (coarse to fine); 0: off.
        blend_source: what a photograph sees keeps its colours.
        plane_chunk: planes decoded at once, for less memory.
        longest_side: photographs are averaged down to it for the network; None: as they come.
        n_sources: photographs that a view is rendered from, see the module.
        foreground: see above.
        scene_scale: world units per unit of the network, at the start; a buffer, so a checkpoint keeps its own. None: as the points
            of the photographs have it that :meth:`set_sources` is given; 1, with a warning, where there are none.
        n_train_target_views: frames of a training batch, its first ones, that are targets.
        loss_weights: of the losses that ``forward`` computes in training.
    """

    encoder: str = "resnet50"
    encoder_weights: str | None = None
    checkpoint: str | None = None
    n_harmonics: int = 10
    encoding: str = "reference"
    mode: str = "sigma"
    poolings: int = 2
    density_unit: str = "depth"
    density_scale: float = 1.0
    precision: str = "auto"
    compile: bool = False
    n_planes: int = 32
    n_fine_planes: int = 0
    near_disparity: float = 1.0
    far_disparity: float = 0.001
    blend_source: bool = True
    plane_chunk: int | None = None
    longest_side: int | None = None
    n_sources: int = 1
    foreground: bool = True
    scene_scale: float | None = None
    n_train_target_views: int = 1
    loss_weights: dict[str, float] = field(default_factory=lambda: {"loss_rgb_target": 1.0, "loss_ssim_target": 1.0})
    log_vars: list[str] = field(default_factory=lambda: ["loss_rgb_target", "loss_ssim_target", "objective", "epoch", "sec/it"])

    def __post_init__(self) -> None:
        if self.n_sources < 1 or self.n_train_target_views < 1:
            raise ValueError(f"n_sources={self.n_sources}, n_train_target_views={self.n_train_target_views}: both must be at least 1")
        unknown = sorted(set(self.loss_weights) - set(LOSSES))
        if unknown:
            raise ValueError(f"loss_weights: {', '.join(unknown)}: this model computes {', '.join(LOSSES)}")
        if self.n_fine_planes < 0:
            raise ValueError(f"n_fine_planes={self.n_fine_planes}: must not be negative")
        for name in ("plane_chunk", "longest_side", "scene_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: must be positive")
        fixed_disparities(self.n_planes, self.near_disparity, self.far_disparity, batch=1)  # checks them
        self.network = MPINetwork(
            self.encoder,
            self.encoder_weights,
            n_harmonics=self.n_harmonics,
            encoding=self.encoding,
            mode=self.mode,
            poolings=self.poolings,
            density_unit=self.density_unit,
            density_scale=self.density_scale,
            precision=self.precision,
            compile=self.compile,
        )
        if self.checkpoint is not None:
            load_network(self.network, self.checkpoint, {name: getattr(self, name) for name in NETWORK_SETTINGS})
        self.source_views = SourceViews([], kept=0)
        self.register_buffer("world_unit", torch.tensor(1.0 if self.scene_scale is None else float(self.scene_scale)))
        self._told_unit_of: set[str] = set()
        self._stacks: dict[int, SceneMPI] = {}
        self._stacks_of: Any = None

    def set_sources(self, frames: Sequence[Frame], *, kept: int | None = None, points: Mapping[str, Tensor] | None = None) -> None:
        """The photographs that :meth:`render_view` chooses from, all of one sequence; they replace earlier ones.

        Where ``scene_scale`` is None, the sequence's unit is fitted to them as in evaluations: by what factor the depths of the
        points exceed those that the network sees there, the mean of its logarithm over the points and then over the photographs.

        Args:
            kept: keep at most so many, as far from each other as possible; None: all.
            points: sparse points (x, y, z), pixel position and z in world units, of some of the frames, by name, shape (n, 3).
        """
        self.source_views = SourceViews(frames, kept=len(frames) if kept is None else kept).to(self.world_unit.device)
        if self.scene_scale is None and frames:
            self._calibrate(frames, points or {})

    def forward(
        self,
        *,
        image_rgb: Tensor | None,
        camera: PerspectiveCameras,
        fg_probability: Tensor | None = None,
        mask_crop: Tensor | None = None,
        depth_map: Tensor | None = None,
        sequence_name: list[str] | None = None,
        evaluation_mode: EvaluationMode = EvaluationMode.EVALUATION,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The targets of a batch from its sources.

        Args:
            image_rgb: in [0, 1], not masked, shape (B, 3, H, W): the first frame (in training the first
                ``n_train_target_views``) is a target, the others are sources. None, or a batch without sources: the model's own
                photographs are taken, at the size that the cameras know.
            camera: of the B frames, PyTorch3D's.
            fg_probability: shape (B, 1, H, W), see the class; that of targets is not looked at.
            sequence_name: sources of other sequences than the target's are left out.

        Returns:
            ``implicitron_render`` with colour (n, 3, H, W), z (n, 1, H, W) in world units (not the distance along the ray that
            Implicitron's renderers report) and mask (n, 1, H, W); the same as ``images_render``, ``depths_render`` and
            ``masks_render``. In training the whole scene, with the losses against the targets' photographs over the pixels that
            a source saw, and ``objective``, their weighted sum.

        Raises:
            ValueError: a target without any source.
        """
        training = evaluation_mode == EvaluationMode.TRAINING
        n_frames = camera.R.shape[0]
        n_targets = min(self.n_train_target_views, n_frames) if training else 1
        if image_rgb is None:
            sizes = [tuple(int(side) for side in camera.image_size[i]) for i in range(n_targets)]
        else:
            sizes = [tuple(image_rgb.shape[-2:])] * n_frames
        cameras = [pinhole_camera(camera, i, height=height, width=width) for i, (height, width) in enumerate(sizes)]
        views, valid = [], []
        for i in range(n_targets):
            sources = [
                SourceImage(image_rgb[j], None if fg_probability is None else fg_probability[j], cameras[j])
                for j in range(n_targets, n_frames if image_rgb is not None else 0)
                if sequence_name is None or sequence_name[j] == sequence_name[i]
            ]
            view, seen = self._render_from(sources, cameras[i], training=training)
            views.append(view)
            valid.append(seen)
        rendered = {name: torch.stack([getattr(view, name) for view in views]) for name in ("rgb", "depth", "mask")}
        predictions: dict[str, Any] = {
            "images_render": rendered["rgb"],
            "depths_render": rendered["depth"],
            "masks_render": rendered["mask"],
            "implicitron_render": ImplicitronRender(
                image_render=rendered["rgb"], depth_render=rendered["depth"], mask_render=rendered["mask"]
            ),
        }
        if training and image_rgb is not None:
            for name, loss in LOSSES.items():
                predictions[name] = loss(rendered["rgb"], image_rgb[:n_targets], torch.stack(valid))
            predictions["objective"] = sum(weight * predictions[name] for name, weight in self.loss_weights.items())
        return predictions

    @property
    def source_settings(self) -> SourceSettings:
        """A training step has as many sources as a view is rendered from."""
        return SourceSettings(views=self.n_sources, min_views=self.n_sources, kept=max(1, len(self.source_views)))

    @property
    def n_targets(self) -> int:
        """Frames of a batch, its first ones, that ``losses`` renders."""
        return self.n_train_target_views

    def rays_per_step(self, frames_per_step: int) -> int:
        """Pixels that ``losses`` renders for a batch of so many target frames of the size of the model's own photographs."""
        return min(frames_per_step, self.n_targets) * self.source_views.rgb[0, 0].numel() if len(self.source_views) else 0

    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The losses of :meth:`forward` in training, unweighted, as :class:`ImplicitronModel` gives its own."""
        predictions = self(**batch, evaluation_mode=EvaluationMode.TRAINING)
        return {name: predictions[name] for name in LOSSES}

    @torch.no_grad()
    def render_view(self, camera: PinholeCamera, chunk_rays: int | None = None) -> RenderedView:
        """A view from the model's own photographs, at the camera's size; see :class:`RenderedView`.

        The multiplane images of the last photographs are kept: neighbouring views cost no pass of the network.

        Args:
            camera: on the model's device.
            chunk_rays: taken for the sake of the other models' interface; views are rendered plane by plane.

        Raises:
            ValueError: there is no photograph (neither ``set_sources`` nor a loaded state).
        """
        was_training = self.training
        self.eval()
        view, _ = self._render_from([], camera, training=False)
        self.train(was_training)
        return view

    def _render_from(self, sources: Sequence[SourceImage], camera: PinholeCamera, *, training: bool) -> tuple[RenderedView, Tensor]:
        """The view and which of its pixels a source saw, bool, (1, H, W)."""
        own = not sources
        available = [self.source_views.camera(i) for i in range(len(self.source_views))] if own else [s.camera for s in sources]
        if not available:
            raise ValueError("no photograph to render from: give source views behind the target, call set_sources, or load a state")
        middle = self.world_unit * 2 / (self.near_disparity + self.far_disparity)
        chosen, weights = nearest_sources(available, camera, self.n_sources, depth=middle)
        stacks = self._own_stacks(chosen) if own else [self._stack(sources[i], training=training) for i in chosen]
        settings = {"unit": self.world_unit, "mode": self.mode, "foreground": self.foreground and not training}
        rendered = [view_of_scene(stack, camera, **settings) for stack in stacks]
        return blended_views(rendered, weights)

    def _stack(self, source: SourceImage, *, training: bool = False) -> SceneMPI:
        settings = PlaneSettings(**{entry.name: getattr(self, entry.name) for entry in fields(PlaneSettings)})
        return scene_mpi(self.network, source, settings, training=training)

    @torch.no_grad()
    def _calibrate(self, frames: Sequence[Frame], points: Mapping[str, Tensor]) -> None:
        was_training = self.training
        self.eval()
        device, seen = self.world_unit.device, [frame for frame in frames if frame.name in points]
        found = [log_unit(self._stack(frame_source(f, device)), f.camera, points[f.name], mode=self.mode) for f in seen]
        self.train(was_training)
        logs = [value for value in found if value is not None]
        self.world_unit.fill_(torch.stack(logs).mean().exp() if logs else 1.0)
        sequence = frames[0].sequence_name
        if sequence not in self._told_unit_of:
            tell_unit(sequence, self.world_unit.item(), n_photographs=len(logs))
            self._told_unit_of.add(sequence)

    def _own_stacks(self, chosen: Sequence[int]) -> list[SceneMPI]:
        """Of the model's photographs; those of the last call are used again while neither weights nor photographs changed."""
        made_of = [(id(value), value._version) for value in (*self.parameters(), *self.buffers())]
        if made_of != self._stacks_of:
            self._stacks, self._stacks_of = {}, made_of
        # what is not needed any more goes before anything new comes
        self._stacks = {index: self._stacks[index] for index in chosen if index in self._stacks}
        for index in chosen:
            if index not in self._stacks:
                rgb, mask = (self.source_views.rgb[index].float() / 255, self.source_views.mask[index].float() / 255)
                self._stacks[index] = self._stack(SourceImage(rgb, mask, self.source_views.camera(index)))
        return [self._stacks[index] for index in chosen]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._stacks, self._stacks_of = {}, None  # they would stay behind on the old device
        return super()._apply(*args, **kwargs)


def default_settings() -> dict[str, Any]:
    """Every setting of :class:`MINEModel` with its default."""
    expand_args_fields(MINEModel)
    return plain(get_default_args(MINEModel))


def build_mine_model(**settings: Any) -> MINEModel:
    """A :class:`MINEModel` with Implicitron's defaults overridden.

    Raises:
        ValueError: a setting that the model does not have, or one out of its range.
    """
    known = default_settings()
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"MINEModel has no setting {', '.join(unknown)}; it has: {', '.join(sorted(known))}")
    return MINEModel(**settings)
