import socket

import pytest

from coordinator.ports import check_hosts, free_port, listen, multiaddress, reachable_host
from training.errors import BadInput


def test_a_port_in_use_is_named_with_its_purpose() -> None:
    with listen("127.0.0.1", 0, "HTTP") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BadInput, match=rf"port {port} for gRPC on 127\.0\.0\.1 \(address already in use\)"):
            free_port("127.0.0.1", port, "gRPC")
    assert free_port("127.0.0.1", port, "gRPC") == port


def test_any_free_port_can_be_had_afterwards() -> None:
    port = free_port("127.0.0.1", 0, "libp2p")
    with socket.create_server(("127.0.0.1", port)):
        assert port > 0


def test_an_address_of_another_machine_is_bad_input() -> None:
    with pytest.raises(BadInput, match=r"port 0 for gRPC on 192\.0\.2\.1 \(cannot assign requested address\)"):
        free_port("192.0.2.1", 0, "gRPC")


@pytest.mark.parametrize(("host", "announce_host"), [
    ("localhost", None), ("", None), ("0.0.0.0", "http://me"), ("0.0.0.0", "me:31338/x"), ("0.0.0.0", "")])
def test_hosts_that_nobody_could_reach_are_refused(host: str, announce_host: str | None) -> None:
    with pytest.raises(BadInput, match="host"):
        check_hosts(host, announce_host)


@pytest.mark.parametrize(("host", "announce_host"), [
    ("127.0.0.1", None), ("::", "gpu.example.org"), ("0.0.0.0", "2001:db8::1"), ("0.0.0.0", "192.0.2.7")])
def test_addresses_and_names_are_fine(host: str, announce_host: str | None) -> None:
    check_hosts(host, announce_host)


def test_a_wildcard_is_reachable_by_an_address_and_an_address_by_itself() -> None:
    assert reachable_host("192.0.2.7") == "192.0.2.7"
    assert socket.inet_aton(reachable_host("0.0.0.0")) != socket.inet_aton("0.0.0.0")


def test_multiaddresses_name_the_kind_of_host() -> None:
    assert [multiaddress(host, 5) for host in ("192.0.2.7", "::1", "gpu.example.org")] == [
        "/ip4/192.0.2.7/tcp/5", "/ip6/::1/tcp/5", "/dns/gpu.example.org/tcp/5"]
