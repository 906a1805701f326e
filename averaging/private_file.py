"""Files that only their owner may read: keys and tokens."""

import os
from pathlib import Path


def write_private(path: Path, data: bytes) -> None:
    """Put `data` into the file `path`, whole or not at all, with mode 0600 from the first byte on. Raises OSError."""
    draft = path.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
    draft.replace(path)
