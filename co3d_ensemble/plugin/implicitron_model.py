"""One of Implicitron's own models behind the two calls that training and rendering make: losses and a rendered view.

The model is built from a config in Implicitron's format and keeps Implicitron's settings as its authors published them
(``EmissionAbsorptionRaymarcher.background_opacity``, masking of the pictures, raw world coordinates): it is what ours is
compared with. What the models beyond NeRF need besides is provided here: photographs to pool features from
(:mod:`~co3d_ensemble.plugin.source_views`), weights of the image encoder, and the scene's scale where a setting is one.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from pytorch3d.implicitron.models.base_model import ImplicitronModelBase
from pytorch3d.implicitron.models.generic_model import GenericModel
from pytorch3d.implicitron.models.overfit_model import OverfitModel
from pytorch3d.implicitron.models.renderer.base import EvaluationMode, RendererOutput
from pytorch3d.implicitron.models.renderer.lstm_renderer import LSTMRenderer
from pytorch3d.implicitron.models.renderer.sdf_renderer import SignedDistanceFunctionRenderer
from pytorch3d.implicitron.tools.config import expand_args_fields
from pytorch3d.renderer.cameras import PerspectiveCameras
from torch import Tensor, nn

from co3d_ensemble.functional.cameras import camera_center, distance_to_depth, pixel_centers, pixel_rays
from co3d_ensemble.functional.types import SURFACE_ALPHA, Frame, PinholeCamera, RenderedView
from co3d_ensemble.plugin.frames import pytorch3d_cameras
from co3d_ensemble.plugin.function_precision import set_function_precision
from co3d_ensemble.plugin.image_encoder import RESNET_ARGS, load_encoder_weights, refuse_download
from co3d_ensemble.plugin.implicitron_args import merged_args, model_class_named, plain
from co3d_ensemble.plugin.source_views import SourceSettings, SourceViews

_SPHERE_SAMPLER = "raysampler_AdaptiveRaySampler_args"
_LSTM_ARGS = "renderer_LSTMRenderer_args"
# these two report the distance of a surface; every other renderer reports sum w t
_SURFACE_RENDERERS = (LSTMRenderer, SignedDistanceFunctionRenderer)


class _CoarseFirstOverfitModel(OverfitModel):
    """``OverfitModel`` whose coarse function is the coarse pass on every version.

    0.7.4 renders ``[implicit_function, coarse_implicit_function]``: the fine function guides the coarse one. The order
    is only wrong where the two differ, but then the published settings of the two networks are swapped.
    """

    def _render(self, *, implicit_functions: Sequence[Any], **kwargs: Any) -> Any:
        first = getattr(implicit_functions[0], "func", implicit_functions[0])  # a partial where there is a global code
        if len(implicit_functions) == 2 and first is self.implicit_function:
            implicit_functions = implicit_functions[::-1]
        return super()._render(implicit_functions=implicit_functions, **kwargs)


class ImplicitronModel(nn.Module):
    """Adapter of an ``ImplicitronModelBase``.

    A signed distance field (``SignedDistanceFunctionRenderer``) is traced inside a sphere around the origin. Its world is the
    scene's sphere scaled to the unit sphere, IDR's own convention, so that its thresholds and its initial surface fit any
    scene; only settings with a ``scene_extent`` or ``scene_center`` of their own leave the scale as it is.

    Attributes:
        implicitron: Implicitron's model.
        loss_weights: the non-zero entries of the model's own ``loss_weights``.
        source_settings: how many photographs it pools features from, or None for a model without view pooling.
        source_views: those photographs, or None.
    """

    def __init__(
        self,
        model_class_type: str,
        args: Mapping[str, Any],
        *,
        render_size: tuple[int, int],
        scene_sphere: tuple[Sequence[float], float] | None = None,
        training_frames: Sequence[Frame] = (),
        source_settings: SourceSettings | None = None,
        encoder_weights: Path | str | None = None,
        precision: str = "auto",
    ) -> None:
        """
        Args:
            model_class_type: registered name, e.g. "OverfitModel" or "GenericModel".
            args: ``model_<class>_args`` of Implicitron's trainer; what is left out has Implicitron's default. A node of
                a config may hold interpolations (the experiments' ``${training.n_rays}``); they are resolved here.
            render_size: (height, width) of the training photographs.
            scene_sphere: (centre, radius) of the scene in world units. It gives the near and far distances of
                ``AdaptiveRaySampler`` unless ``args`` set ``scene_center`` or ``scene_extent`` themselves.
            training_frames: where a view-pooling model takes its source views from. Their distance to the scene, plus its
                radius, is the ``init_depth`` of ``LSTMRenderer`` unless ``args`` set it. May be empty where a state dict
                will be loaded.
            source_settings: of a view-pooling model.
            encoder_weights: file with torchvision's weights of the image encoder; None: random.
            precision: ``auto``, ``float32`` or ``bfloat16``: autocast of the implicit functions; what they return is float32 again.

        Raises:
            ValueError: unknown model class, component or setting, naming it; weights that would be downloaded, or a file that
                does not hold those of the encoder; training frames of different sizes to pool features from.
        """
        super().__init__()
        config = merged_args(model_class_type, args)
        given = plain(args)
        refuse_download(given)
        config.render_image_height, config.render_image_width = render_size
        config.tqdm_trigger_threshold = sys.maxsize  # a bar per picture says nothing
        if RESNET_ARGS in config:
            config[RESNET_ARGS].pretrained = False  # torchvision's default setting would download
        sampler = config[_SPHERE_SAMPLER]
        own_sphere = bool({"scene_center", "scene_extent"} & set(given.get(_SPHERE_SAMPLER) or {}))
        if scene_sphere is None or own_sphere:
            scene_sphere = (sampler.scene_center, sampler.scene_extent)
        # centre and radius; in the state dict, because a model at other distances is another model
        self.register_buffer("scene_sphere", torch.tensor([*scene_sphere[0], scene_sphere[1]], dtype=torch.float32))
        self.register_load_state_dict_post_hook(_restore_scene_sphere)
        self._traces_distances = config.get("renderer_class_type") == SignedDistanceFunctionRenderer.__name__
        self._own_sphere = own_sphere
        _set_sphere(sampler, self._sampler_sphere())
        if training_frames and "init_depth" not in (given.get(_LSTM_ARGS) or {}) and _LSTM_ARGS in config:
            config[_LSTM_ARGS].init_depth = _far_end(training_frames, self.scene_sphere)
        self.implicitron = _create(model_class_type, config)
        if self._traces_distances:
            self.implicitron.renderer.register_forward_hook(_mask_of_missing_rays, with_kwargs=True)
        set_function_precision(self.implicitron, precision)
        if encoder_weights is not None:
            load_encoder_weights(getattr(self.implicitron, "image_feature_extractor", None), encoder_weights)
        pools = getattr(self.implicitron, "view_pooler_enabled", False)
        self.source_settings = (source_settings or SourceSettings()) if pools else None
        self.source_views = SourceViews(training_frames, kept=self.source_settings.kept) if self.source_settings else None
        self.loss_weights = {name: float(weight) for name, weight in config.loss_weights.items() if weight != 0}
        sampler = config[f"raysampler_{config.raysampler_class_type}_args"]
        if sampler.n_rays_per_image_sampled_from_mask is None:
            # with n_rays_total_training instead, ViewMetrics ends in an IndexError; with neither, whole pictures are rays
            raise ValueError("n_rays_per_image_sampled_from_mask=None: must be set, n_rays_total_training is not supported")
        self._rays_per_target = sampler.n_rays_per_image_sampled_from_mask
        self._points_per_ray = max(1, sampler.n_pts_per_ray_evaluation)

    @property
    def n_targets(self) -> int | None:
        """Frames of a batch, its first ones, that ``losses`` renders; None: all of them."""
        if isinstance(self.implicitron, GenericModel) and self.implicitron.n_train_target_views > 0:
            return self.implicitron.n_train_target_views
        return None

    def rays_per_step(self, frames_per_step: int) -> int:
        """Rays that ``losses`` renders for a batch of so many target frames: ``GenericModel`` renders its first ones only."""
        return min(frames_per_step, self.n_targets or frames_per_step) * self._rays_per_target

    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Every ``loss_*`` entry of the model's predictions in training mode, unweighted.

        Args:
            batch: the model's keyword arguments: ``image_rgb`` (B, 3, H, W) and ``fg_probability`` (B, 1, H, W) in
                [0, 1], ``mask_crop``, ``camera``, ``sequence_name``, ... The model masks the pictures itself. One that pools
                features takes its targets first and their source views after them.

        Raises:
            ValueError: a name in ``loss_weights`` that this model does not compute.
        """
        self._set_render_size(*batch["image_rgb"].shape[-2:])
        with _expected_warnings():
            predictions = self.implicitron(
                **{**batch, "camera": self._in_models_world(batch["camera"])}, evaluation_mode=EvaluationMode.TRAINING
            )
        losses = {name: value for name, value in predictions.items() if name.startswith("loss_")}
        unknown = sorted(set(self.loss_weights) - set(losses))
        if unknown:
            raise ValueError(f"loss_weights: {', '.join(unknown)}: this model computes {', '.join(sorted(losses))}")
        return losses

    @torch.no_grad()
    def render_view(self, camera: PinholeCamera, chunk_rays: int) -> RenderedView:
        """The model at ``camera`` (on the model's device), ``chunk_rays`` rays at a time.

        A view-pooling model looks at those of its photographs that were taken from the nearest directions.

        Raises:
            ValueError: the model pools features and has no photographs (neither training frames nor a loaded state).
        """
        self._set_render_size(camera.height, camera.width)
        self.implicitron.chunk_size_grid = chunk_rays * self._points_per_ray  # counted in points, divisible by a ray's
        inputs = self._rendering_inputs(camera)
        training = self.training
        self.eval()
        with _expected_warnings(), _without_depth_noise(self.implicitron.renderer, camera.R.device):
            predictions = self.implicitron(**inputs, evaluation_mode=EvaluationMode.EVALUATION)
        self.train(training)
        render = predictions["implicitron_render"]
        mask = render.mask_render[0].clamp(0, 1)
        depth = self._z_depth(render.depth_render[0], render.mask_render[0], camera)
        return RenderedView(rgb=render.image_render[0].clamp(0, 1), depth=depth, mask=mask)

    def _rendering_inputs(self, camera: PinholeCamera) -> dict[str, Any]:
        """The model's keyword arguments for one view: its camera, and the source views behind it where features are pooled."""
        inputs: dict[str, Any] = {"image_rgb": None}
        cameras = [camera]
        if self._traces_distances:
            # Implicitron evaluates with the true mask of the target; "anything may be the object" needs no photograph of it
            inputs["fg_probability"] = torch.ones(1, 1, camera.height, camera.width, device=camera.R.device)
        if self.source_views is not None:
            if len(self.source_views) == 0:
                raise ValueError("this model pools features from photographs: build it with training_frames, or load its state")
            chosen = self.source_views.nearest(camera, self.source_settings.views, around=self.scene_sphere[:3])
            cameras += [self.source_views.camera(index) for index in chosen.tolist()]
            rgb, mask = (pictures[chosen].float() / 255 for pictures in (self.source_views.rgb, self.source_views.mask))
            # the view's own picture is not known; the poolers leave the first picture out
            inputs["image_rgb"] = torch.cat((torch.zeros_like(rgb[:1]), rgb))
            inputs["fg_probability"] = torch.cat((torch.zeros_like(mask[:1]), mask))
            inputs["sequence_name"] = ["scene"] * len(cameras)
        inputs["camera"] = self._in_models_world(pytorch3d_cameras(cameras))
        return inputs

    def _z_depth(self, distance: Tensor, alpha: Tensor, camera: PinholeCamera) -> Tensor:
        """Implicitron's distance along unit rays, ``sum w t``, to z: (1, H, W) each."""
        surface = alpha > SURFACE_ALPHA
        if not isinstance(self.implicitron.renderer, _SURFACE_RENDERERS):
            distance = distance / torch.where(surface, alpha, torch.ones_like(alpha))
        _, scale = self._models_world()
        _, directions = pixel_rays(camera, pixel_centers(camera.height, camera.width, distance.device))
        depth = scale * distance_to_depth(distance.flatten(), directions, camera.R).reshape(distance.shape)
        return torch.where(surface, depth.clamp_min(0), torch.zeros_like(depth))  # SRN may march to behind the camera

    def _models_world(self) -> tuple[Tensor, Tensor | float]:
        """(origin, length unit) of the model's coordinates in world units: the scene's sphere for a signed distance field."""
        if not self._traces_distances:
            return torch.zeros_like(self.scene_sphere[:3]), 1.0
        return self.scene_sphere[:3], 1.0 if self._own_sphere else self.scene_sphere[3]

    def _in_models_world(self, cameras: PerspectiveCameras) -> PerspectiveCameras:
        if not self._traces_distances:
            return cameras
        origin, scale = self._models_world()
        moved = cameras.clone()
        moved.T = (cameras.T + (origin[None, None] @ cameras.R)[:, 0]) / scale
        return moved

    def _sampler_sphere(self) -> Tensor:
        """Centre and radius of the scene's sphere in the model's world."""
        origin, scale = self._models_world()
        return torch.cat((self.scene_sphere[:3] - origin, self.scene_sphere[3:])) / scale

    def _set_render_size(self, height: int, width: int) -> None:
        """Makes the model's pixel grid that of a picture of this size; Implicitron fixes it when it is built."""
        model = self.implicitron
        if (model.render_image_height, model.render_image_width) == (height, width):
            return
        model.render_image_height, model.render_image_width = height, width
        model.create_raysampler()  # holds no weights and no entry of the state dict
        model.raysampler.to(next(model.parameters()).device)


def _set_sphere(sampler: DictConfig, sphere: Tensor) -> None:
    values = sphere.tolist()
    sampler.scene_center, sampler.scene_extent = values[:3], values[3]


def _restore_scene_sphere(adapter: ImplicitronModel, incompatible_keys: Any) -> None:
    """After a state dict is loaded: near and far follow its ``scene_sphere``; a traced sphere is the unit sphere of any."""
    _set_sphere(getattr(adapter.implicitron, _SPHERE_SAMPLER), adapter._sampler_sphere())
    adapter.implicitron.create_raysampler()


def _far_end(frames: Sequence[Frame], sphere: Tensor) -> float:
    """Mean distance of the cameras from the far end of the scene, world units."""
    centers = torch.stack([camera_center(frame.camera.R, frame.camera.T).cpu() for frame in frames])
    return float((centers - sphere[:3]).norm(dim=1).mean() + sphere[3])


def _create(model_class_type: str, config: DictConfig) -> ImplicitronModelBase:
    model_class = model_class_named(model_class_type)
    if model_class is OverfitModel:
        model_class = _CoarseFirstOverfitModel
    expand_args_fields(model_class)
    with warnings.catch_warnings():
        # how it calls torchvision and torch is Implicitron's business
        warnings.filterwarnings("ignore", message="The parameter 'pretrained' is deprecated", category=UserWarning)
        warnings.filterwarnings("ignore", message="Arguments other than a weight enum", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*torch.nn.utils.weight_norm.* is deprecated", category=FutureWarning)
        try:
            return model_class(**config)
        except AssertionError as error:  # what components say of sizes that do not fit together
            raise ValueError(f"model_{model_class_type}_args: {error}") from error


def _mask_of_missing_rays(renderer: nn.Module, args: Any, kwargs: Mapping[str, Any], rendered: RendererOutput) -> None:
    """The evaluated mask of rays without a surface, where ``SignedDistanceFunctionRenderer`` has none of its own.

    It calls rays opaque where none of a chunk meets the surface: the mask must not depend on what else is in the chunk. And it
    takes the distance at the camera for a ray that misses the traced sphere, where nothing was trained: that ray sees nothing.
    Training stays Implicitron's.
    """
    if kwargs["evaluation_mode"] is not EvaluationMode.EVALUATION:
        return
    bundle = args[0] if args else kwargs["ray_bundle"]
    if not rendered.normals.any():
        points = bundle.origins + rendered.depths * bundle.directions
        distance = kwargs["implicit_functions"][0](rays_points_world=points.reshape(-1, 3))[:, :1]
        rendered.masks = torch.sigmoid(-renderer.soft_mask_alpha * distance).reshape(rendered.masks.shape)
    closest = torch.linalg.cross(bundle.origins, bundle.directions).norm(dim=-1, keepdim=True)  # to the sphere's centre
    rendered.masks = torch.where(closest > renderer.object_bounding_sphere, 0.0, rendered.masks)


@contextmanager
def _without_depth_noise(renderer: nn.Module, device: torch.device) -> Iterator[None]:
    """``LSTMRenderer`` jitters the depths that it starts from when it evaluates, too: no two renders would be the same."""
    if not isinstance(renderer, LSTMRenderer):
        yield
        return
    std, renderer.init_depth_noise_std = renderer.init_depth_noise_std, 0.0
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        renderer.init_depth_noise_std = std


@contextmanager
def _expected_warnings() -> Iterator[None]:
    """Implicitron warns at every call that it does what its settings say, and that rendering has no objective."""
    with warnings.catch_warnings():
        for message in ("Thresholding masks!", "Masking images!", "Masking depths!", "No main objective found"):
            warnings.filterwarnings("ignore", message=message)
        yield
