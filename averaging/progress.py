"""Progress records in the DHT: signed by their owner, checked against a schema, read by everyone."""

from concurrent.futures import Future
from dataclasses import asdict
from functools import lru_cache

import pydantic.v1 as pydantic  # hivemind's SchemaValidator takes no other
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.schema import BytesWithPublicKey, SchemaValidator
from hivemind.dht.validation import RecordValidatorBase
from hivemind.utils import MSGPackSerializer, get_dht_time
from hivemind.utils.crypto import RSAPrivateKey

from averaging.ban_records import BanValidator
from averaging.dht import DHT
from averaging.identity import peer_id_of
from averaging.receipt_records import ReceiptValidator
from averaging.records import ARCHIVING, PEER_STATES, PeerRecord, Refusals, Rounds, RoundSeconds

count = pydantic.conint(strict=True, ge=0, lt=2**63)
members = pydantic.conint(strict=True, ge=0, lt=2**16)
amount = pydantic.confloat(strict=True, ge=0, lt=1e18)
span = pydantic.confloat(strict=True, ge=0, lt=1e9)  # seconds; sums of more would lose the small ones
address = pydantic.constr(strict=True, max_length=160)
text = pydantic.constr(strict=True, max_length=64)
state = pydantic.constr(strict=True, regex=f"^({'|'.join((*PEER_STATES, ARCHIVING))})$")


class RoundsSchema(pydantic.BaseModel):
    """averaging.records.Rounds on the wire."""

    averaged: count  # type: ignore[valid-type]
    failed: count  # type: ignore[valid-type]
    alone: count  # type: ignore[valid-type]


class RoundSecondsSchema(pydantic.BaseModel):
    """averaging.records.RoundSeconds on the wire."""

    averaged: span  # type: ignore[valid-type]
    failed: span  # type: ignore[valid-type]


class RefusalsSchema(pydantic.BaseModel):
    """averaging.records.Refusals on the wire."""

    value: count  # type: ignore[valid-type]
    absent: count  # type: ignore[valid-type]
    message: count  # type: ignore[valid-type]


class RecordSchema(pydantic.BaseModel):
    """averaging.records.PeerRecord on the wire: strict types, bounded sizes."""

    peer_id: text  # type: ignore[valid-type]
    name: text  # type: ignore[valid-type]
    state: state  # type: ignore[valid-type]
    epoch: count  # type: ignore[valid-type]
    samples_accumulated: count  # type: ignore[valid-type]
    samples_total: count  # type: ignore[valid-type]
    samples_per_second: amount  # type: ignore[valid-type]
    loss: pydantic.confloat(strict=True, gt=-1e18, lt=1e18) | None  # type: ignore[valid-type]
    group_size: members  # type: ignore[valid-type]
    version: text  # type: ignore[valid-type]
    device: text  # type: ignore[valid-type]
    client_mode: pydantic.StrictBool
    time: amount  # type: ignore[valid-type]
    auxiliary: pydantic.StrictBool
    step_seconds: amount  # type: ignore[valid-type]
    sketch: pydantic.conbytes(strict=True, max_length=256)  # type: ignore[valid-type]
    rounds: RoundsSchema
    round_seconds: span  # type: ignore[valid-type]
    seconds: RoundSecondsSchema
    refused: RefusalsSchema
    addresses: pydantic.conlist(address, max_items=8)  # type: ignore[valid-type]


class PeersSchema(pydantic.BaseModel):
    """The dictionary under `{run_id}_peers`: a record per public key."""

    peers: dict[BytesWithPublicKey, RecordSchema]


def record_validators(run_id: str, key: RSAPrivateKey, authority: bytes = b"") -> list[RecordValidatorBase]:
    """What every node of the experiment's DHT checks before it stores: schemas, signatures, and who wrote the bans.

    `key` is the node's own, by which its records are signed; `authority` the authority's public key, if there is one.
    """
    return [SchemaValidator(PeersSchema, prefix=run_id), RSASignatureValidator(key), BanValidator(authority, run_id),
            ReceiptValidator(run_id)]


def publish_record(dht: DHT, run_id: str, key: RSAPrivateKey, record: PeerRecord, *,
                   lifetime_seconds: float) -> "Future[bool]":
    """Store this peer's record, to be forgotten after `lifetime_seconds`; returns without waiting for the network.

    The future is done when nodes of the DHT have it, and false if none took it.
    """
    value = asdict(record) | {"addresses": list(record.addresses)}  # the wire has no tuples
    return dht.tell(f"{run_id}_peers", RSASignatureValidator(key).local_public_key, value,
                    get_dht_time() + lifetime_seconds)


def read_records(dht: DHT, run_id: str, *, timeout: float = 5.0) -> list[PeerRecord]:
    """Every live record of the experiment. Malformed ones are left out; raises TimeoutError after `timeout` seconds."""
    found = dht.look(f"{run_id}_peers").result(timeout)
    records = (_parse(owner, value) for owner, (value, _) in found.items())
    return [record for record in records if record is not None]


@lru_cache(maxsize=8192)
def _parse(owner: object, value: bytes) -> PeerRecord | None:
    try:  # again what every node should have checked: one that doesn't may have handed it to us
        fields = RecordSchema.parse_obj(MSGPackSerializer.loads(value)).dict()
        if not isinstance(owner, bytes) or fields["peer_id"] != _signer(owner):
            return None  # somebody speaks in another's name
    except ValueError:
        return None
    return PeerRecord(**fields | {
        "rounds": Rounds(**fields["rounds"]), "seconds": RoundSeconds(**fields["seconds"]),
        "refused": Refusals(**fields["refused"]), "addresses": tuple(fields["addresses"])})


@lru_cache(maxsize=8192)
def _signer(owner: bytes) -> str:
    """The libp2p peer id that belongs to the public key in a signed record's subkey. Raises ValueError."""
    return peer_id_of(owner.removeprefix(b"[owner:").removesuffix(b"]"))
