"""How the command line shows answers: tables and lines for people, JSON for programs.

Belongs here: rendering plain values. Does not belong here: getting them. Rich is imported by what prints with it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

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
    show(table)


def show(table: "Table", console: "Console | None" = None) -> None:
    """Prints a table with no word or figure of it cut: at its full width where no terminal sets one (a pipe, a file); in a
    terminal with columns as narrow as their words allow; where even that is too wide, one line for each value."""
    from rich.console import Console
    from rich.measure import Measurement

    console = console or Console()
    sizes = [[Measurement.get(console, console.options, cell) for cell in (c.header, *c.cells)] for c in table.columns]
    most = [max(size.maximum for size in column) for column in sizes]
    least = [most[i] if table.columns[i].no_wrap else min(most[i], max(size.minimum for size in column)) for i, column in enumerate(sizes)]
    frame = 3 * len(sizes) + 1  # a border and two blanks for each column, and the last border
    wide = sum(most) + frame
    if not console.is_terminal:
        console.width = max(console.width, wide)
    if sum(least) + frame > console.width:
        _stack(table, console)
        return
    if wide > console.width:
        # Rich by itself narrows the widest columns first, through the middle of words.
        spare, wanted = console.width - frame - sum(least), sum(most) - sum(least)
        for column, low, high in zip(table.columns, least, most, strict=True):
            column.width = low + spare * (high - low) // wanted
    console.print(table)


def _stack(table: "Table", console: "Console") -> None:
    """Each row as lines of a column's name and its value; what is empty is left out."""
    names = [console.render_str(str(column.header)) for column in table.columns]
    width = max(name.cell_len for name in names)
    console.print(table.title, style="bold", highlight=False, soft_wrap=True)
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        console.print()
        for name, cell in zip(names, cells, strict=True):
            value = console.render_str(cell) if isinstance(cell, str) else cell
            if value.plain:
                console.print(f"  {name.plain:<{width}}  ", value, sep="", highlight=False, soft_wrap=True)


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
