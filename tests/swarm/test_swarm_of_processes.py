"""A swarm as users run it: one coordinator, several volunteers, each a process of its own; and what befalls them."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import httpx
import psutil
import pytest
from processes import is_running, until
from swarm import Covey, Swarm

GONE_SECONDS = 5.0  # no orphan outlives its parent by more


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    swarm = Swarm(tmp_path_factory.mktemp("swarm"))
    yield swarm
    swarm.close()


def goes_on(volunteer: Covey, epochs: int = 2) -> None:
    """It reaches that many more epochs."""
    volunteer.wait_for("epoch", epochs, since=len(volunteer.events))


def averages_in_a_group_of(size: int, volunteers: list[Covey]) -> None:
    for volunteer in volunteers:
        volunteer.wait_for("round", 2, since=len(volunteer.events), kind="gradients", outcome="averaged",
                           group_size=size)


def test_two_volunteers_average_in_a_group_of_two(swarm: Swarm) -> None:
    averages_in_a_group_of(2, swarm.volunteers(2))


def test_status_shows_the_swarm_as_the_volunteers_see_it(swarm: Swarm) -> None:
    volunteers = swarm.volunteers(2)

    def status() -> dict:
        done = subprocess.run([sys.executable, "-m", "peer.cli", "status", swarm.link, "--json"],
                              capture_output=True, text=True, timeout=60, check=True)
        return json.loads(done.stdout)
    until(lambda: len([peer for peer in status()["peers"] if peer["state"] == "training"]) == 2, "two peers")
    shown, epochs = status(), [volunteer.all("epoch")[-1]["epoch"] for volunteer in volunteers]
    assert max(epochs) - 3 <= shown["epoch"] <= max(epochs) + 3
    assert shown["rounds"]["averaged"] > 0
    assert {peer["version"] for peer in shown["peers"]} == {shown["peers"][0]["version"]}


def test_a_late_joiner_downloads_the_state_and_averages_with_the_others(swarm: Swarm) -> None:
    *_, early = swarm.volunteers(2)
    reached = early.all("epoch")[-1]["epoch"]
    *_, late = volunteers = swarm.volunteers(3)
    (loaded, *_) = late.wait_for("state_loaded", succeeded=True)
    assert loaded["epoch"] >= reached
    averages_in_a_group_of(3, volunteers)


def test_a_volunteer_that_accepts_no_connections_takes_part_all_the_same(swarm: Swarm) -> None:
    (host,) = swarm.volunteers(1)
    guest = swarm.join("--client-mode")
    guest.wait_for("ready")
    averages_in_a_group_of(2, [guest, host])
    guest.end()


def test_a_killed_worker_is_restarted_and_catches_up(swarm: Swarm) -> None:
    victim, other = swarm.volunteers(2)
    since, worker = len(victim.events), psutil.Process(victim.all("ready")[-1]["worker_pid"])
    children = worker.children(recursive=True)
    assert {child.name() for child in children} >= {"p2pd"}
    worker.kill()
    until(lambda: not any(is_running(child.pid) for child in children), "its children are gone", GONE_SECONDS)
    (restarting,) = victim.wait_for("restarting", since=since)
    assert restarting["exit_code"] == -signal.SIGKILL
    victim.wait_for("ready", since=since)
    victim.wait_for("state_loaded", since=since, succeeded=True)
    averages_in_a_group_of(2, [victim, other])


def test_the_others_go_on_after_a_whole_peer_is_killed(swarm: Swarm) -> None:
    *others, victim = swarm.volunteers(3)
    family = victim.family()
    assert len(family) >= 5  # daemon, worker, DHT, p2pd, averagers
    victim.process.kill()
    until(lambda: not any(is_running(process.pid) for process in family), "all of it is gone", GONE_SECONDS)
    victim.process.wait()
    averages_in_a_group_of(2, others)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_leaves_in_good_order_and_the_rest_goes_on(swarm: Swarm, number: int) -> None:
    other, leaver = swarm.volunteers(2)
    family, since = leaver.family(), monotonic()
    leaver.signal(number)
    assert leaver.process.wait(10) == 0
    assert monotonic() - since < 10
    (finished,) = leaver.wait_for("finished")
    assert Path(finished["checkpoint"]).exists()
    until(lambda: not any(is_running(process.pid) for process in family), "nothing of it remains", GONE_SECONDS)
    goes_on(other)


def test_a_second_interrupt_leaves_at_once(swarm: Swarm) -> None:
    other, leaver = swarm.volunteers(2)
    family = leaver.family()
    leaver.signal(signal.SIGSTOP)  # both signals are there before it can act on the first
    leaver.signal(signal.SIGINT)
    leaver.signal(signal.SIGCONT)
    leaver.signal(signal.SIGINT)
    leaver.process.wait(10)
    until(lambda: not any(is_running(process.pid) for process in family), "nothing of it remains", GONE_SECONDS)
    goes_on(other)


@pytest.mark.timeout(300)
def test_who_contributes_is_credited_and_told_and_a_restart_of_the_coordinator_takes_nothing_away(
        swarm: Swarm) -> None:
    volunteers = swarm.volunteers(2)
    names, folders = [volunteer.log.stem for volunteer in volunteers], [
        volunteer.log.with_suffix("") for volunteer in volunteers]

    def credited() -> dict[str, int]:
        (ready,) = swarm.coordinator().all("ready")
        shown = httpx.get(f"{ready['dashboard_url']}api/swarm").json()
        rows = {row["name"]: row["samples"] for row in shown["leaderboard"] if not row["flagged"]}
        assert shown["credited_samples"] >= sum(rows.values())
        return rows

    until(lambda: {*names} <= credited().keys(), "both are credited", 60)
    until(lambda: all((folder / "contribution").exists() for folder in folders), "both are told", 60)
    shown = subprocess.run([sys.executable, "-m", "peer.cli", "status"], capture_output=True, text=True, timeout=60,
                           check=True).stdout
    assert all(re.search(rf"^{name}: .*\n(?:  .*\n)+?  credited: ", shown, re.MULTILINE) for name in names), shown
    before = credited()
    assert not any(samples % 32 for samples in before.values())
    swarm.coordinator().process.kill()
    swarm.coordinator().process.wait()
    averages_in_a_group_of(2, volunteers)
    after = credited()  # by another one, on the same state directory
    assert all(after[name] >= before[name] for name in before)
    until(lambda: all(credited()[name] > before[name] for name in names), "what they did meanwhile is credited", 60)


def test_training_goes_on_after_the_coordinators_death(swarm: Swarm) -> None:
    _, victim = volunteers = swarm.volunteers(2)
    coordinator = swarm.coordinator()
    family = coordinator.family()
    coordinator.process.kill()
    coordinator.process.wait()
    until(lambda: not any(is_running(process.pid) for process in family), "all of it is gone", GONE_SECONDS)
    averages_in_a_group_of(2, volunteers)
    until((victim.log.with_suffix("") / "known_peers.json").exists, "the others' addresses are noted")
    since = len(victim.events)
    psutil.Process(victim.all("ready")[-1]["worker_pid"]).kill()  # and comes back by way of the other peer
    victim.wait_for("ready", since=since)
    averages_in_a_group_of(2, volunteers)
    for volunteer in volunteers:
        volunteer.end()


def test_two_who_stop_at_the_same_epoch_end_with_equal_parameters(swarm: Swarm) -> None:
    swarm.volunteers(0)
    pair = [swarm.join("--stop-at-epoch", "6") for _ in range(2)]
    ends = [volunteer.wait_for("finished")[0] for volunteer in pair]
    assert [volunteer.process.wait(30) for volunteer in pair] == [0, 0]
    assert {end["epoch"] for end in ends} == {6}
    assert len({end["parameters_checksum"] for end in ends}) == 1


