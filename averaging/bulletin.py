"""The bulletin board: this peer's record, told to the swarm, and the others' records, read as often as is useful."""

import logging
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import replace
from threading import Condition, Thread
from time import monotonic
from typing import Any

from hivemind.utils import get_dht_time
from hivemind.utils.crypto import RSAPrivateKey

from averaging import roster
from averaging.config import Averaging
from averaging.dht import DHT
from averaging.progress import publish_record, read_records
from averaging.records import PeerRecord

log = logging.getLogger(__name__)


class Bulletin:
    """Keeps `record` in the DHT, and what is there of others in `records()`. Any thread may use it.

    Whoever `is_banned`, by peer id, is passed over.

    A thread of its own talks to the DHT; training waits for it never. A reading that fails leaves the last one.
    """

    def __init__(self, dht: DHT, run_id: str, key: RSAPrivateKey, record: PeerRecord, config: Averaging, *,
                 is_banned: Callable[[str], bool] = lambda _: False) -> None:
        self._is_banned = is_banned
        self._dht, self._run_id, self._key, self._config = dht, run_id, key, config
        self._record, self._others = record, tuple[PeerRecord, ...]()
        self._changed = Condition()
        self._urgent_telling = self._urgent_reading = True
        self._closing = False
        self._told = self._read = 0.0  # when, by the monotonic clock
        self._is_told = False  # whether the record was told as it is
        self._known = frozenset[str]()  # peers, as this one's epoch began
        self._seen: dict[str, tuple[int, float]] = {}  # in which epoch others are for certain, and since when
        self._missed: dict[str, float] = {}  # who did not come to a round: the time of its record then
        self._thread = Thread(target=self._keep, name="bulletin", daemon=True)
        self._thread.start()

    @property
    def record(self) -> PeerRecord:
        """This peer's own, the newest."""
        return self._record

    def records(self) -> tuple[PeerRecord, ...]:
        """All live peers', as last read, or as seen in a round since; this peer's own is the newest."""
        return (*(self._as_seen(record) for record in self._others if not self._is_banned(record.peer_id)),
                self._record)

    def present(self) -> tuple[PeerRecord, ...]:
        """Of `records`, less those who did not come to a round and have written nothing since."""
        missed = {record.peer_id for record in self._others if self._missed.get(record.peer_id) == record.time}
        return tuple(record for record in self.records() if record.peer_id not in missed)

    def saw(self, epoch: int, group: Collection[str], members: Collection[str]) -> None:
        """The round at the end of `epoch` was held by `members`, who are in the next epoch; `group` was expected.

        So the swarm goes on in step, and waits but once for one who is lost, while the DHT lags or is stuck.
        """
        told = {record.peer_id: record.time for record in self._others}
        self._seen |= dict.fromkeys(members, (epoch + 1, get_dht_time()))
        self._missed |= {peer: told[peer] for peer in {*group} - {*members} if peer in told}

    def _was_met(self, peer: str) -> bool:
        """A moment ago: then it is there, though the nodes that this one can ask just now do not have its record."""
        _, since = self._seen.get(peer, (0, 0.0))
        return bool(get_dht_time() - since < self._config.report_progress_expiration)

    def _as_seen(self, record: PeerRecord) -> PeerRecord:
        epoch, since = self._seen.get(record.peer_id, (0, 0.0))
        if record.epoch < epoch and record.time < since:
            return replace(record, epoch=epoch, samples_accumulated=0, sketch=b"", time=since)
        return record

    @property
    def known_before(self) -> int:
        """Peers that were there when this peer's epoch began, less those whose records have expired since."""
        return len(roster.still(self._known, self.records()))

    def update(self, **fields: Any) -> None:
        """Change fields of the record. Another epoch or state is told at once, the rest when it is time."""
        with self._changed:
            before, self._record = self._record, replace(self._record, **fields)
            if (before.epoch, before.state) != (self._record.epoch, self._record.state):
                if before.epoch != self._record.epoch:
                    self._known = roster.known(self.records(), self._record.peer_id, self._record.epoch, self._known,
                                               get_dht_time())
                self._urgent_telling = True
                self._changed.notify()
            self._is_told = self._is_told and before == self._record

    def hasten(self) -> None:
        """Read the others' records soon."""
        with self._changed:
            self._urgent_reading = True
            self._changed.notify()

    def close(self, timeout: float = 2.0) -> None:
        """Tell the record a last time, and end; the word is in the DHT then, if that takes at most `timeout` seconds.

        hivemind drops what a node that is shut down has not stored yet, and whoever takes no leave counts as lost.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout / 2)  # a reading may hang: it is not waited for
        try:
            self._tell().exception(timeout / 2)
        except (OSError, TimeoutError) as error:
            log.warning("the last word was not told: %r", error)

    def _keep(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._urgent_telling or self._urgent_reading,
                                       timeout=self._idle_seconds())
                if self._closing:
                    return
            try:
                if self._urgent_telling or self._is_time_to_tell():
                    self._tell()
                if self._urgent_reading or monotonic() - self._read >= self._reading_period():
                    self._look()
            except OSError as error:  # the pipe to the DHT's process broke: whoever watches that ends this worker
                log.warning("the DHT does not answer: %r", error)
                return

    def _idle_seconds(self) -> float:
        reading = self._read + self._reading_period() - monotonic()
        telling = self._told + self._telling_period() - monotonic()
        return max(0.01, min(reading, telling))

    def _is_time_to_tell(self) -> bool:
        due = self._config.report_progress_expiration / 3 if self._is_told else self._telling_period()
        return monotonic() - self._told >= min(due, self._config.max_refresh_period)

    def _tell(self) -> "Future[bool]":
        with self._changed:
            self._urgent_telling, self._is_told, self._told = False, True, monotonic()
            record = replace(self._record, time=get_dht_time())
        return publish_record(self._dht, self._run_id, self._key, record,
                              lifetime_seconds=self._config.report_progress_expiration)

    def _look(self) -> None:
        self._urgent_reading = False
        try:
            found = read_records(self._dht, self._run_id)
        except TimeoutError:
            log.warning("the DHT did not answer in time; what the swarm did last stands")
        else:
            there = {record.peer_id for record in found}
            met = (record for record in self._others if record.peer_id not in there and self._was_met(record.peer_id))
            self._others = (*(record for record in found if record.peer_id != self._record.peer_id), *met)
            there = {record.peer_id for record in self._others}
            self._seen = {peer: seen for peer, seen in self._seen.items() if peer in there}
            self._missed = {peer: told for peer, told in self._missed.items() if peer in there}
        self._read = monotonic()

    def _telling_period(self) -> float:
        return roster.telling_period(1 + len(self._others), self._config)

    def _reading_period(self) -> float:
        return roster.next_reading(self.records(), self._record.peer_id, self._config, get_dht_time())
