"""What was seen of the swarm so far, kept in the state directory: a restart of the coordinator takes no chart away.

One file, replaced whole every minute and at the end. Of a process that is killed, the last minute's points are gone;
what peers did in it is in their next records. A file that can't be read is passed over, and a disk that can't be
written holds nobody up: the log says so, and all goes on from what is in memory.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from averaging.private_file import write_private
from coordinator.history import History
from coordinator.swarm import SwarmState

KEPT_SECONDS = 60.0  # between two writings
KEPT_GONE = 1000  # of the peers that are gone, those whose counters are kept on disk, for when they come back
logger = logging.getLogger("covey.coordinator")


@dataclass(frozen=True)
class Past:
    """The newest state of the swarm, and what was read so far."""

    state: SwarmState = field(default_factory=SwarmState)
    history: History = field(default_factory=History)


# A tuple, to which a configuration can be given: it then holds for what is inside too.
FORMAT = TypeAdapter(tuple[SwarmState, History], config=ConfigDict(
    strict=True, allow_inf_nan=False, ser_json_bytes="base64", val_json_bytes="base64"))


class PastFile:
    """The file at `path`, of one experiment. `clock`: seconds that never go back."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._kept, self._writable = clock(), True

    def recall(self) -> Past:
        """What was kept; an empty past if nothing was, or nothing that can be read."""
        try:
            return Past(*FORMAT.validate_json(self._path.read_bytes()))
        except FileNotFoundError:
            return Past()
        except (OSError, ValueError) as error:
            found = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            logger.warning("%s can't be read (%s): charts and sums begin anew", self._path, found)
            return Past()

    def is_due(self) -> bool:
        """Whether it is time to write again."""
        return self._clock() - self._kept >= KEPT_SECONDS

    def keep(self, past: Past) -> None:
        """Write, or log that it can't be done."""
        self._kept = self._clock()
        gone = dict(list(past.state.gone.items())[-KEPT_GONE:])
        try:
            write_private(self._path, FORMAT.dump_json((replace(past.state, gone=gone), past.history)))
        except (OSError, ValueError) as error:
            if self._writable:
                logger.warning("%s can't be written (%s): a restart would lose what is not in it", self._path, error)
            self._writable = False
            return
        if not self._writable:
            logger.warning("%s can be written again", self._path)
        self._writable = True
