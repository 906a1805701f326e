"""Ports and addresses of this machine."""

import re
import socket
from ipaddress import IPv4Address, ip_address

import psutil

from training.errors import BadInput


def listen(host: str, port: int, purpose: str) -> socket.socket:
    """A TCP socket that listens at `host`:`port` (0: any free port).

    Raises BadInput that names `purpose` and the port if it is in use or can't be had.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            # a port whose old connections are still in TIME_WAIT is free
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise port_taken(host, port, purpose, error.strerror or str(error)) from None
    return listener


def free_port(host: str, port: int, purpose: str) -> int:
    """`port` if one can listen there now, or for 0 a port where one can. Raises BadInput as `listen` does."""
    with listen(host, port, purpose) as probe:
        return int(probe.getsockname()[1])


def port_taken(host: str, port: int, purpose: str, reason: str) -> BadInput:
    """The error for a port that can't be had."""
    return BadInput(f"port {port} for {purpose} on {host} ({reason.lower()})", expected="one that is free",
                    mend="Stop what uses it, or choose another port (0 for any free one).")


def check_hosts(host: str, announce_host: str | None) -> None:
    """Raises BadInput unless one could listen at `host` and call `announce_host` (None: not given)."""
    try:
        ip_address(host)
    except ValueError:
        raise BadInput(f"host {host!r}", expected="an IP address of this machine, or 0.0.0.0 for all",
                       mend="Names go into --announce-host.") from None
    if announce_host is not None and not re.fullmatch(r"[A-Za-z0-9.:-]{1,253}", announce_host):
        raise BadInput(f"announced host {announce_host!r}", expected="a host's name or IP address, without a port",
                       mend="Correct it.")


def reachable_host(host: str) -> str:
    """What others on the network call a server that listens at the IP address `host`: itself, or for a wildcard
    the first address of this machine that is not loopback, if it has any."""
    if not ip_address(host).is_unspecified:
        return host
    running = [name for name, stats in psutil.net_if_stats().items() if stats.isup]
    addresses = [IPv4Address(entry.address) for name, entries in psutil.net_if_addrs().items()
                 if name in running for entry in entries if entry.family == socket.AF_INET]
    outward = [address for address in addresses if not (address.is_loopback or address.is_link_local)]
    return str(outward[0]) if outward else "127.0.0.1"


def multiaddress(host: str, port: int) -> str:
    """The libp2p multiaddress of TCP `port` at `host`, an IP address or a name."""
    try:
        return f"/ip{ip_address(host).version}/{host}/tcp/{port}"
    except ValueError:
        return f"/dns/{host}/tcp/{port}"
