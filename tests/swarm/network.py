"""A network of its own for peers: each in a network namespace, with a cable to a bridge in one more. Needs root.

Nothing of the machine's own network is touched, and no packet leaves it.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

CLONE_NEWNET = 0x40000000
DEVICE = "eth0"


def leave_network() -> None:
    """This process enters an empty network namespace; call it before there are threads. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "a network namespace can't be made")


@cache
def why_not() -> str:
    """Why there can't be such a network here; empty: there can."""
    if not shutil.which("ip") or not shutil.which("nsenter"):
        return "needs ip (iproute2) and nsenter (util-linux)"
    if subprocess.run(["unshare", "--net", "ip", "link", "add", "probe", "type", "bridge"], capture_output=True,
                      check=False).returncode:
        return "needs the right to make network namespaces and bridges"
    return ""


class Network:
    """A bridge, to which processes are cabled by number, and from which they can be cut."""

    def __init__(self) -> None:
        self._name = f"covey-{os.getpid()}"

    def open(self) -> None:
        """Make it."""
        _ip("netns", "add", self._name)
        _ip("-n", self._name, "link", "add", "bridge", "type", "bridge", "forward_delay", "0")
        _ip("-n", self._name, "link", "set", "bridge", "up")

    def close(self) -> None:
        """The bridge and its cables go with it."""
        _ip("netns", "delete", self._name)

    def address(self, number: int) -> str:
        """Of the process that is cabled by this number."""
        return f"10.77.0.{number + 1}"

    def connect(self, number: int, pid: int) -> None:
        """Cable the process, which has called `leave_network`."""
        _ip("-n", self._name, "link", "add", f"port{number}", "type", "veth", "peer", "name", DEVICE, "netns", str(pid))
        _ip("-n", self._name, "link", "set", f"port{number}", "master", "bridge", "up")
        inside = ["nsenter", "--net", "--target", str(pid), "ip"]
        for command in (["address", "add", f"{self.address(number)}/24", "dev", DEVICE],
                        ["link", "set", DEVICE, "up"], ["link", "set", "lo", "up"]):
            subprocess.run([*inside, *command], check=True)

    def cutting(self, number: int) -> tuple[str, ...]:
        """The command that cuts the cable: what is sent from either side is lost, and nobody is told."""
        return ("ip", "-n", self._name, "link", "set", f"port{number}", "down")

    def mend(self, number: int) -> None:
        """Cable it again."""
        _ip("-n", self._name, "link", "set", f"port{number}", "up")


@contextmanager
def network() -> Iterator[Network]:
    """One that ends with the context."""
    owned = Network()
    owned.open()
    try:
        yield owned
    finally:
        owned.close()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
