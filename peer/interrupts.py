"""Being asked to end: once in good order, twice at once."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from types import FrameType

EXIT_AT_ONCE = 130  # the shell's 128 + SIGINT
SHOW_CURSOR = "\x1b[?25h"  # which a progress bar hides


@contextmanager
def leaving_on_signals() -> Iterator[Event]:
    """An event that SIGTERM, SIGHUP and the first SIGINT set; a SIGINT after that ends the process at once."""
    leave = Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and leave.is_set():
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), SHOW_CURSOR.encode())
            os._exit(EXIT_AT_ONCE)
        leave.set()

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup stays in force
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield leave
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
