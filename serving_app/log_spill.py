"""Prediction records on disk while their stream is away: one folder a process, and the folders of processes that ended.

Belongs here: files, their bounds, who owns a folder, the order of reading. Does not belong here: when records go to disk or come
back (`prediction_log`), what a file holds (`log_frames`). Everything here blocks: it is called from one thread beside the event loop.

`<root>/<process>/00000001.log, …, 00000007.part`: the `.part` is being written; at `SEGMENT_BYTES` it is synced to the device and
renamed to `.log`. So a killed process loses nothing that was written here; a machine without power may lose the `.part`. A segment
is deleted once its last frame was taken, and more asked for; a process that dies before leaves it to be read once more.

Who owns a folder holds the lock (flock) on its file `lock`, and the kernel lets go of it however the process ends. Folders are made,
taken over and removed under the lock of `<root>/lock`, so no two processes take the same one.
"""

import errno
import fcntl
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from serving_app.log_frames import Damage, Frame, decode, encode

SEGMENT_BYTES = 8 << 20
_LOCK = "lock"

log = structlog.get_logger(__name__)


@dataclass
class _Folder:
    """A folder whose lock is held. `left`: its files that are still to be read, oldest first."""

    path: Path
    lock: int
    left: deque[Path]


@dataclass
class _Segment:
    """A file that is being read; it is the first of its folder's `left` until it is finished."""

    folder: _Folder
    path: Path
    size: int
    pieces: Iterator[Frame | Damage]


@dataclass(frozen=True, slots=True)
class Taken:
    """A frame on its way back. `own`: this process wrote it."""

    frame: Frame
    own: bool


class Spill:
    """Used by one thread at a time. `limit_bytes` bounds what lies in the folders that this process holds, those it took over included."""

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self._root = root
        self._limit = limit_bytes
        self._own: _Folder | None = None
        self._adopted: deque[_Folder] = deque()
        self._file = -1  # the open segment
        self._size = 0
        self._number = 0
        self._records: dict[Path, int] = {}  # in each own segment, those that were taken again left out
        self._reading: _Segment | None = None
        # Read by the event loop, written by the thread: whole numbers, each right by itself.
        self.bytes = 0
        self.damaged = 0  # pieces of files that could not be read
        self.lost = 0  # own records in them

    def append(self, frames: list[Frame]) -> None:
        """Adds frames, all or none. Raises OSError where the disk takes no more, or the limit is reached (errno EDQUOT)."""
        data = b"".join(map(encode, frames))
        if self.bytes + len(data) > self._limit:
            raise OSError(errno.EDQUOT, f"{self._limit} bytes of prediction records lie on disk, as many as may")
        if self._file < 0:
            self._begin()
        try:
            _write(self._file, data)
        except OSError:
            # What was written of it is no frame, but would stand before the next one.
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(data)
        self.bytes += len(data)
        self._records[self._path(".part")] += sum(frame.records for frame in frames)
        if self._size >= SEGMENT_BYTES:
            self._seal()

    def take(self, records: int) -> list[Taken]:
        """The next frames, of one segment, until they hold so many records: of ended processes first, each process's in the order
        they were written. Empty where there are none.

        With it the caller says that those before are safe: a segment is deleted when more is asked for than it has.
        """
        while True:
            if self._reading is None:
                self._reading = self._next_segment()
            if self._reading is None:
                return []
            found: list[Taken] = []
            while sum(taken.frame.records for taken in found) < records and (frame := self._next_frame(self._reading)) is not None:
                found.append(Taken(frame, self._reading.folder is self._own))
            if found:
                return found
            self._finish(self._reading)
            self._reading = None

    def adopt(self) -> None:
        """Takes over the folders of processes that have ended. Without a folder, or a right to it, there are none."""
        if not self._root.is_dir():
            return
        with self._alone():
            for path in sorted(p for p in self._root.iterdir() if p.is_dir() and (self._own is None or p != self._own.path)):
                if (lock := _try_lock(path / _LOCK)) is None:
                    continue
                left = deque(sorted(p for p in path.iterdir() if p.suffix in (".log", ".part")))
                self.bytes += sum(p.stat().st_size for p in left)
                self._adopted.append(_Folder(path, lock, left))
                if left:
                    log.info("prediction_log_adopted", folder=path.name, segments=len(left))

    def close(self) -> None:
        """Leaves the files to the next process."""
        with suppress(OSError):
            self._seal()
        for folder in (*self._adopted, *([self._own] if self._own else [])):
            if not folder.left:
                with suppress(OSError):
                    self._remove(folder)
            else:
                os.close(folder.lock)
        self._adopted.clear()
        self._own = None

    # --- writing ---------------------------------------------------------------------------------------------------

    def _path(self, suffix: str) -> Path:
        assert self._own is not None, "a segment has a folder"
        return self._own.path / f"{self._number:08d}{suffix}"

    def _begin(self) -> None:
        if self._own is None:
            self._root.mkdir(parents=True, exist_ok=True)
            with self._alone():
                # The time orders the folders of ended processes; the lock, not the name, tells whose one is.
                path = self._root / f"{time.time_ns():020d}-{os.getpid()}"
                path.mkdir(mode=0o700)  # records may be about people
                lock = _try_lock(path / _LOCK)
                assert lock is not None, "made and locked while nobody else looks"
                self._own = _Folder(path, lock, deque())
        self._number += 1
        self._file = os.open(self._path(".part"), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._size = 0
        self._records[self._path(".part")] = 0

    def _seal(self) -> None:
        """Ends the open segment: from here on it is read. What it holds is there, synced or not, so an error is told and no more."""
        if self._file < 0 or self._own is None:
            return
        written, sealed = self._path(".part"), self._path(".log")
        try:
            os.fdatasync(self._file)
            written.rename(sealed)
        except OSError as error:
            log.warning("prediction_log_not_synced", segment=str(written), error=str(error))
            sealed = written
        os.close(self._file)
        self._file = -1
        self._records[sealed] = self._records.pop(written)
        self._own.left.append(sealed)

    # --- reading ---------------------------------------------------------------------------------------------------

    def _next_segment(self) -> _Segment | None:
        while self._adopted:
            folder = self._adopted[0]
            if (segment := self._first(folder)) is not None:
                return segment
            self._remove(folder)
            self._adopted.popleft()
        if self._own is None:
            return None
        if not self._own.left:
            self._seal()
        return self._first(self._own)

    def _first(self, folder: _Folder) -> _Segment | None:
        """The folder's oldest segment. One that the disk does not give stays where it is, for somebody to look at."""
        while folder.left:
            path = folder.left[0]
            try:
                data = path.read_bytes()
            except OSError as error:
                log.error("prediction_log_segment_unreadable", segment=str(path), error=str(error))
                self.damaged += 1
                self.lost += self._records.pop(path, 0)
                folder.left.popleft()
                continue
            return _Segment(folder, path, len(data), decode(data))
        return None

    def _next_frame(self, segment: _Segment) -> Frame | None:
        for piece in segment.pieces:
            if isinstance(piece, Frame):
                if segment.path in self._records:
                    self._records[segment.path] -= piece.records
                return piece
            self.damaged += 1
            log.error("prediction_log_damaged", segment=str(segment.path), start=piece.start, end=piece.end, bytes=segment.size)
        return None

    def _finish(self, segment: _Segment) -> None:
        self.lost += self._records.pop(segment.path, 0)
        try:
            segment.path.unlink()
        except OSError as error:
            log.warning("prediction_log_segment_stays", segment=str(segment.path), error=str(error))
        segment.folder.left.popleft()
        self.bytes -= segment.size

    def _remove(self, folder: _Folder) -> None:
        """An empty folder; one with files that could not be read stays, and stays locked as long as this process lives."""
        with suppress(OSError), self._alone():
            if {p.name for p in folder.path.iterdir()} <= {_LOCK}:
                (folder.path / _LOCK).unlink(missing_ok=True)
                folder.path.rmdir()
                os.close(folder.lock)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process makes, takes over or removes a folder meanwhile."""
        file = os.open(self._root / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)


def _try_lock(path: Path) -> int | None:
    """The open file with its lock, or None where another process (or this one) holds it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


def _write(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]
