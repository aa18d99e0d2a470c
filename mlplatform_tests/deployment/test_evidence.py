"""From logged predictions and counters to looks, and from a ledger to who is on trial."""

from datetime import UTC, date, datetime, timedelta
from typing import Any

import polars as pl
import pytest

from mlplatform.contracts import CANARY, PRODUCTION, CanaryRule, TrafficRules
from mlplatform.deployment.evidence import COUNTERS, Trial, looks, on_trial, requests_since, shadow_pairs
from mlplatform.records import LedgerEntry
from mlplatform.specs import ModelSpec, Split

T0 = datetime(2013, 9, 1, tzinfo=UTC)
WINDOW = timedelta(minutes=5)
NOW = T0 + timedelta(hours=1)
TRIAL = Trial(2, 1, T0, WINDOW)


def spec(**changes: Any) -> ModelSpec:
    days = [date(2013, month, 1) for month in (1, 2, 3, 4)]
    split = Split(train_start=days[0], validate_start=days[1], test_start=days[2], end=days[3])
    given: dict[str, Any] = {"description": "x", "feature_service": "s", "inputs": {}, "rows": lambda _: pl.DataFrame(), "row_key": ("id",)}
    return ModelSpec(name="m", request_fields=(), split=split, **(given | changes))


def row(minute: float, variant: str, version: int, prediction: float, label: float | None = None, known: float = 0.0, **more: Any) -> Any:
    return {
        "request_id": f"{variant}{minute}",
        "input_index": 0,
        "requested_at": T0 + timedelta(minutes=minute),
        "variant": variant,
        "version": version,
        "prediction": prediction,
        "latency_ms": 3.0,
        "state": "pending" if label is None else "known",
        "label": label,
        "label_known_at": None if label is None else T0 + timedelta(minutes=known),
    } | more


def counters(*rows: tuple[float, float, str, int, int, int]) -> pl.DataFrame:
    names = ("at", "process", "variant", "version", "requests", "errors")
    made = [dict(zip(names, (T0 + timedelta(minutes=minute), *rest), strict=True)) for minute, *rest in rows]
    return pl.DataFrame(made, schema=COUNTERS)


def test_answers_count_when_they_were_asked_and_labels_when_they_became_known() -> None:
    outcomes = pl.DataFrame(
        [
            row(-1, "canary", 2, 0.9),  # before the trial
            row(1, "canary", 2, 0.2, 1.0, known=12),
            row(2, "champion", 1, 0.4, 0.0, known=3),
            row(3, "champion", 7, 0.9),  # of another version
            row(6, "canary", 2, 0.6),
            row(7, "canary", 2, 0.5, 1.0, known=-60),  # asked about what is over
        ]
    )
    found = looks(spec(), TRIAL, outcomes, counters(), NOW)
    assert [(look.until - T0) / WINDOW for look in found] == [1, 1, 2, 2, 3]
    answers = [(float(x.canary.predictions.total), float(x.champion.predictions.total)) for x in found]
    assert answers == [(0.2, 0.4), (0, 0), (1.1, 0), (0, 0), (0, 0)]
    assert [float(x.champion.losses.total) for x in found] == pytest.approx([0, 0.16, 0, 0, 0])
    assert [float(x.canary.losses.total) for x in found] == pytest.approx([0, 0, 0, 0.25, 0.64])
    assert float(found[4].canary.residuals.total) == pytest.approx((1 + 1.0 - 0.2) / 2)
    assert requests_since(TRIAL, outcomes, T0 + timedelta(minutes=2)) == 2


def test_quantiles_are_judged_by_pinball_loss_as_a_share_of_the_range() -> None:
    model = spec(task="quantiles", quantiles=(0.1, 0.5, 0.9), label_range=(-60.0, 300.0), trainer="torch_tabular")
    outcomes = pl.DataFrame([row(1, "canary", 2, 10.0, 40.0, known=2, quantiles=[0.0, 10.0, 50.0])])
    (_, labelled) = looks(model, TRIAL, outcomes, counters(), NOW)
    pinball = (0.1 * 40 + 0.5 * 30 + 0.1 * 10) / 3
    assert float(labelled.canary.losses.total) == pytest.approx(pinball / 360)


def errors(*rows: tuple[float, float, str, int, int, int]) -> list[tuple[int, int, int, int]]:
    """(requests, errors) of the canary, then of the champion, in each look."""
    found = looks(spec(), TRIAL, pl.DataFrame([row(-1, "canary", 2, 0.1, 1.0)]), counters(*rows), NOW)
    return [(x.canary.requests, x.canary.errors, x.champion.requests, x.champion.errors) for x in found]


def test_counters_are_differences_from_one_reading_to_the_next() -> None:
    assert errors(
        (-1, 1.0, "canary", 2, 50, 5),
        (-1, 1.0, "champion", 1, 400, 9),
        (5, 1.0, "canary", 2, 80, 6),
        (5, 1.0, "champion", 1, 500, 9),
        (10, 1.0, "canary", 2, 90, 7),
        (10, 1.0, "champion", 1, 700, 11),
    ) == [(30, 1, 100, 0), (10, 1, 200, 2)]


def test_what_a_process_counted_before_it_was_first_read_is_no_evidence() -> None:
    """It may be of yesterday's outage, or of an earlier trial of the same version."""
    first = [(5, 1.0, "", 0, 0, 0), (5, 1.0, "champion", 1, 90_000, 4_000), (5, 1.0, "canary", 2, 300, 300)]
    assert errors(*first) == [(0, 0, 0, 0)]
    assert errors(*first, (10, 1.0, "champion", 1, 90_100, 4_000), (10, 1.0, "canary", 2, 320, 301))[1:] == [(20, 1, 100, 0)]
    restarted = [(10, 9.0, "", 0, 0, 0), (10, 9.0, "canary", 2, 10, 1)]
    assert errors(*first, *restarted)[1:] == [(0, 0, 0, 0)]


def test_a_version_that_a_known_process_never_counted_begins_with_nothing() -> None:
    assert errors((5, 1.0, "", 0, 0, 0), (10, 1.0, "", 0, 0, 0), (10, 1.0, "canary", 2, 40, 2), (10, 1.0, "champion", 1, 60, 1)) == [
        (0, 0, 0, 0),
        (40, 2, 60, 1),
    ]


def test_a_window_that_is_not_over_is_not_looked_at() -> None:
    outcomes = pl.DataFrame([row(1, "canary", 2, 0.2, 1.0, known=6), row(7, "canary", 2, 0.3, 1.0, known=40)])
    ends = [look.until - T0 for look in looks(spec(), TRIAL, outcomes, counters(), T0 + timedelta(minutes=9))]
    assert ends == [WINDOW]


def entry(hour: int, action: str, alias: str, version: int, weight: float | None = None) -> LedgerEntry:
    rules = {} if weight is None else {"rules": TrafficRules(canary=CanaryRule(weight=weight)).canonical_json(), "before": ""}
    return LedgerEntry(T0 + timedelta(hours=hour), "m", action, alias, version, None, "tom", "because", "", rules)


def test_who_is_on_trial_follows_from_the_ledger() -> None:
    serves = entry(0, "promote", PRODUCTION, 1)
    begun = [serves, entry(1, "canary", CANARY, 2), entry(2, "traffic", CANARY, 2, 1), entry(5, "traffic", CANARY, 2, 5)]
    assert on_trial([serves], WINDOW) is None
    assert on_trial(begun[:2], WINDOW) is None
    found = on_trial(begun, WINDOW)
    assert found is not None
    trial, progress = found
    assert (trial.canary, trial.champion, trial.began) == (2, 1, T0 + timedelta(hours=2))
    assert (progress.percent, progress.since, progress.began) == (5, T0 + timedelta(hours=5), T0 + timedelta(hours=2))
    assert on_trial([*begun, entry(6, "traffic", CANARY, 2, 0)], WINDOW) is None


def test_another_champion_begins_another_trial() -> None:
    begun = [entry(0, "promote", PRODUCTION, 1), entry(1, "canary", CANARY, 2), entry(2, "traffic", CANARY, 2, 5)]
    found = on_trial([*begun, entry(4, "promote", PRODUCTION, 3)], WINDOW)
    assert found is not None
    assert (found[0].champion, found[0].began) == (3, T0 + timedelta(hours=4))


def test_a_shadow_is_paired_with_whoever_answered_the_same_input() -> None:
    rows = [
        row(1, "champion", 1, 0.5, 1.0, request_id="a", city="x"),
        row(1, "shadow", 2, 0.7, request_id="a", city="x"),
        row(2, "champion", 1, 0.1, request_id="b", city="y"),  # not copied
        row(3, "shadow", 9, 0.9, request_id="b", city="y"),  # of another version
    ]
    found = shadow_pairs(spec(), 2, pl.DataFrame(rows), {"city": "city", "gone": "gone"})
    assert (found.shadow_predictions.tolist(), found.champion_predictions.tolist()) == ([0.7], [0.5])
    assert found.shadow_losses == pytest.approx([0.09])
    assert found.champion_losses == pytest.approx([0.25])
    assert found.slices == {"city": ["x"]}
