"""Crediting: what is read is kept and shown, whatever fails in between; a volunteer is told its own, signed."""

import asyncio
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from averaging.receipts import Receipt
from coordinator.credit_ledger import CreditLedger
from coordinator.crediting import Crediting, contribution
from coordinator.follow import under_enrolled_names
from coordinator.swarm import SwarmState
from coordinator.view import MOST_ROWS, About, Seen, swarm_json, view
from proto.swarm_pb2 import SwarmSnapshot

NOW = 1e9
GROUP = {"peer0": 10, "peer1": 30}
Receipts = dict[str, list[Receipt]]


class Swarm:
    """What a coordinator reads."""

    def __init__(self) -> None:
        self.receipts: Receipts = {peer: [Receipt(0, b"g" * 16, GROUP)] for peer in GROUP}
        self.names = {"peer0": "ada", "peer1": "grace"}
        self.banned: set[str] = set()
        self.problem: Exception | None = None

    def read(self) -> Receipts:
        if self.problem:
            raise self.problem
        return self.receipts

    def crediting(self, ledger: CreditLedger) -> Crediting:
        return Crediting(self.read, ledger, names=lambda: self.names, banned=lambda: self.banned, most_samples=100,
                         clock=lambda: NOW)


@pytest.fixture
def swarm() -> Swarm:
    return Swarm()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[CreditLedger]:
    with closing(CreditLedger(tmp_path / "credits.sqlite")) as opened:
        yield opened


def shown(crediting: Crediting) -> list[tuple[str, int]]:
    return [(row.name, row.samples) for row in crediting.leaderboard.rows.values()]


def test_receipts_become_rows_under_enrolled_names(swarm: Swarm, ledger: CreditLedger) -> None:
    crediting = swarm.crediting(ledger)
    for _ in range(2):
        crediting.refresh()
        assert shown(crediting) == [("grace", 30), ("ada", 10)]
    swarm.names["peer0"] = "ada lovelace"
    crediting.refresh()
    assert shown(crediting) == [("grace", 30), ("ada lovelace", 10)]


def test_a_coordinator_that_comes_back_shows_at_once_what_it_knew(swarm: Swarm, ledger: CreditLedger) -> None:
    swarm.crediting(ledger).refresh()
    swarm.problem = TimeoutError()
    assert shown(swarm.crediting(ledger)) == [("grace", 30), ("ada", 10)]


def test_who_is_banned_is_shown_no_more_and_its_word_does_not_count(swarm: Swarm, ledger: CreditLedger) -> None:
    crediting = swarm.crediting(ledger)
    crediting.refresh()
    swarm.banned.add("peer1")
    swarm.receipts["peer0"].append(Receipt(1, b"h" * 16, {"peer0": 99, "peer1": 1}))
    swarm.receipts["peer1"].append(Receipt(1, b"h" * 16, {"peer0": 99, "peer1": 1}))
    crediting.refresh()
    assert shown(crediting) == [("ada", 10)]
    assert crediting.leaderboard.samples == 40  # it is in the model


def test_what_fails_is_said_once_changes_nothing_and_is_made_up_for(
        swarm: Swarm, ledger: CreditLedger, caplog: pytest.LogCaptureFixture) -> None:
    crediting = swarm.crediting(ledger)
    crediting.refresh()
    swarm.problem = TimeoutError()
    swarm.receipts = {peer: [*told, Receipt(1, b"h" * 16, GROUP)] for peer, told in swarm.receipts.items()}
    for _ in range(3):
        crediting.refresh()
    assert shown(crediting) == [("grace", 30), ("ada", 10)]
    swarm.problem = None
    crediting.refresh()
    assert shown(crediting) == [("grace", 60), ("ada", 20)]
    assert [record.getMessage() for record in caplog.records] == [
        "volunteers can't be credited: TimeoutError", "volunteers are credited again"]


def test_a_full_disk_is_made_up_for_too(swarm: Swarm, ledger: CreditLedger) -> None:
    crediting = swarm.crediting(ledger)
    with ledger._db.writing() as db:
        (pages,) = db.execute("pragma page_count").fetchone()
    with ledger._db._lock:
        ledger._db._db.execute(f"pragma max_page_count = {pages}")
    swarm.receipts = {peer: [Receipt(epoch, epoch.to_bytes(16), GROUP) for epoch in range(500)] for peer in GROUP}
    crediting.refresh()
    assert shown(crediting) == []
    with ledger._db._lock:
        ledger._db._db.execute("pragma max_page_count = 100000")
    crediting.refresh()
    assert shown(crediting) == [("grace", 15000), ("ada", 5000)]


def test_it_reads_again_and_again(swarm: Swarm, ledger: CreditLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.crediting.PERIOD_SECONDS", 0.01)
    monkeypatch.setattr("coordinator.crediting.SHARE", 0)
    crediting = swarm.crediting(ledger)

    async def story() -> None:
        keeping = asyncio.create_task(crediting.keep())
        async with asyncio.timeout(10):
            while not shown(crediting):
                await asyncio.sleep(0.01)
            swarm.receipts = {peer: [Receipt(1, b"h" * 16, GROUP)] for peer in GROUP}
            while shown(crediting) != [("grace", 60), ("ada", 20)]:
                await asyncio.sleep(0.01)
        keeping.cancel()
    asyncio.run(story())


def test_a_volunteer_is_told_its_samples_its_share_and_its_place(swarm: Swarm, ledger: CreditLedger) -> None:
    crediting = swarm.crediting(ledger)
    crediting.refresh()
    told = contribution(crediting.leaderboard, "peer0", "ada", "run-1", NOW)
    assert (told.samples, told.epochs, told.flagged, told.swarm_samples, told.rank, told.volunteers) == (
        10, 1, 0, 40, 2, 2)
    assert (told.run_id, told.peer_id, told.name, told.time) == ("run-1", "peer0", "ada", NOW)
    newcomer = contribution(crediting.leaderboard, "peer7", "newcomer", "run-1", NOW)
    assert (newcomer.samples, newcomer.rank, newcomer.volunteers) == (0, 0, 2)


def test_the_json_and_the_snapshot_have_the_first_rows_and_all_sums(
        swarm: Swarm, ledger: CreditLedger, state: SwarmState, about: About, now: float) -> None:
    many = {f"peer{number}": number for number in range(1, MOST_ROWS + 11)}
    swarm.names, swarm.receipts = dict.fromkeys(many, "<b>"), {
        peer: [Receipt(0, b"g" * 16, many)] for peer in many}
    crediting = swarm.crediting(ledger)
    crediting.refresh()
    told = swarm_json(Seen(state, leaderboard=crediting.leaderboard), about, now)
    assert told["leaderboard"][0] == {
        "peer_id": "peer60", "name": "<b>", "samples": 60, "epochs": 1, "flagged": 0}
    assert len(told["leaderboard"]) == MOST_ROWS
    assert (told["credited_samples"], told["flagged_claims"]) == (sum(many.values()), 0)
    snapshot = SwarmSnapshot(**view(Seen(state, leaderboard=crediting.leaderboard), about))
    assert [row.samples for row in snapshot.leaderboard] == [row["samples"] for row in told["leaderboard"]]


def test_a_record_is_shown_under_its_owners_enrolled_name_whatever_it_says(state: SwarmState) -> None:
    records = [peer.record for peer in state.peers.values()]
    names = {records[0].peer_id: "as enrolled"}
    shown = under_enrolled_names(records, names)
    assert [record.name for record in shown] == ["as enrolled", *(record.name for record in records[1:])]
