"""The commands that take a run's folder or a checkpoint: evaluate, export, plot; and those that make shards."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from averaging.experiment import experiment_of
from peer.cli import app
from peer.run_config import RunConfig
from peer.train import train_alone
from training.errors import BadInput

CROPS = {"total_num_crops": 2, "num_crops": [2], "size_crops": [32], "crop_scales": [[0.3, 1.0]]}
RECIPE = {
    "name": "tiny", "model": {"trunk": {"depth": 18}, "head": {"dims": [0, 8], "num_clusters": [4]}},
    "data": {"dataset": "synthetic", "image_size": 32, "synthetic": {"num_train": 64, "num_val": 32},
             "transforms": CROPS},
    "optimizer": {"lr": 0.1, "max_epochs": 2}, "evaluation": {"resize_size": 32, "crop_size": 32, "knn_k": 5},
    "averaging": {"target_batch_size": 16, "target_group_size": 2}}
CLASSIFIER = {
    **RECIPE, "objective": "classification", "model": {"trunk": {"depth": 18}},
    "data": {**RECIPE["data"], "num_classes": 16, "transforms": {**CROPS, "total_num_crops": 1, "num_crops": [1]}}}


def trained(recipe: dict[str, Any], folder: Path) -> Path:
    torch.set_num_threads(1)
    train_alone(experiment_of(recipe), RunConfig(run_dir=folder, batch_size=16, device="cpu", threads=1,
                                                 memory_format="contiguous"), as_json=True)
    return folder


@pytest.fixture(scope="module")
def swav(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that has ended."""
    return trained(RECIPE, tmp_path_factory.mktemp("swav"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(CLASSIFIER, tmp_path_factory.mktemp("classifier"))


def covey(*arguments: str) -> str:
    """What `covey ARGUMENTS` prints; raises what it refuses."""
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_export_writes_what_torchvision_loads(swav: Path, tmp_path: Path) -> None:
    text = covey("export", str(swav), str(tmp_path / "backbone.safetensors"))
    assert "torchvision.models.resnet18, whose fc it lacks" in text
    assert "of epoch 2" in text
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    network.load_state_dict(load_file(tmp_path / "backbone.safetensors"), strict=True)


def test_export_of_a_classifier_is_whole(classifier: Path, tmp_path: Path) -> None:
    told = json.loads(covey("export", str(classifier / "checkpoints"), str(tmp_path / "whole.pth"), "--json"))
    assert (told["network"], told["classes"], told["epoch"]) == ("resnet18", 16, 2)
    network = torchvision.models.resnet18(num_classes=16)
    network.load_state_dict(torch.load(tmp_path / "whole.pth", weights_only=True), strict=True)


def test_an_export_can_be_trained_on_from(swav: Path, tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    covey("export", str(swav), str(path))
    weights = load_file(path)
    model = {"trunk": {"depth": 18, "pretrained": str(path)}}
    run = trained({**CLASSIFIER, "model": model, "optimizer": {"lr": 1e-30, "max_epochs": 1}}, tmp_path / "run")
    [tensors] = (run / "checkpoints").glob("*.safetensors")
    assert torch.equal(load_file(tensors)["objective.backbone.conv1.weight"], weights["conv1.weight"])


def test_export_to_another_suffix_is_refused(swav: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"\.safetensors or \.pth"):
        covey("export", str(swav), str(tmp_path / "backbone.onnx"))


@pytest.mark.parametrize("command", [("evaluate",), ("export",)])
def test_a_folder_without_checkpoints_is_refused(command: tuple[str], tmp_path: Path) -> None:
    more = ["x.pth"] if command == ("export",) else []
    with pytest.raises(BadInput, match="no whole checkpoint"):
        covey(*command, str(tmp_path), *more)


def test_evaluate_gives_knn_and_with_an_option_the_linear_probe(swav: Path) -> None:
    figures = json.loads(covey("evaluate", str(swav), "--linear-probe", "--json"))
    assert {"knn_accuracy", "linear_probe_accuracy", "linear_probe_top5_accuracy"} <= figures.keys()
    assert "top1_accuracy" not in figures
    assert (figures["epoch"], figures["train_images"], figures["val_images"]) == (2, 64, 32)
    text = covey("evaluate", str(swav))
    assert "k-NN accuracy" in text
    assert "linear probe" not in text


def test_evaluate_gives_top1_and_top5_of_a_classifier_as_its_run_did(classifier: Path) -> None:
    figures = json.loads(covey("evaluate", str(classifier), "--json"))
    last = (classifier / "metrics.csv").read_text().splitlines()
    row = dict(zip(last[0].split(","), last[-1].split(","), strict=True))
    assert {name: f"{figures[name]:.12g}" for name in ("top1_accuracy", "top5_accuracy")} == {
        name: row[name] for name in ("top1_accuracy", "top5_accuracy")}
    assert "top-5 accuracy" in covey("evaluate", str(classifier))


def test_plot_names_the_files_that_it_wrote(swav: Path, tmp_path: Path) -> None:
    files = covey("plot", str(swav), "--out", str(tmp_path)).splitlines()
    assert files == [str(tmp_path / name) for name in ("loss.png", "accuracy.png", "throughput.png")]
    assert all(Path(file).stat().st_size for file in files)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    from torchvision.io import write_png
    for number in range(30):
        folder = tmp_path / "pictures" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (3, 40, 36), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        write_png(pixels, str(folder / f"{number}.png"))
    return tmp_path / "pictures"


def test_shards_are_made_preloaded_and_trained_on(pictures: Path, tmp_path: Path) -> None:
    made = json.loads(covey("shards", "make", str(pictures), str(tmp_path / "shards"), "--images-per-shard", "10",
                            "--json"))
    assert made["images"] == 30
    assert "30 images in" in covey("shards", "make", str(pictures), str(tmp_path / "shards"),
                                   "--images-per-shard", "10")
    data = {"dataset": "shards", "num_images": 24, "transforms": CROPS}
    run = tmp_path / "run"
    train_alone(experiment_of({**RECIPE, "data": data}), RunConfig(
        run_dir=run, data=tmp_path / "shards", preload=tmp_path / "near", preload_gib=1, batch_size=8, device="cpu",
        threads=1, memory_format="contiguous"), as_json=True)
    assert list((tmp_path / "near").rglob("*.tar"))
    assert "knn_accuracy" in (run / "metrics.csv").read_text()


@pytest.mark.parametrize(("options", "line"), [
    ({"preload_gib": 1.0}, "--preload-gib 1 without --preload"), ({"preload": Path("/near")}, "tar shards")])
def test_preloading_nothing_is_refused(tmp_path: Path, options: dict[str, Any], line: str) -> None:
    with pytest.raises(BadInput, match=line):
        train_alone(experiment_of(RECIPE), RunConfig(run_dir=tmp_path / "run", device="cpu", **options), as_json=True)
    assert not (tmp_path / "run").exists()


def test_train_takes_its_options_from_the_command_line(tmp_path: Path) -> None:
    recipe = tmp_path / "demo.toml"
    recipe.write_text('name = "short"\nobjective = "classification"\n[model.trunk]\nname = "lenet"\n[data]\n'
                      'dataset = "synthetic"\nimage_size = 32\nnum_classes = 16\n[data.transforms]\n'
                      'total_num_crops = 1\nnum_crops = [1]\nsize_crops = [32]\ncrop_scales = [[0.5, 1.0]]\n'
                      '[data.synthetic]\nnum_train = 64\nnum_val = 32\n[optimizer]\nlr = 0.1\nmax_epochs = 9\n'
                      '[evaluation]\nresize_size = 32\ncrop_size = 32\n'
                      '[averaging]\ntarget_batch_size = 16\ntarget_group_size = 2\n')
    text = covey("train", str(recipe), "optimizer.lr=0.05", "--run-dir", str(tmp_path / "run"), "--batch-size", "16",
                 "--epochs", "3", "--checkpoint-every-epochs", "1", "--keep-last-checkpoints", "2",
                 "--evaluate-every-epochs", "2", "--device",
                 "cpu", "--threads", "1", "--memory-format", "channels_last", "--log", "csv")
    assert "epochs 0 to 3" in text
    assert "epoch 3 of 3" in text
    assert "on the validation images: top-1" in text
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert [bool(row.rpartition(",")[2]) for row in rows] == [True, False, True, True]
    assert len(list((tmp_path / "run" / "checkpoints").glob("*.safetensors"))) == 2
    meta = json.loads((tmp_path / "run" / "checkpoints" / "epoch-00000003.json").read_text())
    assert meta["progress"]["memory_format"] == "channels_last"
    assert json.loads(meta["experiment"])["optimizer"]["lr"] == 0.05
