"""Processes that notice within seconds when one of them ends before its time, whatever they wait for."""

import os
import secrets
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from selectors import EVENT_READ, DefaultSelector
from time import sleep

GRACE_SECONDS = 3.0    # that the main thread has to end by itself once a process is lost
GREETING_SECONDS = 60.0  # that a connection may take to come about
FAREWELL = 0xFFFFFFFF
_NUMBER = struct.Struct("!I")


class LostProcess(ConnectionError):
    """Another process of the run has ended without taking leave, and so must this one."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"process {rank} of this run has ended, and so do the others. What it said before tells why; "
                         "started again, all go on from the newest checkpoint.")
        self.rank = rank


class Vigil:
    """Knows of `lost`, the first process that ended without `close`; then it ends this one, after GRACE_SECONDS.

    Every process holds a connection to rank 0, and the kernel closes those of one that ends. Where a whole machine is
    gone, TCP notices after about ten seconds.
    """

    def __init__(self, links: dict[int, socket.socket]) -> None:
        self._links, self._quiet = links, False
        self._lost: int | None = None
        self._noticed, self._closing = threading.Event(), threading.Event()
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="vigil", daemon=True)
        self._thread.start()

    def require_all(self, within_seconds: float = 0.0) -> None:
        """Raises LostProcess if the loss of one is noticed within that time."""
        if self._noticed.wait(within_seconds):
            assert self._lost is not None
            self._quiet = True  # whoever takes the exception tells
            raise LostProcess(self._lost)

    def close(self) -> None:
        """Take leave of the others, all being there."""
        self._closing.set()
        with suppress(OSError):
            self._wake.send(b"x")
        self._thread.join(GRACE_SECONDS)
        self._tell(FAREWELL)
        for link in (*self._links.values(), self._wake, self._woken):
            link.close()

    def _watch(self) -> None:
        with DefaultSelector() as selector:
            selector.register(self._woken, EVENT_READ)
            for rank, link in self._links.items():
                selector.register(link, EVENT_READ, rank)
            while not self._closing.is_set():
                for key, _ in selector.select():
                    if key.data is None:
                        continue
                    heard = _hear(self._links[key.data])
                    if heard == FAREWELL:
                        selector.unregister(key.fileobj)
                    else:
                        self._mourn(key.data if heard is None else heard)
                        return

    def _mourn(self, rank: int) -> None:
        self._lost = rank
        self._tell(rank)
        self._noticed.set()
        sleep(GRACE_SECONDS)
        if not self._quiet:  # the main thread is stuck where no exception reaches it
            print(f"covey: {LostProcess(rank)}", file=sys.stderr, flush=True)
        os._exit(1)

    def _tell(self, number: int) -> None:
        for link in self._links.values():
            with suppress(OSError):
                link.sendall(_NUMBER.pack(number))


def _hear(link: socket.socket) -> int | None:
    """A rank that is lost, or FAREWELL; None if whoever was there has ended."""
    try:
        heard = link.recv(_NUMBER.size, socket.MSG_WAITALL)
    except OSError:
        return None
    return int(_NUMBER.unpack(heard)[0]) if len(heard) == _NUMBER.size else None


@contextmanager
def keep_vigil(rank: int, size: int, host: str, *, publish: Callable[[str], None], read: Callable[[], str],
               this_machine_only: bool) -> Iterator[Vigil]:
    """Connects the processes: rank 0 tells the others by `publish` what they `read`, and they reach it at `host`.

    Without an exception, all are taken to have done their work; with one, the others are to end too.
    """
    links = _welcome(size, publish, "127.0.0.1" if this_machine_only else "") if rank == 0 else {
        0: _greet(rank, "127.0.0.1" if this_machine_only else host, read())}
    vigil = Vigil(links)
    yield vigil
    vigil.close()


def _welcome(size: int, publish: Callable[[str], None], host: str) -> dict[int, socket.socket]:
    token, links = secrets.token_bytes(16), dict[int, socket.socket]()
    with socket.create_server((host, 0), backlog=size) as server:
        server.settimeout(GREETING_SECONDS)
        publish(f"{server.getsockname()[1]} {token.hex()}")
        while len(links) < size - 1:
            link, _ = server.accept()
            link.settimeout(GREETING_SECONDS)
            with suppress(OSError):
                greeting = link.recv(len(token) + _NUMBER.size, socket.MSG_WAITALL)
                if len(greeting) == len(token) + _NUMBER.size and secrets.compare_digest(greeting[:len(token)], token):
                    links[int(_NUMBER.unpack(greeting[len(token):])[0])] = _lasting(link)
                    continue
            link.close()  # a stranger
    return links


def _greet(rank: int, host: str, where: str) -> socket.socket:
    port, token = where.split()
    link = socket.create_connection((host, int(port)), GREETING_SECONDS)
    link.sendall(bytes.fromhex(token) + _NUMBER.pack(rank))
    return _lasting(link)


def _lasting(link: socket.socket) -> socket.socket:
    """Without a deadline, since the kernel asks whether the other machine is still there."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):  # seconds, seconds, times
        if hasattr(socket, option):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return link
