"""How often one address may call: a bucket of calls that fills with time."""

from collections import OrderedDict
from collections.abc import Callable
from ipaddress import IPv6Address
from time import monotonic

ADDRESSES = 10_000  # remembered; the one that has not called for longest is forgotten first


class Limit:
    """`burst` calls at once, and `per_second` from then on, for each address. `clock` gives seconds."""

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float] = monotonic) -> None:
        self._per_second, self._burst, self._clock = per_second, burst, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # calls left, and when that was so

    def allows(self, address: str) -> bool:
        """Whether one more call may be made now; if so, it counts."""
        now = self._clock()
        left, since = self._buckets.pop(address, (float(self._burst), now))
        left = min(self._burst, left + (now - since) * self._per_second)
        allowed = left >= 1
        self._buckets[address] = (left - allowed, now)
        if len(self._buckets) > ADDRESSES:
            self._buckets.popitem(last=False)
        return allowed


def address_of(grpc_peer: str) -> str:
    """The IP address in gRPC's name of a caller, `ipv4:1.2.3.4:5678`; of IPv6 the first 64 bits, which one host has."""
    kind, _, rest = grpc_peer.partition(":")
    host = rest.rpartition(":")[0] or rest
    if kind != "ipv6":
        return host
    return str(IPv6Address(int(IPv6Address(host.replace("%5B", "").replace("%5D", "").strip("[]"))) >> 64 << 64))
