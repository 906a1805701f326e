import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.state_dir import Role, open_state_dir
from training.errors import BadInput

HOLDER = """
import os, sys, time
from pathlib import Path
from coordinator.state_dir import open_state_dir
with open_state_dir(Path(sys.argv[1]), role="peer", run_id="demo-1"):
    child = os.fork()  # as the DHT node is
    if child:
        print(os.getpid(), child, flush=True)
    time.sleep(60)
"""


def visit(path: Path, role: Role = "peer", run_id: str = "demo-1") -> str:
    """Open and leave the directory; the pid that its lock named meanwhile."""
    with open_state_dir(path, role=role, run_id=run_id) as folder:
        return (folder / "lock").read_text().strip()


def test_a_new_directory_is_for_its_owner_only(tmp_path: Path) -> None:
    with open_state_dir(tmp_path / "a" / "b", role="peer", run_id="demo-1") as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / "lock").stat().st_mode) == 0o600
        assert (folder / "lock").read_text() == f"{os.getpid()}\n"


def test_a_held_directory_names_the_holder_until_it_is_released(tmp_path: Path) -> None:
    with open_state_dir(tmp_path, role="peer", run_id="demo-1"), pytest.raises(
            BadInput, match=rf"held by process {os.getpid()}; expected"):
        visit(tmp_path)
    assert visit(tmp_path) == str(os.getpid())


def test_a_killed_holder_holds_nothing_though_its_child_lives(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    pid, child = map(int, holder.stdout.readline().split())
    try:
        with pytest.raises(BadInput, match=f"held by process {pid}"):
            visit(tmp_path)
        holder.kill()
        holder.wait()
        assert visit(tmp_path) == str(os.getpid())
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)
        holder.communicate()


@pytest.mark.parametrize(("role", "run_id"), [("coordinator", "demo-1"), ("peer", "demo-2")])
def test_another_role_or_experiment_finds_it_taken(tmp_path: Path, role: Role, run_id: str) -> None:
    visit(tmp_path)
    with pytest.raises(BadInput, match=r"belongs to a peer of demo-1; expected one of a .*--state-dir"):
        visit(tmp_path, role, run_id)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"{}", b"null"])
def test_a_marker_that_covey_did_not_write_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "owner.json").write_bytes(content)
    with pytest.raises(BadInput, match="--state-dir"):
        visit(tmp_path)


def test_a_file_in_its_place_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="expected a folder that can be written"):
        visit(tmp_path / "file")
