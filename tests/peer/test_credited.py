"""A volunteer learns what it is credited with, from a real coordinator over TLS, and believes the authority only."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, redirect_stderr, suppress
from io import StringIO
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from grpc import StatusCode
from processes import until

import peer.credited
from averaging.identity import open_key, peer_id_of, public_bytes, sign
from averaging.membership import contribution_words
from coordinator.authority import Authority
from coordinator.credit_ledger import Contribution as Row
from coordinator.credit_ledger import Leaderboard
from coordinator.link import Link
from coordinator.service import QUESTIONS, CoordinatorService, bind_grpc, start_grpc
from coordinator.tls import Certificate, connect, self_signed
from peer.config import PeerConfig
from peer.credited import ask, check, keep_credited, recall
from peer.job import Job, keep_contribution
from proto.coordinator_pb2 import CreditsRequest, EnrolReply, SignedContribution
from proto.coordinator_pb2_grpc import CoordinatorStub
from proto.swarm_pb2 import Contribution, SwarmSnapshot
from training.errors import BadInput

RUN = "credited-1"
KEYS: list[RSAPrivateKey] = []


@pytest.fixture(scope="module")
def me(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The volunteer's peer id."""
    KEYS.append(open_key(tmp_path_factory.mktemp("keys") / "me.key"))
    return peer_id_of(public_bytes(KEYS[0]))


@pytest.fixture(scope="module")
def certificate() -> Certificate:
    return self_signed()


@pytest.fixture
def authority(tmp_path: Path, me: str) -> Iterator[Authority]:
    """That knows the volunteer."""
    (tmp_path / "coordinator").mkdir()
    with closing(Authority(tmp_path / "coordinator", RUN, is_open=True)) as made:
        made.ledger.enrol(me, "ada", public_bytes(KEYS[0]), "", 1.0)
        yield made


@pytest.fixture
def job(tmp_path: Path, authority: Authority) -> Job:
    (tmp_path / "peer").mkdir()
    return Job(run_id=RUN, fingerprint="", experiment=b"", authority=authority.public_key.decode(), initial_peers=[],
               config=PeerConfig(name="ada", state_dir=tmp_path / "peer"))


class Coordinator:
    """As a coordinator answers, less the swarm."""

    def __init__(self, authority: Authority, certificate: Certificate) -> None:
        self._authority, self._certificate, self._port = authority, certificate, 0
        self.leaderboard = Leaderboard()

    async def start(self) -> Link:
        self._server, self._port = bind_grpc("127.0.0.1", self._port, self._certificate)
        await start_grpc(self._server, CoordinatorService(
            self._authority, EnrolReply, "0", SwarmSnapshot, lambda: self.leaderboard))
        return Link("127.0.0.1", self._port, RUN, self._certificate.fingerprint, "")

    async def stop(self) -> None:
        await self._server.stop(None)


Story = Callable[[Coordinator, Link], Awaitable[None]]


@pytest.fixture
def town(authority: Authority, certificate: Certificate) -> Callable[[Story], None]:
    """`town(story)`: a coordinator, while `story` happens."""
    async def told(story: Story) -> None:
        coordinator = Coordinator(authority, certificate)
        try:
            await story(coordinator, await coordinator.start())
        finally:
            await coordinator.stop()
    return lambda story: asyncio.run(told(story))


def credited(me: str, samples: int) -> Leaderboard:
    return Leaderboard({"first": Row("first", "grace", 900, 9, 0), me: Row(me, "ada", samples, 1, 0)}, 900 + samples, 0)


def test_it_is_told_its_samples_signed(town: Callable[[Story], None], job: Job, me: str) -> None:
    async def story(coordinator: Coordinator, link: Link) -> None:
        coordinator.leaderboard = credited(me, 100)
        said = check(await ask(link, me), job, me)
        assert (said.name, said.samples, said.epochs, said.swarm_samples, said.rank, said.volunteers) == (
            "ada", 100, 1, 1000, 2, 2)
    town(story)


def test_who_is_no_member_is_told_so_and_nobody_asks_without_end(town: Callable[[Story], None], me: str) -> None:
    async def story(_: Coordinator, link: Link) -> None:
        for stranger in ("QmNobody", "ada", "", "x" * 10_000):
            with pytest.raises(BadInput, match=r"expected a member's"):
                await ask(link, stranger)
        async with await connect(link, timeout_seconds=10) as channel:
            stub = CoordinatorStub(channel)
            answers = [stub.Credits(CreditsRequest(peer_id=me)) for _ in range(2 * QUESTIONS[1])]
            codes = [await answer.code() for answer in answers]
        assert QUESTIONS[1] / 2 < codes.count(StatusCode.OK) < 1.5 * QUESTIONS[1]
        assert {*codes} == {StatusCode.OK, StatusCode.RESOURCE_EXHAUSTED}
    town(story)


def test_only_what_the_authority_signed_of_this_peer_and_run_is_believed(authority: Authority, job: Job,
                                                                         me: str) -> None:
    def signed(words: bytes) -> SignedContribution:
        return SignedContribution(contribution=words, signature=authority.sign_contribution(words))

    mine = Contribution(run_id=RUN, peer_id=me, samples=5)
    assert check(signed(mine.SerializeToString()), job, me) == mine
    forged = SignedContribution(contribution=mine.SerializeToString(),
                                signature=sign(KEYS[0], contribution_words(mine.SerializeToString())))
    more = signed(mine.SerializeToString())
    more.contribution = Contribution(run_id=RUN, peer_id=me, samples=500).SerializeToString()
    for false in (SignedContribution(), forged, more, signed(b"\xff\xff"),
                  signed(Contribution(run_id="other", peer_id=me).SerializeToString()),
                  signed(Contribution(run_id=RUN, peer_id="other").SerializeToString())):
        with pytest.raises(BadInput, match="authority has not signed"):
            check(false, job, me)
        keep_contribution(job, false.SerializeToString())
        assert recall(job, me) is None


def test_news_come_the_last_word_stays_while_the_coordinator_is_away_and_after_a_restart(
        town: Callable[[Story], None], job: Job, me: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer.credited, "SOONEST_SECONDS", 0.05)
    monkeypatch.setattr(peer.credited, "LATEST_SECONDS", 0.1)
    told, stderr, nowhere = list[Contribution](), StringIO(), Link("127.0.0.1", 1, RUN, "x" * 43, "")

    async def soon(samples: int) -> None:
        await asyncio.to_thread(until, lambda: told and told[-1].samples == samples, f"{samples} are told", 20.0)

    async def story(coordinator: Coordinator, link: Link) -> None:
        keeping = asyncio.create_task(keep_credited([nowhere, link], job, me, told.append))
        await soon(0)
        coordinator.leaderboard = credited(me, 100)
        await soon(100)
        await coordinator.stop()
        kept = recall(job, me)
        assert kept
        assert kept.samples == 100
        coordinator.leaderboard = credited(me, 200)
        await coordinator.start()
        await soon(200)
        keeping.cancel()
        with suppress(asyncio.CancelledError):
            await keeping
    with redirect_stderr(stderr):
        town(story)
    assert "covey" not in stderr.getvalue()
    last, told = told[-1], []

    async def restarted() -> None:
        keeping = asyncio.create_task(keep_credited([nowhere], job, me, told.append))
        while not told:
            await asyncio.sleep(0)
        keeping.cancel()
    asyncio.run(restarted())
    assert told == [last]
