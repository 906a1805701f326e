"""How long a message and its answer take, to each peer."""

from collections import defaultdict, deque
from collections.abc import Iterable

SAMPLES = 16


class RoundTrips:
    """The shortest of a peer's last few: a call may also wait for a busy processor, which says nothing of the way."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=SAMPLES))

    def took(self, peer: str, seconds: float) -> None:
        """A call to `peer` was answered."""
        self._seconds[peer].append(seconds)

    def longest(self, peers: Iterable[str]) -> float:
        """Seconds to the farthest of `peers`, of those that are known."""
        return max((min(self._seconds[peer]) for peer in peers if peer in self._seconds), default=0.0)
