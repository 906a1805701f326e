"""Other peers' addresses, kept for the next start: the coordinator may be away by then."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path

MOST = 32  # addresses worth trying
log = logging.getLogger(__name__)


def remember_peers(path: Path, addresses: Iterable[str]) -> None:
    """Replace what `path` holds by up to MOST of `addresses`; with none, what is there stays."""
    kept = sorted(set(addresses))[:MOST]
    if kept:
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(kept))
        draft.replace(path)


def recall_peers(path: Path) -> list[str]:
    """The addresses in `path`; none if there is nothing, or nothing that can be read."""
    try:
        kept = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        log.warning("%s passed over: %s", path, error)
        return []
    return [address for address in kept if isinstance(address, str)] if isinstance(kept, list) else []
