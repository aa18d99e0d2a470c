"""From request values (JSON, Python or Feast) to the NumPy columns that request-time functions take.

Belongs here: that conversion, with NumPy and the standard library only. Does not belong here: any feature.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

Column = NDArray[Any]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def timestamps(values: Iterable[object]) -> NDArray[np.datetime64]:
    """`datetime64[us]` in UTC from datetimes, ISO 8601 texts or None (NaT). Raises ValueError for
    a time without a zone or a text that is no time, TypeError for anything else."""
    if isinstance(values, np.ndarray) and values.dtype.kind == "M":
        return values.astype("datetime64[us]")
    return np.array([_instant(v) for v in values], dtype="datetime64[us]")


def numbers(values: Iterable[object]) -> NDArray[np.float64]:
    """float64, None as NaN."""
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def columns(inputs: Mapping[str, Iterable[object]], times: Sequence[str]) -> dict[str, Column]:
    """All inputs of a function as columns: those named in `times` as timestamps, the others as numbers."""
    return {name: timestamps(values) if name in times else numbers(values) for name, values in inputs.items()}


def lists(outputs: Mapping[str, Any]) -> dict[str, list[float]]:
    """Columns of numbers as plain lists, for callers without NumPy."""
    return {name: np.asarray(values, dtype=np.float64).tolist() for name, values in outputs.items()}


def _instant(value: object) -> Any:
    if value is None:
        return np.datetime64("NaT", "us")
    if isinstance(value, np.datetime64):
        return value.astype("datetime64[us]")
    moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    if not isinstance(moment, datetime):
        raise TypeError(f"{value!r} is no time: give ISO 8601 text or a datetime")
    if moment != moment:  # noqa: PLR0124  # pandas' NaT is a datetime that differs from itself
        return np.datetime64("NaT", "us")
    if moment.tzinfo is None:
        raise ValueError(f"{value!r} has no zone: append Z or an offset")
    return np.datetime64((moment - _EPOCH) // _MICROSECOND, "us")
