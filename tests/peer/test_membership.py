"""Staying a member, with a real coordinator over TLS whose tokens last seconds: renewed in time, whatever happens."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, redirect_stderr, suppress
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from grpc import aio
from hivemind.proto.auth_pb2 import AccessToken
from hivemind.utils import crypto
from processes import until

import peer.membership
from averaging.authorisation import MemberAuthoriser
from averaging.experiment import Experiment, canonical, experiment_of, fingerprint, run_id
from averaging.identity import open_key, peer_id_of, public_bytes, sign
from averaging.membership import enrolment_words
from averaging.version import VERSION
from coordinator.authority import Authority
from coordinator.link import Link
from coordinator.service import CoordinatorService, bind_grpc, start_grpc
from coordinator.tls import Certificate, own_certificate
from peer.config import PeerConfig
from peer.enrol import Enrolment, enrol, enrol_anywhere
from peer.job import Job, ban_file, keep_membership, read_job, read_token, write_job
from peer.membership import stay
from proto.coordinator_pb2 import EnrolReply, EnrolRequest
from proto.swarm_pb2 import SwarmSnapshot

TOKEN_SECONDS = 6.0  # so renewed each 0.2 s
SOON = 20.0


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return experiment_of({
        "name": "stay", "model": {"trunk": {"depth": 18, "width_multiplier": 0.0625},
                                  "head": {"dims": [0, 8, 8], "num_clusters": [8]}},
        "data": {"dataset": "synthetic", "image_size": 32, "synthetic": {"num_train": 64, "num_val": 32},
                 "transforms": {"preset": "multicrop_2x224", "size_crops": [32]}},
        "optimizer": {"lr": 0.1, "max_epochs": 10}, "averaging": {"target_batch_size": 64, "target_group_size": 2}})


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return own_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[RSAPrivateKey]:
    """The volunteer's, and another's."""
    folder = tmp_path_factory.mktemp("keys")
    return [open_key(folder / f"{number}.key") for number in range(2)]


@pytest.fixture
def authority(tmp_path: Path, experiment: Experiment) -> Iterator[Authority]:
    (tmp_path / "coordinator").mkdir()
    with closing(Authority(tmp_path / "coordinator", run_id(experiment), is_open=False,
                           token_seconds=TOKEN_SECONDS)) as made:
        yield made


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer.membership, "SOONEST_SECONDS", 0.05)


async def serve(authority: Authority, experiment: Experiment, certificate: Certificate, port: int = 0,
                others: Sequence[str] = ()) -> tuple[aio.Server, int]:
    """As a coordinator does, less the swarm. `others`: links of other coordinators, that it tells of."""
    document = canonical(experiment)

    def offer() -> EnrolReply:
        return EnrolReply(experiment=document, fingerprint=fingerprint(document), run_id=run_id(experiment),
                          authority=authority.public_key, experiment_signature=authority.sign_experiment(document),
                          bans=authority.ban_file.newest().signed, coordinators=others)
    server, port = bind_grpc("127.0.0.1", port, certificate)
    await start_grpc(server, CoordinatorService(authority, offer, VERSION, SwarmSnapshot))
    return server, port


class Stay:
    """A volunteer that stays, and what was told of it on stderr."""

    def __init__(self, job: Job, link: Link) -> None:
        self.job, self.link, self.stderr = job, link, StringIO()

    @property
    def told(self) -> list[str]:
        """Lines."""
        return [line for line in self.stderr.getvalue().splitlines() if line.startswith("covey: ")]

    @property
    def expires(self) -> str:
        """Of the token that the worker finds."""
        return str(AccessToken.FromString(read_token(self.job)).expiration_time)

    async def renewed(self) -> None:
        """Wait for the next token."""
        before = self.expires
        await soon(lambda: self.expires > before, "the token is renewed")

    async def complains(self, words: str) -> None:
        await soon(lambda: any(words in line for line in self.told), f"it is told: {words}")


async def soon(condition: Callable[[], object], what: str) -> None:
    await asyncio.to_thread(until, condition, what, SOON)


@asynccontextmanager
async def staying(link: Link, key: RSAPrivateKey, folder: Path) -> AsyncIterator[Stay]:
    folder.mkdir()
    enrolment = await enrol(link, "ada", key)
    job = Job(run_id=enrolment.run_id, fingerprint=enrolment.fingerprint, experiment=enrolment.document,
              authority=enrolment.authority.decode(), initial_peers=[],
              config=PeerConfig(name=enrolment.name, state_dir=folder))
    keep_membership(job, enrolment.token, enrolment.bans)
    write_job(job)
    volunteer = Stay(job, link)
    with redirect_stderr(volunteer.stderr):
        task = asyncio.create_task(stay(link, key, job, enrolment))
        try:
            yield volunteer
            assert not task.done()
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


Story = Callable[[Stay, aio.Server], Awaitable[None]]
Town = Callable[[Story], None]


@pytest.fixture
def town(authority: Authority, experiment: Experiment, certificate: Certificate, keys: list[RSAPrivateKey],
         tmp_path: Path) -> Town:
    """`town(story)`: a coordinator and a volunteer that stays, while `story` happens to them."""
    async def told(story: Story) -> None:
        server, port = await serve(authority, experiment, certificate)
        link = Link("127.0.0.1", port, run_id(experiment), certificate.fingerprint, authority.invite_to_show or "")
        try:
            async with staying(link, keys[0], tmp_path / "peer") as volunteer:
                await story(volunteer, server)
        finally:
            await server.stop(None)
    return lambda story: asyncio.run(told(story))


def test_the_token_is_renewed_long_before_it_expires_and_nothing_is_told(town: Town, authority: Authority) -> None:
    async def story(volunteer: Stay, _: aio.Server) -> None:
        for _turn in range(3):
            await volunteer.renewed()
            assert datetime.fromisoformat(volunteer.expires).timestamp() > time.time() + TOKEN_SECONDS / 2
        assert volunteer.told == []
    town(story)
    [member] = authority.ledger.members()
    assert member.renewed > member.enrolled
    assert [invite.used for invite in authority.ledger.invites()] == [1]


def test_each_new_token_is_one_that_members_take(town: Town, authority: Authority, keys: list[RSAPrivateKey]) -> None:
    async def story(volunteer: Stay, _: aio.Server) -> None:
        await volunteer.renewed()
        key = crypto.RSAPrivateKey.__new__(crypto.RSAPrivateKey)
        key._private_key = keys[0]
        member = MemberAuthoriser(key, authority=authority.public_key, run_id=volunteer.job.run_id,
                                  read_token=lambda: read_token(volunteer.job))
        first = member.token
        assert member.refusal(peer_id_of(public_bytes(keys[0])), first) is None
        await volunteer.renewed()
        assert member.token != first  # a short one is always about to expire
        assert member.refusal(peer_id_of(public_bytes(keys[0])), member.token) is None
    town(story)


def test_a_coordinator_that_is_away_is_asked_again_and_it_is_told_once(
        town: Town, authority: Authority, experiment: Experiment, certificate: Certificate,
        monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[float]()

    async def counted(*arguments: Any, **named: Any) -> Enrolment:
        asked.append(time.monotonic())
        return await enrol_anywhere(*arguments, **named)
    monkeypatch.setattr(peer.membership, "enrol_anywhere", counted)

    async def story(volunteer: Stay, server: aio.Server) -> None:
        await volunteer.renewed()
        await server.stop(None)
        await volunteer.complains("this peer's token is not renewed: no coordinator answers")
        before, kept = len(asked), read_token(volunteer.job)
        await soon(lambda: len(asked) > before + 3, "it is asked again and again")
        assert read_token(volunteer.job) == kept
        again, _ = await serve(authority, experiment, certificate, volunteer.link.port)
        try:
            await volunteer.complains("this peer's token is renewed")
            await volunteer.renewed()
        finally:
            await again.stop(None)
        assert [line.partition(" at ")[0] for line in volunteer.told[:2]] == [
            "covey: this peer's token is not renewed: no coordinator answers", "covey: this peer's token is renewed"]
    town(story)


def test_one_that_came_before_there_was_a_second_coordinator_renews_there_when_the_first_is_away(
        town: Town, authority: Authority, experiment: Experiment, certificate: Certificate) -> None:
    async def story(volunteer: Stay, first: aio.Server) -> None:
        others = ["later://x"]  # what only a later version knows is passed over
        second, port = await serve(authority, experiment, certificate, others=others)
        other = str(Link("127.0.0.1", port, run_id(experiment), certificate.fingerprint))
        others.append(other)
        assert volunteer.job.coordinators == []
        await first.stop(None)
        again, _ = await serve(authority, experiment, certificate, volunteer.link.port, others)
        try:
            await soon(lambda: read_job(volunteer.job.config.state_dir).coordinators == [other], "it knows the second")
            await again.stop(None)
            told = len(volunteer.told)
            for _turn in range(2):
                await volunteer.renewed()
            assert len(volunteer.told) == told  # there is nothing to tell
        finally:
            await second.stop(None)
    town(story)


def test_who_is_banned_hears_it_once_and_is_let_in_again_when_the_ban_is_lifted(
        town: Town, authority: Authority) -> None:
    async def story(volunteer: Stay, _: aio.Server) -> None:
        authority.ban("ada", "spam")
        await volunteer.complains("this volunteer is banned (spam)")
        before = authority.failures["banned"]
        await soon(lambda: authority.failures["banned"] > before + 1, "it asks again")
        assert len(volunteer.told) == 1
        authority.ban("ada", "", lift=True)
        await volunteer.complains("this peer's token is renewed")
        assert len(volunteer.told) == 2
    town(story)


def test_another_reason_is_told_as_well(town: Town, authority: Authority) -> None:
    async def story(volunteer: Stay, server: aio.Server) -> None:
        authority.ban("ada", "spam")
        await volunteer.complains("(spam)")
        authority.ban("ada", "much spam")
        await volunteer.complains("(much spam)")
        assert len(volunteer.told) == 2
    town(story)


def test_others_bans_come_with_the_token(town: Town, authority: Authority, keys: list[RSAPrivateKey]) -> None:
    async def story(volunteer: Stay, _: aio.Server) -> None:
        request = EnrolRequest(run_id=volunteer.job.run_id, name="eve", time=time.time(),
                               invite=authority.invite_to_show or "", public_key=public_bytes(keys[1]))
        request.signature = sign(keys[1], enrolment_words(request))
        authority.enrol(request)
        eve, file = peer_id_of(public_bytes(keys[1])), ban_file(volunteer.job)
        assert not file.is_banned(eve)
        authority.ban("eve", "")
        await soon(lambda: file.is_banned(eve), "the volunteer knows")
        authority.ban("eve", "", lift=True)
        await soon(lambda: not file.is_banned(eve), "it knows of that, too")
    town(story)


def test_the_name_it_was_given_stays(town: Town, authority: Authority) -> None:
    async def story(volunteer: Stay, _: aio.Server) -> None:
        await volunteer.renewed()
        assert AccessToken.FromString(read_token(volunteer.job)).username == volunteer.job.config.name == "ada"
    town(story)
    assert [member.name for member in authority.ledger.members()] == ["ada"]


def test_another_authority_behind_the_same_certificate_is_not_believed(
        town: Town, experiment: Experiment, certificate: Certificate, tmp_path: Path) -> None:
    """The coordinator's authority.key was lost, and its certificate was not."""
    (tmp_path / "other").mkdir()

    async def story(volunteer: Stay, server: aio.Server) -> None:
        with closing(Authority(tmp_path / "other", run_id(experiment), is_open=True)) as other:
            await server.stop(None)
            await volunteer.complains("no coordinator answers")
            kept = read_token(volunteer.job)
            again, _ = await serve(other, experiment, certificate, volunteer.link.port)
            try:
                await volunteer.complains("another authority; expected the one that let this peer in")
                assert read_token(volunteer.job) == kept
            finally:
                await again.stop(None)
    town(story)


def test_a_disk_that_can_not_be_written_is_told_and_tried_again(town: Town, tmp_path: Path) -> None:
    async def story(volunteer: Stay, _: aio.Server) -> None:
        (tmp_path / "peer").rename(tmp_path / "moved")
        await volunteer.complains("this peer's token is not renewed: [Errno 2]")
        (tmp_path / "moved").rename(tmp_path / "peer")
        await volunteer.complains("this peer's token is renewed")
        await volunteer.renewed()
        assert len(volunteer.told) == 2
    town(story)
