"""Ends the local profile's process groups when their supervisor is gone, however it went.

Belongs here: the two small programs around every child. `run` starts a child: it makes itself known to the watchdog,
then becomes the command. `watch` follows those names on a pipe and ends the groups when the supervisor died, even by
SIGKILL. A pipe and the parent's number serve Linux and macOS alike; PR_SET_PDEATHSIG would not do: it follows the
*thread* that started the child. Does not belong here: deciding what runs.

Run by path, with `-I -S`, so that starting it costs a few milliseconds; standard library and `processes` only.
"""

import os
import select
import signal
import sys
from pathlib import Path

# The supervisor's last word: leave the children alone, or end those it did not end itself.
DETACH, END = "detach", "end"
_LOOK_EVERY_S = 0.5


def run(registry: int, command: list[str]) -> None:
    """Becomes `command`, after its group is on the watchdog's list: no moment in which it could be orphaned unseen."""
    os.write(registry, f"+{os.getpid()}\n".encode())
    os.set_inheritable(registry, False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A supervisor under nohup ignores them, and a child would inherit that.
        signal.signal(number, signal.SIG_DFL)
    os.execvp(command[0], command)  # noqa: S606  # replacing this process is the point


def watch(registry: int) -> None:
    """Follows the supervisor's words until its last one or its end; then ends the groups that are left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    supervisor = os.getppid()
    groups: list[int] = []
    pending = ""
    while True:
        # Asked before reading: what the supervisor wrote before it died is still read below.
        orphaned = os.getppid() != supervisor
        readable, _, _ = select.select([registry], [], [], _LOOK_EVERY_S)
        received = os.read(registry, 4096).decode() if readable else ""
        *words, pending = (pending + received).split("\n")
        for word in words:
            if word == DETACH:
                return
            if word.startswith("+"):
                groups.append(int(word[1:]))
            elif word.startswith("-") and int(word[1:]) in groups:
                groups.remove(int(word[1:]))
        # A forked child of the supervisor may hold the pipe open after it: then only the parent's number tells.
        if END in words or (readable and not received) or (orphaned and not readable):
            break
    if groups:
        _end(groups)


def _end(groups: list[int]) -> None:
    # Run by path, this file is no part of the package: its neighbour is found beside it.
    sys.path.append(str(Path(__file__).resolve().parent))
    import processes  # type: ignore[import-not-found,unused-ignore]

    processes.end_groups(groups, grace_s=5.0)


if __name__ == "__main__":
    if sys.argv[1] == "watch":
        watch(int(sys.argv[2]))
    else:
        run(int(sys.argv[2]), sys.argv[3:])
