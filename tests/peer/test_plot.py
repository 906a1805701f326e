"""Plots show what metrics.csv holds."""

import math
from pathlib import Path

import pytest
from PIL import Image

from peer.loggers.csv import CsvLogger
from peer.plot import CHARTS, _draw, plot
from training.errors import BadInput


def record(directory: Path, epochs: int, evaluate_every: int = 5) -> None:
    directory.mkdir(exist_ok=True)
    logger = CsvLogger(directory / "metrics.csv")
    for epoch in range(1, epochs + 1):
        values = {"loss": 3 + math.exp(-epoch / 20), "samples_per_second": 40 + epoch % 7, "samples_total": 64 * epoch}
        if epoch % evaluate_every == 0:
            values["knn_accuracy"] = 1 - math.exp(-epoch / 50)
        logger.update(values, epoch)


@pytest.mark.parametrize("epochs", [6, 120])
def test_there_is_a_png_of_loss_accuracy_and_throughput(tmp_path: Path, epochs: int) -> None:
    record(tmp_path, epochs)
    files = plot(tmp_path, None)
    assert files == [tmp_path / name for name in ("loss.png", "accuracy.png", "throughput.png")]
    for file in files:
        with Image.open(file) as image:
            assert image.format == "PNG"
            assert image.width >= 1000


def test_a_chart_without_figures_is_left_out_and_another_folder_is_made(tmp_path: Path) -> None:
    record(tmp_path / "run", 3)
    files = plot(tmp_path / "run", tmp_path / "new" / "plots")
    assert files == [tmp_path / "new" / "plots" / name for name in ("loss.png", "throughput.png")]
    assert all(file.exists() for file in files)


def test_axes_are_labelled_with_units_and_curves_show_the_figures() -> None:
    accuracy = CHARTS[1]
    empty = {name: ([], []) for name in accuracy.columns}
    [axes] = _draw(accuracy, {**empty, "top1_accuracy": ([1, 2], [0.25, 0.5]), "top5_accuracy": ([1, 2], [0.5, 1])},
                   "run").axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch (updates)", "accuracy on validation images (%)")
    assert [(line.get_label(), list(line.get_ydata())) for line in axes.lines] == [
        ("top-1", [25, 50]), ("top-5", [50, 100])]
    assert len({line.get_color() for line in axes.lines}) == len({line.get_linestyle() for line in axes.lines}) == 2


@pytest.mark.parametrize("content", [None, "", "epoch,loss\n", "epoch,peers\n1,2\n"])
def test_a_missing_or_empty_table_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.csv").write_text(content)
    with pytest.raises(BadInput, match=r"metrics\.csv"):
        plot(tmp_path, None)
    assert not list(tmp_path.glob("*.png"))
