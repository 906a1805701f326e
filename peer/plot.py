"""`covey plot`: PNGs of loss, accuracy and throughput from a run's metrics.csv."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from peer.loggers.csv import NAME, Row, read_rows
from training.errors import BadInput

# Okabe and Ito's palette, which the colour-blind can tell apart; markers and lines differ too
STYLES = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", ":"), ("#CC79A7", "D", "-."))
SMOOTHED = 50  # points, from which on a curve is shown with its running mean
Curve = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Chart:
    """One PNG: which columns, under which names, and what the axis says."""

    file: str
    columns: Mapping[str, str]
    axis: str
    scale: float = 1.0
    from_zero: bool = False


CHARTS = (
    Chart("loss.png", {"loss": "loss"}, "loss (nats)"),
    Chart("accuracy.png", {"knn_accuracy": "k-NN", "top1_accuracy": "top-1", "top5_accuracy": "top-5",
                           "linear_probe_accuracy": "linear probe"}, "accuracy on validation images (%)", 100, True),
    Chart("throughput.png", {"samples_per_second": "this machine"}, "throughput (images/s)", from_zero=True),
)


def plot(directory: Path, out: Path | None) -> list[Path]:
    """Draws what `directory`/metrics.csv has of CHARTS into `out`, or else beside it; the files written.

    A chart of which there is nothing is left out. Raises BadInput without a table, or where it is empty.
    """
    path = directory / NAME
    rows = read_rows(path)
    curves = {name: _curve(rows, name) for chart in CHARTS for name in chart.columns}
    charts = [chart for chart in CHARTS if any(curves[name][0] for name in chart.columns)]
    if not charts:
        raise BadInput(f"{path} without figures", expected="a row per epoch", mend="Train for an epoch first.")
    folder = out or directory
    folder.mkdir(parents=True, exist_ok=True)
    for chart in charts:
        _draw(chart, curves, directory.absolute().name).savefig(folder / chart.file, dpi=150)
    return [folder / chart.file for chart in charts]


def _curve(rows: Sequence[Row], name: str) -> Curve:
    known = [row for row in rows if name in row]
    return [row["epoch"] for row in known], [row[name] for row in known]


def _draw(chart: Chart, curves: Mapping[str, Curve], title: str) -> Figure:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, label), (color, marker, line) in zip(chart.columns.items(), STYLES, strict=False):
        epochs, values = curves[name][0], [chart.scale * value for value in curves[name][1]]
        if len(values) >= SMOOTHED:
            width = len(values) // 20
            axes.plot(epochs, values, color=color, alpha=0.3, linewidth=1, label=label)
            axes.plot(epochs, _running_mean(values, width), line, color=color, linewidth=2,
                      label=f"mean of {width} points")
        elif values:
            axes.plot(epochs, values, line, color=color, marker=marker, markersize=4, linewidth=2, label=label)
    axes.set_title(title, loc="left")
    axes.set(xlabel="epoch (updates)", ylabel=chart.axis, **({"ylim": (0, None)} if chart.from_zero else {}))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)
    return figure


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Of the last `width` values, of fewer at the start."""
    parts = (values[max(0, end - width):end] for end in range(1, len(values) + 1))
    return [sum(part) / len(part) for part in parts]
