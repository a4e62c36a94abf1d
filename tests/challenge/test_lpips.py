import re

import pytest
import torch

from co3d_ensemble.challenge.lpips import load_lpips, lpips_masked
from co3d_ensemble.fields.torchvision_import import import_torchvision


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty torch hub cache, on a machine without network."""

    def refuse(*args, **kwargs):
        raise AssertionError("tried to download")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.mark.parametrize(("backbone", "pattern"), [("vgg", r"vgg16-\*\.pth"), ("alex", r"alexnet-\*\.pth")])
def test_without_weights_there_is_a_reason_and_no_download(hub, backbone, pattern):
    network, reason = load_lpips(backbone)
    assert network is None
    assert re.search(f"no {pattern} in .*checkpoints", reason)


def test_an_unknown_backbone_or_weights_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="'resnet'"):
        load_lpips("resnet")
    with pytest.raises(ValueError, match=r"nowhere\.pth"):
        load_lpips(weights_path=tmp_path / "nowhere.pth")


def test_the_network_sees_pictures_in_minus_1_to_1_with_the_truth_on_black():
    seen = []
    network = lambda x, y: seen.extend((x, y)) or (x - y).abs().mean()
    rgb, gt = torch.rand(3, 4, 5, dtype=torch.float64), torch.rand(3, 4, 5, dtype=torch.float64)
    mask = torch.full((1, 4, 5), 0.5)
    mask[:, :2] = 0.6
    value = lpips_masked(network, rgb, gt, mask)
    assert torch.allclose(seen[0], (2 * rgb - 1).float()[None], atol=1e-6)
    assert torch.allclose(seen[1][:, :, :2], (2 * gt - 1).float()[None, :, :2], atol=1e-6)
    assert (seen[1][:, :, 2:] == -1).all()
    assert isinstance(value, float)


def test_weights_on_disk_are_loaded_into_the_backbone(hub):
    try:
        import_torchvision()
        import lpips  # noqa: F401
        from torchvision.models import alexnet
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"lpips cannot be imported here: {error}")
    backbone = alexnet(weights=None)
    torch.save(backbone.state_dict(), hub / "alexnet-owt-00000000.pth")
    network, reason = load_lpips("alex")
    (damaged := hub / "damaged.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged.pth: cannot be read: EOFError"):
        load_lpips("alex", weights_path=damaged)
    assert reason is None
    assert torch.equal(network.net.slice3.get_submodule("6").weight, backbone.features[6].weight)
    picture, mask = torch.rand(3, 64, 64), torch.ones(1, 64, 64)
    assert lpips_masked(network, picture, picture, mask) == 0
    assert lpips_masked(network, 1 - picture, picture, mask) > 0
    del (state := backbone.state_dict())["features.6.weight"]
    torch.save(state, hub / "alexnet-owt-00000000.pth")
    with pytest.raises(ValueError, match=r"has no 'features\.6\.weight'"):
        load_lpips("alex")
