"""What coordinators know, as the messages in which they tell it to each other."""

from hashlib import sha256
from typing import Any

from google.protobuf.message import Message

from coordinator.facts import Facts, by_key
from coordinator.ledger import TABLES
from proto import replica_pb2


def encode(known: Facts) -> replica_pb2.Facts:
    """The same bytes for the same facts."""
    return replica_pb2.Facts(serial=known.serial, **{
        name: [getattr(replica_pb2, kind.__name__)(**vars(fact)) for _, fact in sorted(getattr(known, name).items())]
        for name, kind in TABLES.items()})


def decode(told: replica_pb2.Facts) -> Facts:
    """What another coordinator has written down."""
    return Facts(serial=told.serial, **{name: by_key(decode_fact(kind, fact) for fact in getattr(told, name))
                                        for name, kind in TABLES.items()})


def decode_fact(kind: type[Any], told: Message) -> Any:
    """One fact, of that kind."""
    return kind(**{field.name: None if field.has_presence and not told.HasField(field.name)
                   else getattr(told, field.name) for field in told.DESCRIPTOR.fields})


def digest(told: replica_pb2.Facts) -> bytes:
    """What changes whenever they do."""
    return sha256(told.SerializeToString(deterministic=True)).digest()
