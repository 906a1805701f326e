from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from training.config import Config, override, validate
from training.errors import BadInput
from training.models.config import SwavModel
from training.models.swav import SwavHead
from training.models.trunk import build_trunk
from training.models.trunk_config import Trunk


class Described(Config):
    model: SwavModel = SwavModel()


def described(line: str) -> SwavModel:
    """The model that the overrides in `line` describe."""
    return validate(Described, override({}, line.split())).model


TORCHVISIONS = {
    "model.trunk.depth=18": "resnet18",
    "model.trunk.depth=34": "resnet34",
    "model.trunk.name=resnet model.head.dims=[2048,2048,128]": "resnet50",
    "model.head.dims=[2048,2048,2048,128]": "resnet50",
    "model.head.dims=[2048,4096,128]": "resnet50",
    "model.trunk.norm=group": "resnet50",
    "model.trunk.norm=layer model.head.use_bn=false": "resnet50",
    "model.trunk.name=resnet model.trunk.depth=101": "resnet101",
    "model.trunk.depth=152": "resnet152",
    "model.trunk.groups=32 model.trunk.width_per_group=4": "resnext50_32x4d",
    "model.trunk.depth=101 model.trunk.groups=32 model.trunk.width_per_group=8": "resnext101_32x8d",
    "model.trunk.depth=101 model.trunk.groups=64 model.trunk.width_per_group=4": "resnext101_64x4d",
    "model.trunk.width_per_group=128": "wide_resnet50_2",
    "model.trunk.depth=101 model.trunk.width_per_group=128": "wide_resnet101_2",
    "model.trunk.name=regnet_y_400mf": "regnet_y_400mf",
    "model.trunk.name=regnet_y_800mf": "regnet_y_800mf",
    "model.trunk.name=regnet_y_1_6gf": "regnet_y_1_6gf",
    "model.trunk.name=regnet_y_3_2gf": "regnet_y_3_2gf",
    "model.trunk.name=regnet_y_8gf": "regnet_y_8gf",
    "model.trunk.name=regnet_y_32gf": "regnet_y_32gf",
    "model.trunk.name=regnet model.trunk.depth=18 model.trunk.w_0=200 model.trunk.w_a=106.23 model.trunk.w_m=2.48 "
    "model.trunk.group_width=112 model.head.dims=[3024,3024,128] model.head.use_bn=false": "regnet_y_16gf",
    "model.trunk.name=regnet model.trunk.depth=27 model.trunk.w_0=456 model.trunk.w_a=160.83 model.trunk.w_m=2.52 "
    "model.trunk.group_width=264 model.head.dims=[7392,7392,128] model.head.use_bn=false": "regnet_y_128gf",
    "model.trunk.name=vgg16": "vgg16",
    "model.trunk.name=vgg16_bn": "vgg16_bn",
    "model.trunk.name=vit_b_16": "vit_b_16",
    "model.trunk.name=torchvision:mobilenet_v3_large": "mobilenet_v3_large",
}
PAPERS = {  # millions of parameters: SwAV, figure 3; SimCLRv2, arXiv 2006.10029, table 1; BYOL, arXiv 2006.07733
    "model.trunk.width_multiplier=2 model.head.dims=[4096,8192,128]": 94,
    "model.trunk.width_multiplier=4 model.head.dims=[8192,8192,128]": 375,
    "model.trunk.width_multiplier=5 model.head.dims=[10240,10240,128] model.head.use_bn=false": 586,
    "model.trunk.depth=101 model.trunk.width_multiplier=2": 170,
    "model.trunk.depth=200 model.trunk.width_multiplier=2": 250,
}


def trunk_parameters(config: Trunk) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_trunk(config).parameters())


@pytest.mark.parametrize(("line", "name"), TORCHVISIONS.items())
def test_trunk_has_the_published_number_of_parameters(line: str, name: str) -> None:
    config = described(line).trunk
    with torch.device("meta"):
        trunk = build_trunk(config)
    weights = next(iter(torchvision.models.get_model_weights(name)))
    classifier = 1000 * trunk.feature_width + 1000
    assert sum(parameter.numel() for parameter in trunk.parameters()) == weights.meta["num_params"] - classifier
    assert config.feature_width in (trunk.feature_width, None)


@pytest.mark.parametrize(("line", "millions"), PAPERS.items())
def test_wide_trunk_has_the_published_number_of_parameters(line: str, millions: int) -> None:
    assert round(trunk_parameters(described(line).trunk) / 1e6) == millions


def test_regnet_256gf_by_parameters_has_the_published_number() -> None:
    model = described(
        "model.trunk.name=regnet model.trunk.depth=27 model.trunk.w_0=640 model.trunk.w_a=230.83 model.trunk.w_m=2.53 "
        "model.trunk.group_width=373 model.head.dims=[10444,10444,128] model.head.use_bn=false")
    assert round(trunk_parameters(model.trunk) / 1e9, 1) == 1.3  # SEER, arXiv 2103.01988


@pytest.mark.parametrize(("line", "dims"), [
    ("", (2048, 2048, 128)), ("model.head.dims=[0,512,64]", (2048, 512, 64)),
    ("model.trunk.depth=18", (512, 2048, 128)), ("model.trunk.name=regnet_y_400mf", (440, 2048, 128)),
    ("model.trunk.name=regnet_y_256gf", (10444, 2048, 128)), ("model.trunk.name=lenet", (84, 2048, 128))])
def test_head_takes_the_width_of_the_trunk(line: str, dims: tuple[int, ...]) -> None:
    assert described(line).head_dims == dims


@pytest.mark.parametrize(("line", "words"), [
    ("model.head.dims=[1024,2048,128]", ["begin with 2048", "not 1024"]),
    ("model.trunk.name=regnet_y_256gf model.head.dims=[10368,10444,128]", ["begin with 10444", "not 10368"]),
    ("model.trunk.width_multiplier=0.3", ["multiple of 1/64", "19.2"]),
    ("model.trunk.width_multiplier=0.125 model.trunk.groups=32 model.trunk.width_per_group=4", ["not 0.5"]),
    ("model.trunk.depth=18 model.trunk.groups=32 model.trunk.width_per_group=4", ["50 or more", "not 18"]),
    ("model.trunk.depth=51", ["model.trunk.depth = 51", "18, 34, 50, 101, 152, 200"]),
    ("model.trunk.name=regnet_y_400mf model.trunk.depth=50", ["no depth", "regnet_y_400mf"]),
    ("model.trunk.name=lenet model.trunk.norm=group", ["no norm", "lenet"]),
    ("model.trunk.name=vit_b_16 model.trunk.activation_checkpointing=true", ["no activation_checkpointing"]),
    ("model.trunk.name=regnet model.trunk.depth=27 model.trunk.w_0=640", ["group_width, w_a, w_m"]),
    ("model.trunk.w_a=1.5", ["no w_a", "resnet"]),
    ("model.trunk.name=regnet_y_400mb", ["Did you mean 'regnet_y_400mf'?"]),
    ("model.amp.opt_level=O3", ["half precision"]),
    ("model.amp.opt_level=O0", ["use_amp=false"]),
    ("model.sync_bn.group_size=-2", ["greater than or equal to -1"]),
])
def test_what_cannot_be_built_is_refused_with_the_reason(line: str, words: list[str]) -> None:
    with pytest.raises(BadInput) as refused:
        described(line)
    assert all(word in str(refused.value) for word in words), refused.value


def test_a_trunk_may_be_replaced_as_a_whole() -> None:
    model = described('model.trunk.depth=18 model.trunk={name="vgg16"}')
    assert model.trunk == Trunk(name="vgg16")


def test_unknown_name_of_torchvisions_names_the_nearest() -> None:
    with pytest.raises(BadInput, match="Did you mean 'densenet121'"):
        build_trunk(Trunk(name="torchvision:densenet12"))


RESNETS: list[tuple[Trunk, str]] = [
    (Trunk(depth=18), "resnet18"), (Trunk(), "resnet50"), (Trunk(groups=32, width_per_group=4), "resnext50_32x4d"),
    (Trunk(width_per_group=128), "wide_resnet50_2"), (Trunk(depth=152), "resnet152"),
    (Trunk(activation_checkpointing=True), "resnet50")]


@pytest.mark.parametrize(("config", "name"), RESNETS)
def test_state_dict_is_torchvisions_without_its_classifier(config: Trunk, name: str) -> None:
    with torch.device("meta"):
        trunk, reference = build_trunk(config), torchvision.models.get_model(name)
    missing, unexpected = reference.load_state_dict(trunk.state_dict(), strict=False, assign=True)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])


@pytest.mark.parametrize(("config", "name"), [RESNETS[0], RESNETS[2]])
def test_trunk_gives_torchvisions_features(config: Trunk, name: str) -> None:
    torch.manual_seed(0)
    trunk, reference = build_trunk(config), torchvision.models.get_model(name)
    reference.load_state_dict(trunk.state_dict(), strict=False)
    reference.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(trunk(images), reference(images), rtol=0, atol=0)


def test_convolutions_start_as_wide_as_torchvisions() -> None:
    torch.manual_seed(0)
    ours, theirs = build_trunk(Trunk(depth=18)).state_dict(), torchvision.models.resnet18().state_dict()
    kernels = [name for name, weight in ours.items() if weight.ndim == 4]
    assert {name: ours[name].std().item() for name in kernels} == pytest.approx(
        {name: theirs[name].std().item() for name in kernels}, rel=0.05)


@pytest.mark.parametrize(("options", "width"), [
    ({"depth": 18}, 512), ({"depth": 34, "width_multiplier": 0.25}, 128), ({}, 2048), ({"depth": 200}, 2048),
    ({"width_multiplier": 2}, 4096), ({"width_multiplier": 5}, 10240), ({"name": "lenet"}, 84),
    ({"name": "vgg16_bn"}, 4096)])
def test_feature_width_is_known_from_the_config(options: dict[str, float], width: int) -> None:
    config = Trunk.model_validate(options)
    with torch.device("meta"):
        features = build_trunk(config)(torch.empty(2, 3, 32, 32))
    assert features.shape == (2, width) == (2, config.feature_width)


@pytest.mark.parametrize("name", ["vit_b_16", "torchvision:squeezenet1_1", "torchvision:googlenet",
                                  "torchvision:swin_t"])
def test_any_network_of_torchvisions_gives_features(name: str) -> None:
    config = Trunk(name=name)
    side = config.image_side or 64
    with torch.device("meta"):
        trunk = build_trunk(config)
        assert trunk(torch.empty(2, 3, side, side)).shape == (2, trunk.feature_width)


@pytest.mark.parametrize(("stem", "side"), [("7x7", 1), ("3x3", 4), ("3x3/2", 2)])
def test_small_stem_keeps_the_side_of_small_images(stem: str, side: int) -> None:
    sides = []
    with torch.device("meta"):
        trunk = build_trunk(Trunk.model_validate({"depth": 18, "stem": stem}))
        trunk.get_submodule("layer4").register_forward_hook(lambda *call: sides.append(call[2].shape[-1]))
        trunk(torch.empty(2, 3, 32, 32))
    assert sides == [side]


@pytest.mark.parametrize(("name", "norm", "groups"), [
    ("resnet", "group", {64: 32, 2048: 32}), ("regnet_y_400mf", "group", {48: 16, 104: 8}),
    ("resnet", "layer", {64: 1, 2048: 1}), ("regnet_y_400mf", "layer", {48: 1, 104: 1})])
def test_other_norms_take_groups_of_channels(name: str, norm: str, groups: dict[int, int]) -> None:
    with torch.device("meta"):
        modules = list(build_trunk(Trunk.model_validate({"name": name, "norm": norm})).modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in modules)
    found = {module.num_channels: module.num_groups for module in modules if isinstance(module, nn.GroupNorm)}
    assert found.items() >= groups.items()


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))


SMALL = [{"depth": 18, "width_multiplier": 0.125}, {"depth": 50, "width_multiplier": 0.125},
         {"name": "regnet", "depth": 6, "w_0": 8, "w_a": 6, "w_m": 2, "group_width": 8}]


def floats_kept(trunk: nn.Module) -> int:
    """How many numbers a forward pass keeps for its backward pass, which is run too."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(0 if isinstance(tensor, nn.Parameter) else tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = trunk(images())
    total = sum(sizes)
    features.square().sum().backward()
    return total


@pytest.mark.parametrize("options", SMALL)
def test_activation_checkpointing_changes_nothing_but_memory(options: dict[str, float]) -> None:
    plain = build_trunk(Trunk.model_validate(options))
    frugal = build_trunk(Trunk.model_validate({**options, "activation_checkpointing": True}))
    frugal.load_state_dict(plain.state_dict())
    kept = [floats_kept(trunk) for trunk in (plain, frugal)]
    for (name, expected), found in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=0, msg=name)
    for (name, buffer), found in zip(plain.named_buffers(), frugal.buffers(), strict=True):
        torch.testing.assert_close(found, buffer, rtol=0, atol=0, msg=name)
    assert kept[1] < 0.55 * kept[0]


@pytest.fixture
def file(tmp_path: Path) -> Callable[[dict[str, Tensor]], str]:
    def write(weights: dict[str, Tensor]) -> str:
        save_file(weights, tmp_path / "weights.safetensors")
        return str(tmp_path / "weights.safetensors")
    return write


def test_pretrained_weights_are_torchvisions_but_for_the_classifier(file: Callable[[dict[str, Tensor]], str]) -> None:
    weights = torchvision.models.resnet18().state_dict()
    trunk = build_trunk(Trunk(depth=18, pretrained=file(weights)))
    for name, tensor in trunk.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)


def test_pretrained_weights_may_lack_the_classifier(file: Callable[[dict[str, Tensor]], str]) -> None:
    weights = build_trunk(Trunk(name="lenet")).state_dict()
    torch.testing.assert_close(dict(build_trunk(Trunk(name="lenet", pretrained=file(weights))).state_dict()),
                               dict(weights), rtol=0, atol=0)


@pytest.mark.parametrize(("change", "words"), [
    ({"conv1.weight": torch.zeros(8, 3, 7, 7)}, "conv1.weight of shape [8, 3, 7, 7]; expected of shape [64, 3, 7, 7]"),
    ({"layer5.weight": torch.zeros(1)}, "layer5.weight of shape [1]; expected nowhere"),
    ({"bn1.bias": None}, "bn1.bias nowhere; expected of shape [64]"),
])
def test_pretrained_weights_of_another_network_are_refused(
        change: dict[str, Tensor | None], words: str, file: Callable[[dict[str, Tensor]], str]) -> None:
    weights = build_trunk(Trunk(depth=18)).state_dict() | change
    path = file({name: weight for name, weight in weights.items() if weight is not None})
    with pytest.raises(BadInput) as refused:
        build_trunk(Trunk(depth=18, pretrained=path))
    assert words in str(refused.value)


@pytest.mark.parametrize("content", [None, b"", b"\x80\x02not a safetensors file"])
def test_a_file_that_cannot_be_read_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match="a readable"):
        build_trunk(Trunk(name="lenet", pretrained=str(path)))


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


def test_embedding_and_scores_are_float32_under_autocast() -> None:
    torch.manual_seed(0)
    head = SwavHead([12, 10, 4], use_bn=True, num_clusters=[5])
    head.normalise_prototypes()
    with torch.autocast("cpu", torch.bfloat16):
        embedding, (scores,) = head(torch.randn(6, 12).bfloat16())
    assert (embedding.dtype, scores.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(6), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores, embedding @ head.prototypes[0].weight.T)
