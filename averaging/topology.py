"""Who mixes with whom at each step of gossip (Decent-DP): pure, for any number of members, odd ones too.

At every step the members fall into disjoint groups, and each takes its group's plain mean, so the mixing matrix is
symmetric and doubly stochastic: the mean over all members stays, and their distance from it never grows. Who has no
partner at a step is a group of one. With an even number (ring) or a power of two (the others) the groups are those of
the PyPI package decent-dp, which takes no other numbers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import gcd

Group = tuple[str, ...]


def groups(topology: str, members: Sequence[str], step: int,
           machines: Sequence[Sequence[str]] | None = None) -> tuple[Group, ...]:
    """The groups at `step`, a partition of `members`, whose order (sorted) all must agree on; each group is sorted.

    `topology`: a key of TOPOLOGIES. `machines`: which members share one, a partition of `members` too; only
    alternating-exp-ring asks. None: every member has its own.
    """
    members = sorted(members)
    if topology == "alternating-exp-ring":
        return _sorted(alternating_exp_ring(machines or [[member] for member in members], step))
    return _sorted([members[index] for index in group] for group in TOPOLOGIES[topology](len(members), step))


def group_of(me: str, found: Sequence[Group]) -> Group:
    """The group among `found` that `me` is in."""
    return next(group for group in found if me in group)


def complete(n: int, step: int) -> list[list[int]]:
    """All n in one group: consensus in one step."""
    return [list(range(n))]


def ring(n: int, step: int) -> list[list[int]]:
    """Neighbours on a ring, in pairs that start at `step`: (0, 1), (2, 3), ... and then (1, 2), (3, 4), ...

    Each pair is that of every second step where n is even; the two steps contract by cos^2(2 pi / n). Where n is odd,
    who is left over moves on by one with every step.
    """
    pairs = [[(step + 2 * k) % n, (step + 2 * k + 1) % n] for k in range(n // 2)]
    return pairs + [[(step - 1) % n]] * (n % 2)


def one_peer_exp(n: int, step: int) -> list[list[int]]:
    """Pairs at distance 1, 2, 4, ... below n, in turn: with n = 2^k, exact consensus in k steps.

    Members at a distance d form gcd(n, d) cycles of equal length, along which neighbours pair up. Where that length
    is odd, who is left over moves on by one each time that d comes round again.
    """
    strides = max(1, (n - 1).bit_length())
    distance, turns = 2 ** (step % strides), step // strides
    cycles = gcd(n, distance)
    length = n // cycles
    return [[(start + distance * place) % n for place in pair]
            for start in range(cycles) for pair in ring(length, turns if length % 2 else 0)]


def alternating_exp_ring(machines: Sequence[Sequence[str]], step: int) -> list[list[str]]:
    """Within machines, and over all members of pairs of machines, which are those of one_peer_exp, by turns.

    Every other pair does so in the opposite order, so that they don't all load the network at once. A machine without
    a partner mixes within itself both times. With 2^k machines: exact consensus in 2 k steps. Where no machine has
    two members, mixing within would be nothing, and is left out.
    """
    if all(len(machine) == 1 for machine in machines):
        return [[machines[index][0] for index in pair] for pair in one_peer_exp(len(machines), step)]
    found = []
    for number, pair in enumerate(sorted(sorted(pair) for pair in one_peer_exp(len(machines), step // 2))):
        if (step + number) % 2:
            found.append([member for index in pair for member in machines[index]])
        else:
            found += [list(machines[index]) for index in pair]
    return found


TOPOLOGIES: Mapping[str, Callable[[int, int], list[list[int]]]] = {
    "complete": complete, "ring": ring, "one-peer-exp": one_peer_exp}


def _sorted(found: Iterable[Sequence[str]]) -> tuple[Group, ...]:
    return tuple(sorted(tuple(sorted(group)) for group in found))
