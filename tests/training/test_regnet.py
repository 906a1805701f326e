import random

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.regnet import BlockParams

from training.models.regnet_widths import PRESETS, Parameters, stages
from training.models.trunk import build_trunk
from training.models.trunk_config import Trunk

TORCHVISIONS = [name for name in PRESETS if name != "regnet_y_256gf"]


def draw(source: random.Random) -> Parameters:
    return Parameters(source.randint(1, 40), 8 * source.randint(1, 100), source.uniform(0, 300),
                      source.uniform(1.5, 3.5), source.randint(1, 400))


@pytest.mark.parametrize("parameters", [*PRESETS.values(), *map(draw, [random.Random(0)] * 200)])
def test_stages_are_torchvisions(parameters: Parameters) -> None:
    theirs = BlockParams.from_init_params(**parameters._asdict())
    expected = zip(theirs.depths, theirs.widths, theirs.group_widths, strict=True)
    assert stages(parameters) == list(expected)


@pytest.mark.parametrize(("name", "width"), [("regnet_y_400mf", 440), ("regnet_y_16gf", 3024),
                                             ("regnet_y_128gf", 7392), ("regnet_y_256gf", 10444)])
def test_features_are_as_wide_as_published(name: str, width: int) -> None:
    config = Trunk(name=name)
    with torch.device("meta"):
        features = build_trunk(config).eval()(torch.empty(1, 3, 32, 32))
    assert features.shape == (1, width) == (1, config.feature_width)


@pytest.mark.parametrize("name", PRESETS)
def test_a_name_stands_for_its_parameters(name: str) -> None:
    assert Trunk(name="regnet", **PRESETS[name]._asdict()).regnet == Trunk(name=name).regnet == PRESETS[name]


@pytest.mark.parametrize("name", TORCHVISIONS[:2])
def test_state_dict_is_torchvisions_without_its_classifier(name: str) -> None:
    trunk, reference = build_trunk(Trunk(name=name)), getattr(torchvision.models, name)()
    missing, unexpected = reference.load_state_dict(trunk.state_dict(), strict=False)
    reference.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    torch.testing.assert_close(trunk(images), reference(images), rtol=0, atol=0)
