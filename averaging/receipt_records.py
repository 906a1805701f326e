"""Receipts in the DHT: written by every member after a round, signed as all records are, read by coordinators only.

They are kept apart from the progress records, which every peer reads all the time, and in SHARDS parts.
"""

import logging
from collections import deque
from contextlib import suppress
from threading import Condition, Thread
from time import monotonic

from hivemind.dht import DHTID
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.utils import MSGPackSerializer, get_dht_time
from hivemind.utils.crypto import RSAPrivateKey

from averaging.dht import DHT
from averaging.holders import Found
from averaging.identity import peer_id_of
from averaging.receipts import LIFE_SECONDS, SHARDS, Receipt, dump, parse, shard_of

CLOCK_SECONDS = 120.0   # that the writer's clock may be ahead
PAUSE_SECONDS = 2.0     # at least between two writings
AGAIN_SECONDS = 60.0    # after which the last one is written once more, for nodes that have come since
LAST_SECONDS = 1.5      # that the last writing may take, before the DHT is closed
KEPT = 64               # receipts of a peer, at most
log = logging.getLogger(__name__)


def key_of(run_id: str, shard: int) -> str:
    """Where the receipts of a part of the peers are."""
    return f"{run_id}_receipts_{shard}"


class ReceiptValidator(RecordValidatorBase):  # type: ignore[misc]  # hivemind is untyped
    """Takes under the keys of receipts only what is one peer's, in its place, well-formed, and not for ever.

    That the peer has signed it, hivemind's RSASignatureValidator sees to.
    """

    def __init__(self, run_id: str) -> None:
        self._shards = {DHTID.generate(key_of(run_id, shard)).to_bytes(): shard for shard in range(SHARDS)}

    def validate(self, record: DHTRecord) -> bool:
        """Of every record that is to be stored, or was found."""
        if (shard := self._shards.get(record.key)) is None:
            return True
        try:
            peer_id = owner_of(MSGPackSerializer.loads(record.subkey))
            parse(MSGPackSerializer.loads(record.value))
        except Exception:  # whatever a stranger's bytes make of msgpack
            return False
        return shard_of(peer_id) == shard and record.expiration_time <= get_dht_time() + LIFE_SECONDS + CLOCK_SECONDS


def owner_of(subkey: object) -> str:
    """The peer whose public key, and nothing else, is in a signed record's subkey. ValueError if there is none."""
    if not isinstance(subkey, bytes) or not (subkey.startswith(b"[owner:") and subkey.endswith(b"]")):
        raise ValueError("a record without an owner")
    return peer_id_of(subkey[len(b"[owner:"):-1])


class ReceiptBook:
    """This peer's receipts, the newest few, told to the DHT. Any thread may add one.

    A thread of its own writes them; nobody waits for it, and what fails is tried again with the next.
    """

    def __init__(self, dht: DHT, run_id: str, key: RSAPrivateKey) -> None:
        self._dht, self._subkey = dht, RSASignatureValidator(key).local_public_key
        self._key = key_of(run_id, shard_of(str(dht.peer_id)))
        self._receipts = deque[tuple[float, Receipt]](maxlen=KEPT)  # with the DHT's time of each
        self._changed, self._is_new, self._closing = Condition(), False, False
        self._thread = Thread(target=self._keep, name="receipts", daemon=True)
        self._thread.start()

    def add(self, receipt: Receipt) -> None:
        """Of a round that has just been committed; returns at once."""
        with self._changed:
            self._receipts.append((get_dht_time(), receipt))
            self._is_new = True
            self._changed.notify()

    def close(self, timeout: float = 2.0) -> None:
        """Tell what is untold, and end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    def _keep(self) -> None:
        last, is_again_due, closing = -PAUSE_SECONDS, False, False
        while not closing:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._is_new, timeout=AGAIN_SECONDS)
                self._changed.wait_for(lambda: self._closing, timeout=last + PAUSE_SECONDS - monotonic())
                is_new, self._is_new, closing = self._is_new, False, self._closing
            if is_new or is_again_due:
                last, is_again_due = monotonic(), is_new
                try:
                    self._tell(wait=closing)
                except OSError as error:  # the pipe to the DHT's process broke: whoever watches that ends this worker
                    log.warning("the DHT does not answer: %r", error)
                    return

    def _tell(self, *, wait: bool) -> None:
        """With the life of the newest; much older ones are left out: none is there for longer than OLDEST_SECONDS."""
        with self._changed:
            written = self._receipts[-1][0]
            told = [receipt for time, receipt in self._receipts if time > written - LIFE_SECONDS / 2]
        if data := dump(told):
            stored = self._dht.tell(self._key, self._subkey, data, written + LIFE_SECONDS)
            if wait:
                with suppress(TimeoutError):
                    stored.result(timeout=LAST_SECONDS)
        else:
            log.warning("a group too large for its members to be credited")


def read_receipts(dht: DHT, run_id: str, *, timeout: float = 5.0) -> dict[str, tuple[Receipt, ...]]:
    """Every live peer's receipts, by peer id. Malformed ones are left out; raises TimeoutError after `timeout` s."""
    until = monotonic() + timeout
    asked = [dht.look(key_of(run_id, shard)) for shard in range(SHARDS)]
    receipts: dict[str, tuple[Receipt, ...]] = {}
    for answer in asked:
        receipts |= _parsed(answer.result(timeout=max(0.0, until - monotonic())))
    return receipts


def _parsed(found: Found) -> dict[str, tuple[Receipt, ...]]:
    """Again what every node should have checked: one that doesn't may have handed it to us."""
    receipts: dict[str, tuple[Receipt, ...]] = {}
    for subkey, (value, _) in found.items():
        try:
            receipts[owner_of(subkey)] = parse(MSGPackSerializer.loads(value))
        except ValueError:
            continue
    return receipts
