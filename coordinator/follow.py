"""Following the swarm: reading the records about once a second, and logging what changed."""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from averaging.records import PeerRecord
from coordinator.history import remember
from coordinator.past import Past, PastFile
from coordinator.swarm import SwarmState, observe

logger = logging.getLogger("covey.coordinator")


def under_enrolled_names(records: Iterable[PeerRecord], names: Mapping[str, str]) -> list[PeerRecord]:
    """The records, of members with the names that they enrolled with: a record may say any."""
    return [replace(record, name=names.get(record.peer_id, record.name)) for record in records]


class SwarmFollower:
    """Keeps `state`, the newest state of the swarm, and `history`, what was read so far: with a `past_file` from
    what is in it on, and kept there.

    `read` returns the records or raises, and may block: it runs in a thread. `banned` gives the peer ids
    that don't count, `clock` Unix seconds. A reading that fails leaves both as they were, the state with its time.
    """

    def __init__(self, read: Callable[[], Iterable[PeerRecord]], *, stale_seconds: float,
                 banned: Callable[[], Collection[str]] = tuple, clock: Callable[[], float] = time.time,
                 past_file: PastFile | None = None) -> None:
        past = past_file.recall() if past_file else Past()
        self.state, self.history, self._past_file = past.state, past.history, past_file
        self.readable = True
        self._read, self._stale_seconds, self._banned, self._clock = read, stale_seconds, banned, clock

    async def refresh(self) -> None:
        """Read once."""
        try:
            records = await asyncio.to_thread(self._read)
        except Exception as error:  # whatever it is, training goes on, and so do we
            if self.readable:
                logger.warning("can't read the peers' records: %s", str(error) or type(error).__name__)
            self.readable = False
            return
        if not self.readable:
            logger.warning("the peers' records can be read again")
        self.readable = True
        before, self.state = self.state, observe(self.state, records, self._clock(),
                                                 stale_seconds=self._stale_seconds, banned=self._banned())
        self.history = remember(self.history, self.state)
        _log_changes(before, self.state)
        if self._past_file and self._past_file.is_due():
            await asyncio.to_thread(self.keep)

    def keep(self) -> None:
        """Write what is known to the past's file, if there is one."""
        if self._past_file:
            self._past_file.keep(Past(self.state, self.history))


def _log_changes(before: SwarmState, state: SwarmState) -> None:
    peers = f"{len(state.peers)} peer{'' if len(state.peers) == 1 else 's'}"
    for peer_id in state.peers.keys() - before.peers.keys():
        logger.info("%r joined (%s): %s", state.peers[peer_id].record.name, peer_id, peers)
    for peer_id in before.peers.keys() - state.peers.keys():
        record = before.peers[peer_id].record
        how = "left" if record.state == "leaving" else "was lost"
        logger.info("%r %s (%s): %s", record.name, how, peer_id, peers)
    if state.epoch != before.epoch:
        loss = "unknown" if state.loss is None else f"{state.loss:.4f}"
        logger.info("epoch %d: %s, loss %s, %.1f samples/s", state.epoch, peers, loss, state.samples_per_second)
