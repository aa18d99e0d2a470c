"""A parent around one service that starts it again when it ends: what a process manager does where there is none.

Belongs here: the small program that outlives `up`, and the file it leaves its count in. Does not belong here: which services
are kept (`Launch.restart`), ending them (`processes`, through the group that both are in).

It starts the service again however it ended, until it is itself asked to end; after a short life it waits longer each time. It
does not see a service that lives and does nothing. Run by path, with `-I -S`; standard library and `processes` only.
"""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

# First and longest wait before the next start, and the life after which a service counts as sound again.
FIRST_S, LONGEST_S, STEADY_S = 0.5, 30.0, 60.0


class Keeper:
    """Keeps `command` running; `record` is replaced at each change: see `service_state.Kept`."""

    def __init__(self, record: Path, command: list[str]) -> None:
        self._record, self._command = record, command
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self._restarts = 0
        self._last = ""

    def run(self) -> int:
        """Returns the last status of the command once asked to end."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._stop)
        patience = FIRST_S
        while True:
            began = time.monotonic()
            self._child = subprocess.Popen(self._command)
            if self._stopping:  # asked between the check below and the start
                self._child.terminate()
            self._write(self._child.pid, 0.0)
            status = self._child.wait()
            if self._stopping:
                return 0 if status < 0 else status
            patience = FIRST_S if time.monotonic() - began >= STEADY_S else patience
            self._tell(status, patience)
            self._end_the_left_behind()
            if not self._pause(patience):
                return 0
            self._restarts += 1
            patience = min(2 * patience, LONGEST_S)

    def _stop(self, number: int, _: object) -> None:
        self._stopping = True
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()

    def _tell(self, status: int, patience: float) -> None:
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        self._last = f"{how} at {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        sys.stderr.write(f"keeper: {Path(self._command[0]).name} ended with {how}; starting it again in {patience:g} s\n")
        sys.stderr.flush()
        self._write(0, patience)

    def _pause(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not self._stopping and time.monotonic() < until:
            time.sleep(0.05)
        return not self._stopping

    def _end_the_left_behind(self) -> None:
        """Children of the ended service would hold its port."""
        # Run by path, this file is no part of the package: its neighbour is found beside it.
        sys.path.append(str(Path(__file__).resolve().parent))
        import processes  # type: ignore[import-not-found,unused-ignore]

        for pid in processes.group_members(os.getpgrp()):
            if pid != os.getpid():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def _write(self, pid: int, wait_s: float) -> None:
        scratch = self._record.with_suffix(".tmp")
        scratch.write_text(json.dumps({"pid": pid, "restarts": self._restarts, "last_end": self._last, "wait_s": wait_s}))
        scratch.replace(self._record)


if __name__ == "__main__":
    sys.exit(Keeper(Path(sys.argv[1]), sys.argv[2:]).run())
