"""The history can be drawn from its first day on."""

from datetime import UTC, datetime, timedelta

import pytest

from mlplatform.deployment.timeline import timeline
from mlplatform.figures import markdown
from mlplatform.records import LedgerEntry

DAY = timedelta(days=1)
START = datetime(2024, 1, 1, tzinfo=UTC)
HISTORY = [
    LedgerEntry(START, "m", "promote", "production", 1, None, "ann", "first"),
    LedgerEntry(START + DAY, "m", "refuse", "production", 2, 1, "ann", "leak"),
    LedgerEntry(START + 2 * DAY, "m", "promote", "production", 3, 1, "ann", "better"),
    LedgerEntry(START + 3 * DAY, "m", "rollback", "production", 1, 3, "ann", "worse"),
]


@pytest.mark.parametrize("n", range(5))
def test_any_beginning_of_a_history_is_drawn_small(n: int) -> None:
    picture = timeline(HISTORY[:n], START + 4 * DAY)
    assert picture.startswith(b"\x89PNG")
    assert len(markdown(picture, "history")) < 80_000


def test_entries_that_move_nothing_are_left_out() -> None:
    passed = LedgerEntry(START, "m", "pass", "", 1, None, "gates", "every blocking gate passed")
    assert timeline([passed], START) == timeline([], START)


def test_a_history_of_refusals_only_is_drawn() -> None:
    assert timeline(HISTORY[1:2], START).startswith(b"\x89PNG")
