"""How prediction records lie in a file of the log: frames, each with its length and a checksum.

Belongs here: writing a frame, finding the whole ones in what a file holds. Does not belong here: files.

A frame is `<magic><lines><length><crc><payload>`: three little-endian uint32, the CRC-32 of the two numbers and the payload; the
payload is UTF-8, the model's name and the lines with records, as the stream has them. The magic begins with 0xFF, which UTF-8 never
holds, so nothing inside a payload looks like a frame and reading can go on behind a piece that is damaged.
"""

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlplatform.contracts import record_count

MAGIC = b"\xffMLP"
_HEADER = struct.Struct("<4sIII")
_NUMBERS = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class Frame:
    """Records of one model: lines as the stream has them."""

    model: str
    lines: Sequence[bytes]

    @property
    def records(self) -> int:
        """How many the lines hold."""
        return sum(map(record_count, self.lines))


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes from `start` to `end` that are no whole frame: torn when the process died, or altered since."""

    start: int
    end: int


def encode(frame: Frame) -> bytes:
    """Raises ValueError for a record or a name with a line break in it."""
    payload = b"\n".join([frame.model.encode(), *frame.lines])
    if payload.count(b"\n") != len(frame.lines):
        raise ValueError("a record holds a line break")
    numbers = _NUMBERS.pack(len(frame.lines), len(payload))
    return MAGIC + numbers + struct.pack("<I", zlib.crc32(payload, zlib.crc32(numbers))) + payload


def decode(data: bytes) -> Iterator[Frame | Damage]:
    """The frames of a file in order, and each stretch of it that is none."""
    at, damaged = 0, -1
    while at < len(data):
        found = _frame_at(data, at)
        if found is None:
            damaged = at if damaged < 0 else damaged
            following = data.find(MAGIC, at + 1)
            at = len(data) if following < 0 else following
            continue
        if damaged >= 0:
            yield Damage(damaged, at)
            damaged = -1
        frame, at = found
        yield frame
    if damaged >= 0:
        yield Damage(damaged, len(data))


def _frame_at(data: bytes, at: int) -> tuple[Frame, int] | None:
    """The frame that begins here and where it ends, or None where there is no whole one."""
    if len(data) - at < _HEADER.size:
        return None
    magic, count, length, crc = _HEADER.unpack_from(data, at)
    start, end = at + _HEADER.size, at + _HEADER.size + length
    if magic != MAGIC or end > len(data):
        return None
    payload = data[start:end]
    if zlib.crc32(payload, zlib.crc32(_NUMBERS.pack(count, length))) != crc:
        return None
    model, *lines = payload.split(b"\n")
    return Frame(model.decode(), lines), end
