"""The status page in a real browser: it changes without reloading, and is right again after an outage."""

import re
from dataclasses import replace

import pytest
from chromium import FIRST, LIVE, TILES, WARNED, Tab
from invented import Site
from processes import until

import coordinator.events
from coordinator.swarm import SwarmState
from coordinator.view import About


def test_figures_change_without_reloading(tab: Tab, site: Site, state: SwarmState) -> None:
    tab.open(site.url)
    tab.wait(FIRST, "figures")
    tab.js("window.mark = document.querySelector('#peers tbody tr')")
    site.show(replace(state, epoch=8, joins=7))
    tab.wait(f"{TILES}.Epoch[0] === '8' && {TILES}.Joined[0] === '7'", "the new epoch", seconds=5)
    assert tab.js("window.mark.isConnected")  # the page is the same one, and so is the row


def test_it_is_right_again_after_an_outage(tab: Tab, about: About, state: SwarmState) -> None:
    site = Site(about, state)
    with site.served():
        tab.open(site.url)
        tab.wait(f"{FIRST} && {LIVE}", "figures")
        tab.js("window.mark = true")
    tab.wait(WARNED, "a notice")
    assert re.fullmatch(r"The coordinator does not answer: these figures are \d+ s old\.", tab.text("#notice"))
    assert tab.js(f"{TILES}.Epoch[0]") == "7"  # what was known stays
    site.show(replace(state, epoch=9))
    with site.served():
        tab.wait(f"!({WARNED}) && {LIVE} && {TILES}.Epoch[0] === '9'", "the new figures", seconds=10)
        assert tab.js("window.mark")


def test_a_viewer_too_many_is_served_by_reading_the_json(
        tab: Tab, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator.events, "MOST_VIEWERS", 0)
    tab.open(site.url)
    tab.wait(f"{FIRST} && document.getElementById('connection').innerText.includes('many watch')", "figures, polled")
    assert tab.js(f"{TILES}.Epoch[0]") == "7"
    monkeypatch.undo()
    tab.wait(LIVE, "a live connection as soon as there is a place", seconds=20)


def test_a_connection_that_fell_silent_is_said_to_be_and_is_made_anew(tab: Tab, site: Site) -> None:
    tab.open(site.url)
    tab.wait(f"{FIRST} && {LIVE}", "figures")
    site.silent = True
    tab.wait(WARNED, "a notice")
    tab.wait(LIVE, "what a new connection says first", seconds=30)
    asked = [event["request"]["url"] for event in tab.told("Network.requestWillBeSent")]
    assert asked.count(f"{site.url}/api/events") == 2


def test_who_does_not_look_holds_no_connection_and_sees_the_newest_on_coming_back(tab: Tab, site: Site,
                                                                                  state: SwarmState) -> None:
    tab.open(site.url)
    tab.wait(f"{FIRST} && {LIVE}", "figures")
    until(lambda: site.viewers == 1, "a viewer")
    tab.js(SEEN % "true")
    until(lambda: site.viewers == 0, "nobody who follows")
    site.show(replace(state, epoch=8))
    tab.js(SEEN % "false")
    tab.wait(f"{TILES}.Epoch[0] === '8' && {LIVE}", "the newest figures", seconds=8)


SEEN = """Object.defineProperty(document, "hidden", {value: %s, configurable: true});
          document.dispatchEvent(new Event("visibilitychange"))"""
