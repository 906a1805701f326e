"""What one HTTP client may hold: uvicorn waits for ever for a request that comes a byte at a time, from anybody."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 10.0  # within which a request has to be there
MOST = 128              # connections of one address


class Connection(H11Protocol):
    """A connection that is closed when nothing has been asked for too long, or when its client has too many."""

    _check: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As uvicorn's."""
        super().connection_made(transport)
        address = (self.client or ("",))[0]
        clients = [other.client for other in self.connections if isinstance(other, Connection)]
        if sum(client[0] == address for client in clients if client) > MOST:
            transport.close()
        else:
            self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        """As uvicorn's."""
        if self._check:
            self._check.cancel()
        super().connection_lost(exc)

    def _look_later(self) -> None:
        self._check = self.loop.call_later(REQUEST_SECONDS, self._look)

    def _look(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:
            self._look_later()
