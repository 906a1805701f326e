"""Every order of events of a small round, with a few faults: a search through the states of its machines."""

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from averaging.messages import Action, Ask, Average, Member, Message, RoundId, Send, StopAveraging, Tell, Timing
from averaging.round import Round, Stage

TIMING = Timing(join_seconds=1.0, longest_join_seconds=5.0, answer_seconds=1.0, average_seconds=10.0,
                resolve_seconds=1.0)


@dataclass
class World:
    """A state: the machines, and what may happen next. Budgets count the faults that are still to come."""

    machines: dict[str, Round]
    losses: int
    crashes: int
    lapses: int                          # of time, while messages are under way
    now: float = 0.0
    under_way: list[tuple[str, str, Message]] = field(default_factory=list)
    reducing: dict[str, bytes] = field(default_factory=dict)  # who averages in which group
    completed: set[tuple[str, bytes]] = field(default_factory=set)
    started: set[tuple[str, bytes]] = field(default_factory=set)
    members: dict[bytes, tuple[str, ...]] = field(default_factory=dict)
    crashed: set[str] = field(default_factory=set)
    asked_in_vain: bool = False          # a message of resolve was lost, or late

    def act(self, peer: str, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Send(receiver, message):
                    self.under_way.append((peer, receiver, message))
                case Average(group_id, members):
                    self.reducing[peer] = group_id
                    self.started.add((peer, group_id))
                    self.members[group_id] = tuple(member.peer_id for member in members)
                case StopAveraging():
                    self.reducing.pop(peer, None)

    def key(self) -> bytes:
        machines = {peer: sorted((name, repr(value)) for name, value in vars(machine).items() if name != "_actions")
                    for peer, machine in self.machines.items()}
        return repr((machines, sorted(map(repr, self.under_way)), sorted(self.reducing.items()), self.losses,
                     self.crashes, self.lapses, sorted(self.crashed), self.asked_in_vain,
                     sorted(self.completed))).encode()


def start(members: Sequence[Member], *, epoch: int, losses: int = 0, crashes: int = 0, lapses: int = 0,
          unknown: str = "") -> World:
    """Nobody but itself knows of the `unknown` one."""
    world = World({}, losses, crashes, lapses)
    for member in members:
        group = [other.peer_id for other in members if member.peer_id == unknown or other.peer_id != unknown]
        world.machines[member.peer_id] = Round(member, RoundId("gradients", epoch), group, TIMING, 0.0, capacity=8)
    for peer, machine in world.machines.items():
        world.act(peer, machine.start(0.0))
    return world


def successors(world: World) -> Iterator[World]:
    """All that can happen next; each a world of its own."""
    packed = pickle.dumps(world)
    for number in range(len(world.under_way)):
        yield _delivered(pickle.loads(packed), number)
        if world.losses:
            yield _lost(pickle.loads(packed), number, arrives=False)
            yield _lost(pickle.loads(packed), number, arrives=True)
    for peer in world.reducing:
        for complete in (True, False):
            if complete or world.losses:
                ended = _average_ended(pickle.loads(packed), peer, complete)
                if ended is not None:
                    yield ended
    for peer, machine in world.machines.items():
        if peer not in world.crashed:
            if world.crashes and machine.stage is not Stage.ENDED:
                yield _crashed(pickle.loads(packed), peer)
            if machine.deadline is not None and (world.lapses or not (world.under_way or world.reducing)):
                yield _ticked(pickle.loads(packed), peer)


def _delivered(world: World, number: int) -> World:
    sender, receiver, message = world.under_way.pop(number)
    if receiver in world.crashed:
        world.act(sender, world.machines[sender].undelivered(receiver, message, world.now))
    else:
        world.act(receiver, world.machines[receiver].received(sender, message, world.now))
    return world


def _lost(world: World, number: int, *, arrives: bool) -> World:
    """The call fails; whether the message arrives nevertheless."""
    sender, receiver, message = world.under_way.pop(number)
    world.losses -= 1
    world.asked_in_vain |= isinstance(message, Ask | Tell)
    if arrives and receiver not in world.crashed:
        world.act(receiver, world.machines[receiver].received(sender, message, world.now))
    world.act(sender, world.machines[sender].undelivered(receiver, message, world.now))
    return world


def _average_ended(world: World, peer: str, complete: bool) -> World | None:
    group_id = world.reducing[peer]
    there = all((other, group_id) in world.started for other in world.members[group_id])
    if complete and not there:
        return None
    del world.reducing[peer]
    world.losses -= not complete
    if complete:
        world.completed.add((peer, group_id))
    world.act(peer, world.machines[peer].averaged(group_id, complete, (), world.now))
    return world


def _crashed(world: World, peer: str) -> World:
    """What it has sent is under way; what is sent to it fails; who still averages with it does not end well."""
    world.crashes -= 1
    world.crashed.add(peer)
    group_id = world.reducing.pop(peer, None)
    for other, theirs in list(world.reducing.items()):
        if theirs == group_id:
            del world.reducing[other]
            world.act(other, world.machines[other].averaged(theirs, False, (peer,), world.now))
    return world


def _ticked(world: World, peer: str) -> World:
    machine = world.machines[peer]
    assert machine.deadline is not None
    if world.under_way or world.reducing:
        world.lapses -= 1
        world.asked_in_vain |= any(isinstance(message, Ask | Tell) for _, _, message in world.under_way)
    world.now = max(world.now, machine.deadline)
    world.act(peer, machine.tick(world.now))
    return world
