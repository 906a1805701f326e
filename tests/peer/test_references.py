"""docs/references.md: every option of the reference documents is accepted, or refused with the reason it states."""

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from averaging.experiment import load_experiment
from peer.cli import app
from training.errors import BadInput

TABLE = Path(__file__).parents[2] / "docs" / "references.md"
NOWHERE = ("not in this version: ", "none: ")  # no such option, and why


def rows() -> Iterator[tuple[str, str, str]]:
    """(document, option there, what stands here) of every row."""
    for line in TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and len(cells) == 3 and cells[0] in set("VDIL"):
            yield cells[0], cells[1], cells[2]


ROWS = list(rows())
PLACES = ("python: ", "script: ")  # no recipe's option: a function, a file
ACCEPTED = [here for _, _, here in ROWS if not here.startswith(("refused:", "`covey ", *PLACES, *NOWHERE))]
REFUSED = [here for _, _, here in ROWS if here.startswith("refused:")]
FLAGS = [here for _, _, here in ROWS if here.startswith("`covey ")]
PLACED = [here for _, _, here in ROWS if here.startswith(PLACES)]


def test_all_four_documents_are_covered() -> None:
    assert {document for document, _, _ in ROWS} == set("VDIL")
    assert len(ROWS) >= 100
    assert len(ACCEPTED) + len(REFUSED) + len(FLAGS) + len(PLACED) >= len(ROWS) - 4


@pytest.mark.parametrize("here", ACCEPTED)
def test_an_option_is_accepted(here: str) -> None:
    recipe, *overrides = here.strip("`").split()
    load_experiment(recipe, overrides)


@pytest.mark.parametrize("here", REFUSED)
def test_an_option_is_refused_with_the_reason(here: str) -> None:
    match = re.fullmatch(r"refused: `([^`]+)`, (.+)", here)
    assert match
    recipe, *overrides = match[1].split()
    with pytest.raises(BadInput) as refused:
        load_experiment(recipe, overrides)
    assert match[2] in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("here", FLAGS)
def test_an_option_is_a_flag_of_a_command(here: str) -> None:
    _, command, *flags = here.strip("`").split()
    commands: Any = typer.main.get_command(app)
    known = {flag for parameter in commands.commands[command].params for flag in parameter.opts}
    assert set(flags) <= known


@pytest.mark.parametrize("here", PLACED)
def test_what_is_elsewhere_is_there(here: str) -> None:
    kind, place = here.split(": ")
    if kind == "script":
        assert (TABLE.parents[1] / place.strip("`")).is_file()
    else:
        module, _, name = place.strip("`").rpartition(".")
        assert callable(getattr(import_module(module), name))


@pytest.mark.parametrize("name", sorted({here.strip("`").split()[0] for here in ACCEPTED}))
def test_every_named_recipe_explains_itself(name: str) -> None:
    text = (TABLE.parents[1] / "training" / "recipes" / f"{name}.toml").read_text()
    assert text.startswith("# ")
