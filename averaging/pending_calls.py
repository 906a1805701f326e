"""A mend of hivemind's client of the libp2p daemon, for every process that has one.

Its reader hands each answer to the call that waits for it. If that call was given up in the same turn of the event
loop, the answer's future is cancelled already, and the reader ends with InvalidStateError: from then on the process
hears neither answers nor calls (p2p_daemon_bindings/control.py, hivemind 1.1.12). Any timeout can do it; a process
that is stopped and continued nearly always does, as its timeouts and its answers are due at once.
"""

from asyncio import Future
from typing import Any

from hivemind.p2p.p2p_daemon_bindings.control import ControlClient


class PendingCalls(dict[Any, "Future[Any]"]):
    """Futures by call. Those that are done with are not `in` it: the reader leaves them alone."""

    def __contains__(self, call_id: object) -> bool:
        future = self.get(call_id)
        return future is not None and not future.done()


def mend_pending_calls() -> None:
    """Before this process starts a client."""
    begin = ControlClient.__init__

    def begin_mended(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        self._pending_calls = PendingCalls()

    ControlClient.__init__ = begin_mended
