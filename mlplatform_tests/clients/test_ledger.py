"""The ledger keeps every entry once, in order, on real Delta files."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

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
