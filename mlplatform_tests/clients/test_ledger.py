"""The ledger keeps every entry once, in order, on real Delta files."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import polars as pl
import pytest
from deltalake.exceptions import DeltaError

from mlplatform.clients.lake import Lake
from mlplatform.clients.ledger import Ledger
from mlplatform.records import LedgerEntry

AT = datetime(2024, 1, 1, 14, 3, 0, 123456, tzinfo=UTC)
FIRST = LedgerEntry(AT, "m", "promote", "production", 1, None, "ann", "first", "run-1", {"auc": 0.75, "note": "ü", "gone": None})


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(Lake(str(tmp_path)))


def test_an_entry_comes_back_as_it_was_written(ledger: Ledger) -> None:
    assert ledger.append(FIRST)
    assert ledger.entries("m") == (FIRST,)
    assert ledger.current("m") == FIRST


def test_a_model_nobody_deployed_has_no_history(ledger: Ledger) -> None:
    assert ledger.entries("m") == ()
    assert ledger.current("m") is None


def test_an_entry_repeated_under_its_id_is_written_once(ledger: Ledger) -> None:
    assert ledger.append(FIRST, "run-1:0")
    assert not ledger.append(replace(FIRST, reason="again"), "run-1:0")
    assert ledger.append(replace(FIRST, version=2), "run-0:0")  # ids may come in any order
    assert [e.version for e in ledger.entries("m")] == [1, 2]


def test_entries_keep_the_order_they_were_written_in_even_when_times_do_not(ledger: Ledger) -> None:
    for version in range(1, 8):
        ledger.append(replace(FIRST, version=version, at=AT - timedelta(minutes=version)))
    assert [e.version for e in ledger.entries("m")] == list(range(1, 8))


def test_what_serves_is_the_last_move_not_the_last_refusal(ledger: Ledger) -> None:
    ledger.append(FIRST)
    ledger.append(replace(FIRST, action="promote", version=2, previous_version=1))
    ledger.append(replace(FIRST, action="rollback", version=1, previous_version=2))
    ledger.append(replace(FIRST, action="refuse", version=3, previous_version=1))
    current = ledger.current("m")
    assert current is not None
    assert (current.action, current.version) == ("rollback", 1)


def test_models_have_histories_of_their_own(ledger: Ledger) -> None:
    ledger.append(FIRST)
    ledger.append(replace(FIRST, model="other", version=9))
    assert [e.version for e in ledger.entries("m")] == [1]


def test_times_of_any_zone_come_back_as_utc_and_zoneless_ones_are_refused(ledger: Ledger) -> None:
    ledger.append(replace(FIRST, at=AT.astimezone(timezone(timedelta(hours=-5)))))
    assert ledger.entries("m")[0].at == AT
    with pytest.raises(ValueError, match="zone"):
        ledger.append(replace(FIRST, at=AT.replace(tzinfo=None)))


def test_delta_itself_refuses_to_change_or_delete_an_entry(ledger: Ledger) -> None:
    ledger.append(FIRST)
    table = ledger.lake.table(ledger.key("m"))
    with pytest.raises(DeltaError):
        table.delete("version = 1")
    with pytest.raises(DeltaError):
        table.update({"version": "2"})
    assert ledger.entries("m") == (FIRST,)


# --- the chain -------------------------------------------------------------------------------------------------------


def written(ledger: Ledger, count: int) -> None:
    for version in range(1, count + 1):
        ledger.append(replace(FIRST, version=version, previous_version=version - 1 or None, reason=f"entry {version}"))


def forged(ledger: Ledger, tmp_path: Path, change: Callable[[pl.DataFrame], pl.DataFrame]) -> Ledger:
    """A ledger elsewhere that holds what `change` makes of the rows: who rewrites files is not held by `delta.appendOnly`."""
    other = Ledger(Lake(str(tmp_path / "forged")))
    other.lake.replace(other.key("m"), change(ledger.lake.read(ledger.key("m")).sort("sequence")))
    return other


def test_a_ledger_nobody_touched_verifies_and_names_its_head(ledger: Ledger) -> None:
    written(ledger, 3)
    found = ledger.verify("m")
    assert (found.holds, found.entries, found.hashed, found.anchored) == (True, 3, 3, 2)
    assert found.head is not None
    assert ledger.verify("m", [replace(found.head, source="a tag")]).holds
    assert Ledger(Lake(ledger.lake.root)).verify("nobody").holds


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: rows.with_columns(reason=pl.when(pl.col("sequence") == 1).then(pl.lit("x")).otherwise("reason")), "edited"),
        (lambda rows: rows.with_columns(evidence=pl.lit("{}")), "edited"),
        (lambda rows: rows.filter(pl.col("sequence") != 1), "dropped"),
        (lambda rows: rows.with_columns(sequence=pl.Series([0, 2, 1, 3])), "follow"),
        (lambda rows: pl.concat([rows, rows.filter(pl.col("sequence") == 1)]), "follow"),
        (lambda rows: rows.with_columns(previous_hash=pl.lit(None, pl.String), hash=pl.lit(None, pl.String)), "is not there"),
        (lambda rows: rows.filter(pl.col("sequence") < 3), "cut off"),
    ],
)
def test_an_edited_dropped_moved_or_inserted_entry_and_a_cut_end_are_seen(
    ledger: Ledger, tmp_path: Path, change: Callable[[pl.DataFrame], pl.DataFrame], told: str
) -> None:
    written(ledger, 4)
    head = ledger.verify("m").head
    assert head is not None
    found = forged(ledger, tmp_path, change).verify("m", [replace(head, source="the registry")])
    assert not found.holds
    assert any(told in fault for fault in found.faults), found.faults


def test_a_chain_computed_anew_from_the_start_shows_only_against_a_head_kept_elsewhere(ledger: Ledger, tmp_path: Path) -> None:
    written(ledger, 3)
    head = ledger.verify("m").head
    assert head is not None
    other = Ledger(Lake(str(tmp_path / "anew")))
    for entry in ledger.entries("m"):
        other.append(replace(entry, reason="nothing happened"))
    assert other.verify("m").holds
    assert not other.verify("m", [replace(head, source="the registry")]).holds


def test_the_chain_begins_at_entries_written_before_there_was_one_and_vouches_for_them(ledger: Ledger, tmp_path: Path) -> None:
    old = Ledger(Lake(str(tmp_path / "old")))
    written(ledger, 3)
    rows = ledger.lake.read(ledger.key("m")).drop("previous_hash", "hash")
    old.lake.replace(old.key("m"), rows)
    old.append(replace(FIRST, version=4))
    found = old.verify("m")
    assert (found.holds, found.entries, found.hashed) == (True, 4, 1)
    edited = forged(
        old, tmp_path, lambda rows: rows.with_columns(actor=pl.when(pl.col("sequence") == 1).then(pl.lit("x")).otherwise("actor"))
    )
    assert "entry 3 does not follow" in edited.verify("m").faults[0]


_WRITER = """
import sys
from datetime import UTC, datetime
from mlplatform.clients.lake import Lake
from mlplatform.clients.ledger import Ledger
from mlplatform.records import LedgerEntry
ledger = Ledger(Lake(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for number in range(8):
    ledger.append(LedgerEntry(datetime.now(UTC), "m", "promote", "production", number, None, sys.argv[2], "at once"))
"""


def test_processes_that_append_at_once_make_one_chain_with_every_entry(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("ann", "bob", "cy")
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=120)
        assert writer.returncode == 0
    ledger = Ledger(Lake(str(tmp_path)))
    found = ledger.verify("m")
    assert found.faults == ()
    assert [line.sequence for line in ledger.lines("m")] == list(range(24))
    for name in ("ann", "bob", "cy"):
        assert [e.version for e in ledger.entries("m") if e.actor == name] == list(range(8))
