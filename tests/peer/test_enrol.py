"""Enrolling with a coordinator that is there, and going on without one that is not."""

import asyncio
from pathlib import Path

import pytest
from fake_coordinator import Served, experiment, reply_of, serve_here

from averaging.identity import open_key
from coordinator.link import Link, parse_link
from coordinator.tls import Unreachable
from peer.config import PeerConfig
from peer.daemon import enrol_or_recall, prepare
from peer.enrol import Enrolment, recall
from peer.job import Job, read_job


@pytest.fixture
def config(tmp_path: Path) -> PeerConfig:
    return PeerConfig(name="ada", state_dir=tmp_path, listen="127.0.0.1", batch_size=4)


async def enrolled(config: PeerConfig) -> tuple[Link, Enrolment, Job]:
    """With a coordinator that is gone afterwards."""
    reply = reply_of(experiment("synthetic"))
    reply.token = b"a token"
    async with serve_here(reply) as served:
        link = parse_link(served.link())
        enrolment = await enrol_or_recall(link, config, open_key(config.identity_path))
    return link, enrolment, prepare(enrolment, config)


def test_who_was_a_member_goes_on_while_the_coordinator_is_away(
        config: PeerConfig, capsys: pytest.CaptureFixture[str]) -> None:
    async def twice() -> tuple[Enrolment, Job, Enrolment]:
        link, enrolment, job = await enrolled(config)
        return enrolment, job, await enrol_or_recall(link, config, open_key(config.identity_path))

    enrolment, job, last = asyncio.run(twice())
    assert "no coordinator answers" in capsys.readouterr().err
    assert (last.experiment, last.document, last.token, last.authority, last.initial_peers, last.name) == (
        enrolment.experiment, enrolment.document, b"a token", enrolment.authority, enrolment.initial_peers, "ada")
    assert prepare(last, config) == job == read_job(config.state_dir)


def test_who_never_was_one_is_told_that_nobody_answers(config: PeerConfig) -> None:
    async def alone() -> None:
        async with serve_here(reply_of(experiment("synthetic"))) as served:
            link = parse_link(served.link())
        await enrol_or_recall(link, config, open_key(config.identity_path))

    with pytest.raises(Unreachable, match="no coordinator answers"):
        asyncio.run(alone())


def test_another_run_is_not_gone_on_with(config: PeerConfig) -> None:
    link, _, _ = asyncio.run(enrolled(config))
    assert recall(link, config) is not None
    assert recall(parse_link(Served(link.address, "fake-000000000000").link()), config) is None
