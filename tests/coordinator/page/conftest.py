"""A browser, and an invented swarm's page for it."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from chromium import CHROMIUM, Tab, chromium_tab
from invented import TARGET, Site, credited, kept, lively

from coordinator.swarm import SwarmState
from coordinator.view import About


@pytest.fixture(scope="module")
def browser() -> Iterator[Tab]:
    if not CHROMIUM:
        pytest.skip("needs Debian's chromium, which is not installed")
    with chromium_tab() as tab:
        yield tab


@pytest.fixture
def tab(browser: Tab) -> Iterator[Tab]:
    """A desktop's window, light."""
    browser.look(1200, 900)
    yield browser
    browser.open("about:blank")


@pytest.fixture
def site(about: About, state: SwarmState) -> Iterator[Site]:
    """A swarm of two."""
    site = Site(about, state)
    with site.served():
        yield site


@pytest.fixture
def lively_site(about: About) -> Iterator[Site]:
    """A swarm of ten with a past."""
    state, history = lively()
    site = Site(replace(about, target_batch_size=TARGET, target_group_size=4), state, history, kept(state.time),
                credited())
    with site.served():
        yield site
