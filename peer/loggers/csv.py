"""metrics.csv in the run's folder: a row per epoch, whole after each. Imports no torch: the daemon writes it too."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from peer.loggers.logger import Run
from training.atomic import move_into_place
from training.errors import BadInput

NAME = "metrics.csv"
Row = dict[str, float]


def open_logger(run: Run) -> "CsvLogger":
    return CsvLogger(run.directory / NAME)


class CsvLogger:
    """Appends to the file at `path`, which may be that of an earlier start. Raises BadInput if it is no such table.

    An epoch that is not after the last one means that the run went back to a checkpoint: rows from there on are
    replaced, so that every epoch stands once and in order. A name not seen before becomes a new, last column.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._columns, self._last = path, dict[str, None](), -1
        self.where = str(path)
        if path.exists():
            self._write(read_rows(path))  # without what a crash left of a line

    def update(self, values: Mapping[str, float], epoch: int) -> None:
        row = {"epoch": epoch, **values}
        if epoch > self._last and row.keys() <= self._columns.keys():
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_text(self._columns, [row]))
            self._last = epoch
        else:
            earlier = read_rows(self._path) if self._last >= 0 else []
            self._write([*(old for old in earlier if old["epoch"] < epoch), row])

    def close(self) -> None:
        pass  # nothing is held between updates

    def _write(self, rows: list[Row]) -> None:
        self._columns = dict.fromkeys(name for row in rows for name in row)  # as they first appear
        self._last = int(rows[-1]["epoch"]) if rows else -1
        staged = self._path.with_suffix(".csv.tmp")
        staged.write_text(",".join(self._columns) + "\n" + _text(self._columns, rows), encoding="utf-8")
        move_into_place(staged, self._path)


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.csv in their order, each with an "epoch", without its empty cells; an unfinished last line
    is passed over. Raises BadInput, naming the line, where it is no such table.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise _bad(f"{path} ({error})") from None
    whole = [line for line in lines if line.endswith("\n")]
    columns, rows = (whole[0].strip().split(",") if whole else []), []
    if "epoch" not in columns:
        raise _bad(f"{path} without a column epoch")
    for number, cells in enumerate(csv.reader(whole[1:]), start=2):
        try:
            row = {name: float(cell) for name, cell in zip(columns, cells, strict=True) if cell}
            row["epoch"] = int(row["epoch"])
        except (ValueError, KeyError, OverflowError):
            raise _bad(f"line {number} of {path}: {','.join(cells)[:60]!r}") from None
        rows.append(row)
    return rows


def _text(columns: Iterable[str], rows: Iterable[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([f"{row[name]:.12g}" if name in row else "" for name in columns] for row in rows)
    return text.getvalue()


def _bad(found: str) -> BadInput:
    return BadInput(found, expected=f"a {NAME} that covey wrote", mend="Give a run's folder, or move it away.")
