"""A second coordinator in a real swarm: when the first is killed, volunteers come, stay and are put out as before."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from processes import until
from swarm import Covey, Swarm

from coordinator.link import parse_link
from peer.operate import Operator
from proto.authority_pb2 import Invite, Member

TOKEN_SECONDS = 40.0  # so renewed each 10 s
FLAGS = ["--token-hours", str(TOKEN_SECONDS / 3600)]
BAN_SECONDS = 30.0
SOON = 60.0
pytestmark = pytest.mark.timeout(300)


@dataclass
class Town:
    """A swarm whose coordinator has a standby."""

    swarm: Swarm
    volunteers: list[Covey]
    standby: Covey
    first_link: str

    @property
    def folder(self) -> Path:
        return self.swarm.folder

    @property
    def link(self) -> str:
        """The standby's."""
        return str(self.standby.all("ready")[0]["link"])

    def restart_standby(self) -> None:
        port = parse_link(self.link).port
        self.standby.end()
        self.standby = stand_by(self.folder, self.first_link, port)


def stand_by(folder: Path, link: str, grpc_port: int = 0, **environment: str) -> Covey:
    made = Covey(["coordinator", "--join", link, "--archive-every-epochs", "5", "--listen", "127.0.0.1",
                  "--port", "0", "--grpc-port", str(grpc_port), "--http-port", "0", "--state-dir",
                  str(folder / "standby"), *FLAGS], folder / "standby.log", **environment)
    made.wait_for("ready")
    return made


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    """Volunteers first: they enrolled when nobody knew of a standby."""
    swarm = Swarm(tmp_path_factory.mktemp("standby"), flags=FLAGS)
    standby = None
    try:
        link = swarm.link
        volunteers = [swarm.join(name=name) for name in ("ada", "grace")]
        token = (swarm.folder / "coordinator" / "admin.token").read_text()
        standby = stand_by(swarm.folder, link, COVEY_ADMIN_TOKEN=token)
        town = Town(swarm, volunteers, standby, link)
        yield town
    finally:
        for one in (town.standby, standby) if standby else ():
            one.end()
        swarm.close()


def covey(*arguments: str, code: int = 0, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-m", "peer.cli", *arguments], capture_output=True, text=True, timeout=60,
                          check=False, env={**os.environ, **environment})
    assert done.returncode == code, done
    return done.stderr if code else done.stdout


def members(town: Town, of: str) -> dict[str, Member]:
    """As the coordinator with that state directory knows them, by name."""
    return {member.name: member for member in asyncio.run(Operator(None, town.folder / of).list_members())}


def invites(town: Town, of: str) -> dict[str, Invite]:
    """Likewise, by label."""
    return {invite.label: invite for invite in asyncio.run(Operator(None, town.folder / of).list_invites())}


def archived(town: Town) -> int:
    """The epoch of the newest checkpoint that the standby has; 0: there is none."""
    found = httpx.get(f"{town.standby.all('ready')[0]['dashboard_url']}api/swarm").json()["archive"]
    return int(found["epoch"] or 0)


def averages_in_a_group_of(size: int, volunteers: list[Covey]) -> None:
    for volunteer in volunteers:
        volunteer.wait_for("round", 2, since=len(volunteer.events), kind="gradients", outcome="averaged",
                           group_size=size)


@pytest.mark.parametrize(("token", "found"), [("", "no COVEY_ADMIN_TOKEN"), ("guessed", "no good admin token")])
def test_nobody_takes_the_authority_over_without_the_admin_token(town: Town, token: str, found: str) -> None:
    folder = town.folder / "thief"
    told = covey("coordinator", "--join", town.first_link, "--state-dir", str(folder), code=2, COVEY_ADMIN_TOKEN=token)
    assert found in told
    assert told.count("\n") == 1
    assert not folder.exists()


def test_the_standby_has_the_authority_for_its_owner_only(town: Town) -> None:
    first, second = town.folder / "coordinator", town.folder / "standby"
    for name in ("authority.key", "admin.token", "experiment.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
        assert (second / name).stat().st_mode & 0o077 == 0
    for name in ("identity.key", "tls.key"):
        assert (first / name).read_bytes() != (second / name).read_bytes()


def test_volunteers_from_before_the_standby_learn_of_it_when_they_renew(town: Town) -> None:
    links = {str(parse_link(link).address) for link in (town.first_link, town.link)}
    for volunteer in town.volunteers:
        job = town.folder / volunteer.log.stem / "job.json"
        until(lambda job=job: {parse_link(link).address for link in json.loads(job.read_bytes())["coordinators"]}
              == links, f"{job} has both links", SOON)
    averages_in_a_group_of(2, town.volunteers)


def test_when_the_first_dies_all_goes_on_with_the_second(town: Town) -> None:
    covey("invite", "create", "friends", "--state-dir", str(town.folder / "coordinator"))
    until(lambda: "friends" in invites(town, "standby"), "the standby knows of the invite", SOON)
    first = town.swarm.coordinator()
    first.signal(signal.SIGKILL)
    first.process.wait()
    town.restart_standby()  # which has all that it needs
    before, epoch = members(town, "standby"), archived(town)
    assert before.keys() == {"ada", "grace"}
    town.volunteers.append(town.swarm.join(name="eve", link=invites(town, "standby")["friends"].link))
    averages_in_a_group_of(3, town.volunteers)
    until(lambda: all(members(town, "standby")[name].renewed > before[name].renewed for name in ("ada", "grace")),
          "the running volunteers renew with the standby", SOON)
    until(lambda: archived(town) > epoch, "a later checkpoint is in the archive", SOON)
    assert json.loads(covey("status", town.link, "--json"))["epoch"] > epoch


def test_a_ban_at_the_second_is_honoured(town: Town) -> None:
    assert "is banned" in covey("ban", "eve", "--reason", "for the test", "--link", town.link,
                                COVEY_ADMIN_TOKEN=(town.folder / "coordinator" / "admin.token").read_text())
    *others, eve = town.volunteers
    until(lambda: all(volunteer.all("round")[-1]["group_size"] == 2 for volunteer in others), "the others average "
          "without it", BAN_SECONDS)
    eve.end()
    averages_in_a_group_of(2, others)


def test_the_first_comes_back_and_knows_what_happened_meanwhile(town: Town) -> None:
    (ready,) = town.swarm.coordinator().all("ready")
    until(lambda: members(town, "coordinator").get("eve", Member()).reason == "for the test", "it has heard", SOON)
    assert "banned (for the test)" in covey("join", town.swarm.link, "--state-dir", str(town.folder / "eve"), code=2)
    address = parse_link(town.link).address
    metric = f'covey_replica_last_success_timestamp_seconds{{coordinator="{address}"}}'
    until(lambda: f"{metric} 1." in httpx.get(ready["metrics_url"]).text, "it says when it last heard the other", SOON)
    averages_in_a_group_of(2, town.volunteers[:2])
