"""Messages for a round that this peer's trainer has not come to: kept for it, within bounds."""

from collections import OrderedDict
from dataclasses import dataclass

from averaging.messages import Message, RoundId

PER_SENDER = 8
SENDERS = 256
LONGEST = 1 << 14  # bytes of a message on the wire; only proposals are longer, and none comes this early


@dataclass(frozen=True)
class Kept:
    """A message, and when it came."""

    sender: str
    message: Message
    time: float


class Early:
    """Keeps the newest of each sender's messages, one of a kind for a round and attempt, for `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._kept: OrderedDict[str, list[Kept]] = OrderedDict()  # by sender; who spoke last comes last

    def keep(self, sender: str, message: Message, length: int, now: float) -> None:
        """`length`: of the message on the wire. What is too long, or crowded out, is forgotten."""
        if length > LONGEST:
            return
        same = (type(message), message.round, message.attempt)
        rest = [kept for kept in self._kept.pop(sender, []) if self._is_fresh(kept, now) and same != (
            type(kept.message), kept.message.round, kept.message.attempt)]
        self._kept[sender] = [*rest, Kept(sender, message, now)][-PER_SENDER:]
        if len(self._kept) > SENDERS:
            self._kept.popitem(last=False)

    def take(self, round: RoundId, now: float) -> list[Kept]:
        """Those for `round`, as they came; they are kept no more."""
        of_round = [kept for messages in self._kept.values() for kept in messages if kept.message.round == round]
        for kept in of_round:
            self._kept[kept.sender].remove(kept)
        self._kept = OrderedDict((sender, messages) for sender, messages in self._kept.items() if messages)
        return sorted((kept for kept in of_round if self._is_fresh(kept, now)), key=lambda kept: kept.time)

    def _is_fresh(self, kept: Kept, now: float) -> bool:
        return now - kept.time < self._seconds
