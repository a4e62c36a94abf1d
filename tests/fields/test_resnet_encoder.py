"""The encoder against torchvision's own network, and where its weights come from."""

from __future__ import annotations

import urllib.error

import pytest
import torch

from co3d_ensemble.fields.resnet_encoder import CHANNELS, ResNetEncoder
from co3d_ensemble.fields.torchvision_import import import_torchvision

torchvision = import_torchvision()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None).eval()


@pytest.fixture
def weights(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    return tmp_path / "resnet18.pth"


def test_maps_are_those_inside_torchvisions_network_on_the_normalised_picture(network, weights):
    encoder = ResNetEncoder("resnet18", weights).eval()
    image = torch.rand(2, 3, 64, 96)
    seen = {}
    for name in ("relu", "layer1", "layer2", "layer3", "layer4"):
        getattr(network, name).register_forward_hook(lambda module, args, output, name=name: seen.update({name: output.clone()}))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        maps = encoder(image)
        network(((image.permute(0, 2, 3, 1) - mean) / std).permute(0, 3, 1, 2))
    torch.testing.assert_close(maps, [seen[name] for name in ("relu", "layer1", "layer2", "layer3", "layer4")])


@pytest.mark.parametrize("name", CHANNELS)
def test_channels_and_sizes_are_as_told(name):
    with torch.device("meta"):
        encoder = ResNetEncoder(name)
        maps = encoder(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [(c, 64 >> i, 96 >> i) for i, c in enumerate(encoder.channels, start=1)]


def test_old_files_without_counters_load(network, tmp_path):
    state = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    torch.testing.assert_close(ResNetEncoder("resnet18", tmp_path / "old.pth").layer4[1].conv2.weight, network.layer4[1].conv2.weight)


def test_weights_of_the_hub_are_torchvisions(network, monkeypatch):
    asked = []
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda self, **_: asked.append(self.name) or network.state_dict())
    encoder = ResNetEncoder("resnet18", "hub")
    assert asked == ["IMAGENET1K_V1"]
    torch.testing.assert_close(encoder.conv1.weight, network.conv1.weight)


def test_a_hub_without_network_or_with_a_damaged_file_is_named(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(OSError, match="weights=hub: .*resnet18-.*pth cannot be read, or not be downloaded from https://.*no network"):
        ResNetEncoder("resnet18", "hub")
    (tmp_path / "hub/checkpoints/resnet18-f37072fd.pth").write_bytes(b"PK\x03\x04cut")
    with pytest.raises(OSError, match="weights=hub: .*resnet18-f37072fd.pth cannot be read"):
        ResNetEncoder("resnet18", "hub")


def test_a_file_that_is_not_there_foreign_or_another_networks_is_named(weights, tmp_path):
    (tmp_path / "noise.pth").write_bytes(b"no weights")
    torch.save([1], tmp_path / "list.pth")
    for path, message in (("absent.pth", "no such file"), ("noise.pth", "cannot be read"), ("list.pth", "no state dict")):
        with pytest.raises(ValueError, match=f"{path}.*{message}"):
            ResNetEncoder("resnet18", tmp_path / path)
    with pytest.raises(ValueError, match="not those of resnet34: layer1.2"):
        ResNetEncoder("resnet34", weights)


def test_an_unknown_network_is_named():
    with pytest.raises(ValueError, match="'vgg16'"):
        ResNetEncoder("vgg16")
