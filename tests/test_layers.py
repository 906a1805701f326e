"""Who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "proto": set[str](),
    "training": set[str](),
    "averaging": {"proto", "training"},
    "coordinator": {"proto", "training", "averaging"},
    "peer": {"proto", "training", "averaging", "coordinator"},
}


def imported(path: Path) -> set[str]:
    """Top-level names of all that the file imports."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_leftwards(room: str) -> None:
    allowed = MAY_IMPORT[room] | {room}
    files = list((ROOT / room).rglob("*.py"))
    assert files
    astray = {f"{path.relative_to(ROOT)} imports {name}" for path in files
              for name in (imported(path) & {*MAY_IMPORT, "tests", "deploy", "benchmarks"}) - allowed}
    assert not astray


@pytest.mark.parametrize("room", ["training"])
def test_training_knows_neither_network_nor_processes(room: str) -> None:
    banned = {"asyncio", "socket", "grpc", "hivemind", "multiprocessing", "subprocess"}
    astray = {f"{path.name} imports {name}" for path in (ROOT / room).rglob("*.py") for name in imported(path) & banned}
    assert not astray


@pytest.mark.parametrize("module", ["peer.cli", "peer.daemon", "averaging.experiment", "coordinator.link"])
def test_what_answers_at_once_imports_no_torch(module: str) -> None:
    script = f"import sys, {module}; print({{'torch', 'hivemind'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "set()\n"
