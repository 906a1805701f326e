"""A short version of `python -m benchmarks.coordinator_load`: real processes, records through the DHT, viewers by HTTP.

How fast and how cheap it is, the benchmark prints; here it has to be right.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

VOLUNTEERS, VIEWERS = 200, 10
GROWTH_BYTES = 96 << 20  # of all the coordinator's processes, first readings included


@pytest.fixture(scope="module")
def load() -> Any:
    arguments = ["--minutes", "0.15", "--epoch", "5", "--volunteers", str(VOLUNTEERS), "--viewers", str(VIEWERS)]
    ended = subprocess.run([sys.executable, "-m", "benchmarks.coordinator_load", "--json", *arguments], check=False,
                           cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout)


@pytest.mark.timeout(300)
def test_all_volunteers_are_seen(load: Any) -> None:
    assert load["seen"] == VOLUNTEERS


def test_all_viewers_are_shown_the_figures_and_rows_of_the_json(load: Any) -> None:
    assert load["right"]
    assert load["event_bytes"] > 0


def test_it_is_scraped_meanwhile_and_its_memory_stays_within_bounds(load: Any) -> None:
    assert load["scrapes"]
    assert max(load["memory"]) - load["memory"][0] < GROWTH_BYTES
