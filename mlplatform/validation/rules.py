"""The rules a contract stands for, by name, and which rows break them.

Belongs here: naming each rule, saying it in words, and evaluating it over a whole frame at once. Does not belong here:
what happens to a row that breaks one (`split`), or rules about the table as a whole (`table`).

| rule | broken where |
|---|---|
| `unreadable` | the entry could not be parsed at all; its text is in `payload` |
| `null:<column>` | null in a column that is not nullable |
| `range:<column>` | outside the inclusive bounds; a float that is NaN or infinite, bounds or not |
| `allowed:<column>` | not one of the allowed values |
| `pattern:<column>` | the regular expression is not found in the text (anchor it with ^ and $) |
| `duplicate_key` | another version of the row with this key was preferred |
| `reference:<source>` | no such row in the other source; `reference:<source>:<columns>` where a source is referred to twice |
| a `RowRule`'s own name | its expression is true (null counts as not broken) |
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import polars as pl

from mlplatform.specs import Column, Contract, Reference, RowRule
from mlplatform.validation.conform import POLARS_TYPES

UNREADABLE = "unreadable"
DUPLICATE_KEY = "duplicate_key"


class MissingReferenceError(LookupError):
    """A contract refers to a source whose rows were not handed in."""


@dataclass(frozen=True)
class Rule:
    """One rule. `columns` are the contract's columns it speaks of; a rule that does not quarantine only counts."""

    name: str
    description: str
    quarantines: bool
    columns: tuple[str, ...]
    # True where broken; None where a single row does not tell (references, duplicates, row rules).
    broken: Callable[[], pl.Expr] | None = None


def rules_of(contract: Contract) -> tuple[Rule, ...]:
    """Every rule of the contract, quarantining ones first. Raises ValueError where two bear the same name."""
    generated = [
        Rule(UNREADABLE, "The entry could not be parsed", True, ()),
        *(rule for column in contract.columns for rule in _column_rules(column)),
    ]
    if contract.key:
        key = ", ".join(contract.key)
        generated.append(Rule(DUPLICATE_KEY, f"Another version of the row with this {key} was preferred", True, contract.key))
    generated += [_reference_rule(contract, reference) for reference in contract.references]
    generated += [Rule(r.name, r.description, r.on_broken == "quarantine", _columns_of(r, contract)) for r in contract.rules]
    names = [rule.name for rule in generated]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"rules must have different names: {', '.join(twice)}")
    return tuple(sorted(generated, key=lambda rule: not rule.quarantines))


def _column_rules(column: Column) -> Iterator[Rule]:
    name = column.name
    if not column.nullable:
        yield Rule(f"null:{name}", f"{name} must not be null", True, (name,), lambda: pl.col(name).is_null())
    if column.dtype == "float" or column.minimum is not None or column.maximum is not None:
        yield Rule(
            f"range:{name}", f"{name} must be {range_text(column) or 'a finite number'}", True, (name,), lambda: _out_of_range(column)
        )
    if column.allowed is not None:
        allowed = list(column.allowed)
        words = f"{name} must be one of {', '.join(allowed)}"
        yield Rule(f"allowed:{name}", words, True, (name,), lambda: ~pl.col(name).cast(pl.String).is_in(allowed))
    if column.pattern is not None:
        pattern = column.pattern
        words = f"{name} must match {pattern}"
        yield Rule(f"pattern:{name}", words, True, (name,), lambda: ~pl.col(name).cast(pl.String).str.contains(pattern))


def range_text(column: Column) -> str:
    """The bounds in words, such as `from 0 to 120 mph`; empty where there are none."""
    parts = []
    if column.minimum is not None:
        parts.append(f"from {column.minimum:g}" if column.maximum is not None else f"at least {column.minimum:g}")
    if column.maximum is not None:
        parts.append(f"to {column.maximum:g}" if column.minimum is not None else f"at most {column.maximum:g}")
    return " ".join([*parts, column.unit] if column.unit and parts else parts)


def _out_of_range(column: Column) -> pl.Expr:
    value = pl.col(column.name)
    # NaN compares greater than every number in Polars, so the bounds alone would let it through below a minimum.
    broken = ~value.is_finite() if column.dtype == "float" else pl.lit(False)
    if column.minimum is not None:
        broken = broken | (value < column.minimum)
    if column.maximum is not None:
        broken = broken | (value > column.maximum)
    return broken


def reference_rule_name(contract: Contract, reference: Reference) -> str:
    alone = sum(r.source == reference.source for r in contract.references) == 1
    return f"reference:{reference.source}" if alone else f"reference:{reference.source}:{','.join(reference.columns)}"


def _reference_rule(contract: Contract, reference: Reference) -> Rule:
    words = f"{', '.join(reference.columns)} must be found in {reference.source}'s {', '.join(reference.to)}"
    return Rule(reference_rule_name(contract, reference), words, reference.on_missing == "quarantine", reference.columns)


def _columns_of(rule: RowRule, contract: Contract) -> tuple[str, ...]:
    named = set(rule.broken().meta.root_names())
    return tuple(c.name for c in contract.columns if c.name in named)


def column_flags(values: pl.DataFrame, contract: Contract) -> pl.DataFrame:
    """One boolean column per rule that a single value decides."""
    return values.select(rule.broken().fill_null(False).alias(rule.name) for rule in rules_of(contract) if rule.broken is not None)


def reference_flags(values: pl.DataFrame, contract: Contract, references: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """One boolean column per reference: true for the rows without a counterpart. Raises MissingReferenceError."""
    return pl.DataFrame([_orphans(values, contract, reference, references) for reference in contract.references])


def _orphans(values: pl.DataFrame, contract: Contract, reference: Reference, references: Mapping[str, pl.DataFrame]) -> pl.Series:
    if reference.source not in references:
        raise MissingReferenceError(f"the rows of '{reference.source}' are needed to check {', '.join(reference.columns)}")
    types = {name: POLARS_TYPES[contract.column(name).dtype] for name in reference.columns}
    known = references[reference.source].select(
        pl.col(there).cast(types[here]).alias(here) for here, there in zip(reference.columns, reference.to, strict=True)
    )
    found = values.select(reference.columns).join(
        known.unique().with_columns(found=pl.lit(True)), on=reference.columns, how="left", maintain_order="left"
    )
    broken = found["found"].is_null()
    if not reference.null_is_missing:
        broken &= found.select(pl.all_horizontal(pl.col(reference.columns).is_not_null())).to_series()
    return broken.alias(reference_rule_name(contract, reference))


def row_rule_flags(values: pl.DataFrame, contract: Contract, context: pl.DataFrame | None = None) -> pl.DataFrame:
    """One boolean column per row rule, over `values`; the rows of `context` are seen as neighbours only.

    Raises TypeError where a rule's expression is not boolean.
    """
    everything = values if context is None else pl.concat([values, context], how="diagonal")
    names = [rule.name for rule in contract.rules]
    flags = everything.with_columns(rule.broken().alias(rule.name) for rule in contract.rules).select(names)
    if wrong := [name for name, dtype in flags.schema.items() if dtype not in (pl.Boolean(), pl.Null())]:
        raise TypeError(f"row rules must be boolean expressions: {', '.join(wrong)}")
    return flags.head(values.height).select(pl.all().cast(pl.Boolean).fill_null(False))
