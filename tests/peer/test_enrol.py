"""Enrolling with a coordinator that is there, and going on without one that is not."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from fake_coordinator import Served, experiment, reply_of, serve_here

from averaging.identity import open_key
from coordinator.link import Link, parse_link
from coordinator.tls import Unreachable
from peer.config import PeerConfig
from peer.daemon import enrol_or_recall, prepare
from peer.enrol import MOST_COORDINATORS, Enrolment, enrol_anywhere, links, recall
from peer.job import Job, read_job
from training.errors import BadInput


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


def test_who_starts_again_while_the_links_coordinator_is_away_enrols_with_another(
        config: PeerConfig, capsys: pytest.CaptureFixture[str]) -> None:
    async def story() -> tuple[Link, Link, Enrolment]:
        first, second = (reply_of(experiment("synthetic")) for _ in range(2))
        first.token, second.token, second.dashboard_url = b"the first's", b"the second's", "http://second/"
        key = open_key(config.identity_path)
        async with serve_here(second) as there:
            async with serve_here(first) as here:
                first.coordinators.extend([here.link(), there.link()])
                link = replace(parse_link(here.link()), invite="invite")
                prepare(await enrol_or_recall(link, config, key), config)
            return link, parse_link(there.link()), await enrol_or_recall(link, config, key)

    link, there, last = asyncio.run(story())
    assert (last.token, last.dashboard_url) == (b"the second's", "http://second/")
    assert read_job(config.state_dir).coordinators == [str(replace(link, invite="")), str(there)]
    assert not capsys.readouterr().err


def test_of_several_that_do_not_let_it_in_the_one_that_says_why_is_told_of(config: PeerConfig) -> None:
    async def story() -> None:
        reply = reply_of(experiment("synthetic"))
        async with serve_here(reply) as gone:
            pass
        async with serve_here(reply) as there:
            link = parse_link(gone.link("other-000000000000"))
            await enrol_anywhere(link, [parse_link(there.link(link.run_id))], "ada", open_key(config.identity_path))

    with pytest.raises(BadInput, match="refuses: experiment 'other-000000000000' is not run here"):
        asyncio.run(story())


def test_a_few_links_of_the_run_are_kept_and_nothing_else() -> None:
    good = [f"covey://host:{port}/tiny-1/{'c' * 43}" for port in range(1, 20)]
    kept = links("tiny-1", ["", "later://x", f"covey://host:1/other-1/{'c' * 43}", *good])
    assert [str(link) for link in kept] == good[:MOST_COORDINATORS]


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
