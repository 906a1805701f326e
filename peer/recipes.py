"""`covey recipes`: what can be trained, and one recipe with every option's value and meaning."""

import json
from collections.abc import Sequence
from functools import reduce
from importlib.resources import files

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from averaging.experiment import Experiment, load_experiment
from training.config import options, recipe_names


def recipes_table() -> Table:
    """Every recipe that ships with covey, with the first line of its comment."""
    table = Table("recipe", "what it trains", box=None)
    for name in recipe_names():
        table.add_row(name, Text(_summary(name)))
    return table


def _summary(name: str) -> str:
    first = files("training.recipes").joinpath(f"{name}.toml").read_text().partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def options_list(recipe: str, overrides: Sequence[str]) -> Group:
    """The recipe with overrides laid over it: every option, its value and its meaning. Raises BadInput."""
    experiment = load_experiment(recipe, overrides)
    return Group(*(line for key, field in options(type(experiment)) for line in (
        Text(f"{key} = {_value(experiment, key)}", style="bold"),
        Padding(Text(field.description or ""), (0, 0, 0, 4), expand=False))))


def _value(experiment: Experiment, key: str) -> str:
    return json.dumps(reduce(getattr, key.split("."), experiment))
