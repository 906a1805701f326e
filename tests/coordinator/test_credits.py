"""Credits as a pure function of receipts: they sum to what was averaged, and who lies gets no more than others saw."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from averaging.receipts import Receipt
from coordinator.credits import ABOVE, TWICE, Credit, credits

MOST = 1000
GROUP, OTHER = b"g" * 16, b"h" * 16
EVERYBODY = [f"peer{number}" for number in range(8)]


def written(*words: tuple[str, Mapping[str, int]], epoch: int = 0, group: bytes = GROUP) -> dict[str, list[Receipt]]:
    """By who says what of a round."""
    receipts: dict[str, list[Receipt]] = defaultdict(list)
    for writer, accepted in words:
        receipts[writer].append(Receipt(epoch, group, accepted))
    return receipts


def credited(receipts: Mapping[str, list[Receipt]], members: list[str] = EVERYBODY) -> dict[str, int]:
    return {peer: credit.samples for (_, peer), credit in
            credits(receipts, members=members, most_samples=MOST).items()}


def flags(receipts: Mapping[str, list[Receipt]]) -> dict[str, str]:
    return {peer: credit.flag for (_, peer), credit in
            credits(receipts, members=EVERYBODY, most_samples=MOST).items() if credit.flag}


TRUE = {"peer0": 10, "peer1": 20, "peer2": 30}


@given(st.data())
def test_credits_sum_to_the_samples_of_all_groups_of_all_epochs(data: st.DataObject) -> None:
    truth, receipts = 0, defaultdict[str, list[Receipt]](list)
    for epoch in range(data.draw(st.integers(1, 4))):
        order = data.draw(st.permutations(EVERYBODY))
        size = data.draw(st.integers(2, 4))
        for first in range(0, len(order) - 1, size):
            group = order[first:first + size]
            if len(group) > 1:
                accepted = {peer: data.draw(st.integers(0, MOST)) for peer in group}
                truth += sum(accepted.values())
                for peer in group:
                    receipts[peer].append(Receipt(epoch, bytes([epoch, first]) * 8, accepted))
    found = credits(receipts, members=EVERYBODY, most_samples=MOST)
    assert sum(credit.samples for credit in found.values()) == truth
    assert not any(credit.flag for credit in found.values())


def test_who_claims_more_than_its_group_saw_gets_what_it_saw_and_is_flagged() -> None:
    receipts = written(("peer0", TRUE | {"peer0": 900}), ("peer1", TRUE), ("peer2", TRUE))
    assert credited(receipts) == TRUE
    assert flags(receipts) == {"peer0": ABOVE}


def test_who_claims_less_gets_less_and_is_not_flagged() -> None:
    receipts = written(("peer0", TRUE | {"peer0": 3}), ("peer1", TRUE), ("peer2", TRUE))
    assert credited(receipts) == TRUE | {"peer0": 3}
    assert not flags(receipts)


def test_of_several_others_one_liar_neither_adds_nor_takes_away() -> None:
    four = TRUE | {"peer3": 40}
    for lie in (0, 999):
        receipts = written(*((peer, four) for peer in ("peer0", "peer1", "peer2")), ("peer3", four | {"peer0": lie}))
        assert credited(receipts) == four
        assert not flags(receipts)


def test_in_a_group_of_two_the_others_word_stands() -> None:
    receipts = written(("peer0", {"peer0": 10, "peer1": 20}), ("peer1", {"peer0": 4, "peer1": 20}))
    assert credited(receipts) == {"peer0": 4, "peer1": 20}
    assert flags(receipts) == {"peer0": ABOVE}


def test_more_than_counts_in_a_round_is_not_credited_whoever_confirms_it() -> None:
    huge = {"peer0": MOST + 1, "peer1": 20}
    receipts = written(("peer0", huge), ("peer1", huge))
    assert credited(receipts) == {"peer0": MOST, "peer1": 20}
    assert flags(receipts) == {"peer0": ABOVE}


@pytest.mark.parametrize("receipts", [
    written(("peer0", {"peer0": 10})),                                    # a round of one
    written(("peer0", {"peer0": 10, "peer1": 20})),                       # the other has not written
    written(("peer0", {"peer0": 10, "peer1": 20}), ("peer1", {"peer1": 20})),   # the other does not name it
    written(("peer0", {"peer0": 10}), ("peer1", {"peer0": 10, "peer1": 20})),   # it does not name the other
    written(("peer0", {"peer0": 10, "peer9": 1}), ("peer9", {"peer0": 10, "peer9": 1})),  # who is no member
    written(("peer0", {"peer0": 10, "peer1": 20}), ("peer1", {"peer0": 10})),   # who does not name itself
    written(("peer0", {"peer1": 5, "peer2": 7}), ("peer3", {"peer1": 9})),      # in others' names
    written(("peer0", {"peer0": 0, "peer1": 0}), ("peer1", {"peer0": 0, "peer1": 0}))])  # auxiliaries
def test_what_nobody_confirms_brings_nothing(receipts: dict[str, list[Receipt]]) -> None:
    assert credited(receipts) == {}


def test_of_a_member_that_was_averaged_and_died_before_it_wrote_nothing_is_credited_but_the_others_are() -> None:
    assert credited(written(("peer0", TRUE), ("peer1", TRUE))) == {"peer0": 10, "peer1": 20}


def test_an_auxiliary_is_a_witness() -> None:
    group = {"peer0": 10, "peer1": 0}
    assert credited(written(("peer0", group), ("peer1", group))) == {"peer0": 10}


def test_the_word_of_who_is_banned_does_not_count() -> None:
    receipts = written(*((peer, TRUE) for peer in TRUE))
    assert credited(receipts, ["peer0", "peer1"]) == {"peer0": 10, "peer1": 20}
    assert credited(receipts, ["peer0"]) == {}


def test_who_says_two_things_of_one_round_is_not_heard_on_it() -> None:
    receipts = written(*((peer, TRUE) for peer in TRUE), ("peer2", TRUE | {"peer0": 1}))
    assert credited(receipts) == {"peer0": 10, "peer1": 20}


def test_the_same_receipt_twice_counts_once() -> None:
    assert credited(written(*((peer, TRUE) for peer in TRUE), *((peer, TRUE) for peer in TRUE))) == TRUE


def test_in_two_groups_of_one_epoch_one_counts_and_it_is_flagged() -> None:
    two, three = {"peer0": 10, "peer1": 20}, {"peer0": 12, "peer2": 30, "peer3": 40}
    receipts = written(*((peer, two) for peer in two))
    for peer, told in written(*((peer, three) for peer in three), group=OTHER).items():
        receipts[peer] += told
    assert credited(receipts) == {"peer0": 12, "peer1": 20, "peer2": 30, "peer3": 40}
    assert flags(receipts) == {"peer0": TWICE}


def test_another_group_that_names_a_volunteer_changes_nothing_of_it() -> None:
    receipts = written(*((peer, TRUE) for peer in TRUE))
    invented = {"peer0": 1, "peer5": 900, "peer6": 900, "peer7": 900}
    for peer in ("peer5", "peer6", "peer7"):
        receipts[peer].append(Receipt(0, OTHER, invented))
    found = credited(receipts)
    assert {peer: found[peer] for peer in TRUE} == TRUE
    assert not flags(receipts)


def test_ranks_are_a_total_order() -> None:
    base = Credit(0, "peer0", GROUP, 10, 10, 1)
    worse_to_better = [replace(base, samples=11, claimed=11), base, replace(base, group_id=OTHER),
                       replace(base, flag=ABOVE), replace(base, witnesses=2)]
    for order in permutations(worse_to_better):
        assert sorted(order, key=lambda credit: credit.rank) == worse_to_better
