"""How the averaging benches print what they found."""

from collections.abc import Iterable, Sequence
from os import getloadavg
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table


def wide_console() -> Console:
    """Where tables are not folded, whatever the terminal."""
    return Console(highlight=False, width=190)


def print_table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table, and how busy the machine was: of other people's work these figures tell nothing."""
    console.print(f"[bold]{title}[/]; load average {getloadavg()[0]:.1f}", soft_wrap=True)
    table = Table(*columns, box=box.SIMPLE)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Median, and in parentheses lowest and highest."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})" if values else "none"


def verdict(values: Sequence[float], goal: float, *, at_most: bool, form: str = ".2f") -> str:
    """As `spread`, and whether the median reaches the goal."""
    reached = values and (median(values) <= goal if at_most else median(values) >= goal)
    return f"{spread(values, form)} {'reached' if reached else 'MISSED'}"
