"""How the command line shows answers: tables and lines for people, JSON for programs.

Belongs here: rendering plain values. Does not belong here: getting them. Rich is imported by what prints with it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import typer

# Columns that are of no use in pieces.
_WHOLE = (
    "at",
    "action",
    "created",
    "url",
    "view",
    "generation",
    "feature",
    "every",
    "ttl",
    "used_by",
    "null",
    "5 %",
    "median",
    "95 %",
    "values",
)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


def say(text: str, markup: bool = False) -> None:
    from rich.console import Console

    Console().print(text, markup=markup, highlight=False, soft_wrap=True)


def table(title: str, rows: Sequence[Mapping[str, Any]], empty: str) -> None:
    """Rows of the same columns; `empty` says what it means that there are none."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        say(f"{title}: {empty}")
        return
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in rows[0]:
        table.add_column(
            name.replace("_", " "), justify="right" if _is_number(rows[0][name]) else "left", overflow="fold", no_wrap=name in _WHOLE
        )
    for row in rows:
        table.add_row(*(Text(_shown(value)) for value in row.values()))
    Console().print(table)


def age(seconds: float) -> str:
    """`2 d 3 h`, `3 h 5 min`, `12 min`, `40 s`: the two largest units, rounded down. A time yet to come is `0 s`."""
    minutes = int(seconds) // 60
    if minutes <= 0:
        return f"{max(int(seconds), 0)} s"
    parts = [(minutes // 1440, "d"), (minutes // 60 % 24, "h"), (minutes % 60, "min")]
    first = next(i for i, (number, _) in enumerate(parts) if number)
    return " ".join(f"{number} {unit}" for number, unit in parts[first : first + 2] if number)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def short_time(iso: str) -> str:
    """An ISO time as a table shows it: to the second, without its zone."""
    return iso[:19].replace("T", " ")
