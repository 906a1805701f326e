"""What a peer says of the rounds that it has averaged in: the evidence by which volunteers are credited. No network.

Its members' receipts of a round name the same group, and of each member the samples that its signed statement told the
group: so each member's own claim can be held against what the others saw.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256

from google.protobuf.message import DecodeError

from proto import receipts_pb2

SHARDS = 16            # of the receipts in the DHT, so that none is too long to be read in one message
BUDGET = 4 << 10       # bytes that one peer's may take; its newest alone may take up to
LONGEST = 16 << 10     # ... so many: a group of about three hundred
LIFE_SECONDS = 6 * 3600.0  # that a peer's are in the DHT after its last round
OLDEST_SECONDS = 1.5 * LIFE_SECONDS  # that one can be there, with newer ones
MOST_EPOCHS = 2**53    # neither SQLite nor JSON counts further
MOST_SAMPLES = 2**53
GROUP_ID_BYTES = 16
LONGEST_PEER_ID = 128


@dataclass(frozen=True)
class Receipt:
    """Of one committed round."""

    epoch: int  # the collaborative epoch that it ended
    group_id: bytes
    accepted: Mapping[str, int]  # by peer id, of every member: its samples that are in the mean


def dump(receipts: Iterable[Receipt]) -> bytes:
    """The newest, which come last, of those that fit into BUDGET; empty if the newest alone is longer than LONGEST."""
    kept: list[receipts_pb2.Receipt] = []
    length = 0
    for receipt in reversed(list(receipts)):
        row = receipts_pb2.Receipt(epoch=receipt.epoch, group_id=receipt.group_id, accepted=[
            receipts_pb2.Accepted(peer_id=peer, samples=samples) for peer, samples in sorted(receipt.accepted.items())])
        length += row.ByteSize() + 4  # its tag and length
        if length > (BUDGET if kept else LONGEST):
            break
        kept.insert(0, row)
    return bytes(receipts_pb2.Receipts(receipts=kept).SerializeToString())


def parse(data: object) -> tuple[Receipt, ...]:
    """What `dump` wrote. ValueError for anything else, whoever sent it."""
    if not isinstance(data, bytes) or len(data) > LONGEST:
        raise ValueError("receipts are bytes, and not many")
    try:
        rows = receipts_pb2.Receipts.FromString(data).receipts
    except DecodeError:
        raise ValueError("malformed receipts") from None
    return tuple(_receipt(row) for row in rows)


def _receipt(row: receipts_pb2.Receipt) -> Receipt:
    accepted = {member.peer_id: member.samples for member in row.accepted}
    is_sound = (row.epoch < MOST_EPOCHS and len(row.group_id) == GROUP_ID_BYTES and len(accepted) == len(row.accepted)
                and all(len(peer) <= LONGEST_PEER_ID and samples < MOST_SAMPLES for peer, samples in accepted.items()))
    if not is_sound:
        raise ValueError("a receipt that no round can give")
    return Receipt(row.epoch, row.group_id, accepted)


def shard_of(peer_id: str) -> int:
    """Where in the DHT the peer's receipts are."""
    return sha256(peer_id.encode()).digest()[0] % SHARDS
