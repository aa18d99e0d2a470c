"""How many requests are worked on at once: who comes on top is answered at once that he should come later.

Belongs here: the limit and how it follows the load, with times given. Does not belong here: clocks, tasks, HTTP.

A server that takes every request answers all of them late; one that takes what it can finish answers those in time. Two rules:

- no more than `cap` requests are in work, whatever their delay comes from (by Little's law that bounds the wait);
- when the event loop itself falls behind, the limit falls with it. The signal is CoDel's (Nichols and Jacobson, "Controlling Queue
  Delay", ACM Queue 10(5), 2012; RFC 8289): the least delay within an interval. A burst drains within the interval, and its least
  delay is small; a standing queue's is not. The answer to it is TCP's: lower the limit by a part at once, raise it in small steps.
  Twenty milliseconds as the delay to stay below is what WeChat's services use (Zhou et al., "Overload Control for Scaling WeChat
  Microservices", SoCC 2018, 4.1).
"""

from math import inf

_FALL = 0.7
_RISE = 1.1  # per interval in which somebody was refused
_RISE_UNBOUND = 1.5  # per interval in which nobody was: the limit was not what held the load down


class Admission:
    """`cap`: most requests in work; `target_s`: delay of the event loop to stay below.

    `floor`: the limit never falls below it. A neighbour on the same processor makes the loop late too, and refusing would not help then: so
    few requests are no queue of ours.
    """

    def __init__(self, cap: int, target_s: float, floor: int = 64, interval_s: float = 0.1, buffer_bytes: int = 1 << 28) -> None:
        self.cap = cap
        self.limit = float(cap)
        self.in_work = 0
        self.refused = 0
        self.held_bytes = 0
        self._target_s = target_s
        self._floor = float(min(floor, cap))
        self._interval_s = interval_s
        self._buffer_bytes = buffer_bytes
        self._peak = 0
        self._bound = False
        self._least_s = inf
        self._ends_at = -inf

    @property
    def full(self) -> bool:
        return self.in_work >= self.limit

    def enter(self) -> bool:
        """Takes one request into work, or counts it as refused. Each True is paid back by one `leave`."""
        if self.in_work >= self.limit:
            self._bound = True
            self.refused += 1
            return False
        self.in_work += 1
        self._peak = max(self._peak, self.in_work)
        return True

    def leave(self) -> None:
        self.in_work -= 1

    def refuse(self) -> None:
        """Counts a request turned away before it was read, because `full`."""
        self._bound = True
        self.refused += 1

    def hold(self, size: int) -> bool:
        """Takes note of bytes received and not yet worked on; False where all bodies together are too much for memory."""
        self.held_bytes += size
        return self.held_bytes <= self._buffer_bytes

    def release(self, size: int) -> None:
        self.held_bytes -= size

    def observe(self, delay_s: float, now: float) -> None:
        """What a request waits before its own code runs; to be told many times within an interval. `now`: monotonic seconds."""
        if now >= self._ends_at:
            if self._least_s < inf:
                self._judge()
            self._least_s = inf
            self._ends_at = now + self._interval_s
            self._peak = self.in_work
            self._bound = False
        self._least_s = min(self._least_s, delay_s)

    def _judge(self) -> None:
        if self._least_s > self._target_s:
            # From what really was in work: a limit far above it would have to fall many times before it binds.
            self.limit = max(self._floor, min(self.limit, max(self._peak, 1)) * _FALL)
        elif self.limit < self.cap:
            self.limit = min(float(self.cap), self.limit * (_RISE if self._bound else _RISE_UNBOUND) + 1.0)
