"""Records on disk: in order, within bounds, each taken over by exactly one process, whatever the disk does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving_app import log_spill
from serving_app.log_frames import Frame, encode
from serving_app.log_spill import Spill

LARGE = 1 << 30
REPO = Path(__file__).parents[2]


def frame(number: int, records: int = 3, width: int = 20) -> Frame:
    return Frame("m", [f'{{"n":{number},"i":{i},"x":"{"x" * width}"}}'.encode() for i in range(records)])


def files(root: Path) -> list[str]:
    return sorted(p.name for p in root.rglob("*") if p.is_file())


def all_of(spill: Spill) -> list[tuple[Frame, bool]]:
    found = []
    while taken := spill.take(5):
        found += [(one.frame, one.own) for one in taken]
    return found


def test_frames_come_back_in_order_and_then_no_file_is_left(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(log_spill, "SEGMENT_BYTES", 1000)
    spill = Spill(tmp_path / "spill", LARGE)
    for number in range(30):
        spill.append([frame(number), frame(number + 100)])
    assert sum(name.endswith(".log") for name in files(tmp_path)) > 3
    assert spill.bytes == sum(p.stat().st_size for p in tmp_path.rglob("*.*"))
    assert all_of(spill) == [(frame(n), True) for number in range(30) for n in (number, number + 100)]
    assert files(tmp_path) == ["lock", "lock"]
    assert spill.bytes == spill.damaged == spill.lost == 0
    spill.close()
    assert files(tmp_path) == ["lock"]


def test_more_may_be_written_while_what_is_there_is_read(tmp_path) -> None:
    spill = Spill(tmp_path, LARGE)
    spill.append([frame(1), frame(2)])
    [first] = spill.take(1)
    spill.append([frame(3)])
    assert [first.frame, *(f for f, _ in all_of(spill))] == [frame(1), frame(2), frame(3)]


def test_beyond_its_bytes_it_takes_nothing_until_some_are_gone(tmp_path) -> None:
    size = len(encode(frame(1)))
    spill = Spill(tmp_path, 2 * size)
    spill.append([frame(1)])
    spill.append([frame(2)])
    with pytest.raises(OSError, match="as many as may"):
        spill.append([frame(3)])
    assert spill.bytes == 2 * size
    assert [f for f, _ in all_of(spill)] == [frame(1), frame(2)]
    spill.append([frame(3)])


def test_the_folder_of_a_process_that_lives_is_left_alone_and_that_of_one_that_ended_taken_by_one(tmp_path) -> None:
    first, second, third = (Spill(tmp_path, LARGE) for _ in range(3))
    first.append([frame(1)])
    second.adopt()
    assert second.take(1) == []
    first.close()
    second.adopt()
    third.adopt()
    second.adopt()
    assert all_of(second) == [(frame(1), False)]
    assert third.take(1) == []
    assert files(tmp_path) == ["lock"]


def test_a_segment_stays_until_more_is_asked_for_than_it_has(tmp_path) -> None:
    spill = Spill(tmp_path, LARGE)
    spill.append([frame(1), frame(2)])
    assert len(spill.take(100)) == 2
    assert len(list(tmp_path.rglob("*.log"))) == 1
    assert spill.take(100) == []
    assert not list(tmp_path.rglob("*.log"))


def test_what_was_read_in_part_is_read_again_by_the_next(tmp_path) -> None:
    first, second = Spill(tmp_path, LARGE), Spill(tmp_path, LARGE)
    first.append([frame(1), frame(2)])
    assert len(first.take(1)) == 1
    first.close()
    second.adopt()
    assert [f for f, _ in all_of(second)] == [frame(1), frame(2)]


def test_many_processes_at_once_take_each_folder_once(tmp_path) -> None:
    code = """
import sys
from pathlib import Path
from serving_app.log_spill import Spill
spill = Spill(Path(sys.argv[1]), 1 << 30)
spill.adopt()
while taken := spill.take(1):
    for one in taken:
        print(one.frame.lines[0].decode())
spill.close()
"""
    for number in range(20):
        ended = Spill(tmp_path, LARGE)
        ended.append([frame(number, records=1)])
        ended.close()
    env = os.environ | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) for _ in range(4)]
    taken = [line for process in processes for line in process.communicate(timeout=60)[0].splitlines() if line.startswith("{")]
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(taken) == sorted(frame(n, records=1).lines[0].decode() for n in range(20))
    assert files(tmp_path) == ["lock"]


def test_an_altered_segment_loses_the_records_in_it_and_says_how_many(tmp_path) -> None:
    spill = Spill(tmp_path, LARGE)
    spill.append([frame(1), frame(2, records=5), frame(3)])
    [segment] = tmp_path.rglob("*.part")
    raw = bytearray(segment.read_bytes())
    raw[len(encode(frame(1))) + 40] ^= 1
    segment.write_bytes(raw)
    assert [f for f, _ in all_of(spill)] == [frame(1), frame(3)]
    assert (spill.damaged, spill.lost, spill.bytes) == (1, 5, 0)


def test_a_segment_that_cannot_be_read_stays_and_does_not_hold_up_the_others(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(log_spill, "SEGMENT_BYTES", 1)
    first, second = Spill(tmp_path, LARGE), Spill(tmp_path, LARGE)
    first.append([frame(1)])
    first.append([frame(2)])
    first.close()
    [bad, _] = sorted(tmp_path.rglob("*.log"))
    bad.unlink()
    bad.mkdir()  # reading it is an error for root, too
    second.adopt()
    assert [f for f, _ in all_of(second)] == [frame(2)]
    assert second.damaged == 1
    assert bad.is_dir()


def test_a_disk_that_is_full_in_the_middle_of_a_batch_keeps_the_batches_before_and_nothing_of_it(tmp_path) -> None:
    code = """
import resource, sys
from pathlib import Path
from serving_app.log_frames import Frame
from serving_app.log_spill import Spill
spill = Spill(Path(sys.argv[1]), 1 << 30)
frame = Frame("m", [b"x" * 99])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
written = 0
try:
    while True:
        spill.append([frame, frame])
        written += 1
except OSError as error:
    print(written, error.errno, spill.bytes)
"""
    env = os.environ | {"PYTHONPATH": str(REPO)}
    told = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=env, check=True)
    written, number, size = map(int, told.stdout.split())
    assert written > 1
    assert os.strerror(number) == "File too large"  # the limit on a file's size stands for the end of the disk
    [segment] = tmp_path.rglob("*.part")
    assert segment.stat().st_size == size
    spill = Spill(tmp_path, LARGE)
    spill.adopt()
    assert len(all_of(spill)) == 2 * written
    assert spill.damaged == 0


def test_where_no_folder_can_be_made_it_says_so_and_nothing_is_adopted(tmp_path) -> None:
    root = tmp_path / "spill"
    root.write_text("a file")
    spill = Spill(root, LARGE)
    with pytest.raises(OSError, match="exists"):
        spill.append([frame(1)])
    spill.adopt()
    assert spill.take(1) == []
    spill.close()
