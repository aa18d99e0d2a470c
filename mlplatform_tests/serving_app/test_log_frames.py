"""Frames of the log's files: a torn or altered one is found, never misread, and hides none behind it."""

import pytest

from serving_app.log_frames import Damage, Frame, decode, encode

FRAMES = [Frame("m", [b'{"a":1}', b'{"b":"\xc3\xa9"}']), Frame("other", [b"{}"]), Frame("m", [])]
DATA = b"".join(map(encode, FRAMES))


def test_what_was_written_is_read() -> None:
    assert list(decode(DATA)) == FRAMES
    assert list(decode(b"")) == []


def test_a_tail_torn_at_any_byte_leaves_the_frames_before_it_and_nothing_else() -> None:
    ends = [0]
    for frame in FRAMES:
        ends.append(ends[-1] + len(encode(frame)))
    for cut in range(len(DATA)):
        whole = sum(end <= cut for end in ends) - 1
        torn = [] if cut in ends else [Damage(ends[whole], cut)]
        assert list(decode(DATA[:cut])) == FRAMES[:whole] + torn


def test_any_byte_altered_costs_its_frame_alone() -> None:
    first = len(encode(FRAMES[0]))
    for at in range(first):
        altered = DATA[:at] + bytes([DATA[at] ^ 0x55]) + DATA[at + 1 :]
        assert list(decode(altered)) == [Damage(0, first), *FRAMES[1:]]


def test_zeros_that_a_machine_without_power_left_are_damage() -> None:
    zeros = bytes(4096)
    assert list(decode(DATA + zeros)) == [*FRAMES, Damage(len(DATA), len(DATA) + 4096)]


def test_a_record_of_two_lines_is_not_written() -> None:
    with pytest.raises(ValueError, match="line break"):
        encode(Frame("m", [b"{\n}"]))
