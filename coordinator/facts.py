"""What the coordinators of one run tell each other: invites, members, bans, and where each of them is.

Each goes on while it can't reach the others; `merge` then gives all of them the same, whoever merges with whom, in
whatever order and however often. So no coordinator leads, and none need be asked.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Hashable)
Fact = TypeVar("Fact")
TICK = 0.001       # seconds; an order that follows another is later by that at least, whatever the clocks say


@dataclass(frozen=True)
class InviteFact:
    """Only `revoked` ever changes, and not back. Times here and below are in Unix seconds."""

    code: str
    label: str
    created: float
    expires: float | None  # None: never
    uses: int | None       # volunteers that may enrol with it; None: any number
    revoked: bool


@dataclass(frozen=True)
class MemberFact:
    """The newest renewal's name counts; two members may have asked two coordinators for the same one."""

    peer_id: str
    name: str
    public_key: bytes
    enrolled: float
    renewed: float


@dataclass(frozen=True)
class UseFact:
    """Somebody enrolled with an invite. Never forgotten, so that an invite's uses only grow."""

    code: str
    peer_id: str
    time: float


@dataclass(frozen=True)
class BanFact:
    """The operator's last word on a peer: banned, or let in again."""

    peer_id: str
    time: float
    banned: bool
    reason: str


@dataclass(frozen=True)
class CoordinatorFact:
    """Where a coordinator is, as it said at `time`."""

    peer_id: str
    time: float
    link: str       # without an invite
    addresses: str  # of its DHT node: multiaddresses, a space between


@dataclass(frozen=True)
class Facts:
    """What one coordinator knows. `serial`: the highest of a list of bans."""

    invites: Mapping[str, InviteFact] = field(default_factory=dict)
    members: Mapping[str, MemberFact] = field(default_factory=dict)
    uses: Mapping[tuple[str, str], UseFact] = field(default_factory=dict)
    bans: Mapping[str, BanFact] = field(default_factory=dict)
    coordinators: Mapping[str, CoordinatorFact] = field(default_factory=dict)
    serial: int = 0


def merge(one: Facts, other: Facts) -> Facts:
    """All that either knows. Commutative, associative and idempotent."""
    return Facts(invites=_united(one.invites, other.invites, _invite),
                 members=_united(one.members, other.members, _member),
                 uses=_united(one.uses, other.uses, lambda a, b: min(a, b, key=lambda use: use.time)),
                 bans=_united(one.bans, other.bans, _newer("time", "banned", "reason")),
                 coordinators=_united(one.coordinators, other.coordinators, _newer("time", "link", "addresses")),
                 serial=max(one.serial, other.serial))


def by_key(facts: Iterable[Any]) -> dict[Any, Any]:
    """Facts of one kind, as `Facts` has them."""
    return {(fact.code, fact.peer_id) if isinstance(fact, UseFact) else
            fact.code if isinstance(fact, InviteFact) else fact.peer_id: fact for fact in facts}


def _united(one: Mapping[Key, Fact], other: Mapping[Key, Fact],
            joined: Callable[[Fact, Fact], Fact]) -> dict[Key, Fact]:
    return {**one, **{key: joined(one[key], fact) if key in one else fact for key, fact in other.items()}}


def _newer(*names: str) -> Callable[[Any, Any], Any]:
    return lambda one, other: max(one, other, key=lambda fact: tuple(getattr(fact, name) for name in names))


def _invite(one: InviteFact, other: InviteFact) -> InviteFact:
    # made once, of random letters: the key is for a total order only
    kept = max(one, other, key=lambda fact: (fact.created, fact.label, inf if fact.expires is None else fact.expires,
                                             inf if fact.uses is None else fact.uses))
    return replace(kept, revoked=one.revoked or other.revoked)


def _member(one: MemberFact, other: MemberFact) -> MemberFact:
    newest = max(one, other, key=lambda fact: (fact.renewed, fact.name, fact.public_key))
    return replace(newest, enrolled=min(one.enrolled, other.enrolled))
