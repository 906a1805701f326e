"""What a user gets wrong: one line on stderr, exit code 2, no traceback, nothing left behind."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_coordinator import Served, experiment, reply_of, serve

from averaging.experiment import fingerprint
from coordinator.calls import TOKEN
from coordinator.state_dir import open_state_dir
from proto.coordinator_pb2 import EnrolReply

ROOT = Path(__file__).parents[2]


def refused(*arguments: str) -> str:
    """The one line that `covey ARGUMENTS` ends with."""
    before = set(Path(os.environ["XDG_RUNTIME_DIR"]).rglob("*"))
    result = subprocess.run([sys.executable, "-m", "peer.cli", *arguments], cwd=ROOT, capture_output=True, text=True,
                            check=False, timeout=60)
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert result.stderr.startswith("covey: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert "; expected " in result.stderr
    assert set(Path(os.environ["XDG_RUNTIME_DIR"]).rglob("*")) == before
    return result.stderr


@pytest.fixture
def folder_reply() -> EnrolReply:
    """Of an experiment that trains on the volunteer's own images."""
    return reply_of(experiment("image_folder"))


@pytest.fixture
def served(folder_reply: EnrolReply) -> Iterator[Served]:
    with serve(folder_reply) as served:
        yield served


@pytest.fixture
def link(served: Served) -> str:
    return served.link()


@pytest.fixture
def synthetic_link() -> Iterator[str]:
    reply = reply_of(experiment("synthetic"))
    with serve(reply) as served:
        yield served.link()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twenty of them, by name; nobody decodes them here."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.png").write_bytes(b"")
    return folder


def test_an_unknown_recipe_names_the_nearest() -> None:
    assert "recipe 'dmo'" in (line := refused("coordinator", "dmo"))
    assert "Did you mean 'demo'?" in line


@pytest.mark.parametrize(("flags", "found"), [
    (["--archive-every-epochs", "0", "--evaluate"], "without an archive"),
    (["--data", "/nowhere"], "data folder '/nowhere'"),
    (["--upload-to-hub", "me/my/model"], "--upload-to-hub me/my/model"),
])
def test_an_archive_that_could_not_do_its_work_is_refused_at_the_start(flags: list[str], found: str,
                                                                       tmp_path: Path) -> None:
    assert found in refused("coordinator", "demo", *flags, "--state-dir", str(tmp_path / "state"))
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(("arguments", "found"), [
    ([], "neither a recipe nor --join"), (["demo", "--join", "covey://x"], "a recipe and --join"),
    (["--join", "covey://x", "loss.temperature=0.2"], "a recipe and --join"),
    (["--join", "covey://x"], "it has no port")])
def test_a_coordinator_runs_a_recipe_or_stands_by_another(arguments: list[str], found: str) -> None:
    assert found in refused("coordinator", *arguments)


def test_a_coordinator_that_hands_nothing_over_is_not_stood_by(
        link: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "standby"
    monkeypatch.delenv(TOKEN, raising=False)
    assert f"no {TOKEN}" in refused("coordinator", "--join", link, "--state-dir", str(folder))
    monkeypatch.setenv(TOKEN, "guessed")
    assert "answers UNIMPLEMENTED" in refused("coordinator", "--join", link, "--state-dir", str(folder))
    assert not folder.exists()


def test_an_unknown_key_names_the_nearest() -> None:
    line = refused("coordinator", "demo", "loss.temprature=0.2")
    assert "loss.temprature" in line
    assert "Did you mean 'loss.temperature'?" in line


def test_a_value_out_of_range_names_its_key() -> None:
    assert "averaging.target_group_size" in refused("coordinator", "demo", "averaging.target_group_size=1")


@pytest.mark.parametrize("command", ["join", "status"])
def test_a_malformed_link_shows_the_right_shape(command: str) -> None:
    assert "covey://HOST:PORT/RUN_ID/CERTIFICATE/INVITE" in refused(command, "covey://host/run")


def test_a_stale_link_names_what_runs_there(served: Served, folder_reply: EnrolReply) -> None:
    line = refused("join", served.link("fake-000000000000"))
    assert folder_reply.run_id in line
    assert "stale" in line


def test_the_swarm_of_another_run_is_not_shown(served: Served, folder_reply: EnrolReply) -> None:
    assert folder_reply.run_id in refused("status", served.link("fake-000000000000"))


@pytest.mark.parametrize("command", ["join", "status"])
def test_whoever_has_another_certificate_than_the_links_is_not_talked_to(command: str, link: str) -> None:
    line = refused(command, f"{link[:-4]}AAAA")
    assert "certificate" in line
    assert "as in the link" in line


def test_an_experiment_that_the_authority_has_not_signed_is_refused(
        link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fake_coordinator.sign", lambda *_: b"forged")
    assert "has not signed" in refused("join", link)


@pytest.mark.parametrize("command", ["join", "status"])
def test_a_coordinator_that_does_not_answer_is_named(command: str) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # bound, so that nobody else takes it, but not listening
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        link = Served(address, "fake-000000000000").link()
        assert f"no coordinator answers at {address}" in refused(command, link)


def test_an_experiment_changed_on_the_way_is_refused(link: str, folder_reply: EnrolReply) -> None:
    folder_reply.experiment = folder_reply.experiment.replace(b'"lr":0.1', b'"lr":9.0')
    assert "fingerprint" in refused("join", link)


def test_another_experiment_than_the_link_s_is_refused(folder_reply: EnrolReply) -> None:
    other = reply_of(experiment("synthetic"))
    other.run_id = folder_reply.run_id
    with serve(other) as served:
        line = refused("join", served.link(folder_reply.run_id))
    assert other.fingerprint[:12] in line
    assert folder_reply.run_id in line


def test_an_experiment_of_a_newer_covey_is_refused(folder_reply: EnrolReply) -> None:
    folder_reply.experiment = folder_reply.experiment.replace(b'"name":"fake"', b'"name":"fake","novelty":1')
    folder_reply.fingerprint = fingerprint(folder_reply.experiment)
    folder_reply.run_id = f"fake-{folder_reply.fingerprint[:12]}"
    with serve(folder_reply) as served:
        assert "novelty" in refused("join", served.link())


def test_a_held_state_directory_names_its_holder(link: str, folder_reply: EnrolReply, images: Path,
                                                 tmp_path: Path) -> None:
    with open_state_dir(tmp_path / "held", role="peer", run_id=folder_reply.run_id):
        line = refused("join", link, "--data", str(images), "--batch-size", "4",
                       "--state-dir", str(tmp_path / "held"))
    assert f"held by process {os.getpid()}" in line


def test_a_missing_data_folder_is_named(link: str, tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refused("join", link, "--data", str(tmp_path / "nowhere"))


def test_an_experiment_on_own_images_asks_for_a_folder(link: str) -> None:
    assert "--data" in refused("join", link)


def test_an_empty_data_folder_is_named(link: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused("join", link, "--data", str(tmp_path / "empty"))


def test_a_folder_for_an_experiment_that_makes_its_images_is_refused(synthetic_link: str, images: Path) -> None:
    assert "makes its own images" in refused("join", synthetic_link, "--data", str(images))


def test_a_batch_larger_than_the_folder_names_both(link: str, images: Path) -> None:
    line = refused("join", link, "--data", str(images), "--batch-size", "21")
    assert "batch size 21" in line
    assert "to 16" in line  # a fifth of the images is kept for evaluation


def test_a_batch_larger_than_the_synthetic_set_names_both(synthetic_link: str) -> None:
    assert "to 64" in refused("join", synthetic_link, "--batch-size", "65")


def test_a_batch_of_none_is_refused(synthetic_link: str) -> None:
    assert "batch_size" in refused("join", synthetic_link, "--batch-size", "0")


@pytest.mark.parametrize("option", ["--port", "--http-port"])
def test_a_port_in_use_is_named(synthetic_link: str, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}" in refused("join", synthetic_link, "--listen", "127.0.0.1", option, port)


def test_a_port_in_use_stops_a_coordinator(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refused("coordinator", "demo", "--listen", "127.0.0.1", "--port", "0", "--grpc-port", port,
                       "--http-port", "0", "--state-dir", str(tmp_path))
    assert f"port {port}" in line


def test_leaving_without_a_peer_is_refused() -> None:
    refused("leave")
