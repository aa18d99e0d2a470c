"""Between the rooms' records and Dagster's metadata: schemas, tables and pictures an analyst sees.

Belongs here: rendering. Does not belong here: computing what is rendered.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dagster as dg

from mlplatform.features.plan import ViewPlan
from mlplatform.figures import markdown
from mlplatform.validation.describe import ColumnDescription


def table_schema(plan: ViewPlan) -> dict[str, object]:
    """The column schema of a view's offline table."""
    keys = [dg.TableColumn(k, "string", "join key") for k in plan.join_keys]
    times = [
        dg.TableColumn("event_timestamp", "timestamp", "when the value became known (UTC)"),
        dg.TableColumn("created", "timestamp", "when the platform made it available (UTC)"),
    ]
    features = [
        dg.TableColumn(f, "float64", _described(plan.feature_descriptions.get(f, ""), plan.feature_units.get(f, ""))) for f in plan.features
    ]
    return {"dagster/column_schema": dg.TableSchema(columns=[*keys, *times, *features])}


def column_schema(columns: Sequence[ColumnDescription]) -> dict[str, object]:
    """The column schema of a contract's table."""
    return {
        "dagster/column_schema": dg.TableSchema(
            columns=[
                dg.TableColumn(
                    c.name,
                    c.dtype,
                    c.description,
                    dg.TableColumnConstraints(nullable=c.nullable, unique=c.unique, other=list(c.constraints)),
                )
                for c in columns
            ]
        )
    }


def _described(text: str, unit: str) -> str:
    return f"{text} [{unit}]" if unit else text


def md_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; numbers as given, floats with four significant digits."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(_cell(v) for v in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|")


def picture(png: bytes, title: str) -> dg.MarkdownMetadataValue:
    """A plot inside the metadata itself, so that it needs no file server."""
    return dg.MetadataValue.md(markdown(png, title))


def numbers(metrics: Mapping[str, float]) -> dict[str, dg.MetadataValue]:
    """Each metric as a number of its own, so that Dagster plots it over materializations."""
    return {name: dg.MetadataValue.float(float(value)) for name, value in metrics.items()}
