"""Views on disk, damaged files, devices, and that views come one at a time."""

import numpy as np
import pytest
import torch

from co3d_ensemble.functional.types import RenderedView
from co3d_ensemble.rendering import read_view, resolve_device, write_view


def view(height=5, width=7, seed=0) -> RenderedView:
    generator = torch.Generator().manual_seed(seed)
    return RenderedView(
        rgb=torch.rand(3, height, width, generator=generator),
        depth=1000 * torch.rand(1, height, width, generator=generator),
        mask=torch.rand(1, height, width, generator=generator),
    )


def test_a_view_comes_back_with_depth_exact_and_colour_and_mask_to_a_two_thousandth(tmp_path):
    original = view()
    write_view(tmp_path / "renders" / "frame.npz", original)
    restored = read_view(tmp_path / "renders" / "frame.npz")
    assert torch.equal(restored.depth, original.depth)
    for name in ("rgb", "mask"):
        value = getattr(restored, name)
        assert value.dtype == torch.float32
        assert (value - getattr(original, name)).abs().max() <= 1 / 4096
    assert [path.name for path in (tmp_path / "renders").iterdir()] == ["frame.npz"]


def test_black_and_opaque_are_kept_exactly(tmp_path):
    write_view(tmp_path / "v.npz", RenderedView(torch.zeros(3, 2, 2), torch.zeros(1, 2, 2), torch.ones(1, 2, 2)))
    restored = read_view(tmp_path / "v.npz")
    assert not restored.rgb.any() and not restored.depth.any() and (restored.mask == 1).all()


def damaged(path, kind):
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a picture")
    elif kind == "flipped byte":
        middle = len(content) // 3
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :])
    elif kind == "bad compression":
        start = content.index(b"rgb.npy") + 30
        path.write_bytes(content[:start] + b"\xff" * 20 + content[start + 20 :])
    elif kind == "other arrays":
        np.savez(path, rgb=np.zeros(3))
    elif kind == "single array":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "pickled":
        np.savez(path, rgb=np.array([{}], dtype=object), depth=np.zeros(1), mask=np.zeros(1))


KINDS = ["truncated", "empty", "text", "flipped byte", "bad compression", "other arrays", "single array", "pickled"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_view_is_an_error_that_names_the_file(tmp_path, kind):
    path = tmp_path / "frame000007.npz"
    write_view(path, view(40, 40))
    damaged(path, kind)
    with pytest.raises(ValueError, match="frame000007.npz: not a render, or damaged"):
        read_view(path)


def test_any_wrong_byte_is_reported_or_harmless(tmp_path):
    path, original = tmp_path / "v.npz", view(3, 3)
    write_view(path, original)
    content, reported = path.read_bytes(), 0
    before = read_view(path)
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        try:
            after = read_view(path)
        except ValueError:
            reported += 1
        else:
            assert torch.equal(after.rgb, before.rgb) and torch.equal(after.depth, before.depth) and torch.equal(after.mask, before.mask)
    assert reported > len(content) / 2


def test_a_view_that_is_not_there_is_not_called_damaged(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_view(tmp_path / "missing.npz")


def test_auto_is_cuda_where_there_is_one(monkeypatch):
    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert resolve_device("auto").type == expected
        assert resolve_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there_is_refused_by_name(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device={name}: .*device=cpu or auto"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["mps", "meta", "cpu:0", "cuda:", "cuda:-1", "cuda:first", "CPU", ""])
def test_only_the_cpu_and_cuda_devices_are_devices(name):
    with pytest.raises(ValueError, match=f"device={name}: expected auto, cpu, cuda or cuda:N"):
        resolve_device(name)


def test_a_cuda_device_beyond_the_last_is_refused_with_the_last_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="device=cuda:2: the last CUDA device here is cuda:1"):
        resolve_device("cuda:2")
