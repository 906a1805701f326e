import pytest
import torch
import torchvision
from torch import nn

from training.models.config import Trunk
from training.models.resnet import ResNet
from training.models.swav import SwavHead


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_state_dict_is_torchvisions_without_its_classifier(depth: int) -> None:
    with torch.device("meta"):
        ours = ResNet(Trunk(depth=depth)).state_dict()
        theirs = getattr(torchvision.models, f"resnet{depth}")().state_dict()
    expected = {name: tensor.shape for name, tensor in theirs.items() if not name.startswith("fc.")}
    assert {name: tensor.shape for name, tensor in ours.items()} == expected


@pytest.mark.parametrize("depth", [18, 50])
def test_trunk_gives_torchvisions_features(depth: int) -> None:
    torch.manual_seed(0)
    trunk, reference = ResNet(Trunk(depth=depth)), getattr(torchvision.models, f"resnet{depth}")()
    missing, unexpected = reference.load_state_dict(trunk.state_dict(), strict=False)
    reference.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    torch.testing.assert_close(trunk(images), reference(images), rtol=0, atol=0)


def test_convolutions_start_as_wide_as_torchvisions() -> None:
    torch.manual_seed(0)
    ours, theirs = ResNet(Trunk(depth=18)).state_dict(), torchvision.models.resnet18().state_dict()
    kernels = [name for name, weight in ours.items() if weight.ndim == 4]
    assert {name: ours[name].std().item() for name in kernels} == pytest.approx(
        {name: theirs[name].std().item() for name in kernels}, rel=0.05)


@pytest.mark.parametrize(("depth", "multiplier", "width"), [(18, 1, 512), (34, 0.25, 128), (50, 1, 2048),
                                                           (50, 2, 4096), (50, 4, 8192), (18, 0.3, 153)])
def test_feature_width_is_known_from_the_config(depth: int, multiplier: float, width: int) -> None:
    config = Trunk(depth=depth, width_multiplier=multiplier)
    with torch.device("meta"):
        features = ResNet(config)(torch.empty(2, 3, 32, 32))
    assert features.shape == (2, width) == (2, config.feature_width)


@pytest.mark.parametrize(("stem", "side"), [("7x7", 1), ("3x3", 4), ("3x3/2", 2)])
def test_small_stem_keeps_the_side_of_small_images(stem: str, side: int) -> None:
    sides = []
    with torch.device("meta"):
        trunk = ResNet(Trunk(depth=18, stem=stem))
        trunk.layer4.register_forward_hook(lambda *call: sides.append(call[2].shape[-1]))
        trunk(torch.empty(2, 3, 32, 32))
    assert sides == [side]


def test_wide_resnet_50_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        trunk = ResNet(Trunk(depth=50, width_multiplier=2))
    assert round(sum(p.numel() for p in trunk.parameters()) / 1e6) == 94  # SwAV, figure 3: 94M


@pytest.mark.parametrize("use_bn", [True, False])
def test_projection_ends_in_a_bare_linear_layer(use_bn: bool) -> None:
    head = SwavHead([12, 10, 9, 4], use_bn=use_bn, num_clusters=[3])
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU] if use_bn else [nn.Linear, nn.ReLU]
    assert [type(layer) for layer in head.projection] == [*hidden, *hidden, nn.Linear]
    assert [layer.out_features for layer in head.projection if isinstance(layer, nn.Linear)] == [10, 9, 4]
    assert all(layer.bias is not None for layer in head.projection if isinstance(layer, nn.Linear))


def test_score_is_the_cosine_of_embedding_and_prototype() -> None:
    torch.manual_seed(0)
    head = SwavHead([12, 10, 4], use_bn=True, num_clusters=[5, 7])
    head.normalise_prototypes()
    embedding, scores = head(torch.randn(6, 12))
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(6))
    for prototypes, head_scores in zip(head.prototypes, scores, strict=True):
        assert prototypes.bias is None
        cosine = nn.functional.cosine_similarity(embedding[:, None], prototypes.weight[None], dim=2)
        torch.testing.assert_close(head_scores, cosine)
