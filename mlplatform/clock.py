"""The platform's one source of time: the real clock, or the simulated clock of the local profile.

Belongs here: telling the time. Does not belong here: deciding what happens at a time. Rooms get `now` passed in.
"""

import json
import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol


class Clock(Protocol):
    def now(self) -> datetime:
        """The current time, UTC, microseconds."""
        ...


class ClockFileError(ValueError):
    """The file of a simulated clock holds no time; the message says what to do."""


class SystemClock:
    """Wall time."""

    def now(self) -> datetime:
        return datetime.now(UTC)


@dataclass(frozen=True)
class SimulatedClock:
    """A clock kept in a small file shared by all local processes: simulated = anchor + speed * (wall - wall anchor).

    Speed 0 stands still until it is set again. Reading costs one small file read.
    """

    path: Path

    def now(self) -> datetime:
        """Raises ClockFileError where the file is not what `set` writes, OSError where it cannot be read."""
        text = self.path.read_text()
        try:
            state = json.loads(text)
            passed = (time.time() - state["wall"]) * state["speed"]
            return datetime.fromisoformat(state["anchor"]) + timedelta(seconds=passed)
        except (ValueError, TypeError, KeyError) as fault:
            raise ClockFileError(f"{self.path} is no clock: `make down`, remove it, then `make up` begins anew") from fault

    def set(self, to: datetime, speed: float = 0.0) -> None:
        """Puts the clock at `to`. The file is replaced in one step, so a reader never sees half of it."""
        if to.tzinfo is None:
            raise ValueError("the simulated clock takes a time with a zone")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(f".{os.getpid()}.tmp")
        scratch.write_text(json.dumps({"anchor": to.astimezone(UTC).isoformat(), "wall": time.time(), "speed": speed}))
        scratch.replace(self.path)


def clock_from(setting: str) -> Clock:
    """`system`, or the path of a simulated clock's file."""
    return SystemClock() if setting == "system" else SimulatedClock(Path(setting))
