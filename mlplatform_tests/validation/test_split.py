"""The split against a slow oracle that looks at one row at a time, and the cases a newcomer would ask about."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplatform.specs import Column, Contract, FileReader, Reference, RowRule, SourceSpec
from mlplatform.validation.conform import SchemaError
from mlplatform.validation.rules import MissingReferenceError, rules_of
from mlplatform.validation.split import SplitResult, split

START = datetime(2024, 3, 1, tzinfo=UTC)
READER = FileReader(connection="files", path="x.parquet")
SCHEMA = {
    "site": pl.String(),
    "at": pl.Datetime("us", "UTC"),
    "level": pl.Float64(),
    "count": pl.Int64(),
    "state": pl.String(),
    "code": pl.String(),
    "received_at": pl.Datetime("us", "UTC"),
    "payload": pl.String(),
}
CONTRACT = Contract(
    columns=(
        Column(name="site", dtype="string"),
        Column(name="at", dtype="timestamp"),
        Column(name="level", dtype="float", nullable=True, minimum=0, maximum=10),
        Column(name="count", dtype="int", nullable=True),
        Column(name="state", dtype="string", nullable=True, allowed=("on", "off")),
        Column(name="code", dtype="string", nullable=True, pattern="^[a-c]$"),
    ),
    key=("site", "at"),
    references=(
        Reference(columns=("code",), source="codes", to=("id",), on_missing="quarantine"),
        Reference(columns=("state",), source="states", to=("name",), null_is_missing=True),
    ),
    rules=(
        RowRule(name="on_and_empty", description="on at level 0", broken=lambda: (pl.col("state") == "on") & (pl.col("level") == 0)),
        # Looks at the neighbours: a count far above the mean of its site.
        RowRule(
            name="count_far_above_site",
            description="far above the site's mean",
            broken=lambda: (
                pl.col("count") * pl.col("count").count().over("site")
                > pl.col("count").sum().over("site") + 4 * pl.col("count").count().over("site")
            ),
        ),
        RowRule(name="state_unknown", description="no state", broken=lambda: pl.col("state").is_null(), on_broken="warn"),
    ),
    max_quarantine_share=1,
)
SPEC = SourceSpec(name="gauges", description="Gauges", reader=READER, contract=CONTRACT, time_column="at")
REFERENCES = {"codes": pl.DataFrame({"id": ["a", "b", "x"]}), "states": pl.DataFrame({"name": ["on", "off", "odd"]})}
COLUMNS = [c.name for c in CONTRACT.columns]


# --- the oracle ---------------------------------------------------------------------------------------------------


@dataclass
class Expected:
    validated: list[int]
    quarantined: dict[int, list[str]]
    redelivered: int


def same(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple("nan" if isinstance(v, float) and math.isnan(v) else v for v in (*(row[c] for c in COLUMNS), row["payload"]))


def value_rules(row: dict[str, Any]) -> list[str]:
    broken = [f"null:{c}" for c in ("site", "at") if row[c] is None]
    if row["level"] is not None and not 0 <= row["level"] <= 10:  # a NaN is not between any two numbers
        broken.append("range:level")
    if row["state"] is not None and row["state"] not in ("on", "off"):
        broken.append("allowed:state")
    if row["code"] is not None and row["code"] not in ("a", "b", "c"):
        broken.append("pattern:code")
    if row["code"] is not None and row["code"] not in ("a", "b", "x"):
        broken.append("reference:codes")
    if row["state"] == "on" and row["level"] == 0:
        broken.append("on_and_empty")
    if row["state"] not in ("on", "off", "odd"):
        broken.append("reference:states")
    if row["state"] is None:
        broken.append("state_unknown")
    return broken


def far_above(row: dict[str, Any], around: Sequence[dict[str, Any]]) -> bool:
    counts = [r["count"] for r in around if r["site"] == row["site"] and r["count"] is not None]
    return row["count"] is not None and row["count"] * len(counts) > sum(counts) + 4 * len(counts)


def key_of(row: dict[str, Any]) -> tuple[Any, Any] | None:
    return None if row["site"] is None or row["at"] is None else (row["site"], row["at"])


WARNINGS = {"reference:states", "state_unknown"}


def oracle(rows: list[dict[str, Any]], context: list[dict[str, Any]]) -> Expected:
    first: dict[tuple[Any, ...], int] = {}
    for i in sorted(range(len(rows)), key=lambda i: (rows[i]["received_at"], i)):
        first.setdefault(same(rows[i]), i)
    fresh = sorted(first.values())
    readable = [i for i in fresh if rows[i]["payload"] is None]
    around = {key_of(r): r for r in context if key_of(r) not in {key_of(rows[i]) for i in readable}}

    broken = {i: value_rules(rows[i]) for i in readable}
    everyone = [rows[i] for i in readable] + list(around.values())
    far = {i: far_above(rows[i], everyone) for i in readable}
    losers = set()
    for i in readable:
        rivals = [j for j in readable if key_of(rows[i]) is not None and key_of(rows[j]) == key_of(rows[i])]
        best = max(rivals, default=i, key=lambda j: (not (set(broken[j]) - WARNINGS) and not far[j], rows[j]["received_at"], j))
        if best != i:
            losers.add(i)
    remaining = [rows[i] for i in readable if i not in losers] + list(around.values())
    for i in readable:
        if far[i] if i in losers else far_above(rows[i], remaining):
            broken[i].append("count_far_above_site")
        if i in losers:
            broken[i].append("duplicate_key")
    quarantined = {i: names for i, names in broken.items() if set(names) - WARNINGS}
    quarantined |= {i: ["unreadable"] for i in fresh if rows[i]["payload"] is not None}
    return Expected([i for i in readable if i not in quarantined], quarantined, len(rows) - len(fresh))


# --- the property -------------------------------------------------------------------------------------------------

moments = st.integers(0, 4).map(lambda h: START + timedelta(hours=h))
row = st.fixed_dictionaries(
    {
        "site": st.sampled_from(["n", "s", None]),
        "at": st.one_of(moments, st.none()),
        "level": st.sampled_from([0.0, 5.0, 10.0, 10.5, -1.0, math.nan, math.inf, None]),
        "count": st.sampled_from([0, 1, 2, 30, None]),
        "state": st.sampled_from(["on", "off", "odd", None]),
        "code": st.sampled_from(["a", "b", "c", "x", "aa", None]),
        "received_at": st.integers(0, 3).map(lambda m: START + timedelta(days=1, minutes=m)),
        "payload": st.sampled_from([None, None, None, None, None, "{broken", "also broken"]),
    }
)
sound_row = st.fixed_dictionaries(
    {
        "site": st.sampled_from(["n", "s"]),
        "at": moments,
        "level": st.just(5.0),
        "count": st.sampled_from([0, 1, 30]),
        "state": st.just("on"),
        "code": st.just("a"),
        "received_at": st.just(START),
        "payload": st.none(),
    }
)


@st.composite
def deliveries(draw: st.DrawFn) -> list[dict[str, Any]]:
    rows = draw(st.lists(st.one_of(row, sound_row), max_size=25))
    again = draw(st.lists(st.sampled_from(rows), max_size=8)) if rows else []
    late = [r | {"received_at": START + timedelta(days=2)} for r in again]
    return draw(st.permutations(rows + late))


@settings(max_examples=150, deadline=None)
@given(deliveries(), st.lists(sound_row, max_size=5))
def test_the_split_agrees_with_an_oracle_that_looks_at_one_row_at_a_time(rows: list[dict[str, Any]], context: list[dict[str, Any]]) -> None:
    result = split(pl.DataFrame(rows, schema=SCHEMA), SPEC, REFERENCES, pl.DataFrame(context, schema=SCHEMA))
    expected = oracle(rows, context)

    summary = result.summary
    assert summary.rows_in == len(rows) == summary.validated + summary.quarantined + summary.redelivered
    assert (summary.validated, summary.quarantined) == (result.validated.height, result.quarantined.height)
    assert summary.redelivered == expected.redelivered
    assert [same(r | {"payload": None}) for r in result.validated.to_dicts()] == [same(rows[i]) for i in expected.validated]
    found = [(same(r), set(r["broken_rules"])) for r in result.quarantined.to_dicts()]
    assert found == [(same(rows[i]), set(names)) for i, names in sorted(expected.quarantined.items())]
    told = [name for names in expected.quarantined.values() for name in names if name not in WARNINGS]
    assert dict(summary.broken) == {name: told.count(name) for name in set(told)}


# --- single cases -------------------------------------------------------------------------------------------------


def reading(**values: Any) -> dict[str, Any]:
    sound = {"site": "n", "at": START, "level": 5.0, "count": 1, "state": "on", "code": "a", "received_at": START, "payload": None}
    return sound | values


def run(*rows: dict[str, Any], context: Sequence[dict[str, Any]] | None = None) -> SplitResult:
    around = None if context is None else pl.DataFrame(context, schema=SCHEMA)
    return split(pl.DataFrame(rows, schema=SCHEMA), SPEC, REFERENCES, around)


def test_every_broken_rule_is_named_with_quarantining_rules_first() -> None:
    result = run(reading(level=99.0, code="q", state=None))
    assert result.quarantined["broken_rules"].to_list() == [
        ["range:level", "pattern:code", "reference:codes", "reference:states", "state_unknown"]
    ]
    assert result.summary.warned == {"reference:states": 1, "state_unknown": 1}


def test_a_warning_alone_leaves_the_row_in_place() -> None:
    result = run(reading(state=None))
    assert result.validated.height == 1
    assert result.summary.warned == {"reference:states": 1, "state_unknown": 1}


@pytest.mark.parametrize("level", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_out_of_range(level: float) -> None:
    assert run(reading(level=level)).summary.broken == {"range:level": 1}


def test_an_exact_repeat_is_dropped_and_the_first_arrival_kept() -> None:
    later = START + timedelta(hours=3)
    result = run(reading(received_at=later), reading())
    assert result.summary.redelivered == 1
    assert result.validated["received_at"].to_list() == [START]


def test_a_correction_wins_over_what_it_corrects() -> None:
    result = run(reading(level=6.0, received_at=START + timedelta(hours=1)), reading(level=5.0))
    assert result.validated["level"].to_list() == [6.0]
    assert result.quarantined.select("level", "broken_rules").to_dicts() == [{"level": 5.0, "broken_rules": ["duplicate_key"]}]


def test_a_damaged_correction_does_not_hide_the_sound_row() -> None:
    result = run(reading(level=5.0), reading(level=99.0, received_at=START + timedelta(hours=1)))
    assert result.validated["level"].to_list() == [5.0]
    assert result.quarantined["broken_rules"].to_list() == [["range:level", "duplicate_key"]]


def test_a_late_redelivery_of_the_old_version_does_not_undo_a_correction() -> None:
    hour = timedelta(hours=1)
    result = run(reading(level=5.0), reading(level=6.0, received_at=START + hour), reading(level=5.0, received_at=START + 2 * hour))
    assert result.validated["level"].to_list() == [6.0]
    assert result.summary.redelivered == 1


def test_rows_without_a_whole_key_are_nobodys_duplicate() -> None:
    result = run(reading(site=None, level=1.0), reading(site=None, level=2.0))
    assert [set(r) for r in result.quarantined["broken_rules"]] == [{"null:site"}] * 2


def test_neighbours_from_the_context_are_seen_but_not_put_out() -> None:
    around = [reading(at=START - timedelta(hours=h), count=1) for h in (1, 2, 3)]
    alone, with_context = run(reading(count=30)), run(reading(count=30), context=around)
    assert alone.summary.broken == {}
    assert with_context.summary.broken == {"count_far_above_site": 1}
    assert with_context.summary.rows_in == 1


def test_a_replaced_version_is_nobodys_neighbour() -> None:
    wrong = [reading(count=0, code="b", received_at=START - timedelta(minutes=m), level=1.0 + m) for m in range(1, 9)]
    result = run(*wrong, reading(count=2), reading(count=6, at=START + timedelta(hours=1)))
    # With the eight old zeros beside it the 6 would stand out; the only neighbour left is the 2.
    assert result.validated["count"].to_list() == [2, 6]


def test_an_unreadable_entry_is_set_aside_with_its_text_on_the_day_it_came() -> None:
    empty = dict.fromkeys(COLUMNS)
    result = run(empty | {"received_at": START + timedelta(days=4), "payload": "{oops"})
    assert result.quarantined.select("event_date", "broken_rules", "payload").to_dicts() == [
        {"event_date": date(2024, 3, 5), "broken_rules": ["unreadable"], "payload": "{oops"}
    ]


def test_the_outcome_has_the_same_schema_with_and_without_rows() -> None:
    some, none = run(reading(), reading(at=START + timedelta(hours=1), level=-1.0)), run()
    assert some.validated.schema == none.validated.schema
    assert some.quarantined.schema == none.quarantined.schema
    assert none.validated.columns == [*COLUMNS, "received_at", "event_date"]
    assert none.quarantined.columns == [*COLUMNS, "received_at", "event_date", "broken_rules", "payload"]


def test_an_unpartitioned_source_gets_no_day() -> None:
    spec = SPEC.model_copy(update={"time_column": None})
    assert "event_date" not in split(pl.DataFrame([reading()], schema=SCHEMA), spec, REFERENCES).validated.columns


def test_a_contract_without_key_or_rules_takes_every_row() -> None:
    contract = Contract(columns=(Column(name="note", dtype="string", nullable=True),), key=())
    spec = SourceSpec(name="notes", description="Notes", reader=READER, contract=contract)
    rows = pl.DataFrame({"note": ["a", "a", None], "received_at": [START] * 3}, schema_overrides={"received_at": pl.Datetime("us", "UTC")})
    assert split(rows, spec, {}).summary.validated == 3


def test_a_missing_column_fails_and_names_it() -> None:
    with pytest.raises(SchemaError, match="missing: level, code"):
        split(pl.DataFrame([reading()], schema=SCHEMA).drop("level", "code"), SPEC, REFERENCES)


def test_a_column_of_another_type_fails_and_names_it() -> None:
    with pytest.raises(SchemaError, match="level is String, declared float"):
        split(pl.DataFrame([reading()], schema=SCHEMA).cast({"level": pl.String}), SPEC, REFERENCES)


def test_whole_numbers_do_for_a_float_column() -> None:
    rows = pl.DataFrame([reading()], schema=SCHEMA).cast({"level": pl.Int64})
    assert split(rows, SPEC, REFERENCES).validated.schema["level"] == pl.Float64()


def test_rows_that_were_not_stamped_on_arrival_fail() -> None:
    with pytest.raises(SchemaError, match="received_at"):
        split(pl.DataFrame([reading()], schema=SCHEMA).drop("received_at"), SPEC, REFERENCES)


def test_references_that_were_not_handed_in_fail() -> None:
    with pytest.raises(MissingReferenceError, match="codes"):
        split(pl.DataFrame([reading()], schema=SCHEMA), SPEC, {})


def test_an_empty_reference_table_makes_every_row_an_orphan() -> None:
    result = split(pl.DataFrame([reading()], schema=SCHEMA), SPEC, REFERENCES | {"codes": REFERENCES["codes"].clear()})
    assert result.summary.broken == {"reference:codes": 1}


def test_a_source_referred_to_twice_gets_two_rule_names() -> None:
    twice = tuple(Reference(columns=(c,), source="codes", to=("id",)) for c in ("code", "state"))
    contract = CONTRACT.model_copy(update={"references": twice})
    assert {"reference:codes:code", "reference:codes:state"} <= {r.name for r in rules_of(contract)}


def test_two_rules_of_one_name_are_refused() -> None:
    clash = CONTRACT.model_copy(update={"rules": (RowRule(name="duplicate_key", description="", broken=lambda: pl.lit(False)),)})
    with pytest.raises(ValueError, match="duplicate_key"):
        rules_of(clash)


def test_a_row_rule_must_be_a_condition() -> None:
    wrong = CONTRACT.model_copy(update={"rules": (RowRule(name="sum", description="", broken=lambda: pl.col("count") + 1),)})
    with pytest.raises(TypeError, match="sum"):
        split(pl.DataFrame([reading()], schema=SCHEMA), SPEC.model_copy(update={"contract": wrong}), REFERENCES)
