"""Progress records over a real DHT: what is told arrives, what is forged doesn't."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from time import monotonic, sleep

import pytest
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.utils import get_dht_time
from hivemind.utils.crypto import RSAPrivateKey

from averaging.dht import DHT, open_identity, start_dht
from averaging.progress import publish_record, read_records, record_validators
from averaging.records import PeerRecord, Refusals, Rounds, RoundSeconds

RUN = "progress-test"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[DHT, RSAPrivateKey]]]:
    folder, nodes = tmp_path_factory.mktemp("keys"), list[tuple[DHT, RSAPrivateKey]]()
    for number in range(2):
        path: Path = folder / f"{number}.key"
        key = open_identity(path)
        friends = [str(maddr) for dht, _ in nodes for maddr in dht.get_visible_maddrs()]
        nodes.append((start_dht(identity_path=path, host_maddrs=["/ip4/127.0.0.1/tcp/0"], initial_peers=friends,
                                record_validators=record_validators(RUN, key)), key))
    yield nodes
    for dht, _ in nodes:
        dht.shutdown()


def record(dht: DHT, **fields: object) -> PeerRecord:
    told = PeerRecord(
        peer_id=str(dht.peer_id), name="ada", state="training", epoch=3, samples_accumulated=64, samples_total=640,
        samples_per_second=12.5, loss=1.5, group_size=2, version="0.1.0", device="cpu", client_mode=False,
        time=get_dht_time(), rounds=Rounds(averaged=3, failed=1), round_seconds=1.5,
        seconds=RoundSeconds(4.5, 30.0), refused=Refusals(value=2, absent=1),
        sketch=bytes(128), auxiliary=True, step_seconds=0.5)
    return replace(told, **fields)


def eventually(dht: DHT, expected: set[str]) -> dict[str, PeerRecord]:
    deadline = monotonic() + 20
    while (records := {one.name: one for one in read_records(dht, RUN)}).keys() != expected:
        assert monotonic() < deadline, records
        sleep(0.05)
    return records


def forge(dht: DHT, key: RSAPrivateKey, subkey: bytes, value: object) -> bool:
    """What a stranger's node would do: store without our checks. Whether any node took it."""
    return bool(dht.store(f"{RUN}_peers", subkey=subkey, value=value, expiration_time=get_dht_time() + 60))


def test_what_a_peer_tells_is_read_by_another(nodes: list[tuple[DHT, RSAPrivateKey]]) -> None:
    (dht, key), (other, _) = nodes
    told = record(dht)
    publish_record(dht, RUN, key, told, lifetime_seconds=60)
    assert eventually(other, {"ada"})["ada"] == told


def test_a_later_record_replaces_the_earlier(nodes: list[tuple[DHT, RSAPrivateKey]]) -> None:
    (dht, key), (other, _) = nodes
    publish_record(dht, RUN, key, record(dht, name="ada"), lifetime_seconds=60)
    publish_record(dht, RUN, key, record(dht, name="ada at epoch 4", epoch=4), lifetime_seconds=61)
    assert eventually(other, {"ada at epoch 4"})["ada at epoch 4"].epoch == 4


def test_a_record_in_another_peers_name_is_not_read(nodes: list[tuple[DHT, RSAPrivateKey]]) -> None:
    (dht, key), (other, other_key) = nodes
    publish_record(dht, RUN, key, record(dht, name="honest"), lifetime_seconds=70)
    publish_record(other, RUN, other_key, record(dht, name="impostor", epoch=10**6), lifetime_seconds=70)
    assert set(eventually(other, {"honest"})) == {"honest"}
    publish_record(other, RUN, other_key, record(other, name="itself"), lifetime_seconds=71)
    eventually(dht, {"honest", "itself"})


def test_a_record_signed_by_another_key_is_stored_nowhere(nodes: list[tuple[DHT, RSAPrivateKey]]) -> None:
    (dht, _), (other, other_key) = nodes
    owner = RSASignatureValidator(RSAPrivateKey()).local_public_key  # whose private key this node doesn't have
    assert not forge(other, other_key, owner, {"peer_id": str(dht.peer_id)})


@pytest.mark.parametrize("fields", [{"epoch": -1}, {"epoch": "3"}, {"state": "winning"}, {"name": "x" * 65},
                                    {"samples_per_second": float("inf")}, {"loss": float("nan")}, {"group_size": 2**16},
                                    {"round_seconds": 1e9}, {"seconds": {"averaged": -1.0, "failed": 0.0}},
                                    {"refused": {"value": 1}}])
def test_a_record_out_of_schema_is_stored_nowhere(nodes: list[tuple[DHT, RSAPrivateKey]],
                                                  fields: dict[str, object]) -> None:
    other, other_key = nodes[1]
    owner = RSASignatureValidator(other_key).local_public_key
    assert not forge(other, other_key, owner, asdict(record(other)) | fields)
