"""Who meets whom: the partition is fair and mixes; lagging, absent and forged-looking records don't mislead."""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from averaging.config import Averaging
from averaging.records import ARCHIVING, PeerRecord
from averaging.roster import group_of, known, majority, members, next_reading, partition, standing, telling_period

CONFIG = Averaging(target_batch_size=1000, target_group_size=4, min_refresh_period=0.5, default_refresh_period=3.0,
                   max_refresh_period=10.0)

LATER = 200.0  # long after the records were written


def record(peer_id: str, **fields: object) -> PeerRecord:
    plain = PeerRecord(peer_id=peer_id, name=peer_id, state="training", epoch=5, samples_accumulated=0,
                       samples_total=0, samples_per_second=0.0, loss=None, group_size=0, version="0", device="cpu",
                       client_mode=False, time=100.0)
    return replace(plain, **fields)  # type: ignore[arg-type]


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.sets(st.text(max_size=5), max_size=60), st.text(max_size=5), st.integers(2, 9))
def test_partition_is_fair_and_nobody_is_alone(peers: set[str], key: str, size: int) -> None:
    groups = partition(peers, key=key, target_group_size=size)
    assert sorted(peer for group in groups for peer in group) == sorted(peers)
    sizes = [len(group) for group in groups]
    assert max(sizes, default=0) - min(sizes, default=0) <= 1
    assert max(sizes, default=0) <= max(size, 3)
    assert len(peers) < 2 or min(sizes) >= 2
    if size >= 3:
        assert len(groups) == -(-len(peers) // size)  # as few as can be


def test_seven_peers_in_groups_of_three() -> None:
    groups = partition("abcdefg", key="gradients/1", target_group_size=3)
    assert sorted(map(len, groups)) == [2, 2, 3]


def test_an_odd_peer_joins_a_pair() -> None:
    assert sorted(map(len, partition("abc", key="", target_group_size=2))) == [3]


def test_order_and_repetition_of_the_peers_do_not_matter() -> None:
    assert (partition("abcdefgh", key="x", target_group_size=3)
            == partition("hgfedcbaabc", key="x", target_group_size=3))


def test_groups_mix_from_epoch_to_epoch() -> None:
    met = Counter[tuple[str, ...]]()
    for epoch in range(400):
        for group in partition("abcdef", key=f"gradients/{epoch}", target_group_size=3):
            met.update(combinations(group, 2))
    # two of six, in groups of three, meet in 2 of 5 epochs
    assert len(met) == 15
    assert all(count == pytest.approx(160, abs=40) for count in met.values())  # four standard deviations


def test_group_of_is_the_same_for_all_its_members() -> None:
    for peer in "abcdefg":
        group = group_of(peer, "abcdefg", key="k", target_group_size=3)
        assert peer in group
        assert all(group_of(other, "abcdefg", key="k", target_group_size=3) == group for other in group)


def test_group_of_takes_this_peer_in_even_if_nobody_knows_it_yet() -> None:
    assert group_of("z", "ab", key="k", target_group_size=3) == ("a", "b", "z")


def test_members_are_in_the_epoch_or_one_beside_it_or_have_written_lately() -> None:
    records = [record("a"), record("lagging", epoch=4), record("behind", epoch=3), record("ahead", epoch=6),
               record("far ahead", epoch=7), record("lately", epoch=1, time=LATER - 19.0),
               record("starting", state="starting"), record("leaving", state="leaving"),
               record("helper", auxiliary=True), record("client", client_mode=True)]
    assert members(records, "me", 5, known_before=1, now=LATER) == (
        "a", "ahead", "client", "helper", "lagging", "lately", "me")


def test_a_swarm_that_dwindles_is_known_as_it_is() -> None:
    """Nine peers, of whom two die in each epoch: at no time did more than half of those vanish who were there."""
    alive, dead, before = [f"p{number}" for number in range(9)], [], frozenset[str]()
    for epoch in range(5, 9):
        records = [record(peer, epoch=epoch) for peer in alive] + [record(peer, epoch=at) for peer, at in dead]
        before = known(records, "p0", epoch, before, LATER)
        assert members(records, "p0", epoch, known_before=len(before), now=LATER) != ("p0",)
        dead += [(alive.pop(), epoch), (alive.pop(), epoch)]


def test_newcomers_do_not_make_those_who_train_a_minority() -> None:
    records = [record("a"), record("me"), *(record(f"new{n}", state="starting", epoch=0) for n in range(9)),
               *(record(f"behind{n}", epoch=0) for n in range(9))]
    assert known(records, "me", 5, frozenset({"a", "me"}), LATER) == {"a", "me"}


def test_who_is_cut_off_remembers_the_others_until_their_records_expire_or_they_leave() -> None:
    others = [record(f"p{n}", epoch=5) for n in range(5)]
    before = known([*others, record("me")], "me", 5, frozenset(), LATER)
    for epoch in range(6, 20):  # trains alone, and hears of nobody
        before = known([*others, record("me", epoch=epoch)], "me", epoch, before, LATER)
    assert len(before) == 6
    assert members([*others, record("me", epoch=19)], "me", 19, known_before=len(before), now=LATER) == ("me",)
    assert known([record("p0", epoch=5, state="leaving"), record("me", epoch=20)], "me", 20, before, LATER) == {"me"}


@pytest.mark.parametrize(("there", "known_before", "alone"), [
    (3, 6, False), (2, 6, True), (2, 4, False), (1, 2, False)])
def test_a_small_part_of_the_swarm_does_not_average(there: int, known_before: int, alone: bool) -> None:
    records = [record(f"p{number}") for number in range(there)]
    found = members(records, "p0", 5, known_before=known_before, now=LATER)
    assert found == (("p0",) if alone else tuple(f"p{number}" for number in range(there)))


def test_standing_reckons_with_what_was_gathered_since_the_record() -> None:
    records = [record("me", samples_accumulated=7), record("a", samples_accumulated=100, samples_per_second=10.0),
               record("b", samples_accumulated=50, samples_per_second=4.0, time=98.0)]
    there = standing(records, "me", 5, 20, now=103.0)  # own samples are those handed in
    assert (there.samples, there.peers, there.epoch) == (20 + 130 + 70, 3, 5)


def test_a_silent_peer_is_not_reckoned_to_gather_for_ever() -> None:
    silent = record("a", samples_accumulated=100, samples_per_second=10.0)
    assert standing([silent], "me", 5, 0, now=1e6, longest_seconds=20.0).samples == 300


def test_a_clock_that_is_ahead_does_not_take_samples_away() -> None:
    assert standing([record("a", samples_accumulated=100, samples_per_second=10.0, time=200.0)],
                    "me", 5, 0, now=100.0).samples == 100


def test_only_samples_towards_the_same_epoch_count() -> None:
    records = [record("a", samples_accumulated=100, epoch=6), record("b", samples_accumulated=100, epoch=4)]
    there = standing(records, "me", 5, 1, now=100.0)
    assert (there.samples, there.peers, there.epoch) == (1, 3, 6)


def test_who_does_not_train_counts_for_nothing_in_the_standing() -> None:
    records = [record("a", auxiliary=True, samples_accumulated=9, epoch=9), record("b", state="leaving", epoch=9)]
    there = standing(records, "me", 5, 1, now=100.0)
    assert (there.samples, there.peers, there.epoch) == (1, 1, 5)


def test_an_archive_counts_for_nothing_but_what_it_has() -> None:
    archive = record("archive", state=ARCHIVING, epoch=6, samples_accumulated=9, samples_per_second=9.0, sketch=b"x",
                     time=LATER)
    records = [record("me", sketch=b"y"), record("a", sketch=b"y"), archive]
    there = standing(records, "me", 5, 1, LATER)
    assert (there.samples, there.peers, there.epoch, there.archived, there.minority) == (1, 2, 5, 6, False)
    assert members(records, "me", 5, known_before=1, now=LATER) == ("a", "me")
    assert known(records, "me", 5, frozenset(), LATER) == {"a", "me"}
    assert majority(records, 6) == (b"", ())
    assert next_reading([record("me"), archive], "me", CONFIG, LATER) == CONFIG.default_refresh_period


def test_readings_come_closer_towards_the_end_of_the_epoch() -> None:
    def seconds(samples: int) -> float:
        others = [record("me"), record("a", samples_accumulated=samples, samples_per_second=50.0)]
        return next_reading(others, "me", CONFIG, 100.0)

    assert seconds(0) == pytest.approx(10.0)    # 20 s are left
    assert seconds(600) == pytest.approx(4.0)   # 8 s
    assert seconds(999) == seconds(1000) == CONFIG.min_refresh_period


@pytest.mark.parametrize(("others", "seconds"), [
    ([], 3.0), ([record("a", auxiliary=True)], 3.0), ([record("a")], 10.0), ([record("a", epoch=6)], 0.5)])
def test_readings_of_the_lone_the_slow_and_the_late(others: list[PeerRecord], seconds: float) -> None:
    assert next_reading([record("me"), *others], "me", CONFIG, 100.0) == seconds


@pytest.mark.parametrize(("peers", "seconds"), [(1, 0.5), (4, 0.5), (8, 1.0), (64, 8.0), (80, 10.0), (1000, 10.0)])
def test_in_a_larger_swarm_each_tells_less_often_within_bounds(peers: int, seconds: float) -> None:
    assert telling_period(peers, CONFIG) == seconds


def test_majority_is_more_than_half_of_those_who_tell() -> None:
    records = [record("a", sketch=b"x"), record("b", sketch=b"x"), record("c", sketch=b"y"), record("d"),
               record("e", sketch=b"z", epoch=4), record("f", sketch=b"y", state="leaving"),
               record("g", sketch=b"y", auxiliary=True)]
    assert majority(records, 5) == (b"x", ("a", "b"))


@pytest.mark.parametrize("sketches", [[], [b""], [b"x", b"y"], [b"x", b"x", b"y", b"y"], [b"x", b"x", b"y", b"z"]])
def test_no_majority_is_no_sketch(sketches: list[bytes]) -> None:
    assert majority([record(str(number), sketch=sketch) for number, sketch in enumerate(sketches)], 5) == (b"", ())


@pytest.mark.parametrize(("own", "others", "minority"), [
    (b"mine", [b"theirs", b"theirs"], True),
    (b"theirs", [b"theirs", b"theirs"], False),
    (b"mine", [b"theirs", b"other"], False),
    (b"mine", [b"theirs"], False),
    (b"", [b"theirs", b"theirs"], False),
])
def test_a_minority_is_whoever_differs_from_what_more_than_half_have(own: bytes, others: list[bytes],
                                                                     minority: bool) -> None:
    records = [record("me", sketch=own), *(record(f"p{number}", sketch=sketch) for number, sketch in enumerate(others))]
    assert standing(records, "me", 5, 0, 100.0).minority == minority
    assert not standing(records, "me", 6, 0, 100.0).minority  # what it was an epoch ago says nothing
