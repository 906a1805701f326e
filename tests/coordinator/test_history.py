"""The history stays within its bounds and still spans the run."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from averaging.records import Rounds
from coordinator.history import CAPACITY, History, columns, remember
from coordinator.swarm import Counters, Peer, SwarmState

WEEK = 7 * 24 * 3600


def told(states: Iterable[SwarmState]) -> History:
    history = History()
    for state in states:
        history = remember(history, state)
    return history


def test_a_point_has_the_figures_of_its_reading(state: SwarmState, now: float) -> None:
    series = columns(told([state]))["over_time"]
    assert {name: values for name, values in series.items() if name != "width"} == {
        "time": [now], "epoch": [7], "loss": [2.5], "samples_per_second": [40.0], "peers": [2], "group_size": [2],
        "consensus_distance": [None], "averaged": [5], "failed": [1], "alone": [2], "round_seconds": [2.5],
        "refused_value": [3], "refused_absent": [1], "refused_message": [0]}


def test_a_week_of_readings_is_seen_whole_and_evenly(now: float) -> None:
    every = 60.0  # seconds; a tenth of the readings, for the test's sake
    history = told(SwarmState(time=now + i * every, epoch=i // 10) for i in range(int(WEEK / every)))
    times = [point.time for point in history.over_time.points]
    assert CAPACITY / 2 < len(times) <= CAPACITY
    assert (times[0] - now, times[-1] - now) == (pytest.approx(0, abs=history.over_time.width), WEEK - every)
    steps = [late - early for early, late in pairwise(times)]
    assert max(steps[:-1]) <= history.over_time.width + every
    epochs = [point.epoch for point in history.over_epochs.points]
    assert len(epochs) <= CAPACITY
    assert (epochs[0], epochs[-1]) == (pytest.approx(0, abs=history.over_epochs.width), WEEK // 600 - 1)


def test_a_young_run_keeps_every_reading_and_every_epoch(now: float) -> None:
    history = told(SwarmState(time=now + i, epoch=i // 2) for i in range(100))
    assert [point.time - now for point in history.over_time.points] == list(range(100))
    assert [point.epoch for point in history.over_epochs.points] == list(range(50))


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 2**63 - 1)), max_size=300))
def test_whatever_clocks_and_peers_say_points_are_in_order_and_the_newest_is_there(
        readings: list[tuple[int, int]]) -> None:
    history = told(SwarmState(time=float(time), epoch=epoch) for time, epoch in readings)
    times, epochs = [p.time for p in history.over_time.points], [p.epoch for p in history.over_epochs.points]
    assert times == sorted(set(times))
    assert epochs == sorted(set(epochs))
    if readings:
        assert float(readings[-1][0]) in times
        assert readings[-1][1] in epochs


def test_of_an_epoch_the_newest_reading_stays(state: SwarmState) -> None:
    later = replace(state, time=state.time + 5, peers={}, counters=Counters(0, Rounds(averaged=9)))
    points = told([state, later]).over_epochs.points
    assert [(point.epoch, point.averaged, point.loss) for point in points] == [(7, 9, None)]


def test_an_epoch_that_only_a_liar_claimed_is_not_shown_when_it_is_gone(state: SwarmState) -> None:
    lie = replace(state, epoch=10**9, time=state.time + 1)
    assert columns(told([state, lie, replace(state, time=state.time + 2)]))["over_epochs"]["epoch"] == [7]


def test_its_memory_does_not_grow_with_the_peers(state: SwarmState, now: float) -> None:
    many = {f"peer{i}": Peer(replace(peer.record, peer_id=f"peer{i}"), now)
            for i, peer in enumerate(list(state.peers.values()) * 50)}
    assert columns(told([replace(state, peers=many)]))["over_time"]["peers"] == [100]
