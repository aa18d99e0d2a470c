"""A contract in words, for the column schema, the checks and the documentation of a source.

Belongs here: plain records and text made from a declaration. Does not belong here: evaluating anything, or the types of
the tool that shows it.
"""

from dataclasses import dataclass
from datetime import timedelta

from mlplatform.specs import Column, Contract, SourceSpec
from mlplatform.validation.rules import range_text, rules_of


@dataclass(frozen=True)
class ColumnDescription:
    """One column as people read it; `constraints` are short phrases such as `not null` or `from 0 to 360 degrees`."""

    name: str
    dtype: str
    description: str
    nullable: bool
    unique: bool
    constraints: tuple[str, ...]


@dataclass(frozen=True)
class CheckDescription:
    """One check of a source's table. Only a `blocking` one stops what is downstream."""

    name: str
    description: str
    blocking: bool


# The columns the platform adds, in the order the tables have them.
_RECEIVED = ColumnDescription("received_at", "timestamp", "When the row reached the platform (UTC)", False, False, ("not null",))
_DAY = ColumnDescription("event_date", "date", "UTC day of the time column; the table's partition", False, False, ("not null",))
_REASONS = ColumnDescription(
    "broken_rules", "list[string]", "Every rule the row breaks: those it is set aside for, then warnings", False, False, ()
)
_PAYLOAD = ColumnDescription("payload", "string", "The entry as it came, where it could not be read", True, False, ())


def validated_columns(spec: SourceSpec) -> tuple[ColumnDescription, ...]:
    """The columns of `validated/<source>`, in the table's order."""
    own = tuple(_described(column, spec.contract) for column in spec.contract.columns)
    return (*own, _RECEIVED, _DAY) if spec.partitioned else (*own, _RECEIVED)


def quarantine_columns(spec: SourceSpec) -> tuple[ColumnDescription, ...]:
    """The columns of `quarantine/<source>`: the same, held to nothing, with the reasons."""
    own = tuple(ColumnDescription(c.name, c.dtype, c.description, True, False, ()) for c in spec.contract.columns)
    return (*own, _RECEIVED, *((_DAY,) if spec.partitioned else ()), _REASONS, _PAYLOAD)


def checks(spec: SourceSpec) -> tuple[CheckDescription, ...]:
    """The checks a contract stands for: one blocking check of the table, then one per warning and per coverage.

    Names are fit for check names (letters, digits, underscores).
    """
    warnings = [CheckDescription(check_name(r.name), r.description, False) for r in rules_of(spec.contract) if not r.quarantines]
    covers = [
        CheckDescription(
            check_name(f"coverage:{c.source}"), f"Rows of {c.source} without a row here by {', '.join(c.columns)} and time", False
        )
        for c in spec.contract.coverage
    ]
    return (CheckDescription("contract", table_limits(spec), True), *warnings, *covers)


def check_name(rule: str) -> str:
    return rule.replace(":", "_").replace(",", "_")


def table_limits(spec: SourceSpec) -> str:
    """What stops the whole table, in one sentence."""
    contract = spec.contract
    parts = [f"at most {contract.max_quarantine_share:.1%} of the rows quarantined"]
    if contract.max_age is not None:
        parts.append(f"newest row at most {_hours(contract.max_age)} old when the day is complete")
    parts += [f"{c.name} null in at most {c.max_null_share:.1%}" for c in contract.columns if c.max_null_share is not None]
    return "; ".join(parts)


def markdown(spec: SourceSpec) -> str:
    """The contract as a Markdown page: columns with units and constraints, then every rule of more than one value."""
    contract = spec.contract
    lines = [f"# {spec.name}", "", spec.description, "", f"Owner: {spec.owner}. Limits: {table_limits(spec)}.", ""]
    lines += ["| column | type | unit | constraints | description |", "|---|---|---|---|---|"]
    for column in contract.columns:
        words = ", ".join(_described(column, contract).constraints).replace("|", "\\|")
        lines.append(f"| `{column.name}` | {column.dtype} | {column.unit} | {words} | {column.description} |")
    lines += ["", "| rule | a broken row is | meaning |", "|---|---|---|"]
    named = {r.name for r in contract.rules}
    for rule in rules_of(contract):
        if rule.name in named or rule.name.startswith(("reference:", "duplicate_key")):
            lines.append(f"| `{rule.name}` | {'quarantined' if rule.quarantines else 'counted'} | {rule.description} |")
    return "\n".join(lines) + "\n"


def _described(column: Column, contract: Contract) -> ColumnDescription:
    unit = f" [{column.unit}]" if column.unit else ""
    return ColumnDescription(
        name=column.name,
        dtype=column.dtype,
        description=f"{column.description}{unit}",
        nullable=column.nullable,
        unique=contract.key == (column.name,),
        constraints=tuple(_constraints(column, contract)),
    )


def _constraints(column: Column, contract: Contract) -> list[str]:
    words = [] if column.nullable else ["not null"]
    if contract.key == (column.name,):
        words.append("unique")
    elif column.name in contract.key:
        words.append(f"part of the key ({', '.join(contract.key)})")
    if bounds := range_text(column):
        words.append(bounds)
    if column.allowed is not None:
        words.append(f"one of {', '.join(column.allowed)}")
    if column.pattern is not None:
        words.append(f"matches {column.pattern}")
    if column.max_null_share is not None:
        words.append(f"null in at most {column.max_null_share:.1%}")
    for reference in contract.references:
        if column.name in reference.columns:
            words.append(f"found in {reference.source} ({', '.join(reference.to)})")
    return words


def _hours(age: timedelta) -> str:
    return f"{age.total_seconds() / 3600:g} h"
