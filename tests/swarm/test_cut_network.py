"""A peer's cable is cut at a chosen step of a chosen round: the others go on in time, and it comes back when mended.

Unlike a process that is killed or stopped, nobody is told: neither side sees a connection close.
"""

from collections.abc import Iterator

import pytest
from fault_cases import CUTS, Case, strike
from faulty_peers import Herd, herd
from network import network, why_not

CHOSEN = ("cut member sending", "cut leader matching", "cut leader reducing", "cut leader announcing")
pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Herd]:
    with network() as lan, herd(tmp_path_factory.mktemp("herd"), lan) as peers:
        yield peers


def test_the_chosen_cases_exist() -> None:
    assert {str(case) for case in CUTS} >= set(CHOSEN)


@pytest.mark.parametrize("case", [case for case in CUTS if str(case) in CHOSEN], ids=str)
def test_survivors_go_on_and_who_was_cut_off_comes_back(case: Case, peers: Herd) -> None:
    row = strike(peers, case)
    print(f"{row.case}: stall {row.stall:.2f} s, agreed {row.agreement:.2f} s, back {row.back:.1f} s, {row.outcome}")
