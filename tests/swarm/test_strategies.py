"""`covey coordinator RECIPE averaging.strategy=...` and volunteers: each strategy trains a swarm of processes."""

from pathlib import Path

import pytest
from swarm import Swarm

from averaging.records import AVERAGED

OPTIONS = {
    "local_sgd": ["averaging.local_steps=2", "averaging.initial_steps=4", "averaging.average_momentum=true"],
    "diloco": ["averaging.local_steps=2", "averaging.fragments=2", "averaging.delay=1", "averaging.alpha=0.5",
               "averaging.compression=blockwise8bit"],
    "gossip": ["averaging.topology=one-peer-exp"],
}


@pytest.mark.parametrize("strategy", OPTIONS)
def test_a_swarm_trains_by_each_strategy(strategy: str, tmp_path: Path) -> None:
    swarm = Swarm(tmp_path, overrides=[f"averaging.strategy={strategy}", *OPTIONS[strategy]])
    try:
        for volunteer in swarm.volunteers(2):
            averaged = volunteer.wait_for("round", 4, kind=AVERAGED[strategy], outcome="averaged", group_size=2)
            assert all(ended["bytes_sent"] > 0 for ended in averaged)
            assert not volunteer.all("restarting")
    finally:
        swarm.close()


def test_an_auxiliary_volunteer_helps_two_others_to_average(tmp_path: Path) -> None:
    swarm = Swarm(tmp_path)
    try:
        helper = swarm.join("--auxiliary")
        for volunteer in swarm.volunteers(2):
            volunteer.wait_for("round", 3, outcome="averaged", group_size=3)
        for ended in helper.wait_for("round", 3, outcome="averaged", group_size=3):
            assert ended["bytes_sent"] > 0
        assert not helper.all("epoch")
    finally:
        swarm.close()
