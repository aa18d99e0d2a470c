"""How many requests are worked on at once: who comes on top is answered at once that he should come later.

Belongs here: the limit and how it follows the load, with times given. Does not belong here: clocks, tasks, HTTP.

A server that takes every request answers all of them late; one that takes what it can finish answers those in time. Two rules:

- no more than `cap` requests are in work, whatever their delay comes from (by Little's law that bounds the wait);
- when requests wait for each other, the limit falls. The signal is CoDel's (Nichols and Jacobson, "Controlling Queue Delay", ACM Queue
  10(5), 2012; RFC 8289): the least delay within an interval. A burst drains within the interval, and its least delay is small; a
  standing queue's is not. The answer to it is TCP's: lower the limit by a part at once, raise it in small steps. Twenty milliseconds
  as the delay to stay below is what WeChat's services use (Zhou et al., "Overload Control for Scaling WeChat Microservices", SoCC
  2018, 4.1).

There are two queues: the event loop's own, before a request's code runs, and those inside the application, seen as time in work. The
second counts only while the process is busy: a request that waits for a slow store waits for nobody here, and refusing others would
not help it.
"""

from math import inf

_FALL = 0.7
_RISE = 1.1  # per interval in which somebody was refused
_RISE_UNBOUND = 1.5  # per interval in which nobody was: the limit was not what held the load down
_IN_WORK = 2.0  # targets that the quickest request may be in work
_BUSY_SHARE = 0.6  # of one processor, used by the process; or
_BUSY_DELAY_S = 0.002  # mean delay of the loop: it has no idle moment, or a neighbour takes the processor from it


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
        self._least_work_s = inf
        self._delays_s = 0.0
        self._samples = 0
        self._began: tuple[float, float] | None = None  # monotonic and processor seconds

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

    def leave(self, work_s: float) -> None:
        """`work_s`: seconds since `enter`."""
        self.in_work -= 1
        self._least_work_s = min(self._least_work_s, work_s)

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

    def observe(self, delay_s: float, now: float, processor_s: float) -> None:
        """What a request waits before its own code runs; to be told many times within an interval.

        `now`: monotonic seconds. `processor_s`: processor seconds the process has used so far.
        """
        if self._began is None:
            self._begin(now, processor_s)
        elif now - self._began[0] >= self._interval_s:
            self._judge((processor_s - self._began[1]) / (now - self._began[0]))
            self._begin(now, processor_s)
        self._least_s = min(self._least_s, delay_s)
        self._delays_s += delay_s
        self._samples += 1

    def _begin(self, now: float, processor_s: float) -> None:
        self._began = now, processor_s
        self._least_s = self._least_work_s = inf
        self._delays_s, self._samples = 0.0, 0
        self._peak = self.in_work
        self._bound = False

    def _judge(self, share: float) -> None:
        busy = share > _BUSY_SHARE or self._delays_s > _BUSY_DELAY_S * self._samples
        # Infinite where nothing was finished: whether that is a queue is for the next interval to tell.
        waiting = busy and _IN_WORK * self._target_s < self._least_work_s < inf
        if waiting or self._least_s > self._target_s:
            # From what really was in work: a limit far above it would have to fall many times before it binds.
            self.limit = max(self._floor, min(self.limit, max(self._peak, 1)) * _FALL)
        elif self.limit < self.cap:
            self.limit = min(float(self.cap), self.limit * (_RISE if self._bound else _RISE_UNBOUND) + 1.0)
