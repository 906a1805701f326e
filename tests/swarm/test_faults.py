"""A peer is lost, stopped, slow or poisonous at a chosen step of a chosen round: the others agree, in time.

What is checked each time is in fault_cases.py; `python -m benchmarks.faults` goes through all cases, again and again.
"""

from collections.abc import Iterator

import pytest
from fault_cases import CASES, Case, strike
from faulty_peers import Herd, herd

CHOSEN = (
    "kill member matching", "kill member sending", "kill member reducing", "kill member receiving",
    "kill leader matching", "kill leader deciding", "kill leader announcing", "kill 3 of 6 sending",
    "pause member voted", "pause leader matching",
    "stop member matching", "stop member receiving", "stop leader sending", "stop leader announcing",
    "slow member slow sending", "gradient member gradient", "poison member poisoning")


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Herd]:
    with herd(tmp_path_factory.mktemp("herd")) as peers:
        yield peers


def test_the_chosen_cases_exist() -> None:
    assert {str(case) for case in CASES} >= set(CHOSEN)


@pytest.mark.parametrize("case", [case for case in CASES if str(case) in CHOSEN], ids=str)
def test_survivors_agree_and_go_on(case: Case, peers: Herd) -> None:
    row = strike(peers, case)
    print(f"{row.case}: stall {row.stall:.2f} s, agreed {row.agreement:.2f} s, {row.outcome}")
