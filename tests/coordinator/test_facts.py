"""What two coordinators that were apart make of each other's facts: the same, whoever asks whom, in whatever order."""

from dataclasses import replace
from functools import reduce
from itertools import permutations

from drawn_facts import FACTS
from hypothesis import given
from hypothesis import strategies as st

from coordinator.facts import BanFact, Facts, InviteFact, MemberFact, UseFact, by_key, merge
from coordinator.members import invites_of, members_of, told_apart


@given(FACTS, FACTS)
def test_it_does_not_matter_who_merges_with_whom(one: Facts, other: Facts) -> None:
    assert merge(one, other) == merge(other, one)


@given(FACTS, FACTS, FACTS)
def test_nor_in_what_order_three_meet(one: Facts, two: Facts, three: Facts) -> None:
    assert merge(merge(one, two), three) == merge(one, merge(two, three))


@given(FACTS, FACTS)
def test_nor_how_often(one: Facts, other: Facts) -> None:
    assert merge(one, one) == one
    both = merge(one, other)
    assert merge(both, other) == both == merge(both, one)


@given(FACTS)
def test_who_knows_nothing_learns_everything(one: Facts) -> None:
    assert merge(Facts(), one) == one


@given(st.lists(FACTS, min_size=3, max_size=3))
def test_what_the_operator_sees_is_the_same_everywhere(three: list[Facts]) -> None:
    seen = [(invites_of(known), sorted(members_of(known), key=lambda member: member.peer_id))
            for known in (reduce(merge, order) for order in permutations(three))]
    assert all(other == seen[0] for other in seen)


@given(FACTS, FACTS)
def test_nothing_that_only_grows_shrinks(one: Facts, other: Facts) -> None:
    both = merge(one, other)
    assert both.serial >= one.serial
    assert all(both.invites[code].revoked for code, invite in one.invites.items() if invite.revoked)
    used = {invite.code: invite.used for invite in invites_of(both)}
    assert all(used[invite.code] >= invite.used for invite in invites_of(one))
    assert all(both.members[peer].renewed >= member.renewed for peer, member in one.members.items())


@given(FACTS)
def test_no_two_members_are_called_the_same_and_no_two_invites(known: Facts) -> None:
    names = [member.name for member in members_of(known)]
    labels = [invite.label for invite in invites_of(known)]
    assert (len(set(names)), len(set(labels))) == (len(names), len(labels))


# -- by example --

INVITE = InviteFact("code", "for one", 0.0, None, 1, revoked=False)


def member(peer_id: str, name: str, *, enrolled: float, renewed: float | None = None) -> MemberFact:
    return MemberFact(peer_id, name, b"", enrolled, enrolled if renewed is None else renewed)


def test_an_invite_for_one_that_two_used_apart_is_used_up_and_both_stay() -> None:
    here, there = (Facts(invites=by_key([INVITE]), uses=by_key([UseFact("code", peer, 1.0)]),
                         members=by_key([member(peer, peer, enrolled=1.0)])) for peer in ("QmA", "QmB"))
    both = merge(here, there)
    assert [(invite.used, invite.uses_left) for invite in invites_of(both)] == [(2, 0)]
    assert [(seen.peer_id, seen.invite) for seen in members_of(both)] == [("QmA", "for one"), ("QmB", "for one")]


def test_an_invite_that_was_revoked_anywhere_is_revoked() -> None:
    revoked = replace(INVITE, revoked=True)
    assert merge(Facts(invites=by_key([INVITE])), Facts(invites=by_key([revoked]))).invites["code"].revoked


def test_of_two_with_one_name_who_came_first_keeps_it() -> None:
    here = Facts(members=by_key([member("QmB", "ada", enrolled=1.0)]))
    there = Facts(members=by_key([member("QmA", "ada", enrolled=2.0)]))
    assert {seen.peer_id: seen.name for seen in members_of(merge(here, there))} == {"QmB": "ada", "QmA": "ada-2"}


def test_a_number_that_somebody_has_already_is_passed_over() -> None:
    assert told_apart([("1", "ada"), ("2", "ada"), ("3", "ada-2"), ("4", "ada")]) == {
        "1": "ada", "2": "ada-3", "3": "ada-2", "4": "ada-4"}


def test_the_last_order_counts_and_the_last_name() -> None:
    banned, lifted = BanFact("QmA", 1.0, True, "spam"), BanFact("QmA", 2.0, False, "")
    assert merge(Facts(bans=by_key([lifted])), Facts(bans=by_key([banned]))).bans["QmA"] == lifted
    first, renewed = member("QmA", "ada", enrolled=1.0), member("QmA", "grace", enrolled=3.0, renewed=4.0)
    assert merge(Facts(members=by_key([renewed])), Facts(members=by_key([first]))).members["QmA"] == replace(
        renewed, enrolled=1.0)
