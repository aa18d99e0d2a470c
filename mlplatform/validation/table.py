"""What can be wrong with a table as a whole although each of its rows could be right.

Belongs here: judging a split's outcome, and whether one source's rows cover another's, in short texts for people.
Does not belong here: judging rows (`rules`), or what a failure leads to (the orchestration's blocking checks).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from math import ceil

import polars as pl

from mlplatform.records import ValidationSummary
from mlplatform.specs import Contract, Coverage, SourceSpec
from mlplatform.validation.rules import rules_of
from mlplatform.validation.split import BROKEN_RULES, DAY, RECEIVED_AT, SplitResult


@dataclass(frozen=True)
class CoverageResult:
    """How many rows of `source` needed a row, and how many found none. `name` is `coverage:<source>`."""

    name: str
    source: str
    needed: int
    missing: int

    @property
    def missing_share(self) -> float:
        return self.missing / self.needed if self.needed else 0.0


def judge(result: SplitResult, spec: SourceSpec, now: datetime | None = None, rows_expected: bool = True) -> ValidationSummary:
    """The split's summary with `failures` filled in: each a sentence, none where the table is acceptable.

    - more rows quarantined than `max_quarantine_share` allows, rounded up to a whole row, so that one bad row among few
      does not stop a table (a share of 0 allows none);
    - a column with a larger share of nulls than its `max_null_share`, among the rows that were not redelivered;
    - the newest validated row older than `max_age` at `now` (timezone-aware; None: not judged), by the source's time
      column, or by `received_at` where it has none. For a partition, `now` is at most the end of its last day;
    - no valid row where `rows_expected`.

    Of a result of several days each is judged by itself for the first two, so that a bad day cannot hide among good ones;
    `bad_days` names them. The last two are about the whole: how fresh it is, and whether there is anything.
    """
    failures = [*_empty(result.summary, rows_expected), *_too_old(result.validated, spec, now)]
    days = _days(result, spec)
    if len(days) <= 1:
        return replace(result.summary, failures=(*_bad_rows(result, spec), *failures))
    bad = {day: found for day in days if (found := tuple(_bad_rows(_of_day(result, spec, day), spec)))}
    by_day = [f"{day}: {'; '.join(found)}" for day, found in bad.items()]
    return replace(result.summary, failures=(*by_day, *failures), bad_days=() if failures else tuple(bad))


def _days(result: SplitResult, spec: SourceSpec) -> list[date]:
    if not spec.partitioned:
        return []
    found = pl.concat([result.validated[DAY], result.quarantined[DAY]]).unique().sort()
    return list(found)


def _of_day(result: SplitResult, spec: SourceSpec, day: date) -> SplitResult:
    """What the split would have given for one of its days, repeats apart (they carry no day: they were dropped)."""
    validated, quarantined = (frame.filter(pl.col(DAY) == day) for frame in (result.validated, result.quarantined))
    quarantining = {rule.name for rule in rules_of(spec.contract) if rule.quarantines}
    broken = Counter(name for names in quarantined[BROKEN_RULES].to_list() for name in names if name in quarantining)
    rows = validated.height + quarantined.height
    return SplitResult(
        validated, quarantined, ValidationSummary(spec.name, rows, validated.height, quarantined.height, redelivered=0, broken=broken)
    )


def quarantine_allowed(contract: Contract, rows: int) -> int:
    """How many of so many rows may be set aside: the share, rounded up to a whole row."""
    return ceil(contract.max_quarantine_share * rows)


def _bad_rows(result: SplitResult, spec: SourceSpec) -> Iterator[str]:
    summary, contract = result.summary, spec.contract
    if summary.quarantined > quarantine_allowed(contract, summary.rows_in - summary.redelivered):
        reasons = ", ".join(f"{name} {count}" for name, count in sorted(summary.broken.items(), key=lambda item: -item[1]))
        yield (
            f"{summary.quarantined} of {summary.rows_in} rows quarantined ({summary.quarantine_share:.1%}), "
            f"allowed {contract.max_quarantine_share:.1%}: {reasons}"
        )
    yield from _too_many_nulls(result, spec)


def _empty(summary: ValidationSummary, rows_expected: bool) -> Iterator[str]:
    if rows_expected and not summary.validated:
        yield "no rows where rows are expected" if not summary.rows_in else f"none of {summary.rows_in} rows is valid"


def _too_many_nulls(result: SplitResult, spec: SourceSpec) -> Iterator[str]:
    rows = result.validated.height + result.quarantined.height
    for column in spec.contract.columns:
        if column.max_null_share is None or not rows:
            continue
        share = (result.validated[column.name].null_count() + result.quarantined[column.name].null_count()) / rows
        if share > column.max_null_share:
            yield f"{column.name} is null in {share:.1%} of the rows, allowed {column.max_null_share:.1%}"


def _too_old(validated: pl.DataFrame, spec: SourceSpec, now: datetime | None) -> Iterator[str]:
    max_age = spec.contract.max_age
    if max_age is None or now is None or validated.is_empty():
        return
    if now.tzinfo is None:
        raise ValueError("`now` must carry a time zone")
    column = spec.time_column or RECEIVED_AT
    newest = validated[column].max()
    if isinstance(newest, datetime) and now - newest > max_age:
        looked = f"{now.astimezone(UTC):%Y-%m-%d %H:%M}"
        yield f"the newest {column} is {newest:%Y-%m-%d %H:%M} UTC, {now - newest} before {looked}; allowed {max_age}"


def coverage(rows: pl.DataFrame, spec: SourceSpec, declared: Coverage, needing: pl.DataFrame) -> CoverageResult:
    """Counts the rows of `needing` (of `declared.source`, already cut to the days in question) without a row in `rows`.

    `rows` holds the answering source's rows of those days; a row answers when its `declared.values` are all there.
    Raises ValueError where the answering source has no time column.
    """
    if spec.time_column is None:
        raise ValueError(f"source '{spec.name}' has no time column to cover '{declared.source}' by")
    on = [*declared.columns, spec.time_column]
    answers = rows.drop_nulls(declared.values).select(on) if declared.values else rows.select(on)
    asked = needing.select(*declared.columns, pl.col(declared.at).dt.truncate(declared.every).alias(spec.time_column))
    missing = asked.join(answers.unique(), on=on, how="anti").height
    return CoverageResult(f"coverage:{declared.source}", declared.source, asked.height, missing)
