"""Invites and members as an operator sees them, out of what is known of them; names and labels are told apart."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from coordinator.facts import Facts, MemberFact

LONGEST_NAME = 64  # letters


@dataclass(frozen=True)
class Invite:
    """Times in Unix seconds; None: no end, or any number."""

    code: str
    label: str
    created: float
    expires: float | None
    uses_left: int | None
    revoked: bool
    used: int  # volunteers who have enrolled with it

    def refusal(self, now: float) -> str | None:
        """Why nobody can enrol with it at `now`; None: somebody can."""
        if self.revoked:
            return "revoked"
        if self.expires is not None and self.expires <= now:
            return "expired"
        return "used up" if self.uses_left == 0 else None


@dataclass(frozen=True)
class Member:
    """Who has enrolled. `reason`: of its ban; None: it is not banned."""

    peer_id: str
    name: str
    public_key: bytes
    invite: str  # the label of the one that it enrolled with; empty: none was needed
    enrolled: float
    renewed: float
    reason: str | None


def told_apart(wished: Iterable[tuple[str, str]]) -> dict[str, str]:
    """A name for each key: the one it wishes, unless one before it has that; then one with a number behind it."""
    wished = list(wished)
    taken, given = {name for _, name in wished}, dict[str, str]()
    held = set[str]()
    for key, name in wished:
        given[key] = free(name, taken) if name in held else name
        held.add(given[key])
        taken.add(given[key])
    return given


def free(name: str, taken: set[str]) -> str:
    """`name`, or with a number behind it, so that it is not `taken`."""
    number, given = 1, name
    while given in taken:
        number += 1
        given = f"{name[:LONGEST_NAME - len(str(number)) - 1]}-{number}"
    return given


def invites_of(facts: Facts) -> list[Invite]:
    """All, the oldest first."""
    used: dict[str, int] = {}
    for use in facts.uses.values():
        used[use.code] = used.get(use.code, 0) + 1
    made = sorted(facts.invites.values(), key=lambda fact: (fact.created, fact.code))
    labels = told_apart((fact.code, fact.label) for fact in made)
    return [Invite(fact.code, labels[fact.code], fact.created, fact.expires,
                   None if fact.uses is None else max(0, fact.uses - used.get(fact.code, 0)), fact.revoked,
                   used.get(fact.code, 0)) for fact in made]


def members_of(facts: Facts) -> Iterator[Member]:
    """All, in no order."""
    names, labels = _names(facts.members), {invite.code: invite.label for invite in invites_of(facts)}
    came_by = {use.peer_id: use.code for use in sorted(facts.uses.values(), key=lambda use: (-use.time, use.code))}
    bans = {peer_id: ban.reason for peer_id, ban in facts.bans.items() if ban.banned}
    for fact in facts.members.values():
        yield Member(fact.peer_id, names[fact.peer_id], fact.public_key, labels.get(came_by.get(fact.peer_id, ""), ""),
                     fact.enrolled, fact.renewed, bans.get(fact.peer_id))


def _names(members: Mapping[str, MemberFact]) -> dict[str, str]:
    """Who came first has its name; another with the same, from another coordinator, a number behind it."""
    return told_apart((fact.peer_id, fact.name) for fact in sorted(
        members.values(), key=lambda fact: (fact.enrolled, fact.peer_id)))
