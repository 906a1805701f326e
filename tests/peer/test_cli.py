"""The command line where nothing is wrong."""

import json
import subprocess
import sys
from pathlib import Path

from fake_coordinator import experiment, reply_of, serve

from averaging.version import VERSION

ROOT = Path(__file__).parents[2]


def covey(*arguments: str) -> str:
    """What `covey ARGUMENTS` prints."""
    return subprocess.run([sys.executable, "-m", "peer.cli", *arguments], cwd=ROOT, capture_output=True, text=True,
                          check=True, timeout=60).stdout


def test_help_names_the_commands_that_work() -> None:
    text = covey("--help")
    for command in ("demo", "coordinator", "join", "status", "leave", "train", "evaluate", "export", "plot",
                    "shards", "recipes"):
        assert f" {command} " in text


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, peer.cli; print(*{'torch', 'hivemind', 'grpc', 'uvloop', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "\n"


def test_the_version_is_the_package_s() -> None:
    assert covey("--version") == f"{VERSION}\n"


def test_recipes_are_listed() -> None:
    assert "demo" in covey("recipes")


def test_a_recipe_shows_every_option_with_overrides_laid_over_it() -> None:
    text = covey("recipes", "demo", "loss.temperature=0.25", "averaging.target_batch_size=1024")
    assert "loss.temperature = 0.25\n" in text
    assert "averaging.target_batch_size = 1024\n" in text
    assert "averaging.target_group_size = " in text


def test_status_without_peers_is_no_error() -> None:
    assert "no peers of yours" in covey("status")
    assert json.loads(covey("status", "--json")) == {"peers": []}


def test_status_with_a_link_shows_the_swarm() -> None:
    reply = reply_of(experiment("synthetic"))
    with serve(reply) as served:
        link = served.link()
        table, one, several = covey("status", link), covey("status", link, "--json"), covey(
            "status", link, "--json", "--watch")
    assert "ada" in table
    assert json.loads(one)["peers"][0]["loss"] == 2.5
    assert [json.loads(line)["epoch"] for line in several.splitlines()] == [0, 1, 2]
