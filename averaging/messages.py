"""What the members of a round are, what they say to each other, and what the round's machine asks of the transport."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RoundId:
    """One meeting of the swarm; every peer takes part in one group of it."""

    kind: str
    epoch: int


@dataclass(frozen=True)
class Layout:
    """What a member's vector holds, in this order, and how that travels. All numbers are of values."""

    tensors: int = 0
    buffers: int = 0
    state: int = 0                    # only there where members' fingerprints differ
    compression: str = "none"         # of tensors
    state_compression: str = "none"   # of buffers and state

    @property
    def values(self) -> int:
        """In all."""
        return self.tensors + self.buffers + self.state

    def sections(self, *, with_state: bool) -> list[tuple[int, str]]:
        """(values, codec) of what is averaged. No scale is shared between them."""
        return [(values, codec) for values, codec in (
            (self.tensors, self.compression), (self.buffers, self.state_compression),
            (self.state if with_state else 0, self.state_compression)) if values]


NOTHING = Layout()


@dataclass(frozen=True)
class Member:
    """What one peer brings. The transport has verified the statement that it comes from."""

    peer_id: str
    weight: float                                   # capped by the signed statement
    mode: Literal["node", "client", "auxiliary"]    # client: reduces nothing, never leads; auxiliary: only reduces
    fingerprint: bytes                              # of its state
    layout: Layout                                  # NOTHING of an auxiliary
    statement: bytes                                # signed; opaque here, travels with the proposal
    samples: int = 0                                # that went into what it brings; capped as the weight is


@dataclass(frozen=True)
class Timing:
    """Deadlines of one round, in seconds: at least these, scaled up from measured round-trip times by the transport."""

    join_seconds: float     # that a leader waits for a member that has not said that it is coming
    longest_join_seconds: float  # ... for one that has (it is in the midst of a micro-batch)
    answer_seconds: float   # for an answer, and for a vote
    average_seconds: float  # for the all-reduce
    resolve_seconds: float  # for the answers of the others once the leader is lost


Status = Literal["undecided", "committed", "aborted", "unknown"]


@dataclass(frozen=True)
class Message:
    """What members say to each other; each goes one way, in a call of its own that is acknowledged."""

    round: RoundId
    attempt: int


@dataclass(frozen=True)
class Join(Message):
    """To the leader: here I am."""

    member: Member


@dataclass(frozen=True)
class Call(Message):
    """Come to this round, and join `leader` (mostly the sender)."""

    leader: str


@dataclass(frozen=True)
class Coming(Message):
    """In answer to Call, Join or Ask: my trainer is not here yet, but in about so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Late(Message):
    """Do not count on me: I take no further part, or my group is closed; `taken` are in it."""

    taken: tuple[str, ...]


@dataclass(frozen=True)
class Elsewhere(Message):
    """I follow this leader."""

    leader: str


@dataclass(frozen=True)
class GroupMessage(Message):
    """About one group."""

    group_id: bytes  # 16 bytes: name_group


@dataclass(frozen=True)
class Propose(GroupMessage):
    """The leader's group: begin to average. Supersedes its proposals of smaller `serial` in this attempt."""

    serial: int
    members: tuple[Member, ...]  # sorted by peer id


@dataclass(frozen=True)
class Refuse(GroupMessage):
    """To the leader: I will not take part in this group."""

    reason: str


@dataclass(frozen=True)
class Complete(GroupMessage):
    """To the leader, a vote: whether my average is complete, and if not, whose fault it is as seen from here."""

    ok: bool
    blamed: tuple[str, ...]


@dataclass(frozen=True)
class Decide(GroupMessage):
    """The leader's decision; `excluded` are left out of the next attempt, `echo` asks for a Tell in answer."""

    commit: bool
    excluded: tuple[str, ...]
    echo: bool


@dataclass(frozen=True)
class Ask(GroupMessage):
    """How did this group end? (To one's leader: are you still there? With an empty group_id: no group yet.)"""


@dataclass(frozen=True)
class Tell(GroupMessage):
    """How this group ended for me."""

    status: Status
    excluded: tuple[str, ...]  # whom I leave out of the next attempt


@dataclass(frozen=True)
class Send:
    """Call `receiver` with `message`; if that fails or is not acknowledged in answer_seconds, tell `undelivered`."""

    receiver: str
    message: Message


@dataclass(frozen=True)
class Average:
    """Start the all-reduce of this group. Data of it may arrive a little earlier than this action, or later."""

    group_id: bytes
    members: tuple[Member, ...]  # sorted by peer id, this peer included
    with_state: bool
    attempt: int


@dataclass(frozen=True)
class StopAveraging:
    """Give this group's all-reduce up; `averaged` is not expected any more (and ignored)."""

    group_id: bytes


Action = Send | Average | StopAveraging
