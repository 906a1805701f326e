"""The archive between real donors: an archivist, libp2p, and peers that hand out states, bad ones too.

What is not real here is the trainers, whose states are made up, and the reading of the records.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import swarm_peers
import torch
from swarm_peers import Peer
from torch import Tensor

from averaging.authorisation import MemberAuthoriser
from averaging.backoff import Backoff
from averaging.dht import open_identity, start_dht
from averaging.experiment import canonical, load_experiment, run_id
from averaging.progress import record_validators
from averaging.records import ARCHIVING, PeerRecord
from averaging.sketch import sketch
from coordinator.archive import Archive, ArchiveOptions
from coordinator.archiving import Archiver, archiving
from coordinator.authority import Authority
from coordinator.held import Held
from coordinator.node import Node
from coordinator.swarm import Peer as Seen
from coordinator.swarm import SwarmState
from training.checkpoint import newest_checkpoint, read_checkpoint

EXPERIMENT = load_experiment(str(Path(__file__).parents[1] / "swarm" / "tiny.toml"))
RUN = run_id(EXPERIMENT)
EPOCH = 10
State = dict[str, Tensor]
Record = Callable[..., PeerRecord]
pytestmark = pytest.mark.timeout(300)


def state_at(epoch: int) -> State:
    """What an honest trainer has then."""
    state = safetensors.torch.load(Held(canonical(EXPERIMENT)).snapshot()[1])
    return {name: value + 0.001 * epoch if value.is_floating_point() else value
            for name, value in state.items()} | {"epoch": torch.tensor(epoch)}


def sketch_of(state: State) -> bytes:
    count = sum(name.startswith("parameters.") for name in state)
    return sketch(state[f"parameters.{index}"] for index in range(count))


class Scene:
    """A coordinator's node with its archiver, and donors; records are what `seen` says."""

    def __init__(self, folder: Path, options: ArchiveOptions, record: Record) -> None:
        self.folder, self.published, self._record = folder, list[PeerRecord](), record
        self.authority = Authority(folder, RUN, is_open=True)
        self.key = open_identity(folder / "identity.key")
        member = self.member(self.key)
        self.dht = start_dht(identity_path=folder / "identity.key", host_maddrs=["/ip4/127.0.0.1/tcp/0"],
                             record_validators=record_validators(RUN, self.key), authorizer=member)
        node = Node(str(self.dht.peer_id), [], list, dict, lambda: True, lambda: None,
                    lambda record, lifetime_seconds: self.published.append(record), lambda _: None,
                    partial(self.token, self.key), self.dht.daemon_address(15))
        self.archiver = Archiver(options, EXPERIMENT, self.authority.public_key, node, folder,
                                 retry=Backoff(first_seconds=0.5, ceiling_seconds=0.5))
        self.donors: list[Peer] = []

    def token(self, key: object) -> bytes:
        return self.authority.issue(key.get_public_key().to_bytes(), "somebody", time.time() + 600)

    def member(self, key: object) -> MemberAuthoriser:
        return MemberAuthoriser(key, authority=self.authority.public_key, run_id=RUN,
                                read_token=partial(self.token, key))

    def donor(self, state: State, epoch: int) -> Peer:
        """A peer that hands out `state`."""
        peer = Peer(self.folder / f"donor{len(self.donors)}.key", [self], authoriser=self.member)
        self.donors.append(peer)
        peer.swarm.offer_state(lambda: state)
        peer.swarm.report(epoch, 0)
        return peer

    def run(self, until: Callable[[Archive], object], seen: dict[str, tuple[int, bytes]], seconds: float = 90) -> None:
        """Have the archiver look at those records, of peer id: epoch and sketch, until the archive is so."""
        peers = {peer: Seen(self._record(peer, epoch=epoch, sketch=sketch), 0.0)
                 for peer, (epoch, sketch) in seen.items()}

        async def look() -> None:
            deadline = time.monotonic() + seconds
            async with archiving(self.archiver):
                while not until(self.archiver.archive):
                    assert time.monotonic() < deadline, self.archiver.archive
                    self.archiver.look(SwarmState(time=time.time(), peers=peers))
                    await asyncio.sleep(0.05)
                self.archiver.look(SwarmState(time=time.time(), peers=peers))

        asyncio.run(look())

    def close(self) -> None:
        for donor in self.donors:
            donor.close()
        self.dht.shutdown()
        self.authority.close()


@pytest.fixture
def scene(tmp_path: Path, record: Record, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setattr(swarm_peers, "RUN", RUN)
    with closing(Scene(tmp_path, ArchiveOptions(EPOCH), record)) as scene:
        yield scene


@contextmanager
def asked_first(peers: list[Peer], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    ids = [peer.id for peer in peers]
    with monkeypatch.context() as patch:
        patch.setattr("averaging.transports.swarm.state.random.shuffle",
                      lambda records: records.sort(key=lambda one: one.peer_id not in ids))
        yield


def test_hostile_donors_are_passed_over_and_an_honest_one_is_archived(
        scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tells in its record what the majority tells, and sends something else."""
    good = state_at(EPOCH)
    spoilt = good["parameters.0"].clone()
    spoilt.view(-1)[0] = float("nan")
    bad = [good | {"parameters.0": spoilt}, good | {"parameters.0": -good["parameters.0"]},
           {name: value for name, value in good.items() if not name.startswith("statistics.")}]
    hostile = [scene.donor(state, EPOCH) for state in bad]
    ahead = scene.donor(good | {"epoch": torch.tensor(10**6)}, 10**6)
    honest = scene.donor(good, EPOCH)
    everyone = {peer.id: (EPOCH, sketch_of(good)) for peer in (*hostile, ahead, honest)}
    with asked_first([*hostile, ahead], monkeypatch):
        scene.run(lambda archive: archive.epoch is not None, everyone)
    checkpoint = read_checkpoint(newest_checkpoint(scene.folder / "checkpoints"))
    assert checkpoint.epoch == scene.archiver.archive.epoch == EPOCH
    shelf = Held(canonical(EXPERIMENT))
    shelf.restore(scene.folder / "checkpoints")
    kept = safetensors.torch.load(shelf.snapshot()[1])
    assert kept.keys() == good.keys()
    assert all(torch.equal(kept[name], good[name]) for name in good)


def test_where_no_donor_is_good_the_archive_says_so_and_keeps_what_it_has(scene: Scene) -> None:
    first, second = state_at(EPOCH), state_at(2 * EPOCH)
    donor = scene.donor(first, EPOCH)
    scene.run(lambda archive: archive.epoch == EPOCH, {donor.id: (EPOCH, sketch_of(first))})
    assert (scene.published[-1].state, scene.published[-1].epoch) == (ARCHIVING, EPOCH)
    assert scene.published[0].epoch == EPOCH, "nobody is told of a state that is not there"
    before = sorted(path.name for path in (scene.folder / "checkpoints").iterdir())
    donor.swarm.report(2 * EPOCH, 0)
    donor.swarm.offer_state(lambda: second | {"parameters.0": -second["parameters.0"]})
    scene.run(lambda archive: archive.failures.get("download"), {donor.id: (2 * EPOCH, sketch_of(second))})
    assert "it is not what most peers have" in scene.archiver.archive.last_error
    assert sorted(path.name for path in (scene.folder / "checkpoints").iterdir()) == before
    donor.swarm.offer_state(lambda: second)
    scene.run(lambda archive: archive.epoch == 2 * EPOCH, {donor.id: (2 * EPOCH, sketch_of(second))})
    assert scene.archiver.archive.last_error == ""


def test_evaluations_that_are_damaged_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    node = Node("me", [], list, dict, lambda: True, lambda: None, lambda *_, **__: None, lambda _: None, bytes, "")
    for content, kept in (("[", 0), ('[{"epoch": 1}]', 0), ('{"a": 1}', 0), ("null", 0),
                          (json.dumps([{"epoch": 1, "figures": {"knn_accuracy": 0.5}}]), 1)):
        (tmp_path / "evaluations.json").write_text(content)
        archiver = Archiver(ArchiveOptions(1), EXPERIMENT, b"", node, tmp_path)
        assert len(archiver.archive.evaluations) == kept
    assert caplog.text.count("evaluations.json passed over") == 4
    assert replace(archiver.archive, evaluations=()) == Archive()
