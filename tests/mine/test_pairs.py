"""What becomes of a pair on its way to the device."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from co3d_ensemble.mine.pairs import Pair, collate


def pair(**more) -> Pair:
    return Pair("name", torch.rand(3, 2, 4), torch.rand(3, 2, 4), torch.eye(3), torch.eye(3), torch.eye(3), torch.rand(3), **more)


def test_a_data_loader_pins_every_tensor_of_a_batch(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    batch = collate([pair(source_points=torch.rand(5, 3))])
    result = pin_memory(batch)
    assert len(pinned) == 7 and result.name == batch.name and result.source_depth is None
    assert result.source is not batch.source and torch.equal(result.source_points, batch.source_points)


def test_copies_to_a_device_do_not_wait_and_copies_from_it_do(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking=False: asked.append((str(device), non_blocking)) or self)
    pair().to("cuda:1")
    pair().to(torch.device("cpu"))
    assert set(asked) == {("cuda:1", True), ("cpu", False)}


def test_a_batch_takes_one_size_and_keeps_what_all_have():
    batch = collate([pair(source_depth=torch.ones(1, 2, 4)), pair()])
    assert batch.source.shape == (2, 3, 2, 4) and batch.source_depth is None and batch.name == ["name", "name"]
    other = Pair("wide", torch.rand(3, 2, 5), torch.rand(3, 2, 5), torch.eye(3), torch.eye(3), torch.eye(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"name has pictures of \(3, 2, 4\) and wide of \(3, 2, 5\)"):
        collate([pair(), other])
