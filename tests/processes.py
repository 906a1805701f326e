"""What tests of real processes share: waiting for a condition, and who still runs."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil


def until(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Wait for `condition`; fail, saying `what`, if it does not come within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{seconds:g} s, and still not: {what}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether a process of this number runs; a zombie doesn't."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def worker_pids(state_dir: Path) -> list[int]:
    """Of the fake worker and its two children; empty before it is up."""
    path = state_dir / "pids"
    return [int(line) for line in path.read_text().split()] if path.exists() else []
