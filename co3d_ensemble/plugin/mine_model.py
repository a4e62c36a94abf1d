"""MINE as an Implicitron model: photographs with cameras in, colour, depth and mask at any other camera out.

Several photographs of a scene: each target camera takes the ``n_sources`` that were taken nearest to it (:func:`camera_distance`),
renders the multiplane image of each, and averages the pictures pixel by pixel with weights
``valid exp(-distance / smallest distance)``: a source says nothing of pixels that it did not see (fewer than two of its planes), and
a farther one counts less, as a multiplane image is worse the farther one moves away (Mildenhall et al., "Local Light Field
Fusion", SIGGRAPH 2019, weigh alike). With ``n_sources`` 1, the default, the nearest photograph alone is shown: nothing is averaged,
so nothing is blurred where two multiplane images disagree about depth.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from pytorch3d.implicitron.models.base_model import ImplicitronModelBase, ImplicitronRender
from pytorch3d.implicitron.models.renderer.base import EvaluationMode
from pytorch3d.implicitron.tools.config import expand_args_fields, get_default_args, registry
from pytorch3d.renderer.cameras import PerspectiveCameras
from torch import Tensor

from co3d_ensemble.fields.mpi_network import ImageFeatures, MPINetwork
from co3d_ensemble.fields.mpi_reference_weights import is_reference, load_reference
from co3d_ensemble.functional.cameras import opencv_from_pinhole, relative_pose
from co3d_ensemble.functional.mpi import blend_source, mean_plane_weights, render_source_view, render_target_view
from co3d_ensemble.functional.mpi_losses import disparity_scale, l1_loss, ssim_loss, values_at_points
from co3d_ensemble.functional.mpi_sampling import fine_disparities, fixed_disparities, stratified_disparities
from co3d_ensemble.functional.types import SURFACE_ALPHA, Frame, PinholeCamera, RenderedView
from co3d_ensemble.plugin.frames import area_average, pinhole_camera
from co3d_ensemble.plugin.mine_views import SceneMPI, SourceImage, blended_views, camera_distance
from co3d_ensemble.plugin.source_views import SourceSettings, SourceViews

logger = logging.getLogger(__name__)

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
    precision: str = "float32"
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
            load_network(self.network, self.checkpoint)
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
        distances = torch.stack([camera_distance(source, camera, middle) for source in available])
        chosen = distances.argsort(stable=True)[: self.n_sources]
        weights = torch.exp(-distances[chosen] / distances[chosen[0]].clamp_min(torch.finfo(distances.dtype).tiny))
        stacks = self._own_stacks(chosen.tolist()) if own else [self._stack(sources[i], training=training) for i in chosen.tolist()]
        rendered = [self._view(stack, camera, foreground=self.foreground and not training) for stack in stacks]
        return blended_views(rendered, weights / weights.sum())

    def _stack(self, source: SourceImage, *, training: bool) -> SceneMPI:
        """One pass of encoder and decoder."""
        height, width = source.camera.height, source.camera.width
        scale = 1.0 if self.longest_side is None else min(1.0, self.longest_side / max(height, width))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        camera = source.camera.resized(*size)
        rgb_mask = [part if part is None or size == (height, width) else area_average(part, *size) for part in (source.rgb, source.mask)]
        image, mask = (None if part is None else part[None] for part in rgb_mask)
        K, _, _ = opencv_from_pinhole(camera)
        features = self.network.encode(image)
        disparity = self._disparities(features, K, training=training)
        ((rgb, sigma),) = self.network.decode(features, disparity, plane_chunk=self.plane_chunk, n_scales=1)
        depth = disparity.reciprocal()
        if self.blend_source:
            seen = render_source_view(rgb, sigma, depth, K[None], mode=self.mode)
            rgb = blend_source(rgb, seen.transmittance, image)
        return SceneMPI(rgb, sigma, depth, mask, camera)

    @torch.no_grad()
    def _calibrate(self, frames: Sequence[Frame], points: Mapping[str, Tensor]) -> None:
        was_training = self.training
        self.eval()
        found = [self._log_unit(frame, points[frame.name]) for frame in frames if frame.name in points]
        self.train(was_training)
        logs = [value for value in found if value is not None]
        self.world_unit.fill_(torch.stack(logs).mean().exp() if logs else 1.0)
        sequence = frames[0].sequence_name
        if sequence not in self._told_unit_of and logs:
            told = "sequence %s: %.4g world units per unit of the network, by the points of %d photographs"
            logger.info(told, sequence, self.world_unit.item(), len(logs))
        elif sequence not in self._told_unit_of:
            told = "sequence %s: no depth and no point cloud to fit the unit of length to: world units are taken for the network's"
            logger.warning(told + " (scene_scale=1; another number may suit it better)", sequence)
        self._told_unit_of.add(sequence)

    def _log_unit(self, frame: Frame, points: Tensor) -> Tensor | None:
        """Logarithm of the world units per unit of the network; None where the network sees nothing at the points."""
        device = self.world_unit.device
        stack = self._stack(SourceImage(frame.rgb.to(device).float() / 255, None, frame.camera.to(device)), training=False)
        K, _, _ = opencv_from_pinhole(stack.camera)
        seen = render_source_view(stack.rgb, stack.sigma, stack.depth, K[None], mode=self.mode)
        shrunk = points.new_tensor([stack.camera.width / frame.camera.width, stack.camera.height / frame.camera.height, 1.0])
        points = (points * shrunk).to(device)[None]
        disparity, there = values_at_points(seen.disparity, points)
        counted = points * (there & (disparity > 0))[..., None]
        return disparity_scale(seen.disparity, counted)[0].log() if counted.any() else None

    def _disparities(self, features: ImageFeatures, K: Tensor, *, training: bool) -> Tensor:
        """1 / z of the planes, with the fine ones where there are any, descending, shape (1, N)."""
        draw = stratified_disparities if training else fixed_disparities
        disparity = draw(self.n_planes, self.near_disparity, self.far_disparity, batch=1, device=K.device)
        if not self.n_fine_planes:
            return disparity
        with torch.no_grad():
            ((rgb, sigma),) = self.network.decode(features, disparity, plane_chunk=self.plane_chunk, n_scales=1)
            seen = render_source_view(rgb, sigma, disparity.reciprocal(), K[None], mode=self.mode)
            return fine_disparities(disparity, mean_plane_weights(seen), self.n_fine_planes, perturb=training)

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
                self._stacks[index] = self._stack(SourceImage(rgb, mask, self.source_views.camera(index)), training=False)
        return [self._stacks[index] for index in chosen]

    def _view(self, stack: SceneMPI, camera: PinholeCamera, *, foreground: bool) -> tuple[RenderedView, Tensor]:
        K_source, R_source, t_source = opencv_from_pinhole(stack.camera)
        K_target, R_target, t_target = opencv_from_pinhole(camera)
        R, t = relative_pose(R_source, t_source, R_target, t_target)
        geometry = {
            "K_source": K_source[None],
            "K_target": K_target[None],
            "R": R[None],
            "t": t[None] / self.world_unit,
            "height": camera.height,
            "width": camera.width,
            "mode": self.mode,
        }
        rgb = stack.rgb
        masked = foreground and stack.mask is not None
        if masked:
            rgb = rgb * stack.mask[:, None]
        view = render_target_view(rgb, stack.sigma, stack.depth, **geometry)
        mask = view.alpha
        if masked:
            on_planes = stack.mask[:, None].expand(-1, rgb.shape[1], 3, -1, -1)
            mask = render_target_view(on_planes, stack.sigma, stack.depth, **geometry).rgb[:, :1]
        mask = mask.clamp(0, 1)
        depth = torch.where(mask > SURFACE_ALPHA, view.depth * self.world_unit, 0)
        return RenderedView(rgb=view.rgb.clamp(0, 1)[0], depth=depth[0], mask=mask[0]), view.valid[0]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._stacks, self._stacks_of = {}, None  # they would stay behind on the old device
        return super()._apply(*args, **kwargs)


def build_mine_model(**settings: Any) -> MINEModel:
    """A :class:`MINEModel` with Implicitron's defaults overridden.

    Raises:
        ValueError: a setting that the model does not have, or one out of its range.
    """
    expand_args_fields(MINEModel)
    known = get_default_args(MINEModel)
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"MINEModel has no setting {', '.join(unknown)}; it has: {', '.join(sorted(known))}")
    return MINEModel(**settings)


def load_network(network: MPINetwork, path: Path | str) -> None:
    """Fills ``network`` from a checkpoint of MINE's training: its averaged weights, ``{"model": state dict, ...}``; or from its authors'.

    Raises:
        ValueError: naming the file: there is none, it is no such checkpoint, or it is another network's.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"checkpoint={path}: cannot be read: {error}") from error
    if is_reference(saved):
        return load_reference(network, path)
    state = saved.get("model") if isinstance(saved, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint={path}: is not a best.pt of MINE: it has no state dict under 'model'")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"checkpoint={path}: is another network's than these settings': {str(error)[:300]}") from error
