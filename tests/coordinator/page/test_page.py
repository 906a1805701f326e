"""The status page in a real browser: what it shows is what the JSON says, of friends and of strangers."""

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

import httpx
import pytest
from chromium import DRAWN, FIRST, LEADERBOARD, ROWS, TILES, WARNED, Tab
from invented import Site

from averaging.records import PeerRecord, Rounds
from coordinator.archive import Archive, Evaluation
from coordinator.credit_ledger import Contribution, Leaderboard
from coordinator.history import History, remember
from coordinator.swarm import Peer, SwarmState


def test_the_figures_are_those_of_the_json(tab: Tab, lively_site: Site) -> None:
    tab.open(lively_site.url)
    tab.wait(FIRST, "figures")
    swarm = httpx.get(f"{lively_site.url}/api/swarm").json()
    minutes, seconds = divmod(round(swarm["seconds_to_next_epoch"]), 60)
    shown = {name: texts[0] for name, texts in tab.js(TILES).items()}
    assert shown == {
        "Epoch": f"{swarm['epoch']:,}", "Next epoch": f"in {minutes} min {seconds} s",
        "Loss": f"{swarm['loss']:.4f}", "Samples/s": f"{swarm['samples_per_second']:,.1f}",
        "Peers": str(len(swarm["peers"])), "Group size": str(swarm["group_size"]),
        "Averaged": f"{swarm['rounds']['averaged']:,}",
        "Failed": f"{swarm['rounds']['failed']:,}", "Alone": f"{swarm['rounds']['alone']:,}",
        "Joined": str(swarm["joins"]), "Left": str(swarm["departures"]["left"]),
        "Lost": str(swarm["departures"]["lost"]), "Round duration": f"{swarm['round_seconds']:.1f} s",
        "Checkpoint's age": "2 min 17 s",
        "Values": f"{swarm['refused']['value']:,}", "Absent": f"{swarm['refused']['absent']:,}",
        "Messages": f"{swarm['refused']['message']:,}"}
    assert all(float(text.split()[0].replace(",", "")) > 0 for text in shown.values() if text[0] != "i")
    since = datetime.fromtimestamp(swarm["since_seconds"]).strftime("%Y-%m-%d %H:%M")  # local, as on the page
    assert tab.text("#since") == f"Since {since}. "
    assert swarm["time_seconds"] - swarm["archive"]["time_seconds"] == 137
    assert tab.js(TILES)["Checkpoint's age"][1] == f"epoch {swarm['archive']['epoch']}"
    assert tab.js(TILES)["Next epoch"][1] == f"{swarm['epoch_samples']:,} of 65,536 samples"
    assert f"of at most {swarm['target_group_size']}" in tab.text("#tiles")
    assert [row[0] for row in tab.js(ROWS)] == sorted(peer["name"] for peer in swarm["peers"])
    assert {row[0]: row[1:] for row in tab.js(ROWS)} == {peer["name"]: _row(peer) for peer in swarm["peers"]}


def test_the_leaderboard_is_the_jsons(tab: Tab, lively_site: Site) -> None:
    tab.open(lively_site.url)
    tab.wait(f"{LEADERBOARD}.length > 0", "the leaderboard")
    swarm = httpx.get(f"{lively_site.url}/api/swarm").json()
    assert tab.js(LEADERBOARD) == [
        [str(rank), row["name"], f"{row['samples']:,}", f"{100 * row['samples'] / swarm['credited_samples']:.1f}%",
         f"{row['epochs']:,}", f"{row['flagged']:,}"] for rank, row in enumerate(swarm["leaderboard"], 1)]
    said = tab.text("#leaderboard-sums")
    assert said.startswith(f"{swarm['credited_samples']:,} samples are credited in all.")
    assert said.endswith(f": {swarm['flagged_claims']:,} in all.")


def _row(peer: dict[str, Any]) -> list[str]:
    loss = "–" if peer["loss"] is None else f"{peer['loss']:.4f}"
    return [peer["state"], f"{peer['epoch']:,}", f"{peer['samples_accumulated']:,}",
            f"{peer['samples_per_second']:,.1f}", loss, str(peer["group_size"]),
            f"{peer['round_seconds']:.1f} s" if peer["round_seconds"] else "–", str(sum(peer["refused"].values())),
            f"{peer['last_seen_seconds']:.0f} s ago", peer["device"], peer["version"], peer["mode"]]


def test_the_charts_have_the_points_of_the_history(tab: Tab, lively_site: Site) -> None:
    tab.open(lively_site.url)
    tab.wait(DRAWN, "the charts")
    history = httpx.get(f"{lively_site.url}/api/history").json()
    drawn = tab.js("document.querySelector('#chart-loss .chart').data[0].y")
    assert drawn == history["over_epochs"]["loss"]
    speeds = tab.js("document.querySelector('#chart-speed .chart').data[0].y")
    assert [speed for speed in speeds if speed is not None] == history["over_time"]["samples_per_second"]
    assert speeds.count(None) == 1  # the outage is a hole, not a line
    bars = tab.js("document.querySelector('#chart-rounds .chart').data.map((trace) => trace.y)")
    assert [sum(bar) for bar in bars] == [history["over_time"][outcome][-1]
                                          for outcome in ("averaged", "failed", "alone")]
    seconds = tab.js("document.querySelector('#chart-duration .chart').data[0].y")
    assert [value for value in seconds if value is not None] == history["over_time"]["round_seconds"]
    refused = tab.js("document.querySelector('#chart-refused .chart').data.map((trace) => trace.y)")
    assert [sum(bar) for bar in refused] == [history["over_time"][f"refused_{kind}"][-1]
                                             for kind in ("value", "absent", "message")]
    groups = tab.js("document.querySelector('#chart-group .chart').data.map((trace) => trace.y)")
    assert [size for size in groups[0] if size is not None] == history["over_time"]["group_size"]
    assert groups[1] == [4, 4]  # the target
    swarm = httpx.get(f"{lively_site.url}/api/swarm").json()
    accuracy = tab.js("document.querySelector('#chart-evaluation .chart').data.map((trace) => [trace.name, trace.y])")
    measured = [each["figures"]["knn_accuracy"] for each in swarm["archive"]["evaluations"]]
    assert accuracy == [["k-NN accuracy", measured]]
    assert f"now {100 * measured[-1]:.1f}%, lowest" in tab.text("#chart-evaluation figcaption")
    words = tab.text("#chart-loss figcaption")
    assert f"now {history['over_epochs']['loss'][-1]:.4f}, lowest {min(drawn[1:]):.4f} (epoch " in words


def test_what_was_counted_while_the_coordinator_was_away_is_spread_over_that_time(
        tab: Tab, site: Site, state: SwarmState, now: float) -> None:
    history, rounds = History(), 0
    for seconds in (*range(0, 400, 2), *range(800, 1200, 2)):
        rounds += 200 if seconds == 800 else 1
        history = remember(history, replace(state, time=now + seconds, counters=replace(
            state.counters, rounds=Rounds(averaged=rounds))))
    site.show(state, history)
    tab.open(site.url)
    tab.wait(DRAWN, "the charts")
    bars = tab.js("document.querySelector('#chart-rounds .chart').data[0].y")
    assert sum(bars) == rounds
    assert max(bars) <= 1.5 * min(bars)


def test_it_loads_nothing_from_afar_and_nothing_is_refused(tab: Tab, lively_site: Site) -> None:
    tab.open(lively_site.url)
    tab.wait(DRAWN, "the charts")
    x, y = tab.js("(({x, y, width}) => [x + width / 2, y + 80])"
                  "(document.querySelector('#chart-speed .chart').getBoundingClientRect())")
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    tab.wait("/, \\d\\d:\\d\\d/.test(document.querySelector('#chart-speed .hoverlayer').textContent)", "a chart's tip")
    hosts = {re.sub(r"^(\w+://[^/]*)/.*", r"\1", event["request"]["url"])
             for event in tab.told("Network.requestWillBeSent")}
    assert hosts - {"about:blank"} == {lively_site.url}
    assert tab.complaints() == []


HOSTILE = ("<script>window.ran = 1</script>", "<img src=x onerror='window.ran = 1'>", "</th><svg onload=window.ran=1>",
           "javascript:window.ran=1", "&lt;b&gt;${window.ran=1}")


def test_what_volunteers_sign_is_text_and_runs_nothing(tab: Tab, site: Site, state: SwarmState, now: float,
                                                       record: Callable[..., PeerRecord]) -> None:
    peers = {f"12D3{i}": Peer(record(f"12D3{i}", name=name, device=name, version=name), now)
             for i, name in enumerate(HOSTILE)}
    site.show(replace(state, peers=peers))
    site.leaderboard = Leaderboard({row.peer_id: row for row in (
        Contribution(f"12D3{i}", name, 10 - i, 1, 0) for i, name in enumerate(HOSTILE))}, 40)
    tab.open(site.url)
    tab.wait(f"{ROWS}.length === {len(HOSTILE)}", "a row for each")
    assert [row[1] for row in tab.js(LEADERBOARD)] == list(HOSTILE)
    tab.wait(DRAWN, "the charts")
    assert sorted((row[0], row[10], row[11]) for row in tab.js(ROWS)) == sorted((name,) * 3 for name in HOSTILE)
    assert tab.js("typeof window.ran") == "undefined"
    assert tab.js("document.querySelectorAll('main script, main img, main [onerror], main [onload]').length") == 0
    assert tab.complaints() == []


def test_of_very_many_peers_it_shows_the_first_and_says_so(tab: Tab, site: Site, state: SwarmState, now: float,
                                                           record: Callable[..., PeerRecord]) -> None:
    site.show(replace(state, peers={f"{i:04d}": Peer(record(f"{i:04d}"), now) for i in range(1000)}))
    tab.open(site.url)
    tab.wait(f"{ROWS}.length === 300", "rows")
    assert [tab.js(ROWS)[row][0] for row in (0, 299)] == ["0000", "0299"]
    assert tab.text("#peers-more") == "The first 300 of 1,000; the JSON has all."
    assert tab.js(TILES)["Peers"][0] == "1,000"


def test_an_empty_swarm_says_what_is_missing(tab: Tab, site: Site, now: float) -> None:
    site.show(SwarmState(time=now))
    tab.open(site.url)
    tab.wait(FIRST, "figures")
    tab.wait("document.querySelector('#chart-loss figcaption').innerText !== ''", "the history")
    page = tab.text("main")
    for missing in ("No peer is here. Start one", "no peer is here", "known after the first epoch",
                    "known after the first round", "No epoch has ended yet", "Nobody has trained yet",
                    "No peer has been here yet", "No round of averaging has ended yet.", "No group has averaged yet",
                    "No round with others has ended yet", "None so far: nothing bad was sent",
                    "none is kept here", "it runs with --archive-every-epochs 0",
                    "Nobody is credited with samples yet"):
        assert missing in page
    assert not re.search(r"NaN|undefined|null|Invalid", page)


def test_an_empty_archive_says_what_is_missing(tab: Tab, site: Site) -> None:
    site.archive = Archive()
    tab.open(site.url)
    tab.wait("document.querySelector('#chart-evaluation figcaption')?.innerText", "the history")
    assert tab.js(TILES)["Checkpoint's age"] == ["–", "there is none yet"]
    assert "started with --data DIR, or with --evaluate" in tab.text("#chart-evaluation figcaption")
    assert tab.text("#archive-error") == ""
    site.archive = Archive(last_error="disk: <b>no space</b>")
    tab.wait("!document.getElementById('archive-error').hidden", "a word on the failure")
    assert tab.text("#archive-error") == "Checkpoints: disk: <b>no space</b>"
    site.archive = Archive()
    tab.wait("document.getElementById('archive-error').hidden", "its end")
    tab.wait(DRAWN, "the charts")
    tops = tab.js("['evaluation', 'refused'].map((id) => document.getElementById(`chart-${id}`).offsetTop)")
    assert tops[0] >= tops[1]  # an empty one leaves no hole between the others


def test_small_counts_have_no_halves_on_their_axes(tab: Tab, site: Site) -> None:
    tab.open(site.url)
    tab.wait(DRAWN, "the charts")
    for name, labels in (("peers", ["0", "1", "2"]), ("group", ["0", "1", "2"])):
        assert tab.js(f"[...document.querySelectorAll('#chart-{name} .ytick')].map((tick) => tick.textContent)"
                      ) == labels


def test_figures_of_a_classifier_are_drawn_and_said(tab: Tab, site: Site) -> None:
    site.archive = Archive(epoch=2, time=site.state.time, evaluations=tuple(
        Evaluation(at, {"top1_accuracy": 0.25 * at, "top5_accuracy": 0.4 * at, "val_loss": 2.0 - at}) for at in (1, 2)))
    tab.open(site.url)
    tab.wait(DRAWN, "the charts")
    drawn = tab.js("document.querySelector('#chart-evaluation .chart').data.map((trace) => [trace.name, trace.y])")
    assert drawn == [["Top-1 accuracy", [0.25, 0.5]], ["Top-5 accuracy", [0.4, 0.8]]]
    assert tab.text("#chart-evaluation figcaption") == (
        "Top-1 accuracy: now 50.0%, lowest 25.0% (epoch 1), highest 50.0% (epoch 2). "
        "Top-5 accuracy: now 80.0%, lowest 40.0% (epoch 1), highest 80.0% (epoch 2). "
        "Loss on the validation images: now 0.0000, lowest 0.0000 (epoch 2), highest 1.0000 (epoch 1).")


def test_before_the_first_reading_it_says_so(tab: Tab, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.view.FRESH_SECONDS", -1.0)
    site.show(SwarmState())
    tab.open(site.url)
    tab.wait(WARNED, "a notice")
    assert tab.text("#notice") == "The DHT has not been read yet."


def test_an_old_reading_is_called_old(tab: Tab, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.view.FRESH_SECONDS", -1.0)
    tab.open(site.url)
    tab.wait(WARNED, "a notice")
    assert tab.text("#notice") == "The coordinator could not read the DHT lately: these figures are old."


def test_figures_and_tables_do_without_the_chart_library(tab: Tab, lively_site: Site) -> None:
    tab.call("Network.setBlockedURLs", urls=["*plotly*"])
    try:
        tab.open(lively_site.url)
        tab.wait("!document.getElementById('charts-missing').hidden", "a word on the charts")
        tab.wait(f"{ROWS}.length === 10 && {TILES}.Epoch[0] === '412'", "the figures")
        tab.wait("document.querySelector('#chart-loss figcaption').innerText.startsWith('Loss: now')", "the gist")
    finally:
        tab.call("Network.setBlockedURLs", urls=[])
