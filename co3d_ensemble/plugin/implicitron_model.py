"""One of Implicitron's own models behind the two calls that training and rendering make: losses and a rendered view.

The model is built from a config in Implicitron's format and keeps Implicitron's settings as its authors published them
(``EmissionAbsorptionRaymarcher.background_opacity``, masking of the pictures, raw world coordinates): it is what ours is
compared with.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch3d.implicitron.models.base_model import ImplicitronModelBase
from pytorch3d.implicitron.models.generic_model import GenericModel
from pytorch3d.implicitron.models.implicit_function.base import ImplicitFunctionBase
from pytorch3d.implicitron.models.overfit_model import OverfitModel
from pytorch3d.implicitron.models.renderer.base import EvaluationMode
from pytorch3d.implicitron.models.renderer.lstm_renderer import LSTMRenderer
from pytorch3d.implicitron.models.renderer.sdf_renderer import SignedDistanceFunctionRenderer
from pytorch3d.implicitron.tools.config import expand_args_fields, get_default_args, registry
from torch import Tensor, nn

from co3d_ensemble.fields.radiance_mlp import PRECISIONS
from co3d_ensemble.functional.cameras import distance_to_depth, pixel_centers, pixel_rays
from co3d_ensemble.functional.types import SURFACE_ALPHA, PinholeCamera, RenderedView
from co3d_ensemble.plugin.frames import pytorch3d_cameras

_SPHERE_SAMPLER = "raysampler_AdaptiveRaySampler_args"
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

    Attributes:
        implicitron: Implicitron's model.
        loss_weights: the non-zero entries of the model's own ``loss_weights``.
    """

    def __init__(
        self,
        model_class_type: str,
        args: Mapping[str, Any],
        *,
        render_size: tuple[int, int],
        scene_sphere: tuple[Sequence[float], float] | None = None,
        precision: str = "float32",
    ) -> None:
        """
        Args:
            model_class_type: registered name, e.g. "OverfitModel" or "GenericModel".
            args: ``model_<class>_args`` of Implicitron's trainer; what is left out has Implicitron's default. A node of
                a config may hold interpolations (the experiments' ``${training.n_rays}``); they are resolved here.
            render_size: (height, width) of the training photographs.
            scene_sphere: (centre, radius) of the scene in world units. It gives the near and far distances of
                ``AdaptiveRaySampler`` unless ``args`` set ``scene_center`` or ``scene_extent`` themselves.
            precision: autocast dtype of the implicit functions; what they return is float32 again.

        Raises:
            ValueError: unknown model class, component or setting, naming it.
        """
        super().__init__()
        config = _merged_args(model_class_type, args)
        config.render_image_height, config.render_image_width = render_size
        config.tqdm_trigger_threshold = sys.maxsize  # a bar per picture says nothing
        sampler = config[_SPHERE_SAMPLER]
        if scene_sphere is None or {"scene_center", "scene_extent"} & set(args.get(_SPHERE_SAMPLER) or {}):
            scene_sphere = (sampler.scene_center, sampler.scene_extent)
        # centre and radius; in the state dict, because a model at other distances is another model
        self.register_buffer("scene_sphere", torch.tensor([*scene_sphere[0], scene_sphere[1]], dtype=torch.float32))
        self.register_load_state_dict_post_hook(_restore_scene_sphere)
        _set_sphere(sampler, self.scene_sphere)
        self.implicitron = _create(model_class_type, config)
        _autocast_functions(self.implicitron, precision)
        self.loss_weights = {name: float(weight) for name, weight in config.loss_weights.items() if weight != 0}
        sampler = config[f"raysampler_{config.raysampler_class_type}_args"]
        if sampler.n_rays_per_image_sampled_from_mask is None:
            # with n_rays_total_training instead, ViewMetrics ends in an IndexError; with neither, whole pictures are rays
            raise ValueError("n_rays_per_image_sampled_from_mask=None: must be set, n_rays_total_training is not supported")
        self._rays_per_target = sampler.n_rays_per_image_sampled_from_mask
        self._points_per_ray = max(1, sampler.n_pts_per_ray_evaluation)

    def rays_per_step(self, frames_per_step: int) -> int:
        """Rays that ``losses`` renders for a batch of so many frames: ``GenericModel`` renders its first ones only."""
        targets = frames_per_step
        if isinstance(self.implicitron, GenericModel) and self.implicitron.n_train_target_views > 0:
            targets = min(targets, self.implicitron.n_train_target_views)
        return targets * self._rays_per_target

    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Every ``loss_*`` entry of the model's predictions in training mode, unweighted.

        Args:
            batch: the model's keyword arguments: ``image_rgb`` (B, 3, H, W) and ``fg_probability`` (B, 1, H, W) in
                [0, 1], ``mask_crop``, ``camera``, ``sequence_name``, ... The model masks the pictures itself.

        Raises:
            ValueError: a name in ``loss_weights`` that this model does not compute.
        """
        self._set_render_size(*batch["image_rgb"].shape[-2:])
        with _expected_warnings():
            predictions = self.implicitron(**batch, evaluation_mode=EvaluationMode.TRAINING)
        losses = {name: value for name, value in predictions.items() if name.startswith("loss_")}
        unknown = sorted(set(self.loss_weights) - set(losses))
        if unknown:
            raise ValueError(f"loss_weights: {', '.join(unknown)}: this model computes {', '.join(sorted(losses))}")
        return losses

    @torch.no_grad()
    def render_view(self, camera: PinholeCamera, chunk_rays: int) -> RenderedView:
        """The model at ``camera`` (on the model's device), ``chunk_rays`` rays at a time."""
        self._set_render_size(camera.height, camera.width)
        self.implicitron.chunk_size_grid = chunk_rays * self._points_per_ray  # counted in points, divisible by a ray's
        training = self.training
        self.eval()
        with _expected_warnings():
            predictions = self.implicitron(
                image_rgb=None, camera=pytorch3d_cameras([camera]), evaluation_mode=EvaluationMode.EVALUATION
            )
        self.train(training)
        render = predictions["implicitron_render"]
        mask = render.mask_render[0].clamp(0, 1)
        depth = self._z_depth(render.depth_render[0], render.mask_render[0], camera)
        return RenderedView(rgb=render.image_render[0].clamp(0, 1), depth=depth, mask=mask)

    def _z_depth(self, distance: Tensor, alpha: Tensor, camera: PinholeCamera) -> Tensor:
        """Implicitron's distance along unit rays, ``sum w t``, to z: (1, H, W) each."""
        surface = alpha > SURFACE_ALPHA
        if not isinstance(self.implicitron.renderer, _SURFACE_RENDERERS):
            distance = distance / torch.where(surface, alpha, torch.ones_like(alpha))
        _, directions = pixel_rays(camera, pixel_centers(camera.height, camera.width, distance.device))
        depth = distance_to_depth(distance.flatten(), directions, camera.R).reshape(distance.shape)
        return torch.where(surface, depth, torch.zeros_like(depth))

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
    """After a state dict is loaded: near and far follow its ``scene_sphere``."""
    _set_sphere(getattr(adapter.implicitron, _SPHERE_SAMPLER), adapter.scene_sphere)
    adapter.implicitron.create_raysampler()


def _merged_args(model_class_type: str, args: Mapping[str, Any]) -> DictConfig:
    """Implicitron's defaults with ``args`` over them."""
    model_class = _component(model_class_type)
    defaults = get_default_args(model_class)
    given = OmegaConf.create(_plain(args))
    try:
        config = OmegaConf.merge(defaults, given)
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        where = f" (at {error.full_key})" if error.full_key else ""
        raise ValueError(f"model_{model_class_type}_args: {str(error).splitlines()[0]}{where}") from error
    _check_components(given, config)
    return config


def _check_components(given: DictConfig, config: DictConfig) -> None:
    """Raises ValueError where a given ``<member>_class_type`` names a component that is not registered for the member."""
    for key, value in given.items():
        if isinstance(value, DictConfig):
            _check_components(value, config[key])
        elif str(key).endswith("_class_type") and value is not None:
            start, end = key.removesuffix("class_type"), "_args"
            known = [other[len(start) : -len(end)] for other in config if other.startswith(start) and other.endswith(end)]
            if value not in known:
                raise ValueError(f"{key}={value!r}: expected one of {', '.join(sorted(known))}")


def _plain(args: Mapping[str, Any]) -> dict[str, Any]:
    return OmegaConf.to_container(args, resolve=True) if isinstance(args, DictConfig) else dict(args)


def _component(model_class_type: str) -> type[ImplicitronModelBase]:
    known = sorted(model_class.__name__ for model_class in registry.get_all(ImplicitronModelBase))
    if model_class_type not in known:
        raise ValueError(f"model_class_type={model_class_type!r}: expected one of {', '.join(known)}")
    return registry.get(ImplicitronModelBase, model_class_type)


def _create(model_class_type: str, config: DictConfig) -> ImplicitronModelBase:
    model_class = _component(model_class_type)
    if model_class is OverfitModel:
        model_class = _CoarseFirstOverfitModel
    expand_args_fields(model_class)
    return model_class(**config)


def _autocast_functions(model: nn.Module, precision: str) -> None:
    """Lets every implicit function of ``model`` run under autocast, and nothing else: marching and losses stay float32."""
    dtype = PRECISIONS[precision]
    if dtype is torch.float32:
        return
    for function in model.modules():
        if isinstance(function, ImplicitFunctionBase):
            function.forward = _under_autocast(function.forward, dtype)


def _under_autocast(forward: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        bundle = kwargs.get("ray_bundle", args[0] if args else None)
        device = "cpu" if bundle is None else bundle.origins.device.type
        with torch.autocast(device, dtype=dtype):
            answer = forward(*args, **kwargs)
        return tuple(part.float() if isinstance(part, Tensor) else part for part in answer)

    return wrapped


@contextmanager
def _expected_warnings() -> Iterator[None]:
    """Implicitron warns at every call that it does what its settings say, and that rendering has no objective."""
    with warnings.catch_warnings():
        for message in ("Thresholding masks!", "Masking images!", "Masking depths!", "No main objective found"):
            warnings.filterwarnings("ignore", message=message)
        yield
