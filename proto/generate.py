"""Generates the Python code of the contracts: `python -m proto.generate`, or `--check` that it is fresh.

Needs the dev extra: it pins grpcio-tools and mypy-protobuf, since their versions are part of the output.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONTRACTS = tuple(f"proto/{name}.proto" for name in (
    "swarm", "archive", "coordinator", "authority", "replica", "identity", "peer", "receipts", "round"))
SERVICES = ("proto/coordinator.proto", "proto/authority.proto", "proto/replica.proto", "proto/peer.proto")


def generate(directory: Path) -> set[Path]:
    """Writes messages, services and type stubs below `directory`; returns their paths relative to it."""
    scripts = Path(sys.executable).parent
    _protoc(*CONTRACTS, f"--python_out={directory}",
            f"--plugin={scripts / 'protoc-gen-mypy'}", f"--mypy_out=quiet:{directory}")
    _protoc(*SERVICES, f"--grpc_python_out={directory}",
            f"--plugin={scripts / 'protoc-gen-mypy_grpc'}", f"--mypy_grpc_out=quiet:{directory}")
    return _generated(directory)


def stale() -> list[Path]:
    """The checked-in files that differ from what the contracts give now, are missing or are left over."""
    with tempfile.TemporaryDirectory() as name:
        fresh = Path(name)
        expected, present = generate(fresh), _generated(ROOT)
        return sorted(path for path in expected | present if path not in expected & present
                      or (fresh / path).read_bytes() != (ROOT / path).read_bytes())


def _generated(directory: Path) -> set[Path]:
    return {path.relative_to(directory) for path in directory.glob("proto/*_pb2*.py*")}


def _protoc(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", *arguments], check=True)


def main() -> None:
    """Writes the code beside the contracts; with `--check`, names the stale files and exits 1 instead."""
    if "--check" not in sys.argv[1:]:
        generate(ROOT)
    elif names := stale():
        sys.exit(f"stale: {', '.join(map(str, names))}. Run `python -m proto.generate`.")


if __name__ == "__main__":
    main()
