"""Which views a streaming worker can keep, and why the others stay with their assets.

Belongs here: the decision, from declarations. Does not belong here: doing it.
"""

from collections.abc import Mapping

import polars as pl

from mlplatform.features.plan import ViewPlan
from mlplatform.specs import SourceSpec, StreamReader


def reason_against(plan: ViewPlan, sources: Mapping[str, SourceSpec]) -> str | None:
    """Why a view cannot be streamed, in words; None where it can."""
    column = plan.recipe.independent_by
    if not plan.windowed:
        return "it has no windows: its recipe computes whole ticks"
    if column is None:
        return "its recipe does not say by which column events are independent (independent_by)"
    for name in plan.recipe.inputs:
        spec = sources.get(name)
        if spec is None or not isinstance(spec.reader, StreamReader):
            return f"its input {name} is no event stream"
        if reason := _reason_against_source(spec, column):
            return f"its input {name} {reason}"
    return None


def _reason_against_source(spec: SourceSpec, column: str) -> str | None:
    declared = next((c for c in spec.contract.columns if c.name == column), None)
    if declared is None or declared.nullable:
        return f"has no column {column} that is never null"
    # Versions of a row share its key; only if they share the group too can a group be judged alone.
    if spec.contract.key and column not in spec.contract.key:
        return f"may have versions of one row with different {column}: it is no part of the key"
    looking_around = [r.name for r in spec.contract.rules if r.on_broken == "quarantine" and not _row_by_row(r.broken())]
    if looking_around:
        return f"is judged by rules that look at other rows ({', '.join(looking_around)})"
    return None


def _row_by_row(expression: pl.Expr) -> bool:
    """Whether an expression looks at one row at a time. Polars tells it of an expression's outermost operation only."""
    try:
        return expression.meta.is_row_separable() and all(_row_by_row(part) for part in expression.meta.pop())
    except pl.exceptions.PolarsError:  # Polars cannot tell, as of a Python function
        return False
