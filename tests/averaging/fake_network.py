"""A simulated network for the machine of averaging/round.py: time, delays and faults are data, and nothing is random
that a test has not drawn."""

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

from averaging.messages import Action, Ask, Average, Member, Message, RoundId, Send, StopAveraging, Tell, Timing
from averaging.round import Round, reply_of_the_absent

TIMING = Timing(join_seconds=1.0, longest_join_seconds=5.0, answer_seconds=1.0, average_seconds=10.0,
                resolve_seconds=1.0)
DELAY, REDUCING, CHUNK_TIMEOUT = 0.001, 0.05, 1.0


def bound(timing: Timing, attempts: int = 2) -> float:
    """The longest that a member may take from `start` to its outcome, by averaging/round.py, but for its own naps."""
    return attempts * (timing.longest_join_seconds + timing.join_seconds + 2 * timing.average_seconds
                       + 3 * timing.answer_seconds + timing.resolve_seconds)


@dataclass(frozen=True)
class Fate:
    """What becomes of one message."""

    delay: float = DELAY
    lost: bool = False       # never arrives
    twice: float = 0.0       # arrives a second time, so much later
    ack_lost: bool = False   # arrives, but its sender is told that it did not


@dataclass
class Peer:
    """One member: its machine, and what the network does to it."""

    machine: Round
    arrives: float = 0.0                # when its trainer comes
    is_here: bool = False
    crashed: bool = False
    paused_until: float = 0.0
    paused: float = 0.0                 # seconds, so far
    inbox: list[Callable[[], None]] = field(default_factory=list)  # what happens when it goes on
    early: list[tuple[str, Message]] = field(default_factory=list)
    running: bytes = b""                # the group whose all-reduce runs here
    completed: set[bytes] = field(default_factory=set)
    averages: list[Average] = field(default_factory=list)
    ended_at: float | None = None
    steps: int = 0


class FakeNetwork:
    """Runs a round among `members`. `fate(number, sender, receiver, message)` says what becomes of each message.

    `at_step(number, peer)`: called after each step of a peer, and may crash or pause it. A peer's clock stands still
    while it is paused.
    """

    def __init__(self, members: Sequence[Member], *, views: dict[str, Sequence[str]] | None = None, epoch: int = 0,
                 arrivals: dict[str, float] | None = None, capacity: int = 16, timing: Timing = TIMING,
                 fate: Callable[[int, str, str, Message], Fate] = lambda *_: Fate(), bad: Iterable[str] = (),
                 at_step: Callable[["FakeNetwork", int, str], None] = lambda *_: None,
                 reducing: Callable[[str], float] = lambda _: REDUCING, clients: Sequence[str] = (),
                 on_waking: Callable[[list[Callable[[], None]]], Iterable[Callable[[], None]]] = iter) -> None:
        self.now, self.round, self.bad = 0.0, RoundId("gradients", epoch), set(bad)
        self.timing = timing
        self._order, self._queue = count(), list[tuple[float, int, Callable[[], None]]]()
        self._fate, self._at_step, self._reducing, self._on_waking = fate, at_step, reducing, on_waking
        self.messages: list[tuple[float, str, str, Message]] = []
        self.steps = 0
        self.resolve_failed = False  # whether a message of resolve was lost, late, or went to one who could not answer
        everybody = [member.peer_id for member in members]
        self.peers = {member.peer_id: Peer(
            Round(member, self.round, (views or {}).get(member.peer_id, everybody), timing, 0.0, capacity=capacity,
                  clients=clients), (arrivals or {}).get(member.peer_id, 0.0)) for member in members}
        for peer_id, peer in self.peers.items():
            self._later(peer.arrives, lambda peer_id=peer_id: self._arrive(peer_id))

    # -- faults --

    def crash(self, peer_id: str) -> None:
        peer = self.peers[peer_id]
        if not peer.crashed:
            peer.crashed = True
            self._break(peer_id, peer.running, DELAY)

    def pause(self, peer_id: str, seconds: float) -> None:
        peer, before = self.peers[peer_id], self._stuck(peer_id)
        peer.paused_until = max(peer.paused_until, self.now + seconds)
        peer.paused += self._stuck(peer_id) - before
        for other, theirs in self.peers.items():
            if other != peer_id and peer.running and theirs.running == peer.running:
                self._await(other, peer.running, lambda: [peer_id] if self._stuck(peer_id) else [])
        self._later(seconds, lambda: self._go_on(peer_id))

    def cancel(self, peer_id: str) -> None:
        self._later(0.0, lambda: self._at(peer_id, lambda: self._act(
            peer_id, self.peers[peer_id].machine.cancel(self._clock(peer_id)))))

    def _go_on(self, peer_id: str) -> None:
        peer = self.peers[peer_id]
        if self.now >= peer.paused_until:
            inbox, peer.inbox = [*peer.inbox, lambda: self._tick(peer_id)], []
            for number, event in enumerate(self._on_waking(inbox)):
                self._later(number * 1e-6, lambda event=event: self._at(peer_id, event))

    # -- running --

    def run(self, seconds: float = 200.0) -> "FakeNetwork":
        while self._queue and self._queue[0][0] <= seconds:
            self.now, _, event = heapq.heappop(self._queue)
            event()
        return self

    @property
    def alive(self) -> list[Peer]:
        return [peer for peer in self.peers.values() if not peer.crashed]

    def groups(self) -> dict[bytes, dict[str, str]]:
        """How each group ended at each of its members that has not crashed."""
        ends: dict[bytes, dict[str, str]] = {}
        for peer_id, peer in self.peers.items():
            for average in peer.averages if not peer.crashed else ():
                outcome = peer.machine.outcome
                committed = outcome is not None and outcome.committed and outcome.group_id == average.group_id
                ends.setdefault(average.group_id, {})[peer_id] = "committed" if committed else "aborted"
        return ends

    def _stuck(self, peer_id: str) -> float:
        """Seconds until it goes on."""
        return max(0.0, self.peers[peer_id].paused_until - self.now)

    def _clock(self, peer_id: str) -> float:
        """Its own, as it runs."""
        return self.now - self.peers[peer_id].paused + self._stuck(peer_id)

    def _later(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), event))

    def _at(self, peer_id: str, event: Callable[[], None]) -> None:
        """Let it happen at this peer: not if it has crashed, and later if it is paused."""
        peer = self.peers[peer_id]
        if peer.paused_until > self.now:
            peer.inbox.append(event)
        elif not peer.crashed:
            event()

    def _arrive(self, peer_id: str) -> None:
        def arrive() -> None:
            peer = self.peers[peer_id]
            peer.is_here, early = True, peer.early
            for sender, message in early:
                self._act(peer_id, peer.machine.received(sender, message, self._clock(peer_id)))
            self._act(peer_id, peer.machine.start(self._clock(peer_id)))
        self._at(peer_id, arrive)

    def _act(self, peer_id: str, actions: Sequence[Action]) -> None:
        peer, before = self.peers[peer_id], len(self.messages)
        self.steps += 1
        for action in actions:
            match action:
                case Send(receiver, message):
                    self.messages.append((self.now, peer_id, receiver, message))
                case Average(group_id):
                    peer.averages.append(action)
                    self._reduce(peer_id, action)
                case StopAveraging(group_id):
                    self._break(peer_id, group_id, DELAY, blame=False)
                    peer.running = b""
        if peer.machine.outcome and peer.ended_at is None:
            peer.ended_at = self.now
        self._at_step(self, self.steps, peer_id)
        for number, (_, _, receiver, message) in list(enumerate(self.messages))[before:]:
            self._carry(number, peer_id, receiver, message)
        self._set_timer(peer_id)

    def _set_timer(self, peer_id: str) -> None:
        if (deadline := self.peers[peer_id].machine.deadline) is not None:
            self._later(self._stuck(peer_id) + max(0.0, deadline - self._clock(peer_id)), lambda: self._at(
                peer_id, lambda: self._tick(peer_id)))

    def _tick(self, peer_id: str) -> None:
        peer = self.peers[peer_id]
        deadline = peer.machine.deadline
        if peer.is_here and not peer.crashed and deadline is not None:
            if deadline <= self._clock(peer_id) + 1e-9:
                self._act(peer_id, peer.machine.tick(max(deadline, self._clock(peer_id))))
            else:
                self._set_timer(peer_id)

    # -- messages --

    def _carry(self, number: int, sender: str, receiver: str, message: Message) -> None:
        """A call: it fails if its sender, as long as it runs, reads no answer within answer_seconds."""
        fate = self._fate(number, sender, receiver, message)
        if self.peers[sender].crashed:
            return
        deadline, has_ended = self._clock(sender) + self.timing.answer_seconds, list[bool]()
        is_resolve = isinstance(message, Ask | Tell)
        self.resolve_failed |= is_resolve and (fate.lost or fate.delay > 0.1 or fate.ack_lost)

        def fail() -> None:
            left = 0.0 if self.peers[receiver].crashed else deadline - self._clock(sender)
            if not has_ended and left > 1e-9:
                self._later(left, lambda: self._at(sender, fail))
            elif not has_ended:
                has_ended.append(True)
                self._act(sender, self.peers[sender].machine.undelivered(receiver, message, self._clock(sender)))

        def arrive() -> None:
            self._deliver(sender, receiver, message)
            if not fate.ack_lost:
                self._later(DELAY, lambda: self._at(sender, lambda: has_ended.append(True)))

        def reach() -> None:
            self.resolve_failed |= is_resolve and self._stuck(receiver) > 0
            if self.peers[receiver].crashed:
                self._later(DELAY, lambda: self._at(sender, fail))
            self._at(receiver, arrive)

        stuck = self._stuck(sender)  # before its messages left
        for delay in [] if fate.lost else [fate.delay, fate.delay + fate.twice] if fate.twice else [fate.delay]:
            self._later(stuck + delay, reach)
        self._later(stuck + self.timing.answer_seconds, lambda: self._at(sender, fail))

    def _deliver(self, sender: str, receiver: str, message: Message) -> None:
        peer = self.peers[receiver]
        if peer.is_here:
            self._act(receiver, peer.machine.received(sender, message, self._clock(receiver)))
            return
        peer.early.append((sender, message))
        if reply := reply_of_the_absent(message, self.round.epoch, peer.arrives - self.now):
            self._later(DELAY, lambda: self._at(sender, lambda: self._deliver(receiver, sender, reply)))

    # -- the all-reduce --

    def _reduce(self, peer_id: str, action: Average) -> None:
        group_id, ids = action.group_id, [member.peer_id for member in action.members]
        self.peers[peer_id].running = group_id
        if all(any(average.group_id == group_id for average in self.peers[other].averages) for other in ids):
            for other in ids:
                bad = tuple(self.bad.intersection(ids) - {other})
                self._later(self._reducing(other), lambda other=other, bad=bad: self._averaged(
                    other, group_id, not self.bad.intersection(ids), bad))
        self._await(peer_id, group_id, lambda: [
            peer for peer in ids if peer not in self.peers or self.peers[peer].crashed or self._stuck(peer)
            or all(average.group_id != group_id for average in self.peers[peer].averages)])

    def _await(self, peer_id: str, group_id: bytes, silent: Callable[[], list[str]]) -> None:
        """Who is `silent` when this peer has run for CHUNK_TIMEOUT is blamed."""
        deadline = self._clock(peer_id) + CHUNK_TIMEOUT

        def look() -> None:
            if (left := deadline - self._clock(peer_id)) > 1e-9:
                self._later(left, lambda: self._at(peer_id, look))
            elif whom := silent():
                self._averaged(peer_id, group_id, False, whom)
        self._later(CHUNK_TIMEOUT, lambda: self._at(peer_id, look))

    def _averaged(self, peer_id: str, group_id: bytes, complete: bool, blamed: Sequence[str]) -> None:
        peer = self.peers[peer_id]

        def averaged() -> None:
            if peer.running == group_id:
                peer.running = b""
                if complete:
                    peer.completed.add(group_id)
                else:
                    self._break(peer_id, group_id, DELAY, blamed=blamed)
                self._act(peer_id, peer.machine.averaged(group_id, complete, blamed, self._clock(peer_id)))
        self._at(peer_id, averaged)

    def _break(self, peer_id: str, group_id: bytes, seconds: float, *, blame: bool = True,
               blamed: Sequence[str] | None = None) -> None:
        """`peer_id` takes no further part in the all-reduce: others, who are not done, end within `seconds`."""
        for other, peer in self.peers.items():
            if other != peer_id and group_id and peer.running == group_id:
                whom = (peer_id,) if blamed is None and blame else tuple(set(blamed or ()) - {other})
                self._later(seconds, lambda other=other, whom=whom: self._averaged(other, group_id, False, whom))
