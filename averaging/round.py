"""A round of averaging, as a pure machine: events and the time go in, actions come out (no tensors, no sockets).

Finding each other. Who leads is the first in the order of a hash, among those that a member knows of. All others Join;
when all whom the leader expects are there, or given up, it Proposes the group, and everybody begins to average: two
message delays. What members know of the swarm may differ: a leader takes in whoever joins while there is room, calls
whoever has not joined, and gives way to a leader before it in the order that it hears of. Whoever has joined it goes
there when it says so, or is silent: its proposal may be on its way, and who is called by one that comes back would be
missed in it. While its leader has not answered, a member may enter the group of another whom it has joined: that
leader may be lost. And who has given a leader up that was but slow still enters its group, with all who would lose it.

All or nothing. Votes (Complete) go to the leader; if all are yes it tells everybody to commit, and commits itself once
one other has, which it hears by an echo. So no member commits unless every average was complete, and while the leader
lives its word is all there is. Who has voted yes and loses the leader asks all others: one who has committed decides
it; if there is none, nobody can have, since whoever is asked takes the leader's word alone no more, and the leader,
should it live, gets no echo but the news. So all abort, and try once more without the leader. One member that crashes,
or is stopped for however long, at any step, therefore leaves the others, and itself when it goes on, agreed. Only if
answers are lost too can one commit and another abort: whoever committed may then be out of everybody's reach.

After an abort the members try again, under another leader, without those at fault.

Bounds. From the last member's `start` on, an attempt takes a member at most longest_join + join + 2 average + 3 answer
+ resolve seconds, twice the average only where the leader lives and waits for a member that averages still; a leader
that dies is replaced at once, one that is stopped after answer_seconds and a quarter. Time is that for which this
process runs: `now` stands still while it is stopped, and it reads what has come meanwhile before it gives others up.

What is not defended against: a member that lies in its vote, or about others' ends, can spoil rounds, and have a peer
commit what others abort (the sketch in the progress records shows it), but it can't alter a mean, a weight or a group.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from hashlib import sha256
from math import inf, isfinite
from typing import Any

from averaging.messages import (
    NOTHING,
    Action,
    Ask,
    Average,
    Call,
    Coming,
    Complete,
    Decide,
    Elsewhere,
    GroupMessage,
    Join,
    Late,
    Member,
    Message,
    Propose,
    Refuse,
    RoundId,
    Send,
    Status,
    StopAveraging,
    Tell,
    Timing,
)

PROBES = 4         # signs of life that are asked for in answer_seconds
FIRST_CALL = 1 / 50  # of answer_seconds: before it most have joined of themselves
BLAMING = 1 / 10   # of answer_seconds, after a no, for others to say whose fault it is
MOST_MOVES = 4     # from one leader to another, in an attempt
MOST_EARLY = 64    # messages kept for later
MOST_GROUPS = 64   # remembered for those who ask


@dataclass(frozen=True)
class RoundOutcome:
    """How the round ended for this peer."""

    committed: bool
    group_id: bytes = b""            # of the group that committed
    members: tuple[Member, ...] = ()  # of it, sorted by peer id
    with_state: bool = False
    silent: tuple[str, ...] = ()     # members that committed, if they live, but did not answer at the end
    reason: str = ""                 # why not committed, for people


def with_state(members: Sequence[Member]) -> bool:
    """Whether a group averages its state: there is some, and the fingerprints of those who have it differ."""
    contributors = [member for member in members if member.mode != "auxiliary"]
    fingerprints = {member.fingerprint for member in contributors}
    return any(member.layout.state for member in contributors) and len(fingerprints) > 1


class Stage(Enum):
    """Where a member is in the round. In doubt: it may neither commit nor abort by itself."""

    WAITING = auto()    # for `start`
    FOLLOWING = auto()  # has joined a leader, and waits for its proposal
    GATHERING = auto()  # leads, and waits for members
    AVERAGING = auto()
    FAILED = auto()     # the average will not be complete here or elsewhere: a follower waits for the decision, the
                        # leader a moment for more votes, so as to know whose fault it is
    VOTED = auto()      # a follower in doubt: its average is complete, it waits for the decision
    COUNTING = auto()   # the leader, whose average is complete, waits for the others' votes
    ANNOUNCED = auto()  # the leader in doubt: all votes are yes, it has told them to commit, and waits for an echo
    RESOLVING = auto()  # a follower in doubt who asks all others, because the leader is lost to one of them
    ENDED = auto()


@dataclass(frozen=True)
class Group:
    """A proposal that was made, or accepted, here."""

    group_id: bytes
    serial: int
    leader: str
    members: tuple[Member, ...]

    @cached_property
    def ids(self) -> tuple[str, ...]:
        return tuple(member.peer_id for member in self.members)


def name_group(round: RoundId, attempt: int, serial: int, leader: str, members: Sequence[Member]) -> bytes:
    """16 bytes that no other group has: who can say them knows of the same members, with the same statements."""
    digest = sha256(f"{round.kind}/{round.epoch}/{attempt}/{serial}/{leader}".encode())
    for member in members:
        digest.update(sha256(member.peer_id.encode()).digest() + sha256(member.statement).digest())
    return digest.digest()[:16]


class Round:
    """One member's part in a round. The transport feeds it events and carries out the actions, in their order.

    Call `tick` at `deadline`; when `outcome` is there it is final, and `received` still answers those who ask.
    `group`: whom this peer expects to meet, itself included or not. `clients`: those among them known to be in client
    mode, who never lead. `capacity`: the most members that a group may have. `attempts`: to average, at least one.
    """

    def __init__(self, me: Member, round: RoundId, group: Collection[str], timing: Timing, now: float, *,
                 capacity: int, attempts: int = 2, clients: Collection[str] = ()) -> None:
        self.round, self.stage, self.attempt = round, Stage.WAITING, 0
        self.outcome: RoundOutcome | None = None
        self._me, self._timing, self._now = me, timing, now
        self._capacity, self._attempts = capacity, attempts
        self._clients = {*clients, me.peer_id} if me.mode == "client" else set(clients) - {me.peer_id}
        self._view = {me.peer_id, *group}      # who may be in this attempt's group
        self._excluded: set[str] = set()       # from this attempt and later ones
        self._followers: set[str] = set()      # who said that they follow another in this attempt
        self._leader, self._leader_lives = "", False  # it lives: it has answered
        self._joined: dict[str, Member] = {}   # to this peer, itself included once it leads
        self._has_joined: set[str] = set()     # whom this peer joined, in this attempt
        self._expected: dict[str, float] = {}  # by the leader, who has not joined yet: until when
        self._group: Group | None = None
        self._met: tuple[str, ...] = ()        # the members of the group that committed
        self._serial = 0
        self._is_running = False               # the all-reduce
        self._votes: dict[str, Complete] = {}  # at the leader
        self._answers: dict[str, Status] = {}  # while announced or resolving; "unknown": no answer to be had
        self._ended: dict[bytes, Tell] = {}    # groups, and how
        self._early: list[tuple[str, Message]] = []
        self._moves = 0                        # from one leader to another that lives too
        self._has_called = self._is_leaving = self._is_reading = False
        self._lost: set[str] = set()           # not to be met in this attempt
        self._own_vote: Complete | None = None
        self._began = now                      # the attempt
        self._until = self._probe = inf        # the stage ends; whoever is waited for is asked for a sign of life
        self._actions: list[Action] = []

    @property
    def deadline(self) -> float | None:
        """When to call `tick`."""
        first = min(self._until, self._probe, *self._expected.values(), inf)
        return first if first < inf else None

    # -- events --

    def start(self, now: float) -> list[Action]:
        """The trainer is here: look for the group. Messages that came early are best handed in before."""
        self._now = now
        self._enter(0, self._view)
        return self._take_actions()

    def received(self, sender: str, message: Message, now: float) -> list[Action]:
        """`sender` is whom the connection authenticated; the statements in Join and Propose are verified already."""
        self._now = now
        if message.round == self.round and sender != self._me.peer_id and 0 <= message.attempt < self._attempts:
            self._hear(sender, message)
        return self._take_actions()

    def undelivered(self, receiver: str, message: Message, now: float) -> list[Action]:
        """The call failed, or was not acknowledged within answer_seconds."""
        self._now = now
        self._lose(receiver, message)
        return self._take_actions()

    def averaged(self, group_id: bytes, complete: bool, blamed: Sequence[str], now: float) -> list[Action]:
        """The all-reduce ended here. `blamed`: who sent bad data, fell silent or broke the connection; not who
        stopped in good order because of another's fault."""
        self._now = now
        if self._group and self._group.group_id == group_id and self._is_running:
            self._is_running = False
            self._vote(complete, tuple(blamed))
        return self._take_actions()

    def cancel(self, now: float) -> list[Action]:
        """The trainer gives the meeting up: leave at once, or, in doubt, when the group has ended."""
        self._now = now
        self._is_leaving = True
        match self.stage:
            case Stage.WAITING | Stage.GATHERING:
                self._end("given up here")
            case Stage.FOLLOWING:
                self._say(self._leader, Late, taken=())
                self._end("given up here")
            case Stage.AVERAGING | Stage.FAILED | Stage.COUNTING if self._leads:
                self._decide_to_abort("given up here", {self._me.peer_id})
            case Stage.AVERAGING:
                self._say(self._leader, Complete, group_id=self._current.group_id, ok=False, blamed=())
                self._abort("given up here")
            case Stage.FAILED:
                self._abort("given up here")
        return self._take_actions()

    def tick(self, now: float) -> list[Action]:
        """To be called at `deadline`, or any time."""
        self._now = now
        if now >= self._probe:
            self._probe = now + self._timing.answer_seconds / PROBES
            self._ask_for_signs_of_life()
        if late := [peer for peer, until in self._expected.items() if now >= until]:
            self._drop(*late)
        if now >= self._until:
            self._run_out()
        return self._take_actions()

    # -- time --

    def _ask_for_signs_of_life(self) -> None:
        """Whoever is dead or stopped will not acknowledge this."""
        group_id = self._group.group_id if self._group else b""
        match self.stage:
            case Stage.FOLLOWING:
                self._say(self._leader, Ask, group_id=b"")
            case Stage.GATHERING:
                for peer in sorted(self._expected):
                    self._say(peer, Call, leader=self._me.peer_id)
            case Stage.VOTED | Stage.FAILED if not self._leads:
                self._say(self._leader, Ask, group_id=group_id)
            case Stage.COUNTING | Stage.ANNOUNCED:
                for peer in self._others:
                    if peer not in (self._votes if self.stage is Stage.COUNTING else self._answers):
                        self._say(peer, Ask, group_id=group_id)
            case _:
                self._probe = inf

    def _run_out(self) -> None:
        """The stage has taken its time."""
        match self.stage:
            case Stage.FOLLOWING if self._now >= self._latest_group:
                self._say(self._leader, Late, taken=())
                self._end("no group came about in time")
            case Stage.FOLLOWING:
                self._drop(self._leader)
            case Stage.GATHERING:
                self._drop(*self._expected)
            case Stage.AVERAGING:
                self._stop_averaging()
                self._vote(False, ())
            case Stage.FAILED if self._leads:
                self._decide_to_abort("an average was not complete")
            case Stage.FAILED:
                self._abort("an average was not complete", {self._leader})
            case Stage.COUNTING:
                self._decide_to_abort("votes are missing", set(self._others) - self._votes.keys())
            case Stage.VOTED:
                self._resolve()
            case Stage.ANNOUNCED:
                self._commit()
            case Stage.RESOLVING:
                self._answers = {peer: self._answers.get(peer, "unknown") for peer in self._others}
                self._conclude()

    def _lose(self, peer: str, message: Message) -> None:
        """`message` did not get to `peer`."""
        if self.stage in (Stage.FOLLOWING, Stage.GATHERING):
            if message.attempt == self.attempt and peer in self._view:
                self._drop(peer)
            return
        if peer not in self._others or getattr(message, "group_id", None) != self._current.group_id:
            return
        match self.stage:
            case Stage.AVERAGING if isinstance(message, Propose):
                self._propose_without(peer)
            case Stage.FAILED | Stage.COUNTING if self._leads:
                self._decide_to_abort(f"{peer} is lost", {peer})
            case Stage.ANNOUNCED if not isinstance(message, Ask):
                self._probe = self._now  # ask: it may have heard, or have given up
            case Stage.ANNOUNCED | Stage.RESOLVING:
                self._answers[peer] = "unknown"
                self._conclude()
            case Stage.VOTED if peer == self._leader:
                self._resolve(peer)
            case Stage.FAILED if peer == self._leader:
                self._abort("the leader is lost", {peer})

    # -- finding each other --

    def _enter(self, attempt: int, view: set[str]) -> None:
        self.attempt, self._view, self._began = attempt, view, self._now
        self._followers, self._joined, self._has_joined, self._lost = set(), {}, set(), set()
        self._serial = self._moves = 0
        self._has_called = False
        self._is_reading = True
        self._choose()
        early, self._early = self._early, []
        for sender, message in early:
            self._hear(sender, message)
        self._is_reading = False
        if self.stage is Stage.GATHERING:
            self._propose_if_all_are_here()

    def _choose(self) -> None:
        """Follow the best who can lead, or lead."""
        best = self._best()
        if len(self._view) == 1 or not best:
            self._end("nobody else is there" if len(self._view) == 1 else "nobody is there who could lead")
        elif best == self._me.peer_id:
            self._gather()
        else:
            self._follow(best)

    def _best(self) -> str:
        able = self._view - self._clients
        return min(able - self._followers or able, key=self._rank, default="")

    def _rank(self, peer: str) -> bytes:
        """Who leads changes from round to round, and with the attempt."""
        return sha256(f"{self.round.kind}/{self.round.epoch}/{self.attempt}/{peer}".encode()).digest()

    def _follow(self, leader: str) -> None:
        for peer in self._joined.keys() - {self._me.peer_id, leader}:
            self._say(peer, Elsewhere, leader=leader)
        self.stage, self._leader, self._leader_lives, self._expected = Stage.FOLLOWING, leader, False, {}
        self._joined.pop(self._me.peer_id, None)
        self._joined.pop(leader, None)
        self._has_joined.add(leader)
        self._until = min(self._now + self._timing.join_seconds, self._latest_group)
        self._probe = self._now + self._timing.answer_seconds / PROBES
        self._say(leader, Join, member=self._me)

    def _gather(self) -> None:
        self.stage, self._leader = Stage.GATHERING, self._me.peer_id
        soon = self._now + self._timing.join_seconds
        self._until = min(max(self._began + self._timing.longest_join_seconds, soon), self._latest_group)
        self._probe = self._now + self._timing.answer_seconds * FIRST_CALL
        came, self._joined = self._joined, {self._me.peer_id: self._me}
        for peer, member in came.items():
            if self._has_room_for(peer):
                self._view.add(peer)
                self._joined[peer] = member
        self._expected = dict.fromkeys(self._view - self._joined.keys(), min(soon, self._until))
        self._propose_if_all_are_here()

    def _has_room_for(self, peer: str) -> bool:
        return peer in self._view or len(self._view) < self._capacity

    def _drop(self, *peers: str) -> None:
        """They are not to be met in this attempt."""
        self._lost.update(peers)
        self._view.difference_update(peers)
        for peer in peers:
            self._joined.pop(peer, None)
            self._expected.pop(peer, None)
        if self.stage is Stage.GATHERING:
            self._propose_if_all_are_here()
        elif self._leader in peers:
            self._choose()

    def _may_follow(self, leader: str) -> bool:
        """Whether to go to a leader that somebody speaks of. Moves are few, so that nobody is sent in circles."""
        if leader in self._clients | self._excluded | self._lost | {self._me.peer_id}:
            return False
        return self._has_room_for(leader) and self._moves < MOST_MOVES

    def _move_to(self, leader: str) -> None:
        self._moves += 1
        self._view.add(leader)
        self._followers.discard(leader)
        self._follow(leader)

    # -- what others say --

    def _hear(self, sender: str, message: Message) -> None:
        is_of_now = message.attempt == self.attempt and self.stage in (Stage.FOLLOWING, Stage.GATHERING)
        match message:
            case Ask(group_id=b""):
                self._hear_follower(sender, message, is_of_now)
            case Propose():
                self._hear_proposal(sender, message)
            case GroupMessage(group_id=group_id):
                if self._group and self._group.group_id == group_id and sender in self._others:
                    self._hear_of_group(sender, message)
                else:
                    self._hear_of_another_group(sender, message, group_id)
            case _ if self._is_ahead(message):
                self._early = [*self._early, (sender, message)][-MOST_EARLY:]
            case Join() | Call() if not is_of_now:
                self._turn_away(sender, message)
            case _ if is_of_now:
                self._hear_of_finding(sender, message)

    def _hear_of_finding(self, sender: str, message: Message) -> None:
        match message:
            case Join(member=member):
                self._hear_join(sender, member)
            case Call(leader=leader) if leader == sender:
                self._hear_call(sender)
            case Coming(seconds=seconds) if isfinite(seconds):
                self._hear_coming(sender, max(0.0, seconds))
            case Late(taken=taken):
                self._drop(*{sender, *(taken if sender == self._leader else ())} - {self._me.peer_id})
            case Elsewhere(leader=leader):
                self._hear_elsewhere(sender, leader)

    def _is_ahead(self, message: Message) -> bool:
        return self.stage is Stage.WAITING or (self.stage is not Stage.ENDED and message.attempt > self.attempt)

    def _hear_follower(self, sender: str, message: Message, is_of_now: bool) -> None:
        """Somebody who follows this peer asks for a sign of life."""
        if self._is_ahead(message) or (is_of_now and self.stage is Stage.GATHERING and sender in self._joined):
            self._reply(sender, message, Tell, group_id=b"", status="undecided", excluded=())
        elif is_of_now and self.stage is Stage.GATHERING:
            self._say(sender, Call, leader=self._me.peer_id)
        elif is_of_now:
            self._say(sender, Elsewhere, leader=self._leader)
        else:
            self._turn_away(sender, message)

    def _turn_away(self, sender: str, message: Message) -> None:
        taken = self._group.ids if self._group else self._met
        if message.attempt != self.attempt or sender not in taken:
            self._reply(sender, message, Late, taken=taken if message.attempt == self.attempt else ())

    def _hear_join(self, sender: str, member: Member) -> None:
        if member.peer_id != sender:
            return
        if sender in self._excluded or (self.stage is Stage.GATHERING and not self._has_room_for(sender)):
            self._say(sender, Late, taken=tuple(sorted(self._joined)))
            return
        self._lost.discard(sender)
        self._joined[sender] = member
        if member.mode == "client":
            self._clients.add(sender)
        if self.stage is Stage.GATHERING:
            self._view.add(sender)
            self._expected.pop(sender, None)
            self._propose_if_all_are_here()
        elif sender == self._leader and self._me.peer_id not in self._clients:  # who joins this peer does not lead
            self._followers.add(sender)
            self._choose()
        else:
            self._say(sender, Elsewhere, leader=self._leader)

    def _hear_call(self, sender: str) -> None:
        """`sender` leads."""
        self._lost.discard(sender)
        if sender == self._leader:
            self._leader_lives, self._until = True, self._latest_group
            if not self._is_reading:  # what it called before it was joined
                self._say(sender, Join, member=self._me)
        elif not self._has_room_for(sender):
            self._say(sender, Late, taken=())
        elif self._rank(sender) < self._rank(self._leader) and self._may_follow(sender):
            if self.stage is Stage.GATHERING:
                self._move_to(sender)
            else:  # whom it has joined counts on it, and is to say whether all go there
                self._view.add(sender)
                self._say(self._leader, Elsewhere, leader=sender)
                self._say(sender, Elsewhere, leader=self._leader)
        else:
            self._say(sender, Elsewhere, leader=self._leader)

    def _hear_coming(self, sender: str, seconds: float) -> None:
        until = self._now + seconds + self._timing.join_seconds
        if sender in self._expected:
            self._expected[sender] = min(until, self._until)
        elif sender == self._leader:
            self._leader_lives, self._until = True, min(until, self._latest_group)
            if not self._has_called:  # it is not here to call the others
                self._has_called = True
                for peer in sorted(self._view - {self._me.peer_id, sender}):
                    self._say(peer, Call, leader=sender)

    def _hear_elsewhere(self, sender: str, leader: str) -> None:
        if self.stage is Stage.GATHERING:
            if self._may_follow(leader) and self._rank(leader) < self._rank(self._me.peer_id):
                self._move_to(leader)
            elif leader in self._lost and sender in self._expected:  # it will find that out too, and come
                self._expected[sender] = min(self._now + self._timing.join_seconds, self._until)
        elif sender == self._leader and leader in self._lost:  # it will find that out too, and then lead
            self._until = min(self._now + self._timing.join_seconds, self._latest_group)
        elif sender == self._leader:
            self._joined.pop(sender, None)
            self._followers.add(sender)
            if self._may_follow(leader):
                self._move_to(leader)
            elif self._best() != sender:
                self._choose()

    # -- the group --

    def _propose_if_all_are_here(self) -> None:
        if not self._is_reading and (not self._expected or len(self._joined) >= self._capacity):
            self._propose()

    def _propose(self) -> None:
        """To all who have joined, but for those whose values are not laid out as most are."""
        layouts = Counter(member.layout for member in self._joined.values() if member.mode != "auxiliary")
        for peer, member in list(self._joined.items()):
            if member.mode != "auxiliary" and member.layout != layouts.most_common(1)[0][0]:
                self._say(peer, Late, taken=())
                del self._joined[peer]
        members = tuple(self._joined[peer] for peer in sorted(self._joined))
        if self._me.peer_id not in self._joined or len(members) == 1:
            self._end("nobody else came" if members == (self._me,) else "others average something else")
        elif not any(member.weight > 0 for member in members):
            self._end("nobody has anything to contribute")
        else:
            self._serial += 1
            group_id = name_group(self.round, self.attempt, self._serial, self._leader, members)
            self._begin(Group(group_id, self._serial, self._leader, members))
            for peer in self._others:
                self._say(peer, Propose, group_id=group_id, serial=self._serial, members=members)

    def _propose_without(self, peer: str) -> None:
        """Once more, to those who are left: the all-reduce has hardly begun."""
        self._close_group("aborted")
        self.stage = Stage.GATHERING
        self._joined.pop(peer, None)
        if self._now >= self._latest_group:
            self._end("no group came about in time")
        else:
            self._propose()

    def _hear_proposal(self, sender: str, message: Propose) -> None:
        if self._group and sender == self._leader and message.serial <= self._group.serial:
            return  # it came twice, or after its successor
        if end := self._ended.get(message.group_id):
            self._send(sender, end)
        elif objection := self._objection(sender, message):
            self._reply(sender, message, Refuse, group_id=message.group_id, reason=objection)
            if self.stage is Stage.FOLLOWING and sender == self._leader and message.attempt == self.attempt:
                self._drop(sender)
        else:
            self._close_group("aborted")
            self._begin(Group(message.group_id, message.serial, sender, message.members))

    def _objection(self, sender: str, message: Propose) -> str:
        ids = [member.peer_id for member in message.members]
        contributors = [member for member in message.members if member.mode != "auxiliary"]
        leader = next((member for member in message.members if member.peer_id == sender), None)
        name = name_group(self.round, self.attempt, message.serial, sender, message.members)
        faults = {
            f"this peer is {self.stage.name.lower()}": not self._is_free(ids) and (
                self.stage not in (Stage.FOLLOWING, Stage.AVERAGING, Stage.VOTED, Stage.FAILED)),
            "this peer follows another leader": message.attempt != self.attempt or (
                sender != self._leader and not (sender in self._has_joined and self._is_free(ids))),
            "it comes too late, or too often": self._now > self._latest_group + self._timing.answer_seconds
            or message.serial > self._capacity,
            "the group's name is not its own": message.group_id != name,
            "the members are not sorted, too many or too few":
                ids != sorted(set(ids)) or not 2 <= len(ids) <= self._capacity,
            "this peer is not in it as it is": self._me not in message.members,
            "one who was left out is in it": bool(self._excluded.intersection(ids)),
            "its leader can't lead": leader is None or leader.mode == "client",
            "the members' values are laid out differently": len({member.layout for member in contributors}) > 1 or any(
                member.layout != NOTHING for member in message.members if member.mode == "auxiliary"),
            "a weight is no weight": any(not 0 <= member.weight < inf for member in message.members),
        }
        return next((reason for reason, is_so in faults.items() if is_so), "")

    def _is_free(self, ids: Collection[str]) -> bool:
        """To enter the group of another whom it has joined: its leader has not answered, or is to be in it too; or
        all who have come to it are."""
        return (self.stage is Stage.FOLLOWING and (not self._leader_lives or self._leader in ids)) or (
            self.stage is Stage.GATHERING and self._joined.keys() <= set(ids))

    def _begin(self, group: Group) -> None:
        self.stage, self._group, self._leader, self._is_running = Stage.AVERAGING, group, group.leader, True
        self._votes, self._answers, self._expected = {}, {}, {}
        self._until, self._probe = self._now + self._timing.average_seconds, inf
        self._actions.append(Average(group.group_id, group.members, with_state(group.members), self.attempt))

    # -- the votes, and the decision --

    def _vote(self, ok: bool, blamed: tuple[str, ...]) -> None:
        """The average has ended here."""
        vote = Complete(self.round, self.attempt, self._current.group_id, ok, blamed)
        if self._leads:
            self._count(self._me.peer_id, vote)
            return
        self.stage = Stage.VOTED if ok else Stage.FAILED
        patience = 2 * self._timing.answer_seconds + (self._timing.average_seconds if ok else 0.0)
        self._until = self._now + patience
        self._probe = self._now + self._timing.answer_seconds / PROBES
        self._own_vote = vote
        self._send(self._leader, vote)
        if self._leader in blamed:  # who votes no may abort by itself, and this leader's word will not come in time
            self._abort("an average was not complete", {self._leader})

    def _count(self, voter: str, vote: Complete) -> None:
        """At the leader. A no is final, and so is a yes that no no follows."""
        if voter not in self._votes or not vote.ok:
            self._votes[voter] = vote
        is_last = len(self._votes) == len(self._current.members)
        if not all(vote.ok for vote in self._votes.values()):
            if is_last:
                self._decide_to_abort("an average was not complete")
            elif self.stage is not Stage.FAILED:
                self.stage = Stage.FAILED
                self._until, self._probe = self._now + self._timing.answer_seconds * BLAMING, inf
        elif is_last:
            self._announce(voter if voter != self._me.peer_id else self._others[0])
        elif voter == self._me.peer_id:
            self.stage = Stage.COUNTING
            self._until += self._timing.answer_seconds
            self._probe = self._now + self._timing.answer_seconds / PROBES

    def _announce(self, echo: str) -> None:
        self.stage = Stage.ANNOUNCED
        self._probe = self._now + self._timing.answer_seconds / PROBES
        self._until = self._now + 2 * self._timing.answer_seconds
        for peer in self._others:
            self._say(peer, Decide, group_id=self._current.group_id, commit=True, excluded=(), echo=peer == echo)

    def _decide_to_abort(self, reason: str, lost: Collection[str] = ()) -> None:
        excluded = tuple(sorted(self._blamed() | set(lost)))
        for peer in self._others:
            self._say(peer, Decide, group_id=self._current.group_id, commit=False, excluded=excluded, echo=False)
        self._abort(reason, excluded)

    def _blamed(self) -> set[str]:
        """Whom the noes blame; who blames more than half of the group has more likely a fault of its own."""
        blamed = set[str]()
        for voter, vote in self._votes.items():
            named = set(vote.blamed) & set(self._current.ids) - {voter}
            blamed |= named if 2 * len(named) <= len(self._current.ids) else set()
        return blamed

    def _hear_of_group(self, sender: str, message: Message) -> None:
        """Of the one that this peer is in."""
        match message:
            case Refuse() if self.stage is Stage.AVERAGING and self._leads:
                self._propose_without(sender)
            case Complete() if self.stage in (Stage.AVERAGING, Stage.COUNTING, Stage.FAILED) and self._leads:
                self._count(sender, message)
            case Refuse() if self.stage in (Stage.COUNTING, Stage.FAILED) and self._leads:
                self._decide_to_abort(f"{sender} takes no part", {sender})
            case Decide(commit=True, echo=echo) if sender == self._leader and self.stage is Stage.VOTED:
                self._tell([sender] if echo else [], "committed")
                self._commit()
            case Decide(commit=True) if sender == self._leader and self.stage is Stage.RESOLVING:
                self._hear_answer(sender, "undecided", ())
            case Decide(commit=False, excluded=excluded) if sender == self._leader:
                self._abort("the leader decided so", excluded)
            case Ask():
                self._answer(sender)
            case Tell(status=status, excluded=excluded):
                self._hear_answer(sender, status, excluded)

    def _answer(self, asker: str) -> None:
        """To be asked by one who is not the leader means that somebody has lost the leader."""
        match self.stage:
            case Stage.ANNOUNCED:
                self._say(asker, Decide, group_id=self._current.group_id, commit=True, excluded=(), echo=True)
            case Stage.AVERAGING | Stage.COUNTING if self._leads:
                self._tell([asker], "undecided")
            case Stage.VOTED | Stage.FAILED if asker == self._leader:
                assert self._own_vote is not None
                self._send(asker, self._own_vote)
            case Stage.AVERAGING if asker != self._leader:  # no yes will come from here any more
                self._stop_averaging()
                self._vote(False, ())
                self._tell([asker], "aborted")
            case Stage.FAILED if not self._leads:
                self._tell([asker], "aborted")
            case Stage.VOTED:
                self._tell([asker], "undecided")
                self._resolve()
            case Stage.RESOLVING:
                self._tell([asker], "undecided")

    def _resolve(self, *lost: str) -> None:
        """From here on the leader's word alone is not enough: others may have heard that this peer was undecided."""
        self.stage, self._answers = Stage.RESOLVING, dict.fromkeys(lost, "unknown")
        self._until, self._probe = self._now + self._timing.resolve_seconds, inf
        for peer in self._others:
            self._say(peer, Ask, group_id=self._current.group_id)
        self._conclude()

    def _hear_answer(self, sender: str, status: Status, excluded: Sequence[str]) -> None:
        if status == "committed" and self.stage in (Stage.VOTED, Stage.ANNOUNCED, Stage.RESOLVING):
            self._answers[sender] = status
            self._commit()
        elif status == "aborted" and self._leads:
            if self.stage is not Stage.FAILED:
                self._decide_to_abort(f"{sender} had given up")
        elif status == "aborted":
            if self.stage is Stage.AVERAGING:
                self._vote(False, ())
            self._abort(f"{sender} had given up", excluded)
        elif status == "unknown" and self.stage is Stage.VOTED and sender == self._leader:
            self._resolve(sender)
        elif self.stage is Stage.RESOLVING or (status == "unknown" and self.stage is Stage.ANNOUNCED):
            self._answers[sender] = status
            self._conclude()

    def _conclude(self) -> None:
        """Once all who can be asked have answered, and none has said how the group ended."""
        if len(self._answers) < len(self._others):
            return
        if self.stage is Stage.ANNOUNCED:
            self._commit()
        elif self.stage is Stage.RESOLVING:
            silent = tuple(sorted(peer for peer, status in self._answers.items() if status == "unknown"))
            self._tell(self._others, "aborted", silent)
            self._abort("the leader was lost", silent)

    def _hear_of_another_group(self, sender: str, message: Message, group_id: bytes) -> None:
        """Of one that has ended here, or that this peer does not know."""
        end = self._ended.get(group_id)
        match message:
            case Tell(group_id=b"") if sender == self._leader and self.stage is Stage.FOLLOWING:
                self._leader_lives, self._until = True, self._latest_group
            case Ask() | Complete() if self._group and self._leads and sender in self._others and end:
                self._say(sender, Propose, group_id=self._group.group_id, serial=self._group.serial,
                          members=self._group.members)  # the successor, which that peer has not heard of
            case Ask() if end is None and len(self._ended) < MOST_GROUPS:
                self._ended[group_id] = Tell(message.round, message.attempt, group_id, "aborted", ())
                self._send(sender, self._ended[group_id])  # the proposal would be refused, should it come yet
            case Ask() | Complete() if end:
                self._send(sender, end)
            case Decide(commit=True, echo=echo) if end and (echo or end.status == "aborted"):
                self._send(sender, end)
            case Decide(commit=False, excluded=excluded) if sender == self._leader and self.stage is Stage.FOLLOWING \
                    and message.attempt == self.attempt and end is None:  # it overtook the proposal
                self._ended[group_id] = Tell(message.round, message.attempt, group_id, "aborted", excluded)
                self._go_on("the leader decided so", self._view, excluded)

    # -- ends --

    def _stop_averaging(self) -> None:
        if self._is_running and self._group:
            self._is_running = False
            self._actions.append(StopAveraging(self._group.group_id))

    def _close_group(self, status: Status, excluded: Sequence[str] = ()) -> None:
        self._stop_averaging()
        if self._group:
            group_id = self._group.group_id
            self._ended[group_id] = Tell(self.round, self.attempt, group_id, status, tuple(excluded))
        self._group = None

    def _abort(self, reason: str, excluded: Collection[str] = ()) -> None:
        """The group; the round goes on with the next attempt, if there is one."""
        ids = self._current.ids
        self._close_group("aborted", sorted(excluded))
        self._go_on(reason, ids, excluded)

    def _go_on(self, reason: str, ids: Collection[str], excluded: Collection[str]) -> None:
        self._excluded.update(excluded)
        if self._me.peer_id in excluded:
            self._end(f"left out: {reason}")
        elif self._is_leaving or self.attempt + 1 >= self._attempts:
            self._end(reason)
        else:
            self._enter(self.attempt + 1, set(ids) - self._excluded)

    def _commit(self) -> None:
        group, answers = self._current, self._answers
        if self.stage is Stage.RESOLVING:  # nobody would ask, had the leader not been lost to somebody
            answers = {group.leader: "unknown", **answers}
        silent = tuple(sorted(peer for peer, status in answers.items() if status == "unknown"))
        self._close_group("committed")
        self._met = group.ids
        self._finish(RoundOutcome(True, group.group_id, group.members, with_state(group.members), silent))

    def _end(self, reason: str) -> None:
        if self.stage is Stage.GATHERING:
            for peer in sorted(self._joined.keys() - {self._me.peer_id}):
                self._say(peer, Late, taken=())
        self._finish(RoundOutcome(False, reason=reason))

    def _finish(self, outcome: RoundOutcome) -> None:
        self.stage, self.outcome = Stage.ENDED, outcome
        self._until = self._probe = inf
        self._expected = {}

    # -- small things --

    @property
    def _current(self) -> Group:
        assert self._group is not None
        return self._group

    @property
    def _leads(self) -> bool:
        return self._group is not None and self._group.leader == self._me.peer_id

    @property
    def _others(self) -> list[str]:
        """In this peer's group."""
        return [peer for peer in self._group.ids if peer != self._me.peer_id] if self._group else []

    @property
    def _latest_group(self) -> float:
        """When an attempt's group must have come about."""
        return self._began + self._timing.longest_join_seconds + self._timing.join_seconds

    def _send(self, receiver: str, message: Message) -> None:
        self._actions.append(Send(receiver, message))

    def _say(self, receiver: str, kind: Callable[..., Message], **fields: Any) -> None:
        self._send(receiver, kind(self.round, self.attempt, **fields))

    def _reply(self, receiver: str, to: Message, kind: Callable[..., Message], **fields: Any) -> None:
        """As `_say`, in the attempt that the other is in."""
        self._send(receiver, kind(self.round, to.attempt, **fields))

    def _tell(self, receivers: Sequence[str], status: Status, excluded: tuple[str, ...] = ()) -> None:
        for peer in receivers:
            self._say(peer, Tell, group_id=self._current.group_id, status=status, excluded=excluded)

    def _take_actions(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions


def reply_of_the_absent(message: Message, at_epoch: int, coming_seconds: float | None) -> Message | None:
    """What a peer answers for a round that its trainer has not come to; None: nothing. (The message is to be kept.)

    `at_epoch`: the epoch that the trainer is in; `coming_seconds`: until it can come (the end of its micro-batch),
    None if that can't be told.
    """
    epoch = message.round.epoch
    match message:
        case Join() | Call() | Ask(group_id=b"") if not epoch - 1 <= at_epoch <= epoch:
            return Late(message.round, message.attempt, taken=())
        case Join() | Call() | Ask(group_id=b"") if coming_seconds is not None:
            return Coming(message.round, message.attempt, coming_seconds)
        case Ask():
            return Tell(message.round, message.attempt, message.group_id, "unknown", ())
    return None
