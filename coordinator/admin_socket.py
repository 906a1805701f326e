"""Where a coordinator takes its owner's orders, for both sides of the socket."""

from pathlib import Path

from averaging.runtime import runtime_path

SUFFIX = ".admin"


def admin_socket(state_dir: Path) -> Path:
    """Of the coordinator with this state directory."""
    return runtime_path(state_dir, SUFFIX)
