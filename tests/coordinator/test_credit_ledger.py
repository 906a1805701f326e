"""The file of credits: what is read twice counts once, a restart loses nothing, and it does not grow with time."""

import stat
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from averaging.receipts import OLDEST_SECONDS
from coordinator.credit_ledger import KEEP_SECONDS, CreditLedger
from coordinator.credits import ABOVE, Credit
from training.errors import BadInput

NAMES = {f"peer{number}": f"name {number}" for number in range(10)}
NOW = 1e9


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[CreditLedger]:
    with closing(CreditLedger(tmp_path / "credits.sqlite")) as opened:
        yield opened


def credit(epoch: int = 0, peer: int = 0, samples: int = 10, **more: object) -> Credit:
    return replace(Credit(epoch, f"peer{peer}", b"g" * 16, samples, samples, 1), **more)


def sums(ledger: CreditLedger) -> dict[str, tuple[int, int, int]]:
    return {peer: (row.samples, row.epochs, row.flagged) for peer, row in ledger.leaderboard(NAMES).rows.items()}


def test_the_most_come_first_under_their_enrolled_names(ledger: CreditLedger) -> None:
    ledger.record([credit(0, 0, 5), credit(0, 1, 7), credit(1, 0, 5), credit(0, 2, 1)], NOW)
    board = ledger.leaderboard({peer: NAMES[peer] for peer in ("peer0", "peer1", "peer3")})
    assert [(row.name, row.samples, row.epochs) for row in board.rows.values()] == [("name 0", 10, 2), ("name 1", 7, 1)]
    assert board.samples == 18  # whoever it was
    assert list(ledger.leaderboard(NAMES, without={"peer0"}).rows) == ["peer1", "peer2"]


def test_the_same_credit_twice_counts_once(ledger: CreditLedger) -> None:
    for _ in range(3):
        ledger.record([credit(0), credit(1)], NOW)
    assert sums(ledger) == {"peer0": (20, 2, 0)}


def test_a_better_founded_credit_replaces_another_and_not_the_other_way_round(ledger: CreditLedger) -> None:
    ledger.record([credit(samples=4, claimed=10, flag=ABOVE)], NOW)
    assert sums(ledger) == {"peer0": (4, 1, 1)}
    ledger.record([credit(samples=10, witnesses=3)], NOW)
    assert sums(ledger) == {"peer0": (10, 1, 0)}
    ledger.record([credit(samples=4, claimed=10, flag=ABOVE)], NOW)
    assert sums(ledger) == {"peer0": (10, 1, 0)}


possible = st.builds(credit, st.integers(0, 2), st.integers(0, 2), st.integers(0, 9), witnesses=st.integers(1, 3),
                     group_id=st.sampled_from([b"g" * 16, b"h" * 16]), flag=st.sampled_from(["", ABOVE]))


@given(heard=st.lists(possible, max_size=30), seed=st.integers(0, 9))
def test_two_coordinators_that_heard_the_same_in_any_order_and_parts_agree(
        tmp_path_factory: pytest.TempPathFactory, heard: list[Credit], seed: int) -> None:
    folder, shuffled = tmp_path_factory.mktemp("two"), Random(seed).sample(heard, len(heard))
    with closing(CreditLedger(folder / "a")) as one, closing(CreditLedger(folder / "b")) as other:
        one.record(heard, NOW)
        for each in shuffled:
            other.record([each], NOW)
        assert one.recent() == other.recent()
        assert sums(one) == sums(other)
        with closing(CreditLedger(folder / "c")) as third:
            third.record(one.recent(), NOW)
            assert sums(third) == sums(one)


def test_a_restart_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "credits.sqlite"
    with closing(CreditLedger(path)) as ledger:
        ledger.record([credit(0), credit(1, 1)], NOW)
    with closing(CreditLedger(path)) as ledger:
        ledger.record([credit(0), credit(2, 1)], NOW + 60)
        assert sums(ledger) == {"peer1": (20, 2, 0), "peer0": (10, 1, 0)}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_rows_outlive_all_receipts_and_then_go_while_the_sums_stay(ledger: CreditLedger) -> None:
    ledger.record([credit(0)], NOW)
    ledger.record([credit(1)], NOW + OLDEST_SECONDS)
    assert len(ledger.recent()) == 2
    ledger.record([credit(2)], NOW + KEEP_SECONDS + 1)
    assert [row.epoch for row in ledger.recent()] == [1, 2]
    assert sums(ledger) == {"peer0": (30, 3, 0)}


def test_rows_have_a_bound_whatever_the_swarms_pace(ledger: CreditLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.credit_ledger.MOST_ROWS", 20)
    for epoch in range(100):
        ledger.record([credit(epoch), credit(epoch, 1)], NOW + epoch)
    assert len(ledger.recent()) <= 22
    assert max(row.epoch for row in ledger.recent()) == 99
    assert sums(ledger) == {"peer0": (1000, 100, 0), "peer1": (1000, 100, 0)}


def test_weeks_of_a_thousand_volunteers_take_no_more_room_than_the_last_hours(tmp_path: Path) -> None:
    path, per_day = tmp_path / "credits.sqlite", 12
    with closing(CreditLedger(path)) as ledger:
        sizes = []
        for epoch in range(5 * per_day):
            ledger.record([replace(credit(epoch), peer_id=f"Qm{peer:044d}") for peer in range(1000)],
                          NOW + epoch * 86400 / per_day)
            sizes.append(path.stat().st_size + path.with_name(f"{path.name}-wal").stat().st_size)
        board = ledger.leaderboard({f"Qm{peer:044d}": "x" for peer in range(1000)})
    print(f"{sizes[-1] / 2**20:.1f} MiB after 5 days, {max(sizes[:2 * per_day]) / 2**20:.1f} MiB after 2")
    assert board.samples == 5 * per_day * 1000 * 10
    assert max(sizes) <= 1.5 * max(sizes[:2 * per_day])


def test_a_file_that_is_none_of_ours_is_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "credits.sqlite"
    path.write_bytes(b"not a database at all, whatever it is" * 100)
    with pytest.raises(BadInput, match="expected a file of credits of version 1"):
        CreditLedger(path)
