"""The row split: every row received goes to `validated`, to `quarantine` with every reason, or is counted as redelivered.

Belongs here: which row goes where. Does not belong here: what the rules are (`rules`), or whether the day as a whole is
acceptable (`table`).

Deliveries are at least once, so the same row may come again, and a source may correct a row it already sent:
- An exact repeat (every contract column equal, as received) is dropped and counted; the first one received stays.
- Of several versions with the same key the last one received *that breaks nothing else* wins, so a damaged correction
  never hides a sound row. The others are quarantined as `duplicate_key`. A row whose key holds a null has no identity
  and is nobody's duplicate; a contract without a key has no repeats.
- A broken row takes no other row with it: references count against what was handed in, never against what was set aside.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from mlplatform.records import ValidationSummary
from mlplatform.specs import Contract, SourceSpec
from mlplatform.validation.conform import SchemaError, typed
from mlplatform.validation.rules import DUPLICATE_KEY, UNREADABLE, column_flags, reference_flags, row_rule_flags, rules_of

RECEIVED_AT = "received_at"
DAY = "event_date"
PAYLOAD = "payload"
BROKEN_RULES = "broken_rules"
ROW = "__row"  # position in the rows received; keeps the outcome in their order


@dataclass(frozen=True)
class SplitResult:
    """Frames of the contract's columns, `received_at` and, for partitioned sources, `event_date`.

    `quarantined` has `broken_rules` (names, quarantining rules first, then warnings) and `payload` (the text of an
    unreadable entry, else null) besides.
    """

    validated: pl.DataFrame
    quarantined: pl.DataFrame
    summary: ValidationSummary


def split(rows: pl.DataFrame, spec: SourceSpec, references: Mapping[str, pl.DataFrame], context: pl.DataFrame | None = None) -> SplitResult:
    """Splits the rows received of one source (one partition, or the whole table).

    `rows`: the raw table's columns; `received_at` is required, `payload` (text of an unreadable entry) may be there.
    `references`: rows of each source the contract refers to. `context`: raw rows around `rows` (the hours before and after
    a day) that row rules may look at; they are never put out or counted, and never replace a row of `rows`.
    Raises `SchemaError` where columns are missing or of another type, `MissingReferenceError` for references not handed in.
    """
    contract = spec.contract
    fresh = _first_deliveries(_enveloped(rows, spec), contract)
    readable, unreadable = fresh.filter(pl.col(PAYLOAD).is_null()), fresh.filter(pl.col(PAYLOAD).is_not_null())
    values, flags = _judged(readable, contract, references, context)
    quarantining = _quarantining(flags, contract)
    warning = [r.name for r in rules_of(contract) if not r.quarantines]
    broken = _any(flags, quarantining)

    known = pl.concat([readable.select(ROW, RECEIVED_AT, *_day(spec), PAYLOAD), values], how="horizontal")
    set_aside = _with_reasons(known.filter(broken), flags.filter(broken).select(*quarantining, *warning))
    quarantined = pl.concat([set_aside, _unreadable(unreadable, contract, spec)]).sort(ROW)
    output = [*(c.name for c in contract.columns), RECEIVED_AT, *_day(spec)]
    counts = {name: int(flags[name].sum()) for name in flags.columns} | {UNREADABLE: unreadable.height}
    return SplitResult(
        validated=known.filter(~broken).select(output),
        quarantined=quarantined.select(*output, BROKEN_RULES, PAYLOAD),
        summary=ValidationSummary(
            source=spec.name,
            rows_in=rows.height,
            validated=int((~broken).sum()),
            quarantined=quarantined.height,
            redelivered=rows.height - fresh.height,
            broken={name: counts[name] for name in quarantining if counts[name]},
            warned={name: counts[name] for name in warning if counts[name]},
        ),
    )


def _judged(
    readable: pl.DataFrame, contract: Contract, references: Mapping[str, pl.DataFrame], context: pl.DataFrame | None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows in declared types, and one boolean column per rule, true where a row breaks it."""
    values = typed(readable, contract)
    # Never true here, but it keeps the frame's height where the contract has no rule at all.
    flags = readable.select(pl.repeat(False, pl.len()).alias(UNREADABLE))
    flags = pl.concat([flags, column_flags(values, contract), reference_flags(values, contract, references)], how="horizontal")
    return values, _with_neighbours(flags, values, readable, contract, _context_values(context, values, contract))


def _quarantining(flags: pl.DataFrame, contract: Contract) -> list[str]:
    return [r.name for r in rules_of(contract) if r.quarantines and r.name in flags.columns]


def _any(flags: pl.DataFrame, names: list[str]) -> pl.Series:
    return flags.select(pl.any_horizontal(names)).to_series()


def _day(spec: SourceSpec) -> list[str]:
    return [DAY] if spec.partitioned else []


def _enveloped(rows: pl.DataFrame, spec: SourceSpec) -> pl.DataFrame:
    """The rows with their position, and `payload` and `event_date` even where the reader had none to give."""
    if taken := sorted({RECEIVED_AT, DAY, PAYLOAD, BROKEN_RULES, ROW} & {c.name for c in spec.contract.columns}):
        raise SchemaError(f"the contract of '{spec.name}' declares columns the platform adds itself: {', '.join(taken)}")
    if RECEIVED_AT not in rows.columns:
        raise SchemaError(f"'{RECEIVED_AT}' is missing: the rows of '{spec.name}' were not stamped on arrival")
    extra = {} if PAYLOAD in rows.columns else {PAYLOAD: pl.lit(None, dtype=pl.String)}
    if spec.time_column is not None and DAY not in rows.columns:
        # An entry that tells no time of its own lies on the day it came.
        extra[DAY] = pl.coalesce(pl.lit(typed(rows, spec.contract)[spec.time_column]), RECEIVED_AT).dt.date()
    return rows.with_row_index(ROW).with_columns(pl.col(RECEIVED_AT).cast(pl.Datetime("us", "UTC")), **extra)


def _first_deliveries(received: pl.DataFrame, contract: Contract) -> pl.DataFrame:
    """The rows without exact repeats, in order; of repeats the first one received."""
    if not contract.key:
        return received
    key = list(contract.key)
    # Only rows that share a key can be repeats, so the wide comparison sees few rows on an ordinary day.
    suspects = received.filter(pl.struct(key).is_duplicated())
    repeats = suspects.sort(RECEIVED_AT, ROW).filter(~pl.struct(*(c.name for c in contract.columns), PAYLOAD).is_first_distinct())
    return received.join(repeats.select(ROW), on=ROW, how="anti", maintain_order="left")


def _context_values(context: pl.DataFrame | None, values: pl.DataFrame, contract: Contract) -> pl.DataFrame | None:
    """The context in declared types, one row per key, without the rows that are being judged themselves."""
    if context is None or context.is_empty():
        return None
    if PAYLOAD in context.columns:
        context = context.filter(pl.col(PAYLOAD).is_null())
    neighbours = typed(context, contract)
    if not contract.key:
        return neighbours
    return neighbours.unique(subset=contract.key, keep="last", maintain_order=True).join(values, on=contract.key, how="anti")


def _with_neighbours(
    flags: pl.DataFrame, values: pl.DataFrame, readable: pl.DataFrame, contract: Contract, context: pl.DataFrame | None
) -> pl.DataFrame:
    """Adds the row rules and `duplicate_key`.

    Row rules are judged twice where versions compete: once to find the sound version, then without the losers, so that a
    replaced version is nobody's neighbour. The losers keep the first judgement.
    """
    flags = pl.concat([flags, row_rule_flags(values, contract, context)], how="horizontal")
    lost = _losers(flags, values, readable, contract)
    if lost.any():
        again = row_rule_flags(values.filter(~lost), contract, context)
        winners = pl.concat([flags.filter(~lost).drop(again.columns), again], how="horizontal").select(flags.columns)
        order = pl.Series(ROW, [*(~lost).arg_true(), *lost.arg_true()])
        flags = pl.concat([winners, flags.filter(lost)]).with_columns(order).sort(ROW).drop(ROW)
    return flags.with_columns(lost.alias(DUPLICATE_KEY)) if contract.key else flags


def _losers(flags: pl.DataFrame, values: pl.DataFrame, readable: pl.DataFrame, contract: Contract) -> pl.Series:
    """True for the versions of a key that another version was preferred to."""
    if not contract.key or values.is_empty():
        return pl.repeat(False, values.height, dtype=pl.Boolean(), eager=True)
    key = list(contract.key)
    sound = ~_any(flags, _quarantining(flags, contract))
    versions = values.select(key).with_columns(pl.int_range(pl.len()).alias(ROW), readable[RECEIVED_AT], sound=sound)
    rivals = versions.filter(pl.struct(key).is_duplicated() & pl.all_horizontal(pl.col(key).is_not_null()))
    preferred = rivals.sort("sound", RECEIVED_AT, ROW).unique(subset=key, keep="last")
    return versions[ROW].is_in(rivals[ROW].implode()) & ~versions[ROW].is_in(preferred[ROW].implode())


def _with_reasons(rows: pl.DataFrame, flags: pl.DataFrame) -> pl.DataFrame:
    """The broken rows with the names of the rules they break."""
    if rows.is_empty():
        return rows.with_columns(pl.Series(BROKEN_RULES, [], dtype=pl.List(pl.String)))
    names = pl.concat_list(pl.when(pl.col(name)).then(pl.lit(name)) for name in flags.columns).list.drop_nulls()
    return pl.concat([rows, flags.select(names.alias(BROKEN_RULES))], how="horizontal")


def _unreadable(entries: pl.DataFrame, contract: Contract, spec: SourceSpec) -> pl.DataFrame:
    reason = pl.Series(BROKEN_RULES, [[UNREADABLE]] * entries.height, dtype=pl.List(pl.String))
    envelope = entries.select(ROW, RECEIVED_AT, *_day(spec), PAYLOAD)
    return pl.concat([envelope, typed(entries, contract)], how="horizontal").with_columns(reason)
