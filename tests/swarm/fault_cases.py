"""A fault that strikes a swarm, and what must hold for those who live on."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from fault_points import Fault
from faulty_peers import PEERS, Herd, Peer
from processes import until

AHEAD = 3           # epochs between arming a fault and its epoch, so that no one is there yet
WATCHED = 3         # epochs, from the fault's on, in which nobody may stall
PAUSE_SECONDS = 0.5  # below request_timeout: it costs time, and nobody the round
TOLERANCE = 1e-4    # of a mean's view, in float32; a chunk that is missing shifts it by about 1
STATED = {          # seconds within which survivors leave a peer behind: request_timeout, or next_chunk_timeout
    "kill": 1.0,
    "stop": 1.25,   # ... and a quarter: who is asked for a sign of life, is asked so often
    "hang": 1.25,
    "pause": 1.25,
    "cut": 1.25,
    "poison": 1.0,
    "gradient": 1.0,
    "slow": 3.0,    # averaging_timeout: who shows signs of life is waited for
    "mute": 3.0,
}


@dataclass(frozen=True)
class Case:
    """`action` befalls a peer at `point` (fault_points.py), as a member of the group or as its leader."""

    action: str
    point: str
    role: str = "member"
    victims: int = 1
    peers: int = PEERS

    def __str__(self) -> str:
        what = f"{self.victims} of {self.peers}" if self.victims > 1 else self.role
        return f"{self.action} {what} {self.point}"


CASES = [
    *(Case("kill", point) for point in (
        "computing", "matching", "joined", "sending", "reducing", "receiving", "voting", "voted", "deciding heard")),
    *(Case("kill", point, "leader") for point in (
        "matching", "joined", "sending", "reducing", "receiving", "voting", "deciding", "announcing")),
    *(Case("stop", point) for point in (
        "computing", "matching", "sending", "reducing", "receiving", "voted", "deciding heard")),
    *(Case("stop", point, "leader") for point in ("matching", "sending", "reducing", "deciding", "announcing")),
    *(Case("pause", point) for point in ("matching", "sending", "receiving", "voted")),
    *(Case("pause", point, "leader") for point in ("matching", "reducing", "deciding", "announcing")),
    Case("hang", "sending"),
    Case("slow", "slow sending"),
    Case("mute", "sending"),
    Case("gradient", "gradient"),
    Case("poison", "poisoning"),
    Case("kill", "sending", victims=3, peers=6),
]
CUTS = [  # need a network of their own
    *(Case("cut", point) for point in ("matching", "sending", "reducing", "receiving", "voted", "deciding heard")),
    *(Case("cut", point, "leader") for point in ("matching", "sending", "reducing", "deciding", "announcing")),
]


@dataclass(frozen=True)
class Row:
    """What came of it. Times in seconds."""

    case: str
    stall: float       # the longest round of a survivor, in the epochs that were watched
    agreement: float   # from the fault, or the wish to meet if that is later, until the last survivor's round ended
    back: float | None  # until the victim, alive again, is equal to all others
    equal_after: int   # epochs
    outcome: str


def strike(herd: Herd, case: Case) -> Row:
    """Let it happen, and check what must hold."""
    peers = herd.train(case.peers)
    began = monotonic()
    try:
        return _strike(herd, case, peers)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{herd.describe(began)}") from None


def _strike(herd: Herd, case: Case, peers: Sequence[Peer]) -> Row:
    epoch = max(peer.epoch for peer in peers) + AHEAD
    leader = herd.leader(epoch)
    victim, *others = sorted(peers, key=lambda peer: (peer is leader) != (case.role == "leader"))
    victims, survivors = [victim, *others[:case.victims - 1]], others[case.victims - 1:]
    if case.action == "kill":
        herd.spare()
    victim.arm(Fault(epoch, case.point, case.action, also=tuple(peer.process.pid for peer in victims[1:]),
                     command=herd.cutting(victim) if case.action == "cut" else ()))
    until(lambda: victim.said("fired", epoch=epoch) or survivors[0].epoch > epoch + 1, "the fault's epoch comes", 30)
    assert victim.said("fired", epoch=epoch), f"{case.point} was not reached at epoch {epoch}"
    fired = victim.said("fired", epoch=epoch)[0]["time"]
    if case.action == "pause":
        until(lambda: monotonic() >= fired + PAUSE_SECONDS, "its pause is over", 5)
        victim.signal(signal.SIGCONT)
        survivors = list(peers)
    until(lambda: all(peer.epoch >= epoch + WATCHED for peer in survivors), "the survivors go on", 30)
    back = None if case.action in ("kill", "pause") else bring_back(herd, case, victim)
    if case.action == "kill":
        until(lambda: not any(peer.processes() for peer in victims), "nothing of the dead runs", 5)
    # who is cut off may have committed what the others, who can't ask it, abort
    check_rounds(survivors if case.action in ("kill", "cut") else peers, victims, range(epoch, epoch + WATCHED))
    rounds = [said["seconds"] for peer in survivors for said in peer.said("round")
              if epoch <= said["round"] < epoch + WATCHED]
    row = Row(str(case), max(rounds), agreement(survivors, epoch, fired), back, equal_from(survivors, epoch) - epoch,
              outcome(survivors, epoch))
    assert row.stall <= 2 * STATED[case.action], f"a stall of more than twice {STATED[case.action]:g} s: {row}"
    assert row.equal_after <= 2, row
    assert case.action != "pause" or row.outcome.startswith(f"{case.peers} averaged,"), f"it cost a round: {row}"
    return row


def bring_back(herd: Herd, case: Case, victim: Peer) -> float:
    """Seconds until all, `victim` included, end an epoch together."""
    since = monotonic()
    if case.action == "cut":
        herd.mend(victim)
    else:
        victim.signal(signal.SIGCONT)
    herd.await_step()
    return monotonic() - since


def check_rounds(peers: Sequence[Peer], victims: Sequence[Peer], epochs: range) -> None:
    """All or nothing: who is in a group has its full mean, or nobody has any."""
    everybody = {peer.id: peer for peer in [*peers, *victims]}
    for epoch in epochs:
        brought = {peer.id: said for peer in everybody.values() for said in peer.said("met", met=epoch)}
        ended = {peer.id: said for peer in peers for said in peer.said("parted", parted=epoch)}
        for peer, end in ended.items():
            what = f"epoch {epoch}, {peer}: {end}"
            if not end["averaged"]:
                assert end["values"] == brought[peer]["values"], f"it failed, and changed the tensors: {what}"
                assert end["state"] == brought[peer]["state"], what
                continue
            for other in end["members"]:
                assert other not in ended or ended[other]["members"] == end["members"], \
                    f"one commits and another does not: {what}; {ended[other]}"
            check_mean([brought[member] for member in end["members"]], end, "values", what)
            if end["with_state"]:
                check_mean([brought[member] for member in end["members"]], end, "state", what)


def check_mean(brought: Sequence[dict[str, Any]], end: dict[str, Any], name: str, what: str) -> None:
    """`end` has the weighted mean of all that was brought."""
    total = sum(said["weight"] for said in brought)
    for view, seen in enumerate(end[name]):
        mean = sum(said["weight"] * said[name][view] for said in brought if said["weight"]) / total
        assert abs(mean - seen) <= TOLERANCE * max(1.0, abs(mean)), f"not the mean of its members: {what}; {brought}"


def equal_from(survivors: Sequence[Peer], epoch: int) -> int:
    """The first epoch after this one that all begin with equal parameters; so it stays."""
    reached = min(peer.epoch for peer in survivors)
    checksums = {at: {peer.checksum(at) for peer in survivors} for at in range(epoch + 1, reached + 1)}
    unequal = [at for at, found in checksums.items() if len(found) > 1 or None in found]
    first = max(unequal, default=epoch) + 1
    assert first <= reached, f"survivors differ: {checksums}"
    return first


def agreement(survivors: Sequence[Peer], epoch: int, fired: float) -> float:
    """From the fault, or from when all that live wished to meet."""
    met = [said["time"] for peer in survivors for said in peer.said("met", met=epoch)]
    ended = [said["time"] for peer in survivors for said in peer.said("parted", parted=epoch)]
    return max(ended, default=fired) - max([fired, *met])


def outcome(survivors: Sequence[Peer], epoch: int) -> str:
    """Of the round in which the fault struck, and of the next two."""
    def of(at: int) -> str:
        ends = {(said["outcome"], said["group_size"]) for peer in survivors for said in peer.said("round", round=at)}
        return "/".join(sorted(f"{group} averaged" if how == "averaged" else how for how, group in ends)) or "none"
    return ", ".join(of(at) for at in range(epoch, epoch + WATCHED))
