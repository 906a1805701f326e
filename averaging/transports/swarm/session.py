"""One meeting at the averager: the round's machine (averaging/round.py) between messages, clock and all-reduce."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from math import isfinite
from mmap import mmap
from time import monotonic
from typing import Protocol

import torch
from torch import Tensor

from averaging.config import Averaging
from averaging.messages import Action, Average, Member, Message, Send, StopAveraging, Timing
from averaging.round import Round
from averaging.transports.swarm import awake
from averaging.transports.swarm.all_reduce import Result
from averaging.transports.swarm.channel import Meet, floats
from averaging.transports.transport import Outcome

ROUND_TRIPS = 10    # that deadlines are longer by
SMALL = 1 << 18     # values that may be looked through in the event loop


class Office(Protocol):
    """What a session needs of its averager."""

    def send(self, session: "Session", receiver: str, message: Message) -> None:
        """Have it delivered, or the session told that it is not."""

    async def all_reduce(self, session: "Session", group: Average) -> Result:
        """Run the group's all-reduce, from `given` to `mean`, until it ends or `stop_all_reduce` is called."""

    def stop_all_reduce(self, group_id: bytes) -> None:
        """Give it up, if it runs."""

    def ended(self, session: "Session", outcome: Outcome) -> None:
        """Tell the trainer, who may then use the memory again."""


def timing_of(config: Averaging, round_trip_seconds: float) -> Timing:
    """The configured deadlines, longer by ROUND_TRIPS."""
    longer = ROUND_TRIPS * round_trip_seconds
    return Timing(
        join_seconds=config.request_timeout + longer, longest_join_seconds=config.matchmaking_time + longer,
        answer_seconds=config.request_timeout + longer, average_seconds=config.averaging_timeout + longer,
        resolve_seconds=config.request_timeout + longer)


class Session:
    """From the trainer's wish to meet to the outcome, and after it, for those who ask late."""

    def __init__(self, office: Office, meet: Meet, *, memory: mmap | None, me: Member, timing: Timing,
                 capacity: int) -> None:
        self.meet, self.timing, self.has_ended = meet, timing, False
        values = meet.layout.values
        self.given = floats(memory, 0, values) if memory else None
        self.mean = floats(memory, values, values) if memory else None
        self._office, self._began, self._met = office, monotonic(), 0.0
        self._round = Round(me, meet.round, meet.group, timing, awake.now(), capacity=capacity, clients=meet.clients)
        self._timer: asyncio.TimerHandle | None = None
        self._reducing: asyncio.Task[None] | None = None
        self._stopped = set[bytes]()  # groups whose all-reduce is given up
        self._bytes_sent = self._bytes_received = 0
        self._refused, self._problem = Counter[str](), ""

    async def start(self) -> None:
        """Begin, if what this peer has is fit to be sent."""
        if self.given is not None and not await _are_finite(self.given):
            self._problem = "a value of its own is not finite"
            self.cancel()
        if not self.has_ended:
            self._act(self._round.start(awake.now()))

    def received(self, sender: str, message: Message) -> None:
        """From the network, verified; may come before `start`."""
        self._act(self._round.received(sender, message, awake.now()))

    def undelivered(self, receiver: str, message: Message) -> None:
        """The receiver can't be reached, or did not answer."""
        self._act(self._round.undelivered(receiver, message, awake.now()))

    def cancel(self) -> None:
        """The trainer wants no more of it."""
        self._act(self._round.cancel(awake.now()))

    def _tick(self) -> None:
        self._act(self._round.tick(awake.now()))

    def _act(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Send(receiver, message):
                    self._office.send(self, receiver, message)
                case Average():
                    self._met = self._met or monotonic()
                    self._reducing = asyncio.create_task(self._average(action, self._reducing))
                case StopAveraging(group_id):
                    self._stopped.add(group_id)
                    self._office.stop_all_reduce(group_id)
        self._set_timer()
        self._look_for_the_end()

    def _set_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = None
        if (deadline := self._round.deadline) is not None:
            wait = max(0.0, deadline - awake.now())
            self._timer = asyncio.get_running_loop().call_later(min(wait, awake.BEAT), self._tick)

    async def _average(self, group: Average, before: asyncio.Task[None] | None) -> None:
        if before:  # the attempt before this one writes to the same memory
            await before
        actions: Sequence[Action] = ()
        if group.group_id not in self._stopped:
            result = await self._office.all_reduce(self, group)
            self._bytes_sent += result.bytes_sent
            self._bytes_received += result.bytes_received
            self._refused += result.refused
            self._problem = result.reason
            actions = self._round.averaged(group.group_id, result.complete, result.blamed, awake.now())
        if self._reducing is asyncio.current_task():
            self._reducing = None
        self._act(actions)

    def _look_for_the_end(self) -> None:
        outcome = self._round.outcome
        if outcome is None or self._reducing or self.has_ended:
            return
        why = ": ".join(filter(None, (outcome.reason, self._problem)))
        self._end(Outcome(
            outcome.committed, members=tuple(member.peer_id for member in outcome.members), group_id=outcome.group_id,
            samples={member.peer_id: member.samples for member in outcome.members},
            with_state=outcome.with_state, silent=outcome.silent, reason="" if outcome.committed else why,
            bytes_sent=self._bytes_sent, bytes_received=self._bytes_received, refused=dict(self._refused),
            matchmaking_seconds=(self._met or monotonic()) - self._began))

    def _end(self, outcome: Outcome) -> None:
        self.has_ended = True
        self.given = self.mean = None
        self._office.ended(self, outcome)


async def _are_finite(values: Tensor) -> bool:
    """Looks in another thread if there are many."""
    if values.numel() <= SMALL:
        least, most = torch.aminmax(values)
    else:
        least, most = await asyncio.to_thread(torch.aminmax, values)
    return isfinite(least) and isfinite(most)  # a NaN anywhere makes both NaN
