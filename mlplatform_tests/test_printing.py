"""How ages and tables read on the command line."""

from io import StringIO

import pytest
from rich.console import Console
from rich.table import Table

from mlplatform.printing import age, show

FIGURES = {
    "service": "ours",
    "load": "64 connections",
    **{f"column {i}": f"{i},234,567.{i}" for i in range(1, 10)},
}


def shown(row: dict[str, str], width: int, terminal: bool) -> str:
    table = Table(title="Figures")
    for name in row:
        table.add_column(name, no_wrap=name != "service")
    table.add_row(*row.values())
    file = StringIO()
    show(table, Console(file=file, width=width, force_terminal=terminal, color_system=None))
    return file.getvalue()


def test_in_a_pipe_a_table_is_as_wide_as_it_needs_to_be() -> None:
    said = shown(FIGURES, 80, terminal=False)
    assert "…" not in said
    [line] = [line for line in said.splitlines() if "ours" in line]
    assert all(value in line for value in FIGURES.values())


@pytest.mark.parametrize("width", [40, 80, 120])
def test_in_a_terminal_that_is_too_narrow_each_value_has_a_line_of_its_own(width: int) -> None:
    said = shown(FIGURES, width, terminal=True)
    assert "…" not in said
    for name, value in FIGURES.items():
        assert any(line.split() == [*name.split(), *value.split()] for line in said.splitlines()), said


@pytest.mark.parametrize("width", [60, 80, 100])
def test_text_is_wrapped_between_words_where_the_table_fits_so(width: int) -> None:
    row = {"feature": "mean_departure_delay_min", "service": "the mean delay of departures over the last three hours, in minutes"}
    said = shown(row, width, terminal=True)
    assert max(len(line) for line in said.splitlines()) <= width
    words = {word for line in said.splitlines() for word in line.replace("│", " ").split()}
    assert {"mean_departure_delay_min", *row["service"].split()} <= words


def test_a_table_that_fits_is_left_as_it_is() -> None:
    assert shown({"a": "1", "service": "x"}, 80, terminal=True).splitlines()[-2].split() == ["│", "1", "│", "x", "│"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-5, "0 s"),
        (0.4, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3_600, "1 h"),
        (11_115, "3 h 5 min"),
        (86_400, "1 d"),
        (97_200, "1 d 3 h"),
        (86_700, "1 d"),
    ],
)
def test_an_age_is_told_in_its_two_largest_units(seconds: float, words: str) -> None:
    assert age(seconds) == words
