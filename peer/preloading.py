"""`--preload`: tar shards brought to a local disk before training, with a bar that moves."""

from pathlib import Path
from shutil import disk_usage

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from training.data.config import Data
from training.data.preload import preload
from training.errors import BadInput

GIB = 1 << 30


def bring_near(data: Data, folder: Path | None, local: Path | None, gib: float | None) -> Path | None:
    """The folder to train from: `folder`, or its shards copied into `local`, `gib` of them or what the disk holds.

    Raises BadInput where there is nothing to copy, or nowhere.
    """
    if local is None:
        if gib is not None:
            raise BadInput(f"--preload-gib {gib:g} without --preload", expected="the folder to copy shards to",
                           mend="Give it with --preload DIR.")
        return folder
    if data.dataset != "shards" or folder is None:
        raise BadInput(f"--preload {local} where data.dataset is {data.dataset!r}", expected="tar shards, with --data",
                       mend="Make them with `covey shards make`, and set data.dataset=shards.")
    local.mkdir(parents=True, exist_ok=True)
    capacity = disk_usage(local).total if gib is None else int(gib * GIB)
    columns = TextColumn("copying shards"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn()
    console = Console(stderr=True)  # stdout is left to results
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        near = preload(folder, local, capacity, lambda done, total: bar.update(task, completed=done, total=total))
    return near.folder
