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
from fake_hub import TOKEN, FakeHub, fake_hub
from swarm_peers import Peer
from torch import Tensor

from averaging.authorisation import MemberAuthoriser
from averaging.backoff import Backoff
from averaging.dht import open_identity, start_dht
from averaging.experiment import canonical, load_experiment, run_id
from averaging.progress import record_validators
from averaging.records import ARCHIVING, PeerRecord
from averaging.sketch import sketch
from coordinator import pulls
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
pytestmark = pytest.mark.timeout(300)


def state_at(epoch: int) -> State:
    """What an honest trainer has then."""
    state = safetensors.torch.load(Held(canonical(EXPERIMENT)).snapshot()[1])
    return {name: value + 0.001 * epoch if value.is_floating_point() else value
            for name, value in state.items()} | {"epoch": torch.tensor(epoch)}


def sketch_of(state: State) -> bytes:
    count = sum(name.startswith("parameters.") for name in state)
    return sketch(state[f"parameters.{index}"] for index in range(count))


Act = tuple[int, bytes, Callable[[Archive], object]]  # all donors' epoch and sketch, and what to wait for


class Scene:
    """A coordinator's node with its archiver, and donors; records are what `seen` says."""

    def __init__(self, folder: Path, options: ArchiveOptions) -> None:
        self.folder, self.published = folder, list[PeerRecord]()
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
        self.hub = FakeHub()

    def token(self, key: object) -> bytes:
        return self.authority.issue(key.get_public_key().to_bytes(), "somebody", time.time() + 600)

    def member(self, key: object) -> MemberAuthoriser:
        return MemberAuthoriser(key, authority=self.authority.public_key, run_id=RUN,
                                read_token=partial(self.token, key))

    def donor(self, state: State, epoch: int, *, client_mode: bool = False) -> Peer:
        """A peer that hands out `state`."""
        peer = Peer(self.folder / f"donor{len(self.donors)}.key", [self], authoriser=self.member,
                    client_mode=client_mode)
        self.donors.append(peer)
        peer.swarm.offer_state(lambda: state)
        peer.swarm.report(epoch, 0)
        return peer

    def play(self, *acts: Act) -> None:
        """Have the archiver look at the records that each act comes with, until the archive is as it says."""
        async def look() -> None:
            async with archiving(self.archiver):
                for epoch, sketch, until in acts:
                    peers = {peer.id: Seen(replace(peer.bulletin.record, epoch=epoch, sketch=sketch), 0.0)
                             for peer in self.donors}
                    deadline = time.monotonic() + 90
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
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setattr(swarm_peers, "RUN", RUN)
    monkeypatch.setattr(pulls, "PATIENCE_SECONDS", 1.0)
    with fake_hub() as hub, closing(Scene(tmp_path, ArchiveOptions(EPOCH, hub="me/model"))) as scene:
        for name, value in {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}.items():
            monkeypatch.setenv(name, value)
        scene.hub = hub
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
    scene.donor(good, EPOCH)
    with asked_first([*hostile, ahead], monkeypatch):
        scene.play((EPOCH, sketch_of(good), lambda archive: archive.epoch is not None))
    checkpoint = read_checkpoint(newest_checkpoint(scene.folder / "checkpoints"))
    assert checkpoint.epoch == scene.archiver.archive.epoch == EPOCH
    shelf = Held(canonical(EXPERIMENT))
    shelf.restore(scene.folder / "checkpoints")
    kept = safetensors.torch.load(shelf.snapshot()[1])
    assert kept.keys() == good.keys()
    assert all(torch.equal(kept[name], good[name]) for name in good)


def test_what_fails_is_counted_and_told_and_tried_again(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only donor lies for a while, and the hub is down at first. The donor accepts no connections, besides."""
    states = {epoch: state_at(epoch) for epoch in (EPOCH, 2 * EPOCH)}
    sketches = {epoch: sketch_of(state) for epoch, state in states.items()}
    donor, errors, checkpoints = scene.donor(states[EPOCH], EPOCH, client_mode=True), list[str](), list[list[str]]()

    def lies(archive: Archive) -> bool:
        if not (archive.epoch == EPOCH and archive.failures.get("upload")):
            return False
        errors.append(archive.last_error)
        checkpoints.append(names())
        donor.swarm.offer_state(lambda: states[2 * EPOCH] | {"parameters.0": -states[2 * EPOCH]["parameters.0"]})
        donor.swarm.report(2 * EPOCH, 0)
        return True

    def tells_the_truth(archive: Archive) -> bool:
        if not archive.failures.get("download"):
            return False
        errors.append(archive.last_error)
        checkpoints.append(names())
        donor.swarm.offer_state(lambda: states[2 * EPOCH])
        scene.hub.broken = False
        return True

    def names() -> list[str]:
        return sorted(path.name for path in (scene.folder / "checkpoints").iterdir())

    scene.hub.broken = True
    scene.play((EPOCH, sketches[EPOCH], lies), (2 * EPOCH, sketches[2 * EPOCH], tells_the_truth),
               (2 * EPOCH, sketches[2 * EPOCH], lambda archive: archive.uploaded_epoch == 2 * EPOCH))
    ((message, files),) = scene.hub.commits
    assert "was not uploaded to me/model" in errors[0]
    assert "503" in errors[0]
    assert "it is not what most peers have in epoch 20" in errors[1]
    assert checkpoints[0] == checkpoints[1] == ["epoch-00000010.json", "epoch-00000010.safetensors"]
    assert scene.archiver.archive.epoch == 2 * EPOCH
    assert message == "epoch 20"
    assert files["newest.safetensors"] == (scene.folder / "checkpoints" / "epoch-00000020.safetensors").read_bytes()
    epochs = [record.epoch for record in scene.published]
    assert epochs == sorted(epochs)
    assert (epochs[0], epochs[-1]) == (EPOCH, 2 * EPOCH), "nobody is told of a state that is not there"
    assert {record.state for record in scene.published} == {ARCHIVING}


def test_evaluations_that_are_damaged_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    node = Node("me", [], list, dict, lambda: True, lambda: None, lambda *_, **__: None, lambda _: None, bytes, "")
    for content, kept in (("[", 0), ('[{"epoch": 1}]', 0), ('{"a": 1}', 0), ("null", 0),
                          (json.dumps([{"epoch": 1, "figures": {"knn_accuracy": 0.5}}]), 1)):
        (tmp_path / "evaluations.json").write_text(content)
        archiver = Archiver(ArchiveOptions(1), EXPERIMENT, b"", node, tmp_path)
        assert len(archiver.archive.evaluations) == kept
    assert caplog.text.count("evaluations.json passed over") == 4
    assert replace(archiver.archive, evaluations=()) == Archive()
