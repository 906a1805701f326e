"""The checked-in code is what the contracts generate."""

import shutil
from pathlib import Path

import pytest

from proto import generate


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of proto/ that the test may change."""
    shutil.copytree(generate.ROOT / "proto", tmp_path / "proto")
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    return tmp_path / "proto"


def test_generated_code_is_fresh():
    assert generate.stale() == []


def test_a_changed_contract_makes_its_code_stale(copy):
    with (copy / "peer.proto").open("a") as contract:
        contract.write("\nmessage Added {}\n")
    assert generate.stale() == [Path("proto/peer_pb2.py"), Path("proto/peer_pb2.pyi")]


def test_missing_and_left_over_files_are_stale(copy):
    (copy / "swarm_pb2.pyi").rename(copy / "gone_pb2.pyi")
    assert generate.stale() == [Path("proto/gone_pb2.pyi"), Path("proto/swarm_pb2.pyi")]
