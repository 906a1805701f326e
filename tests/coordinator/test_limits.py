"""How often one address may call."""

import pytest

import coordinator.limits
from coordinator.limits import Limit, address_of


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_is_allowed_then_so_many_a_second() -> None:
    clock = Clock()
    limit = Limit(2.0, 5, clock)
    assert [limit.allows("a") for _ in range(7)] == [True] * 5 + [False] * 2
    clock.now += 0.4
    assert not limit.allows("a")
    clock.now += 0.1
    assert [limit.allows("a"), limit.allows("a")] == [True, False]


def test_who_is_refused_does_not_wait_longer_for_asking() -> None:
    clock = Clock()
    limit = Limit(1.0, 1, clock)
    assert limit.allows("a")
    for _ in range(9):
        clock.now += 0.1
        assert not limit.allows("a")
    clock.now += 0.125
    assert limit.allows("a")


def test_a_long_silence_saves_up_one_burst_and_no_more() -> None:
    clock = Clock()
    limit = Limit(1.0, 3, clock)
    limit.allows("a")
    clock.now += 1e6
    assert [limit.allows("a") for _ in range(4)] == [True] * 3 + [False]


def test_one_address_takes_nothing_from_another() -> None:
    limit = Limit(1.0, 1, Clock())
    assert limit.allows("a")
    assert not limit.allows("a")
    assert limit.allows("b")


def test_no_more_addresses_are_remembered_than_fit_and_who_calls_most_is_not_forgotten(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator.limits, "ADDRESSES", 3)
    limit = Limit(0.0, 1, Clock())
    for address in "abc":
        assert limit.allows(address)
    assert not limit.allows("a")  # so that b has not called for longest
    assert limit.allows("d")
    assert len(limit._buckets) == 3
    assert [limit.allows(address) for address in "acd"] == [False] * 3
    assert limit.allows("b")


@pytest.mark.parametrize(("peer", "address"), [
    ("ipv4:192.0.2.7:5678", "192.0.2.7"),
    ("ipv6:[2001:db8:1:2:3:4:5:6]:5678", "2001:db8:1:2::"),
    ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:5678", "2001:db8:1:2::"),
    ("ipv6:%5B::1%5D:5678", "::"),
    ("ipv6:[fe80::1%25eth0]:5678", "fe80::"),
    ("unix:", ""),
    ("unix:/run/covey/x", "/run/covey/x"),
])
def test_an_address_is_that_of_one_host(peer: str, address: str) -> None:
    assert address_of(peer) == address


def test_two_hosts_of_one_ipv6_network_are_one_and_of_two_networks_are_two() -> None:
    first, second, third = (f"ipv6:[2001:db8:0:{network}::{host}]:1" for network, host in ((1, 1), (1, 2), (2, 1)))
    assert address_of(first) == address_of(second) != address_of(third)
