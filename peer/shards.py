"""`covey shards make`: an image folder packed into tar shards, with a bar that moves."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training.config import validate
from training.data.manifest import Packing
from training.data.shard_making import Made, make_shards

Options = Mapping[str, int | None]


def make(source: Path, destination: Path, options: Options, *, threads: int = 4, quiet: bool = False) -> Made:
    """Packs the image folder `source` into `destination`. `options` are Packing's; none stands for its default.

    Raises BadInput for options, a source or a destination that will not do.
    """
    packing = validate(Packing, {name: value for name, value in options.items() if value is not None})
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task("packing images", total=None)
        return make_shards(source, destination, packing, threads=threads,
                           progress=lambda done, total: bar.update(task, completed=done, total=total))


def line(made: Made, destination: Path) -> str:
    """What was made, for people."""
    left_out = f"; {made.skipped:,} left out, which cannot be decoded" if made.skipped else ""
    gib = made.num_bytes / 2**30
    return f"{made.images:,} images in {made.shards:,} shards, {gib:.2f} GiB, in {destination}{left_out}"
