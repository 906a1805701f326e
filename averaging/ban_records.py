"""The authority's list of bans in the DHT: any member may store it, as nodes take none that it has not signed."""

import logging
from threading import Event

from hivemind.dht import DHT, DHTID
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTKey
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.utils import MSGPackSerializer

from averaging.bans import BanFile, parse_bans

KEEP_SECONDS = 10.0  # between two looks at the DHT: members honour a ban within three of these
ANSWER_SECONDS = 5.0
log = logging.getLogger(__name__)


class BanValidator(RecordValidatorBase):  # type: ignore[misc]  # hivemind is untyped
    """Takes under the key of the bans only what the authority has signed, until when it says so."""

    def __init__(self, authority: bytes, run_id: str) -> None:
        self._authority, self._run_id = authority, run_id
        self._key = DHTID.generate(key_of(run_id)).to_bytes()

    def validate(self, record: DHTRecord) -> bool:
        """Of every record that is to be stored, or was found."""
        if record.key != self._key:
            return True
        try:
            signed = MSGPackSerializer.loads(record.value)
        except Exception:  # whatever a stranger's bytes make of msgpack
            return False
        if record.subkey != DHTProtocol.IS_REGULAR_VALUE or not isinstance(signed, bytes):
            return False
        bans = parse_bans(signed, self._authority, self._run_id)
        return bans is not None and bans.expires == record.expiration_time


def key_of(run_id: str) -> DHTKey:
    """Where the list is in the DHT."""
    return f"{run_id}_bans"


def publish_bans(dht: DHT, run_id: str, file: BanFile) -> None:
    """Store the list of `file`, if there is one; returns without waiting for the network."""
    if (newest := file.newest()).signed:
        dht.store(key_of(run_id), value=newest.signed, expiration_time=newest.bans.expires, return_future=True)


def look_for_bans(dht: DHT, run_id: str, file: BanFile) -> None:
    """Take the list of the DHT into `file`, or tell the DHT of it, whichever is newer. Raises OSError."""
    try:
        found = dht.get(key_of(run_id), latest=True, return_future=True).result(timeout=ANSWER_SECONDS)
    except TimeoutError:
        return
    signed = found.value if found and isinstance(found.value, bytes) else b""
    if signed != file.newest().signed and not file.offer(signed):
        publish_bans(dht, run_id, file)


def keep_bans(dht: DHT, run_id: str, file: BanFile, over: Event) -> None:
    """A thread's work, until `over` is set."""
    while not over.wait(KEEP_SECONDS):
        try:
            look_for_bans(dht, run_id, file)
        except OSError as error:  # a full disk, or the DHT's process is gone
            log.warning("the list of bans could not be kept: %s", error)
