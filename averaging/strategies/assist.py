"""What an auxiliary peer does: it trains nothing, and helps the others to average."""

from collections.abc import Callable
from threading import Event
from time import sleep

from averaging.config import Averaging
from averaging.records import AVERAGED, RoundEnd
from averaging.roster import group_of
from averaging.transports.transport import Transport

POLL_SECONDS = 0.02


def assist(config: Averaging, transport: Transport, stop: Event,
           on_round: Callable[[RoundEnd], None] = lambda _: None) -> None:
    """Take part in each epoch's round without tensors, until `stop` is set; then give up the round under way.

    It never waits on `stop`: a signal handler that sets it, in this thread, would wait for the lock that this thread
    holds in there.
    """
    kind, epoch = AVERAGED[config.strategy], 0
    while not stop.is_set():
        epoch = max(epoch, transport.standing().epoch)
        transport.report(epoch, 0)
        group = group_of(transport.peer_id, transport.members(epoch), key=f"{kind}/{epoch}",
                         target_group_size=config.target_group_size) if transport.is_due(epoch) else ()
        if len(group) < 2:
            sleep(POLL_SECONDS)
            continue
        meeting = transport.meet((), 0.0, kind=kind, epoch=epoch, group=group)
        while not meeting.done() and not stop.is_set():
            sleep(POLL_SECONDS)
        meeting.cancel()
        end = meeting.result()
        on_round(RoundEnd(kind, "averaged" if end.averaged else "failed", epoch, group_size=len(end.members) or 1,
                          seconds=end.seconds, matchmaking_seconds=end.matchmaking_seconds,
                          bytes_sent=end.bytes_sent, bytes_received=end.bytes_received, refused=dict(end.refused),
                          reason=end.reason))
        epoch += 1
