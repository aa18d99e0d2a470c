"""The sensors' decisions, without Dagster."""

import json
from dataclasses import asdict

import pytest

from mlplatform.orchestration.automation.decisions import guard, new_entries, new_outcomes, summary_of
from mlplatform.records import DriftSummary, PerformanceSummary


def test_waiting_entries_ask_for_a_run_with_a_key_of_its_own_each_time():
    first = new_entries({"a": 3, "b": 0}, None)
    again = new_entries({"a": 3, "b": 0}, first.cursor)
    assert first.run
    assert again.run
    assert first.cursor != again.cursor
    assert "3 entries" in first.reason


def test_no_waiting_entry_asks_for_nothing_and_keeps_the_count():
    tick = new_entries({"a": 0, "b": 0}, "7")
    assert not tick.run
    assert tick.cursor == "7"
    assert tick.reason


def test_a_stream_that_cannot_tell_is_run_and_named():
    tick = new_entries({"a": None, "b": 0}, "1")
    assert tick.run
    assert "a cannot tell" in tick.reason


def test_nothing_is_asked_while_an_earlier_run_is_unfinished():
    tick = new_entries({"a": 100}, "4", unfinished=True)
    assert (tick.run, tick.cursor) == (False, "4")
    assert not new_outcomes("5-0", {"x": 1}, "", unfinished=True).run


def test_outcomes_are_asked_for_once_per_state_of_log_and_labels():
    first = new_outcomes("5-0", {"arrivals": 3}, None)
    assert first.run
    assert not new_outcomes("5-0", {"arrivals": 3}, first.cursor).run
    assert new_outcomes("6-0", {"arrivals": 3}, first.cursor).run
    assert new_outcomes("5-0", {"arrivals": 4}, first.cursor).run


def test_outcomes_are_not_asked_for_before_the_first_prediction():
    tick = new_outcomes(None, {"arrivals": 3}, None)
    assert not tick.run
    assert "no prediction" in tick.reason


def test_an_unfinished_run_does_not_swallow_what_came_meanwhile():
    waiting = new_outcomes("5-0", {"arrivals": 3}, "before", unfinished=True)
    assert new_outcomes("5-0", {"arrivals": 3}, waiting.cursor).run


@pytest.mark.parametrize("text", [None])
def test_an_absent_summary_is_none(text):
    assert summary_of(DriftSummary, text) is None


def test_a_stored_summary_comes_back_equal():
    drift = DriftSummary("m", "data_drift", 10, 5, 1, 3, {"x": 0.5}, 0.1, "psi", ("y",))
    assert summary_of(DriftSummary, json.dumps(asdict(drift))) == drift


def test_a_summary_of_another_version_is_still_read():
    kept = asdict(PerformanceSummary("m", ("a", "b"), 3, 2, 1, {}))
    del kept["by_day"]
    found = summary_of(PerformanceSummary, json.dumps({**kept, "unknown_to_us": 1}))
    assert found is not None
    assert (found.outcomes, found.by_day) == (2, ())


def test_the_guard_puts_back_at_once_and_records_what_it_sees_twice():
    assert guard(["wrong"], [], [], None).act
    first = guard([], ["late"], [], None)
    assert not first.act
    assert guard([], ["late"], [], first.cursor).act
    assert not guard([], ["other"], [], first.cursor).act
    assert guard([], [], [], first.cursor).reason == "registry and ledger agree"


def test_an_altered_ledger_alerts_once_and_again_when_more_is_altered():
    first = guard([], [], ["entry 1 edited"], "not json")
    again = guard([], [], ["entry 1 edited"], first.cursor)
    more = guard([], [], ["entry 1 edited", "entry 2 edited"], again.cursor)
    assert (first.alert, again.alert, more.alert) == (True, False, True)
