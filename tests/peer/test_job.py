"""The job passes from daemon to worker as it is, and a peer's config says what libp2p needs."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from peer.config import PeerConfig
from peer.job import Job, read_job, write_job
from training.errors import BadInput


def job(state_dir: Path) -> Job:
    return Job(run_id="demo-0123456789ab", fingerprint="01", authority="ssh-rsa AAAA",
               initial_peers=["/ip4/127.0.0.1/tcp/1/p2p/Qm"],
               experiment=b'{"a":1,"b":"\xc3\xa9"}',
               config=PeerConfig(name="é", state_dir=state_dir, data=Path("/images"), threads=2, stop_at_epoch=9))


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_job(job(tmp_path))
    assert read_job(tmp_path) == job(tmp_path)


def test_a_later_job_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    write_job(job(tmp_path))
    later = job(tmp_path).model_copy(update={"initial_peers": []})
    write_job(later)
    assert read_job(tmp_path) == later
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("content", [None, "{", "[]", '{"run_id": "x"}'])
def test_a_folder_without_a_job_says_so(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "job.json").write_text(content)
        (tmp_path / "experiment.json").write_bytes(b"{}")
    with pytest.raises(BadInput, match="a job that `covey join` left here"):
        read_job(tmp_path)


def test_multiaddresses_follow_the_kind_of_address() -> None:
    def maddrs(**options: object) -> list[str]:
        return PeerConfig.model_validate({"name": "a", "state_dir": "/s", "port": 4001, **options}).host_maddrs

    assert maddrs(listen="127.0.0.1") == ["/ip4/127.0.0.1/tcp/4001"]
    assert maddrs(listen="::1") == ["/ip6/::1/tcp/4001"]
    assert maddrs(client_mode=True) == []


@pytest.mark.parametrize(
    "wrong", [{"listen": "localhost"}, {"device": "tpu"}, {"name": ""}, {"port": 70000}, {"nam": "a"}])
def test_a_config_refuses_what_it_does_not_know(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PeerConfig.model_validate({"name": "a", "state_dir": "/s", **wrong})
