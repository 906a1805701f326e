"""Forked peers for the averaging benches: processes of one thread on loopback, each with its own DHT node.

They are forked from a process that has torch and hivemind imported, which takes milliseconds where a new interpreter
takes seconds. None outlives the bench, however that ends, nor do their own children.
"""

import averaging.fork  # noqa: F401

# isort: split
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from hivemind.utils.asyncio import _AsyncContextWrapper
from hivemind.utils.mpfuture import MPFuture

from averaging.dht import DHT, start_dht
from averaging.process import die_with_parent

START_SECONDS = 60.0  # that a peer has to get ready
LOG = "peers.log"


@dataclass(frozen=True)
class Child:
    """A forked process, and the pipe to it."""

    process: multiprocessing.Process
    pipe: "Connection[Any, Any]"
    folder: Path

    def hear(self, seconds: float = START_SECONDS) -> Any:
        """What it says next."""
        try:
            if self.pipe.poll(seconds):
                return self.pipe.recv()
        except (EOFError, ConnectionError):
            pass
        said = (self.folder / LOG).read_text()[-2000:]
        raise SystemExit(f"{self.process.name} says nothing; the last of its log:\n{said}")


@dataclass(frozen=True)
class Place:
    """What a forked process is given."""

    number: int
    pipe: "Connection[Any, Any]"  # to the parent
    folder: Path                  # shared by all of them, removed at the end

    @property
    def identity(self) -> Path:
        """The file with the key of its DHT node."""
        return self.folder / f"{self.number}.key"


@contextmanager
def forked(count: int, live: Callable[..., None], *arguments: Any) -> Iterator[list[Child]]:
    """`live(place, *arguments)` in `count` processes, which end with the context."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(
            tempfile.TemporaryDirectory(prefix="covey-bench-", ignore_cleanup_errors=True)))
        children = []
        for number in range(count):
            ours, theirs = multiprocessing.Pipe()
            place = Place(number, theirs, folder)
            process = multiprocessing.Process(target=_begin, args=(os.getpid(), place, live, arguments),
                                              name=f"{live.__module__}, peer {number}")
            process.start()
            theirs.close()
            children.append(Child(process, ours, folder))
            stack.callback(_end, children[-1])
        yield children


def _begin(parent: int, place: Place, live: Callable[..., None], arguments: Sequence[Any]) -> None:
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle; it ends us
    tempfile.tempdir = os.environ["XDG_RUNTIME_DIR"] = str(place.folder)  # killed, it leaves nothing elsewhere
    with (place.folder / LOG).open("a") as log:
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    MPFuture.reset_backend()  # it would share its locks with all other peers, dead ones too
    _AsyncContextWrapper.EXECUTOR_LOCK = multiprocessing.Lock()
    for name in ("hivemind", "averaging"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what fails is counted
    try:
        live(place, *arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)  # hivemind's threads would be waited for


def _end(child: Child) -> None:
    child.pipe.close()
    child.process.kill()
    child.process.join()


def start_node(place: Place, validators: Sequence[Any] = ()) -> DHT:
    """In a child: its DHT node, which knows the others'. The parent calls `introduce`."""
    dht = start_dht(identity_path=place.identity, host_maddrs=["/ip4/127.0.0.1/tcp/0"],
                    initial_peers=place.pipe.recv(), record_validators=validators)
    place.pipe.send([str(address) for address in dht.get_visible_maddrs()])
    place.pipe.recv()
    return dht


def introduce(children: Sequence[Child]) -> None:
    """Lets the children's DHT nodes find each other, and returns when all children have said that they are ready."""
    first, *others = children
    first.pipe.send([])
    addresses = first.hear()
    for other in others:
        other.pipe.send(addresses)
    for other in others:
        other.hear()
    for child in children:
        child.pipe.send("all are here")
    for child in children:
        assert child.hear() == "ready"
