"""The swarm's state, as a function of records and time."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from math import sqrt
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from averaging.records import ARCHIVING, PEER_STATES, PeerRecord, Refusals, Rounds, RoundSeconds
from coordinator import swarm
from coordinator.swarm import Counters, SwarmState, observe
from coordinator.view import About, Seen, view
from proto.swarm_pb2 import SwarmSnapshot

Record = Callable[..., PeerRecord]
STALE = 60.0
ABOUT = About(run_id="tiny-0", link="", version="0", target_batch_size=1, target_group_size=2, averaged="gradients")


def fold(*readings: tuple[float, list[PeerRecord]]) -> SwarmState:
    """The state after readings of (time, records)."""
    state = SwarmState()
    for time, records in readings:
        state = observe(state, records, time, stale_seconds=STALE)
    return state


# A history: each reading, some seconds after the one before, shows some of five peers in some condition.
conditions = st.fixed_dictionaries({
    "state": st.sampled_from(PEER_STATES), "epoch": st.integers(0, 5), "samples_total": st.integers(0, 100),
    "rounds": st.builds(Rounds, *[st.integers(0, 5)] * 3), "refused": st.builds(Refusals, *[st.integers(0, 5)] * 3),
    "seconds": st.builds(RoundSeconds, *[st.floats(0, 1e9)] * 2), "age": st.integers(-30, 90)})
histories = st.lists(
    st.tuples(st.integers(0, 40), st.dictionaries(st.sampled_from("abcde"), conditions)), min_size=1, max_size=12)


def readings(history: list[tuple[int, dict]], record: Record, now: float) -> list[tuple[float, list[PeerRecord]]]:
    """The history as (time, records)."""
    rows = []
    for wait, peers in history:
        now += wait
        rows.append((now, [record(peer_id, time=now - row["age"], **{key: row[key] for key in row if key != "age"})
                           for peer_id, row in peers.items()]))
    return rows


@given(histories, st.randoms())
def test_order_of_the_records_does_not_matter(record: Record, now: float, history: list, shuffler) -> None:
    rows = readings(history, record, now)
    shuffled = [(time, shuffler.sample(records, len(records))) for time, records in rows]
    assert fold(*rows) == fold(*shuffled)


@given(histories)
def test_of_records_with_one_time_the_same_wins_in_any_order(record: Record, now: float, history: list) -> None:
    pooled = [replace(entry, time=now) for _, records in readings(history, record, now) for entry in records]
    assert fold((now, pooled)) == fold((now, pooled[::-1]))


@given(histories)
def test_reading_the_same_again_changes_nothing(record: Record, now: float, history: list) -> None:
    rows = readings(history, record, now)
    assert fold(*rows) == fold(*rows, rows[-1])


@given(histories)
def test_who_joined_and_did_not_depart_is_here(record: Record, now: float, history: list) -> None:
    rows = readings(history, record, now)
    for length in range(1, len(rows) + 1):
        state = fold(*rows[:length])
        assert state.joins - state.left - state.lost == len(state.peers)
        assert not state.peers.keys() & state.gone.keys()
        assert list(state.peers) == sorted(state.peers)


@given(histories)
def test_counters_never_go_down(record: Record, now: float, history: list) -> None:
    rows = readings(history, record, now)
    states = [fold(*rows[:length]) for length in range(1, len(rows) + 1)]
    for before, after in pairwise(states):
        assert all(late >= early for early, late in zip(before.counters.amounts, after.counters.amounts, strict=True))
        assert (after.joins, after.left, after.lost) >= (before.joins, before.left, before.lost)


def test_seconds_are_not_rounded_down() -> None:
    so_far, same = (Counters(seconds=RoundSeconds(seconds, 0.0)) for seconds in (966675195.1, 107066629.0))
    assert so_far.seconds.averaged + 107066629.0 - 107066629.0 < so_far.seconds.averaged
    assert so_far.grown(same, same) == so_far


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.data())
def test_readings_that_are_missed_lose_no_samples(record: Record, now: float, gains: list[int], data) -> None:
    totals = [sum(gains[:length + 1]) for length in range(len(gains))]
    seen = data.draw(st.sets(st.integers(0, len(totals) - 1))) | {len(totals) - 1}
    rows = [(now + 5 * i, [record("a", time=now + 5 * i, samples_total=totals[i])]) for i in sorted(seen)]
    assert fold(*rows).counters.samples == totals[-1]


def test_nothing_read_is_an_empty_swarm(now: float) -> None:
    state = fold((now, []))
    assert (state.peers, state.epoch, state.epoch_samples, state.loss, state.group_size) == ({}, 0, 0, None, 0)


def test_samples_count_towards_the_highest_epoch_only(record: Record, now: float) -> None:
    state = fold((now, [record("a", epoch=4, samples_accumulated=10), record("b", epoch=4, samples_accumulated=7),
                        record("c", epoch=3, samples_accumulated=100)]))
    assert (state.epoch, state.epoch_samples) == (4, 17)


def test_a_leaving_peer_brings_no_samples_and_no_speed(record: Record, now: float) -> None:
    state = fold((now, [record("a", samples_accumulated=10, samples_per_second=5.0),
                        record("b", samples_accumulated=7, samples_per_second=3.0, state="leaving")]))
    assert (state.epoch_samples, state.samples_per_second, len(state.peers)) == (10, 5.0, 2)


def test_loss_is_weighted_by_speed_over_those_that_have_one(record: Record, now: float) -> None:
    state = fold((now, [record("a", loss=1.0, samples_per_second=30.0), record("b", loss=5.0, samples_per_second=10.0),
                        record("c", loss=None, samples_per_second=99.0)]))
    assert state.loss == pytest.approx(2.0)


def test_loss_of_peers_without_a_speed_is_their_mean(record: Record, now: float) -> None:
    still = [record(name, loss=loss, samples_per_second=0.0) for name, loss in (("a", 1.0), ("b", 3.0))]
    assert fold((now, still)).loss == pytest.approx(2.0)


def test_group_size_is_the_largest_of_the_last_rounds(record: Record, now: float) -> None:
    assert fold((now, [record("a", group_size=2), record("b", group_size=5), record("c")])).group_size == 5


def test_a_rounds_duration_is_the_median_of_those_that_were_held(record: Record, now: float) -> None:
    held = [record(name, round_seconds=seconds) for name, seconds in (("a", 2.0), ("b", 3.0), ("liar", 9e8), ("c", 0))]
    assert fold((now, held)).round_seconds == 3.0
    assert fold((now, [record("a")])).round_seconds is None


def test_no_lie_is_too_large_to_be_carried(record: Record, now: float) -> None:
    most = 2**63 - 1
    liars = [record(name, samples_total=most, samples_accumulated=most, group_size=2**16 - 1, round_seconds=9e8,
                    rounds=Rounds(most, most, most), refused=Refusals(most, most, most)) for name in "abc"]
    snapshot = SwarmSnapshot(**view(Seen(fold((now, liars))), ABOUT))
    assert (snapshot.samples_total, snapshot.epoch_samples, snapshot.refused.value) == (most, most, most)


def test_counters_go_on_when_a_worker_restarts(record: Record, now: float) -> None:
    state = fold((now, [record("a", samples_total=100, rounds=Rounds(4, 1, 0), seconds=RoundSeconds(8.0, 30.0),
                               refused=Refusals(value=2))]),
                 (now + 9, [record("a", time=now + 9, samples_total=30, rounds=Rounds(1, 0, 0),
                                   seconds=RoundSeconds(2.5), refused=Refusals(absent=1))]),
                 (now + 19, [record("a", time=now + 19, samples_total=35, rounds=Rounds(2, 0, 0),
                                    seconds=RoundSeconds(4.0), refused=Refusals(absent=1))]))
    assert state.counters.samples == 135
    assert (state.counters.seconds, state.counters.refused) == (RoundSeconds(12.0, 30.0), Refusals(2, 1, 0))
    assert state.counters.rounds == Rounds(6, 1, 0)
    assert (state.joins, state.lost) == (1, 0)


def test_one_counter_that_fell_shows_that_all_began_anew(record: Record, now: float) -> None:
    state = fold((now, [record("a", samples_total=10, rounds=Rounds(3, 0, 0))]),
                 (now + 9, [record("a", time=now + 9, samples_total=12, rounds=Rounds(0, 0, 0))]))
    assert state.counters.samples == 22


def test_a_peer_that_said_so_has_left(record: Record, now: float) -> None:
    bye = record("a", state="leaving", time=now + 5)
    state = fold((now, [record("a")]), (now + 5, [bye]))
    assert len(state.peers) == 1
    state = observe(state, [bye], now + 16, stale_seconds=STALE)
    assert (len(state.peers), state.left, state.lost) == (0, 1, 0)


def test_a_peer_that_fell_silent_is_lost(record: Record, now: float) -> None:
    state = fold((now, [record("a")]), (now + STALE, []), (now + STALE + 1, []))
    assert (len(state.peers), state.left, state.lost) == (0, 0, 1)


def test_a_record_that_one_reading_misses_is_no_departure(record: Record, now: float) -> None:
    state = fold((now, [record("a", samples_total=50)]), (now + 20, []), (now + 40, [record("a", samples_total=50)]))
    assert (len(state.peers), state.joins, state.lost, state.counters.samples) == (1, 1, 0, 50)


def test_a_left_peers_last_record_does_not_bring_it_back(record: Record, now: float) -> None:
    bye, old = record("a", state="leaving", time=now + 5), record("a")
    state = fold((now, [old]), (now + 5, [bye]), (now + 16, [bye]), (now + 17, [old]), (now + 18, [bye]))
    assert (len(state.peers), state.joins, state.left) == (0, 1, 1)


@pytest.mark.parametrize(("last", "total"), [
    pytest.param("leaving", 100 + 150, id="left: another worker, which counts from 0"),
    pytest.param("training", 150, id="lost: the same worker, which counts on")])
def test_what_a_returning_peer_counts(record: Record, now: float, last: str, total: int) -> None:
    state = fold((now, [record("a", samples_total=100, state=last)]), (now + 70, []),
                 (now + 80, [record("a", time=now + 80, samples_total=150)]))
    assert (state.counters.samples, state.joins, len(state.peers)) == (total, 2, 1)


def test_an_old_copy_from_another_node_is_no_restart(record: Record, now: float) -> None:
    old, new = record("a", samples_total=10), record("a", samples_total=90, time=now + 30)
    state = fold((now, [old]), (now + 30, [new]), (now + 31, [old]))
    assert (state.counters.samples, state.peers["a"].record) == (90, new)


def test_a_clock_set_back_loses_a_peer_but_not_for_ever(record: Record, now: float) -> None:
    after = record("a", time=now - 1000)
    state = fold((now, [record("a")]), (now + 30, [after]))
    assert state.peers["a"].record.time == now
    state = observe(state, [after], now + 61, stale_seconds=STALE)
    assert state.peers["a"].record == after


def test_a_clock_that_is_wrong_does_no_harm_after_first_sight(record: Record, now: float) -> None:
    slow = [(now + t, [record("a", time=now + t - 50)]) for t in (0, 20)]
    assert fold(*slow, (now + 75, [])).peers.keys() == {"a"}  # heard 55 s ago, whatever its clock says


def test_a_record_from_the_future_does_not_live_longer(record: Record, now: float) -> None:
    ahead = record("a", time=now + 86_400)
    state = fold((now, [ahead]), (now + STALE + 1, [ahead]))
    assert (len(state.peers), state.lost) == (0, 1)


def test_what_was_over_before_we_looked_never_was_here(record: Record, now: float) -> None:
    state = fold((now, [record("a", time=now - STALE - 1), record("b", state="leaving", time=now - 11)]))
    assert (len(state.peers), state.joins, state.left, state.lost) == (0, 0, 0, 0)


def test_an_empty_swarm_remembers_its_epoch(record: Record, now: float) -> None:
    assert fold((now, [record("a", epoch=9)]), (now + 90, [])).epoch == 9


def test_an_epoch_that_no_live_peer_claims_is_past(record: Record, now: float) -> None:
    newcomer = record("b", epoch=2, time=now + 90)
    assert fold((now, [record("a", epoch=9)]), (now + 90, [newcomer])).epoch == 2


def test_only_so_many_of_the_gone_are_remembered(record: Record, now: float, monkeypatch) -> None:
    monkeypatch.setattr(swarm, "REMEMBERED", 2)
    records = [record(name, time=now) for name in "abc"]
    late = replace(records[0], time=now + 1)
    state = fold((now, records), (now + 1, [late]), (now + STALE + 0.5, []), (now + STALE + 2, []))
    assert (list(state.gone), state.lost) == (["c", "a"], 3)


def test_the_distance_from_consensus_is_that_of_the_newest_epochs_sketches(
        record: Record, now: float) -> None:
    def sketch(first: float) -> bytes:
        return pack("<32f8x", first, *[0.0] * 31)

    records = [record("a", epoch=7, sketch=sketch(1.0)), record("b", epoch=7, sketch=sketch(4.0)),
               record("c", epoch=7, sketch=sketch(-2.0)), record("late", epoch=6, sketch=sketch(100.0)),
               record("mute", epoch=7), record("odd", epoch=7, sketch=b"1234"),
               record("liar", epoch=7, sketch=sketch(float("nan")))]
    state = fold((now, records))
    assert state.consensus_distance == pytest.approx(sqrt((0 + 9 + 9) / 3))
    assert fold((now, records[:1])).consensus_distance is None


def test_an_archive_is_no_peer_of_the_swarm(record: Record, now: float) -> None:
    state = fold((now, [record("a", epoch=3), record("archive", state=ARCHIVING, epoch=40, samples_total=99)]))
    assert (state.peers.keys(), state.epoch, state.joins, state.counters.samples) == ({"a"}, 3, 1, 0)
    assert fold((now, [record("archive", state=ARCHIVING, epoch=40)])).epoch == 0
