"""What can go wrong with a source, in four kinds, each told so that whoever is called at night knows what to do.

Belongs here: the errors of the readers and the wording they share. Does not belong here: deciding whether to try again.
"""

from typing import ClassVar

# Long enough to recognise a value or an answer, short enough for a log line.
EXAMPLE_LENGTH = 80


class SourceError(Exception):
    """A source could not be read whole. Nothing of it was returned, so nothing is lost: the next run reads it again.

    `retryable` says whether the same request may well succeed later without anybody mending anything.
    """

    retryable: ClassVar[bool] = False

    def __init__(self, source: str, happened: str, mend: str) -> None:
        super().__init__(f"{source}: {happened}. {mend}")
        self.source = source
        self.happened = happened
        self.mend = mend


class SourceDownError(SourceError):
    """The source is unreachable, too slow, or answers that it cannot answer (time-outs, 429, 5xx, a missing volume)."""

    retryable = True


class SourceTruncatedError(SourceError):
    """The source began to answer but did not send everything it announced: a page or half a file is missing."""

    retryable = True


class SourceRefusedError(SourceError):
    """The source answers, but not to this request: credentials, an unknown table, path or bucket (4xx)."""


class SourceNonsenseError(SourceError):
    """The source sends what its contract does not allow: not JSON, a missing column, a value of another type.

    `column` and `example` name the culprit where there is one.
    """

    def __init__(self, source: str, happened: str, mend: str, *, column: str | None = None, example: str | None = None) -> None:
        super().__init__(source, happened, mend)
        self.column = column
        self.example = example


def missing_column(source: str, column: str, present: list[str]) -> SourceNonsenseError:
    """The source does not have a column its contract names."""
    return SourceNonsenseError(
        source,
        f"column '{column}' is missing; it sends {', '.join(sorted(present)) or 'no columns at all'}",
        "Rename it in the source, or in the contract if the source is right",
        column=column,
    )


def wrong_value(source: str, column: str, dtype: str, example: object, count: int, total: int) -> SourceNonsenseError:
    """`count` of `total` values of a column cannot be read as the contract's dtype."""
    return SourceNonsenseError(
        source,
        f"column '{column}' should be {dtype}, but {count} of {total} values are not, such as {shown(example)}",
        "Mend the source, or declare the column as what it is in the contract",
        column=column,
        example=shown(example),
    )


def shown(value: object) -> str:
    """A value as an error message shows it: quoted, and cut to a length a log can bear."""
    text = repr(value)
    return text if len(text) <= EXAMPLE_LENGTH else f"{text[:EXAMPLE_LENGTH]}…"
