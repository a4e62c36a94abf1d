"""A step of training on torch's meta device: tensors that were made on the CPU in between are refused there, and so is asking for a
value, which on a GPU would wait for it."""

import contextlib

import pytest
import torch

from co3d_ensemble.fields.mpi_network import MPINetwork
from co3d_ensemble.functional.mpi import mean_plane_weights, render_source_view
from co3d_ensemble.functional.mpi_sampling import fine_disparities, stratified_disparities
from co3d_ensemble.mine.config import LOSSES
from co3d_ensemble.mine.objective import Objective
from co3d_ensemble.mine.pairs import Pair

BATCH, HEIGHT, WIDTH = 2, 48, 96


@pytest.mark.parametrize(
    ("plane_chunk", "settings"), [(None, {}), (2, {"density_unit": "disparity"}), (None, {"mode": "alpha", "encoding": "slides"})]
)
@pytest.mark.parametrize("calibrate", [True, False])
def test_a_step_stays_on_its_device_and_waits_for_no_value(monkeypatch, plane_chunk, settings, calibrate):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # meta has none
    shapes = ((3, HEIGHT, WIDTH), (3, HEIGHT, WIDTH), (3, 3), (3, 3), (3, 3), (3,), (8, 3), (8, 3))
    pair = Pair(["a", "b"], *(torch.rand(BATCH, *shape, device="meta") for shape in shapes))
    network = MPINetwork("resnet18", poolings=1, **settings).to("meta")
    features = network.encode(pair.source)
    disparity = stratified_disparities(3, 1.0, 0.01, batch=BATCH, device="meta")
    with torch.no_grad():
        ((rgb, sigma),) = network.decode(features, disparity, n_scales=1, plane_chunk=plane_chunk)
        seen = render_source_view(rgb, sigma, disparity.reciprocal(), pair.K_source, mode=network.mode)
        disparity = fine_disparities(disparity, mean_plane_weights(seen), 2)
    planes = network.decode(features, disparity, plane_chunk=plane_chunk)
    losses = Objective(frozenset(LOSSES), mode=network.mode, calibrate=calibrate).losses(planes, disparity, pair)
    sum(losses.values()).backward()
    assert set(losses) == set(LOSSES) and all(loss.is_meta for loss in losses.values())
    assert all(parameter.grad is not None for name, parameter in network.named_parameters() if name.startswith(("encoder", "heads")))
    with pytest.raises(RuntimeError, match="meta"):
        losses["loss_rgb_target"].item()
