"""Exports load in the networks of torchvision and timm with strict=True, and compute what the backbone does."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from training.config import override, validate
from training.errors import BadInput
from training.export import classifier_name, counterpart, torchvision_state, write_export
from training.models.trunk_config import Trunk
from training.objectives.objective import Objective, build_objective
from training.recipe import ClassificationTraining, SwavTraining

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def swav(**trunk: object) -> Objective:
    return trained(build_objective(validate(SwavTraining, {
        "name": "tiny", "optimizer": {"lr": 0.1, "max_epochs": 1},
        "model": {"trunk": trunk, "head": {"dims": [0, 8], "num_clusters": [4]}}})))


def classifier(*overrides: str, **trunk: object) -> Objective:
    return trained(build_objective(validate(ClassificationTraining, override({
        "name": "tiny", "objective": "classification", "optimizer": {"lr": 0.1, "max_epochs": 1},
        "model": {"trunk": trunk},
        "data": {"num_classes": 7, "transforms": {
            "total_num_crops": 1, "num_crops": [1], "size_crops": [64], "crop_scales": [[0.2, 1]]}}}, overrides))))


def trained(objective: Objective) -> Objective:
    """With running statistics that are not the initial ones."""
    objective.train()
    with torch.no_grad():
        objective.backbone(3 * IMAGES + 1)
    return objective.eval()


@pytest.fixture(params=[".safetensors", ".pth"])
def through_a_file(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Objective], dict[str, Tensor]]:
    """What comes back of an export."""
    def export(objective: Objective) -> dict[str, Tensor]:
        path = tmp_path / f"backbone{request.param}"
        write_export(torchvision_state(objective), path, {"covey_epoch": "3"})
        assert list(tmp_path.iterdir()) == [path]
        return load_file(path) if request.param == ".safetensors" else torch.load(path, weights_only=True)
    return export


@torch.no_grad()
def assert_same_output(network: nn.Module, ours: Callable[[Tensor], Tensor]) -> None:
    torch.testing.assert_close(network.eval()(IMAGES), ours(IMAGES), rtol=1e-5, atol=1e-5)


def test_swav_loads_in_torchvision_s_resnet50_less_its_classifier(
        through_a_file: Callable[[Objective], dict[str, Tensor]]) -> None:
    objective = swav()
    network = torchvision.models.resnet50()
    network.fc = nn.Identity()
    network.load_state_dict(through_a_file(objective), strict=True)
    assert_same_output(network, objective.backbone)


def test_swav_loads_in_timm_s_resnet50_less_its_classifier() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    objective = swav()
    network = timm.create_model("resnet50", num_classes=0)
    network.load_state_dict(torchvision_state(objective), strict=True)
    assert_same_output(network, objective.backbone)


def test_a_classifier_loads_whole_in_torchvision_s_and_timm_s_resnet50(
        through_a_file: Callable[[Objective], dict[str, Tensor]]) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    objective = classifier()
    state = through_a_file(objective)
    for network in (torchvision.models.resnet50(num_classes=7), timm.create_model("resnet50", num_classes=7)):
        network.load_state_dict(state, strict=True)
        assert_same_output(network, objective.predict)


@pytest.mark.parametrize("trunk", [{"depth": 18}, {"name": "regnet_y_400mf"}, {"name": "torchvision:mobilenet_v2"},
                                   {"depth": 50, "groups": 32, "width_per_group": 4}])
def test_a_classifier_loads_in_the_network_that_is_named_as_its_counterpart(trunk: dict[str, object]) -> None:
    objective, name = classifier(**trunk), counterpart(Trunk(**trunk))
    assert name is not None
    network = torchvision.models.get_model(name, weights=None, num_classes=7)
    network.load_state_dict(torchvision_state(objective), strict=True)
    assert_same_output(network, objective.predict)


@pytest.mark.parametrize("trunk", [{"stem": "3x3"}, {"width_multiplier": 2}, {"norm": "group"}, {"depth": 200},
                                   {"name": "lenet"}, {"name": "regnet_y_256gf"}])
def test_a_network_that_torchvision_lacks_has_no_counterpart(trunk: dict[str, object]) -> None:
    assert counterpart(Trunk(**trunk)) is None


def test_a_squeezenet_goes_without_the_linear_classifier_that_it_has_no_place_for() -> None:
    objective = classifier(name="torchvision:squeezenet1_1")
    network = torchvision.models.squeezenet1_1()
    missing, unexpected = network.load_state_dict(torchvision_state(objective), strict=False)
    assert (missing, unexpected) == (["classifier.1.weight", "classifier.1.bias"], [])
    assert classifier_name(objective) == "classifier.1"


def test_nothing_of_the_head_is_exported() -> None:
    assert not [name for name in torchvision_state(swav(depth=18)) if "head" in name or "prototypes" in name]


def test_a_safetensors_file_says_what_it_is_of(tmp_path: Path) -> None:
    write_export({"x": torch.ones(1)}, tmp_path / "x.safetensors", {"covey_epoch": "3"})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "covey_epoch": "3"}


@pytest.mark.parametrize("name", ["backbone.onnx", "backbone", "nowhere/backbone.pth"])
def test_another_suffix_or_a_missing_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match="file"):
        write_export({}, tmp_path / name, {})
    assert not list(tmp_path.iterdir())
