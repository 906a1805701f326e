"""A real coordinator's process, on loopback."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from processes import until

from averaging.experiment import canonical, experiment_of, run_id
from averaging.identity import open_key
from coordinator.coordinator import run_coordinator
from coordinator.link import parse_link
from coordinator.ports import listen
from peer.enrol import Enrolment, enrol
from training.errors import BadInput

TREE = {"name": "tiny", "optimizer": {"lr": 0.1, "max_epochs": 10},
        "averaging": {"target_batch_size": 256, "target_group_size": 2}}
EXPERIMENT = experiment_of(TREE)
RUN = f"""
import json, sys
from pathlib import Path
from averaging.experiment import experiment_of
from coordinator.coordinator import run_coordinator
run_coordinator(experiment_of({TREE!r}), state_dir=Path(sys.argv[1]), host="127.0.0.1", json_output=True,
                **json.loads(sys.argv[2]))
"""
PUBLISH = """
import sys, time
from pathlib import Path
from averaging.authorisation import MemberAuthoriser
from averaging.dht import open_identity, start_dht
from averaging.progress import publish_record, read_records, record_validators
from averaging.records import PeerRecord, Rounds
path, run, authority, token, *initial_peers = sys.argv[1:]
key, authority = open_identity(Path(path)), authority.encode()
member = MemberAuthoriser(key, authority=authority, run_id=run, read_token=lambda: bytes.fromhex(token))
dht = start_dht(identity_path=Path(path), host_maddrs=["/ip4/127.0.0.1/tcp/0"], initial_peers=initial_peers,
                record_validators=record_validators(run, key, authority), authorizer=member)
record = PeerRecord(
    peer_id=str(dht.peer_id), name="ada", state="training", epoch=3, samples_accumulated=64, samples_total=832,
    samples_per_second=20.0, loss=1.5, group_size=2, version="0.1.0", device="cpu", client_mode=False, time=time.time(),
    rounds=Rounds(averaged=3))
publish_record(dht, run, key, record, lifetime_seconds=60.0)
while not read_records(dht, run):
    time.sleep(0.05)
dht.shutdown()
"""

SUMS = ("since_seconds", "samples_total", "rounds", "joins")
ANY = {"p2p_port": 0, "grpc_port": 0, "http_port": 0}


def run(state_dir: Path, ports: dict[str, int]) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", RUN, str(state_dir), json.dumps(ports)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


def ready(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The line that says where it can be reached."""
    line = process.stdout.readline()
    if not line.startswith('{"event": "ready"'):
        process.kill()
        pytest.fail(f"no ready line but {line!r}: {process.stderr.read()}")
    return json.loads(line)


def stop(process: subprocess.Popen[str], number: signal.Signals) -> int:
    """Its exit status after signal `number`, all it started gone as well."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    status = process.wait(timeout=30)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    process.communicate()
    return status


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("coordinator") / "state"


@pytest.fixture(scope="module")
def coordinator(state_dir: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    process = run(state_dir, ANY)
    try:
        yield process, ready(process)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def key_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("volunteer") / "key"


@pytest.fixture(scope="module")
def enrolment(coordinator: tuple[subprocess.Popen[str], dict[str, Any]], key_path: Path) -> Enrolment:
    return asyncio.run(enrol(parse_link(coordinator[1]["link"]), "ada", open_key(key_path)))


def test_its_link_leads_to_the_experiment(coordinator, enrolment: Enrolment) -> None:
    assert parse_link(coordinator[1]["link"]).run_id == enrolment.run_id == run_id(EXPERIMENT)
    assert enrolment.document == canonical(EXPERIMENT)
    assert enrolment.dashboard_url == coordinator[1]["dashboard_url"]
    assert all(address.endswith(coordinator[1]["peer_id"]) for address in enrolment.initial_peers)


def test_without_the_links_invite_nobody_gets_in(coordinator, tmp_path: Path) -> None:
    link = parse_link(coordinator[1]["link"])
    for invite in ("", "unknown"):
        with pytest.raises(BadInput, match="invite; expected one of the operator's"):
            asyncio.run(enrol(replace(link, invite=invite), "eve", open_key(tmp_path / "key")))


def test_its_keys_are_for_its_owner_only(coordinator, state_dir: Path) -> None:
    secret = {"authority.key", "identity.key", "tls.key", "admin.token", "ledger.sqlite"}
    assert secret <= {path.name for path in state_dir.iterdir()}
    assert all(path.stat().st_mode & 0o077 == 0 for path in state_dir.iterdir() if path.name in secret)


def test_a_record_in_the_dht_shows_in_the_json_and_the_metrics(
        coordinator, enrolment: Enrolment, key_path: Path) -> None:
    url = coordinator[1]["dashboard_url"]
    subprocess.run([sys.executable, "-c", PUBLISH, str(key_path), enrolment.run_id, enrolment.authority.decode(),
                    enrolment.token.hex(), *enrolment.initial_peers], check=True, timeout=60)
    until(lambda: httpx.get(f"{url}api/swarm").json()["peers"], "a peer in the JSON view")
    swarm = httpx.get(f"{url}api/swarm").json()
    assert (swarm["epoch"], swarm["epoch_samples"], swarm["loss"], swarm["joins"]) == (3, 64, 1.5, 1)
    assert [peer["name"] for peer in swarm["peers"]] == ["ada"]
    metrics = httpx.get(coordinator[1]["metrics_url"]).text
    assert "covey_samples_total 832.0" in metrics
    assert 'covey_peers{mode="direct",state="training"} 1.0' in metrics


@pytest.mark.parametrize(("purpose", "option"), [("libp2p", "p2p_port"), ("gRPC", "grpc_port"), ("HTTP", "http_port")])
def test_a_port_in_use_is_refused_before_anything_starts(purpose: str, option: str, tmp_path: Path) -> None:
    with listen("127.0.0.1", 0, "a test") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BadInput, match=f"port {port} for {purpose} on 127.0.0.1"):
            run_coordinator(EXPERIMENT, state_dir=tmp_path, host="127.0.0.1", **{**ANY, option: port})
    assert not (tmp_path / "identity.key").exists()


def test_a_state_directory_in_use_is_refused(coordinator, state_dir: Path) -> None:
    with pytest.raises(BadInput, match=f"is held by process {coordinator[0].pid};"):
        run_coordinator(EXPERIMENT, state_dir=state_dir, host="127.0.0.1", **ANY)


def test_bad_input_is_found_without_torch() -> None:
    code = "import sys, coordinator.coordinator; sys.exit('torch' in sys.modules or 'hivemind' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_it_stops_at_a_signal_and_comes_back_as_the_same_node(coordinator, enrolment: Enrolment,
                                                              state_dir: Path) -> None:
    process, before = coordinator
    with httpx.stream("GET", f"{before['dashboard_url']}api/events", timeout=30) as watched:
        events = watched.iter_lines()
        for reading in ("a first", "a second"):
            until(lambda: next(events).startswith("id: "), f"{reading} reading")
        known = httpx.get(f"{before['dashboard_url']}api/swarm").json()
        assert stop(process, signal.SIGTERM) == 0
        # The stream ends rather than being cut, which would raise.
        assert [line for line in events if line][-1].startswith("data: ")
    ports = {"p2p_port": int(enrolment.initial_peers[0].split("/")[4]), "grpc_port": parse_link(before["link"]).port,
             "http_port": httpx.URL(before["dashboard_url"]).port}
    again = run(state_dir, ports)
    try:
        assert ready(again) == before
        swarm = httpx.get(f"{before['dashboard_url']}api/swarm").json()
        assert [swarm[name] for name in SUMS] == [known[name] for name in SUMS]
        times = httpx.get(f"{before['dashboard_url']}api/history").json()["over_time"]["time"]
        assert times[0] == pytest.approx(known["since_seconds"], abs=1)  # of the first life
        assert len([time for time in times if time <= known["time_seconds"]]) >= 2
        assert "covey_samples_total 0.0" in httpx.get(before["metrics_url"]).text
        [daemon] = [child for child in psutil.Process(again.pid).children(recursive=True) if child.name() == "p2pd"]
        daemon.kill()
        assert again.wait(timeout=20) == 1
        assert "the DHT node died" in again.stderr.read()
    finally:
        again.kill()
        again.communicate()
