"""Who may take part in a real swarm, and who not: invites, tokens that run out, bans, and a stranger at every door."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import httpx
import pytest
from processes import until
from swarm import Covey, Swarm

TOKEN_SECONDS = 40.0
pytestmark = pytest.mark.timeout(300)
BAN_SECONDS = 30.0  # within which all peers honour a ban


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    swarm = Swarm(tmp_path_factory.mktemp("swarm"), flags=["--token-hours", str(TOKEN_SECONDS / 3600)])
    yield swarm
    swarm.close()


def covey(swarm: Swarm, *arguments: str, code: int = 0) -> str:
    """What an operator's command prints; its complaint, where it is to fail."""
    where = ["--state-dir", str(swarm.folder / "coordinator")] if arguments[0] != "join" else []
    done = subprocess.run([sys.executable, "-m", "peer.cli", *arguments, *where], capture_output=True, text=True,
                          timeout=60, check=False)
    assert done.returncode == code, done
    return done.stderr if code else done.stdout


def averages_in_a_group_of(size: int, volunteers: list[Covey]) -> None:
    for volunteer in volunteers:
        volunteer.wait_for("round", 2, since=len(volunteer.events), kind="gradients", outcome="averaged",
                           group_size=size)


def shown(swarm: Swarm) -> set[str]:
    """The volunteers' names on the coordinator's page."""
    (ready,) = swarm.coordinator().all("ready")
    return {peer["name"] for peer in httpx.get(f"{ready['dashboard_url']}api/swarm").json()["peers"]}


def test_an_invite_for_one_lets_one_in(swarm: Swarm) -> None:
    swarm.coordinator()
    link = covey(swarm, "invite", "create", "ada", "--uses", "1", "--expires", "1h").split()[-1]
    other = link[:link.rindex("/")]
    assert "invite; expected one of the operator's" in covey(swarm, "join", other, "--state-dir", str(
        swarm.folder / "stranger"), code=2)
    first = swarm.join(name="ada", link=link)
    first.wait_for("epoch")
    assert "used up" in covey(swarm, "join", link, "--state-dir", str(swarm.folder / "second"), code=2)
    assert not (swarm.folder / "second").exists()
    first.end()
    again = swarm.join(name="ada", link=link)  # who is a member needs no invite
    again.wait_for("epoch")
    again.end()
    assert [(member["name"], member["invite"]) for member in map(json.loads, covey(
        swarm, "members", "--json").splitlines())] == [("ada", "ada")]


def test_members_stay_members_when_their_first_tokens_have_run_out(swarm: Swarm) -> None:
    volunteers = swarm.volunteers(2)
    began = monotonic()
    until(lambda: monotonic() > began + TOKEN_SECONDS, "the tokens that they came with are out", 2 * TOKEN_SECONDS)
    averages_in_a_group_of(2, volunteers)


def test_a_coordinator_that_was_away_renews_again(swarm: Swarm) -> None:
    volunteers = swarm.volunteers(2)
    tokens = [volunteer.log.with_suffix("") / "token" for volunteer in volunteers]
    swarm.coordinator().end()
    averages_in_a_group_of(2, volunteers)
    for volunteer in volunteers:
        until(lambda volunteer=volunteer: "token is not renewed" in volunteer.log.read_text(), "it is told", 20)
    before = [token.read_bytes() for token in tokens]
    swarm.coordinator()
    until(lambda: all(token.read_bytes() != old for token, old in zip(tokens, before, strict=True)), "new tokens", 20)
    averages_in_a_group_of(2, volunteers)


def test_whoever_is_banned_is_out_at_once_at_the_coordinator_and_soon_at_all_peers(swarm: Swarm) -> None:
    *others, banned = swarm.volunteers(3)
    averages_in_a_group_of(3, [*others, banned])
    name = banned.log.stem
    until(lambda: name in shown(swarm), "the volunteer is shown", 10)
    began = monotonic()
    assert "is banned" in covey(swarm, "ban", name, "--reason", "for the test")
    until(lambda: name not in shown(swarm), "it is shown no more", 3)
    until(lambda: all(volunteer.events[-1]["event"] and volunteer.all("round")[-1]["group_size"] == 2
                      for volunteer in others), "the others average without it", BAN_SECONDS)
    print(f"all peers honoured the ban after {monotonic() - began:.1f} s")
    averages_in_a_group_of(2, others)
    since = len(banned.events)
    banned.wait_for("epoch", 2, since=since)  # it trains on, alone
    assert not banned.all("round", since, outcome="averaged")
    copy = copied_identity(swarm.folder / name)
    assert "banned (for the test)" in covey(swarm, "join", swarm.link, "--state-dir", str(copy), code=2)
    assert "a member again" in covey(swarm, "ban", name, "--lift")
    banned.end()
    averages_in_a_group_of(3, [*others, swarm.join(name=name)])


def copied_identity(volunteer: Path) -> Path:
    """A state directory with the same identity, made as its owner would on another machine."""
    file, folder = volunteer.with_suffix(".json"), volunteer.with_name(f"{volunteer.name}-copy")
    for what, where in (("export", volunteer), ("import", folder)):
        subprocess.run([sys.executable, "-m", "peer.cli", "identity", what, str(file), "--state-dir", str(where)],
                       check=True, timeout=60, capture_output=True)
    return folder
