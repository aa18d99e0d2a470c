"""How much one key may ask: a rate as a token bucket, and a number a day.

Belongs here: counting, with the time given. Does not belong here: clocks, Redis, HTTP.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

DAY_S = 86_400


class TokenBucket:
    """At most `burst` requests at once and `rate_per_s` in the long run.

    Kept as one number, the time at which the bucket would be full again: the generic cell rate algorithm (ITU-T I.371, annex A),
    which is a token bucket without a refill to run. Times are monotonic seconds.
    """

    __slots__ = ("_full_at", "_interval_s", "_tolerance_s", "burst", "rate_per_s")

    def __init__(self, rate_per_s: float, burst: int) -> None:
        self.rate_per_s = rate_per_s
        self.burst = burst
        self._interval_s = 1.0 / rate_per_s
        self._tolerance_s = self._interval_s * (burst - 1) + 1e-9  # what adding up floats may lose must not cost a request
        self._full_at = float("-inf")

    def take(self, now: float) -> float:
        """Takes one token and returns 0.0, or takes none and returns the seconds until there is one."""
        full_at = max(self._full_at, now)
        wait = full_at - now - self._tolerance_s
        if wait > 0:
            return wait
        self._full_at = full_at + self._interval_s
        return 0.0


@dataclass(slots=True)
class DailyQuota:
    """Requests of one key on one UTC day: those of this process, and what others had counted when last asked.

    Between two exchanges the others' requests are unknown: n replicas may together exceed `limit` by what they take in that time.
    """

    limit: int
    day: int = -1  # days since 1970
    own: int = 0
    others: int = 0

    def take(self, wall_s: float) -> float:
        """Counts one request and returns 0.0, or counts none and returns the seconds until the next day. `wall_s`: Unix time."""
        day = int(wall_s // DAY_S)
        if day > self.day:  # a clock set back does not give a day twice
            self.day, self.own, self.others = day, 0, 0
        if self.own + self.others >= self.limit:
            return max(1.0, (self.day + 1) * DAY_S - wall_s)
        self.own += 1
        return 0.0

    def counted_elsewhere(self, day: int, others: int) -> None:
        """What the other processes have counted on `day`; an answer about a day gone by is left."""
        if day == self.day:
            self.others = others


def day_name(day: int) -> str:
    """A day's number as its date, for names of keys."""
    return datetime.fromtimestamp(day * DAY_S, UTC).strftime("%Y-%m-%d")
