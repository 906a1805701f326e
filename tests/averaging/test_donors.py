"""Whom a peer asks for the swarm's state."""

from dataclasses import replace

import pytest

from averaging.records import ARCHIVING, PeerRecord
from averaging.transports.swarm.state import donors


def record(peer_id: str, epoch: int, **changes: object) -> PeerRecord:
    plain = PeerRecord(peer_id=peer_id, name=peer_id, state="training", epoch=epoch, samples_accumulated=0,
                       samples_total=0, samples_per_second=0.0, loss=None, group_size=0, version="", device="",
                       client_mode=False, time=0.0)
    return replace(plain, **changes)


def archive(epoch: int, peer_id: str = "archive") -> PeerRecord:
    return record(peer_id, epoch, state=ARCHIVING)


@pytest.mark.parametrize(("others", "asked"), [
    pytest.param([archive(7)], ("archive",), id="nobody trains: the archive"),
    pytest.param([archive(7), record("far", 9), record("near", 6)], ("far", "near", "archive"),
                 id="who trains ahead of it: those first"),
    pytest.param([archive(7), record("far", 7)], ("far", "archive"), id="who trains is as far: those first"),
    pytest.param([archive(7), record("near", 6)], ("archive", "near"), id="it is ahead of all who train: it first"),
    pytest.param([archive(7), record("client", 9, client_mode=True)], ("archive",),
                 id="who is ahead can not be reached: the archive"),
    pytest.param([archive(7), archive(8, "newer")], ("newer", "archive"), id="two archives: the newer first"),
    pytest.param([archive(5)], (), id="it has no more than this peer"),
    pytest.param([archive(4), record("equal", 5, sketch=b"mine")], (), id="a swarm that is ahead is not pulled back"),
])
def test_an_archive_is_asked_where_nobody_who_trains_is_as_far(others: list[PeerRecord],
                                                               asked: tuple[str, ...]) -> None:
    assert donors([record("me", 5, sketch=b"mine"), *others], "me", 5) == asked


def test_an_archive_is_not_in_the_majority() -> None:
    """Two of three have one state; that an archive had another would not make it two of four."""
    records = [record("me", 5, sketch=b"mine"), record("a", 5, sketch=b"x"), record("b", 5, sketch=b"x"),
               replace(archive(5), sketch=b"mine")]
    assert set(donors(records, "me", 5)) == {"a", "b"}


def test_an_archive_does_not_ask_itself() -> None:
    assert donors([archive(7)], "archive", 5) == ()
