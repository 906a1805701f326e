"""How long to wait before what failed is tried again."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Backoff:
    """Seconds between a failure and the next start: doubled by every failure, up to a ceiling."""

    first_seconds: float = 1.0
    ceiling_seconds: float = 60.0
    healthy_seconds: float = 300.0  # what ran for so long makes the next wait the first again

    def after(self, last_seconds: float, uptime_seconds: float) -> float:
        """The wait after what ran `uptime_seconds`; the wait before it was `last_seconds`, or 0."""
        if last_seconds == 0 or uptime_seconds >= self.healthy_seconds:
            return self.first_seconds
        return min(2 * last_seconds, self.ceiling_seconds)
