"""Simulated volunteers for `benchmarks.coordinator_load`: `python -m benchmarks.load_volunteers LINK COUNT SECONDS`

Each has a key of its own and a record that changes, is signed with that key, and is told as a volunteer's is: at each
epoch, and as often as in a swarm of that size. What a thousand would need a thousand machines for, they share: a DHT
node, with libp2p's daemon, through which all is told. Prints a JSON line when all are told, then one at each epoch.
"""

import averaging.fork  # noqa: F401

# isort: split
import asyncio.subprocess
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from time import monotonic

from cryptography.hazmat.primitives.asymmetric.rsa import (
    RSAPrivateNumbers,
    RSAPublicNumbers,
    generate_private_key,
    rsa_crt_dmp1,
    rsa_crt_dmq1,
    rsa_crt_iqmp,
)
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.node import DHTNode
from hivemind.dht.validation import CompositeValidator, DHTRecord
from hivemind.utils import MSGPackSerializer, get_dht_time
from hivemind.utils.crypto import RSAPrivateKey

from averaging import roster
from averaging.authorisation import MemberAuthoriser
from averaging.dht import open_identity
from averaging.holders import Holders
from averaging.identity import peer_id_of
from averaging.process import die_with_parent
from averaging.progress import record_validators
from averaging.records import PeerRecord, Rounds
from averaging.version import VERSION
from coordinator.link import parse_link
from peer.enrol import Enrolment, enrol

NODES = 1
AT_ONCE = 8  # tellings under way
E, BITS = 65537, 2048
DEVICES = ("NVIDIA H200", "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 3060", "cpu")


@dataclass
class Volunteer:
    """Its key, its newest record, and when it told of it."""

    key: RSAPrivateKey
    record: PeerRecord
    told: float = 0.0


class Signers(RSASignatureValidator):  # type: ignore[misc]  # hivemind is untyped
    """Signs with the key of whom the record is of; this node's own is none of them."""

    def __init__(self, key: RSAPrivateKey, volunteers: Sequence[Volunteer]) -> None:
        super().__init__(key)
        self._signers = {MSGPackSerializer.dumps(subkey_of(one)): RSASignatureValidator(one.key) for one in volunteers}

    def sign_value(self, record: DHTRecord) -> bytes:
        """As hivemind's, with that key."""
        return bytes(self._signers[record.subkey].sign_value(record))


def subkey_of(volunteer: Volunteer) -> bytes:
    """Under which its record is."""
    return bytes(RSASignatureValidator(volunteer.key).local_public_key)


def keys() -> Iterator[RSAPrivateKey]:
    """Different keys, good ones but for this: each has both primes in common with others, which saves minutes."""
    primes = list[int]()
    while True:
        numbers = generate_private_key(public_exponent=E, key_size=BITS).private_numbers()
        for p in (numbers.p, numbers.q):
            for q in primes:
                yield _key(p, q)
            primes.append(p)


def _key(p: int, q: int) -> RSAPrivateKey:
    p, q = max(p, q), min(p, q)
    d = pow(E, -1, (p - 1) * (q - 1))
    key = RSAPrivateKey.__new__(RSAPrivateKey)
    key._private_key = RSAPrivateNumbers(
        p, q, d, rsa_crt_dmp1(d, p), rsa_crt_dmq1(d, q), rsa_crt_iqmp(p, q), RSAPublicNumbers(E, p * q),
    ).private_key(unsafe_skip_rsa_key_validation=True)
    return key


def volunteers(count: int) -> list[Volunteer]:
    """`count` of them, in epoch 0."""
    chance, made = Random(5), list[Volunteer]()
    for number, key in enumerate(islice(keys(), count)):
        peer_id = peer_id_of(key.get_public_key().to_bytes())
        made.append(Volunteer(key, PeerRecord(
            peer_id=peer_id, name=f"volunteer-{number:04}", state="training", epoch=0, samples_accumulated=0,
            samples_total=0, samples_per_second=chance.uniform(10, 400), loss=None, group_size=16, version=VERSION,
            device=chance.choice(DEVICES), client_mode=chance.random() < 0.3, time=0.0, step_seconds=0.5,
            sketch=bytes(136), addresses=(f"/ip4/198.51.100.7/tcp/31337/p2p/{peer_id}",))))
    return made


async def tell(holders: Holders, enrolment: Enrolment, volunteer: Volunteer, into: float, epoch: int) -> None:
    """Its record as it is `into` seconds of `epoch`."""
    speed, expiration = volunteer.record.samples_per_second, enrolment.experiment.averaging.report_progress_expiration
    done = volunteer.record.samples_total if epoch == volunteer.record.epoch else int(
        volunteer.record.samples_total + speed)
    volunteer.record = replace(
        volunteer.record, epoch=epoch, samples_accumulated=int(into * speed), samples_total=done + int(speed),
        loss=6.0 / (1 + epoch), rounds=Rounds(averaged=epoch), sketch=epoch.to_bytes(8, "big") * 17,
        time=get_dht_time())
    value = asdict(volunteer.record) | {"addresses": list(volunteer.record.addresses)}
    if not await holders.store(f"{enrolment.run_id}_peers", subkey_of(volunteer), value, get_dht_time() + expiration):
        print(f"{volunteer.record.name}: nobody took its record", file=sys.stderr)


async def live(link: str, count: int, epoch_seconds: float, folder: Path) -> None:
    """Until killed."""
    asyncio.subprocess.create_subprocess_exec = partial(  # libp2p's daemons are not to outlive this process
        asyncio.subprocess.create_subprocess_exec, preexec_fn=die_with_parent)
    crowd, nodes = volunteers(count), list[Holders]()
    for number in range(NODES):
        enrolment, node = await start(link, crowd, folder / f"{number}.key")
        nodes.append(node)
    config = enrolment.experiment.averaging
    period = min(roster.telling_period(count, config), config.report_progress_expiration / 3)
    limit, began, first = asyncio.Semaphore(AT_ONCE), monotonic(), True

    async def one(number: int, volunteer: Volunteer) -> None:
        async with limit:
            now = monotonic() - began
            await tell(nodes[number % NODES], enrolment, volunteer, now % epoch_seconds, int(now / epoch_seconds))

    told = [-period * number / count for number in range(count)]  # spread evenly
    epoch = 0
    while True:
        now = monotonic() - began
        new_epoch, epoch = int(now / epoch_seconds) > epoch, int(now / epoch_seconds)
        due = [number for number in range(count) if first or new_epoch or now - told[number] >= period]
        for number in due:
            told[number] = now if not first else told[number]
        await asyncio.gather(*(one(number, crowd[number]) for number in due))
        if first or new_epoch:
            print(json.dumps({"epoch": epoch, "told": len(due), "seconds": round(monotonic() - began - now, 2)}),
                  flush=True)
        first = False
        await asyncio.sleep(0.1)


async def start(link: str, crowd: Sequence[Volunteer], identity: Path) -> tuple[Enrolment, Holders]:
    """A DHT node that the coordinator lets in."""
    key = open_identity(identity)
    enrolment = await enrol(parse_link(link), identity.stem, key._private_key)
    member = MemberAuthoriser(key, authority=enrolment.authority, run_id=enrolment.run_id,
                              read_token=lambda: enrolment.token)
    schema = [one for one in record_validators(enrolment.run_id, key, enrolment.authority)
              if not isinstance(one, RSASignatureValidator)]
    node = await DHTNode.create(
        initial_peers=list(enrolment.initial_peers), identity_path=str(identity), authorizer=member,
        record_validator=CompositeValidator([*schema, Signers(key, crowd)]),
        host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    holders = Holders(node)
    await holders.serve()
    return enrolment, holders


def main() -> None:
    """Live until killed."""
    with TemporaryDirectory(prefix="covey-load-") as folder:
        asyncio.run(live(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), Path(folder)))


if __name__ == "__main__":
    main()
