"""The status page in a real browser: on a phone, in the dark, by keyboard and by screen reader."""

from dataclasses import replace
from itertools import pairwise

import pytest
from chromium import DRAWN, FIRST, TILES, Tab
from invented import Site, credited
from processes import until

from coordinator.swarm import SwarmState

# Every text whose contrast with the colour behind it is below WCAG's 4.5, those in the charts included.
FAINT = """(() => {
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const colour = (text) => text.match(/[\\d.]+/g).map(Number);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const [r, g, b, alpha = 1] = colour(getComputedStyle(element).backgroundColor);
      if (alpha === 1) return [r, g, b];
    }
  };
  return [...document.querySelectorAll("body *")].filter((e) => [...e.childNodes]
      .some((n) => n.nodeType === 3 && n.data.trim()) && e.getClientRects().length && !e.closest("noscript"))
    .map((e) => {
      const style = getComputedStyle(e);
      const [a, b] = [light(colour(e instanceof SVGElement ? style.fill : style.color).slice(0, 3)), light(behind(e))];
      return [e.textContent.slice(0, 40), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
    }).filter(([, contrast]) => contrast < 4.5);
})()"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1200])
def test_it_fits_and_can_be_read_on_a_phone_in_light_and_dark(tab: Tab, lively_site: Site, width: int,
                                                              dark: bool) -> None:
    tab.look(width, 800, dark=dark, phone=width < 500)
    tab.open(lively_site.url)
    tab.wait(DRAWN, "the charts")
    assert tab.js("document.documentElement.scrollWidth") <= width
    brightness = tab.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(brightness) < 128 * 3) is dark
    assert tab.js(FAINT) == []


def test_a_screen_reader_finds_its_way(tab: Tab, lively_site: Site) -> None:
    tab.open(lively_site.url)
    tab.wait(DRAWN, "the charts")
    tree = tab.call("Accessibility.getFullAXTree")["nodes"]
    found = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]]
    names = {role: [name for kind, name in found if kind == role] for role, _ in found}
    assert len(names["main"]) == len(names["banner"]) == len(names["status"]) == 1
    assert {"Now", "So far", "Peers", "Leaderboard", "Rounds and churn", "Join"} <= set(names["region"])
    assert set(names["image"]) == {"Loss over epochs", "Evaluation over epochs", "Samples per second", "Peers",
                                   "Group size against its target", "Rounds by outcome",
                                   "Duration of rounds, in seconds", "Contributions refused"}
    assert len(names["columnheader"]) == 13 + 6
    assert len(names["rowheader"]) == 10 + 7
    levels = tab.js("[...document.querySelectorAll('h1, h2, h3')].map((heading) => +heading.tagName[1])")
    assert levels[0] == 1
    assert all(late <= early + 1 for early, late in pairwise(levels))


def test_it_announces_epochs_and_not_every_reading(tab: Tab, site: Site, state: SwarmState) -> None:
    tab.open(site.url)
    tab.wait(FIRST, "figures")
    tab.js("""window.said = [];
        new MutationObserver(() => said.push(document.getElementById("announcement").textContent))
          .observe(document.getElementById("announcement"), {childList: true, characterData: true, subtree: true})""")
    for joins in (7, 8):
        site.show(replace(state, joins=joins))
        tab.wait(f"{TILES}.Joined[0] === '{joins}'", "the new reading")
    site.show(replace(state, epoch=8))
    tab.wait("window.said.length > 0", "an announcement")
    assert tab.js("window.said") == ["Epoch 8, loss 2.5000, 2 peers"]


def test_all_that_can_be_used_is_reached_by_keyboard_and_shows_it(tab: Tab, site: Site) -> None:
    site.leaderboard = credited()
    tab.open(site.url)
    tab.wait("!document.getElementById('peers').hidden", "the table")
    reached = []
    for _ in range(6):
        for kind in ("keyDown", "keyUp"):
            tab.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        assert tab.js("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2
        reached.append(tab.js("document.activeElement.id || document.activeElement.innerText"))
    assert reached == ["JSON", "history", "metrics", "peers", "leaderboard", "copy"]
    tab.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    until(lambda: tab.text("#copy") in ("Copied", "Selected"), "a word that it was copied")
    assert tab.js("String(getSelection())") == f"covey join {site.about.link}"
