"""Weights of the image encoder from a local file."""

import warnings

import pytest
import torch

from co3d_ensemble.plugin import compat

compat.install()

import torchvision  # noqa: E402
from pytorch3d.implicitron.models.feature_extractor.resnet_feature_extractor import ResNetFeatureExtractor  # noqa: E402
from pytorch3d.implicitron.tools.config import expand_args_fields  # noqa: E402

from co3d_ensemble.plugin.image_encoder import RESNET_ARGS, load_encoder_weights, refuse_download  # noqa: E402


def encoder(name: str = "resnet18", stages=(1, 2)) -> ResNetFeatureExtractor:
    expand_args_fields(ResNetFeatureExtractor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return ResNetFeatureExtractor(name=name, pretrained=False, stages=stages, proj_dim=8)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(5)
    return torchvision.models.resnet18(weights=None)


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(network.state_dict(), path)
    return path


def test_the_encoder_computes_what_torchvisions_network_computes(network, weights):
    loaded = encoder().eval()
    load_encoder_weights(loaded, weights)
    network.eval()
    pictures = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(pictures)))))
        assert torch.equal(loaded.layers[0](loaded.stem(pictures)), expected)
        assert torch.equal(loaded.layers[1](expected), network.layer2(expected))


def test_projections_keep_their_random_weights(weights):
    loaded = encoder()
    before = loaded.proj_layers[0].weight.clone()
    load_encoder_weights(loaded, weights)
    assert torch.equal(loaded.proj_layers[0].weight, before)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_file_that_holds_no_weights_is_named(tmp_path, content):
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="encoder_weights=.*broken.pth: cannot be read"):
        load_encoder_weights(encoder(), path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="absent.pth: there is no such file; null gives random weights"):
        load_encoder_weights(encoder(), tmp_path / "absent.pth")


def test_weights_of_another_network_are_refused(weights):
    with pytest.raises(ValueError, match="no weights of resnet50: "):
        load_encoder_weights(encoder("resnet50"), weights)


def test_something_else_than_a_state_dict_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth: holds no state dict"):
        load_encoder_weights(encoder(), tmp_path / "list.pth")


def test_a_model_without_an_encoder_has_no_use_for_weights(weights):
    with pytest.raises(ValueError, match="no ResNetFeatureExtractor"):
        load_encoder_weights(None, weights)


def test_settings_that_would_download_are_refused():
    with pytest.raises(ValueError, match="pretrained=true would download.*encoder_weights"):
        refuse_download({RESNET_ARGS: {"pretrained": True}})
    refuse_download({RESNET_ARGS: {"pretrained": False}})
    refuse_download({})
