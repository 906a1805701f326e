"""Crediting: the peers' receipts are read now and then, and what they amount to is kept and shown."""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping

from averaging.receipts import Receipt
from coordinator.credit_ledger import CreditLedger, Leaderboard
from coordinator.credits import Credit, credits
from proto.swarm_pb2 import Contribution

PERIOD_SECONDS = 2.0  # between two readings, at least
SHARE = 20            # and so many times what one takes: of a large swarm it may take long
log = logging.getLogger("covey.coordinator")


class Crediting:
    """Keeps `leaderboard`, from the `ledger` and what `read` returns (receipts by peer id; it may block, or raise).

    `names`: of all members, by peer id; `banned`: peer ids whose word does not count and who are not shown;
    `most_samples`: that one member can bring into a round. What fails is said once, and tried again.
    """

    def __init__(self, read: Callable[[], Mapping[str, Iterable[Receipt]]], ledger: CreditLedger, *,
                 names: Callable[[], Mapping[str, str]], banned: Callable[[], Collection[str]], most_samples: int,
                 clock: Callable[[], float] = time.time) -> None:
        self._read, self._ledger, self._names, self._banned = read, ledger, names, banned
        self._most_samples, self._clock = most_samples, clock
        self._recorded, self._works = frozenset[Credit](), True
        self.leaderboard = self._ranked()

    def refresh(self) -> None:
        """Read once; blocks."""
        try:
            found = frozenset(credits(self._read(), members=self._names().keys() - set(self._banned()),
                                      most_samples=self._most_samples).values())
            if news := found - self._recorded:
                self._ledger.record(news, self._clock())
            self._recorded, self.leaderboard = found, self._ranked()
        except Exception as error:  # whatever it is, training goes on, and so do we
            if self._works:
                log.warning("volunteers can't be credited: %s", str(error) or type(error).__name__)
            self._works = False
        else:
            if not self._works:
                log.warning("volunteers are credited again")
            self._works = True

    def _ranked(self) -> Leaderboard:
        return self._ledger.leaderboard(self._names(), without=self._banned())

    async def keep(self) -> None:
        """Read for ever."""
        while True:
            began = time.monotonic()
            await asyncio.to_thread(self.refresh)
            await asyncio.sleep(max(PERIOD_SECONDS, SHARE * (time.monotonic() - began)))


def contribution(leaderboard: Leaderboard, peer_id: str, name: str, run_id: str, now: float) -> Contribution:
    """What the volunteer is credited with at `now`, Unix seconds."""
    row, ranks = leaderboard.rows.get(peer_id), list(leaderboard.rows)
    told = Contribution(run_id=run_id, peer_id=peer_id, name=name, swarm_samples=leaderboard.samples,
                        volunteers=len(ranks), time=now)
    if row:
        told.samples, told.epochs, told.flagged = row.samples, row.epochs, row.flagged
        told.rank = 1 + ranks.index(peer_id)
    return told
