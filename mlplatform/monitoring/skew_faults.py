"""The faults that a served value can have, by name, and what one source's comparison leaves behind.

Belongs here: names, the record between the comparisons and the summary, comparing floats bit by bit. Does not belong
here: the comparisons (`skew_views`, `skew_requests`), the summary (`skew`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Micros = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

OK = ""
NEVER = np.iinfo(np.int64).min  # where a row has no such time

FAULTS: Mapping[str, str] = MappingProxyType(
    {
        "ttl_ignored": "a value older than its ttl was served as if it were good",
        "correction_lost": "a value was served that a correction had replaced for longer than the propagation budget",
        "late_value": "an older value that came late had taken the place of a newer one",
        "newer_value_lost": "a newer value had been available for longer than the propagation budget",
        "time_shift": "the values are those of another time, whole quarters of an hour away: a time zone was misread",
        "default_filled_silently": "the default stands where there is a value, or where nothing says that there is none",
        "wrong_default": "a replaced value is not the default recorded in the model version",
        "value_not_used": "the default was served though a good value had been available for longer than the propagation budget",
        "from_the_future": "the value became known, or available, after the request",
        "value_differs": "the values are not those of the row with the same entity and time",
        "unknown_row": "no row has this entity and time",
        "request_function_changed": "the function that the contract names gives other numbers for the logged inputs",
        "request_value_differs": "a field that is passed on as it is was served as another number",
        "category_differs": "a category has another code than its position in the contract",
        "unreadable_inputs": "the logged inputs cannot be read as the contract's fields",
        "prediction_differs": "the model gives another answer for the logged features",
    }
)


@dataclass(frozen=True)
class Judged:
    """One source compared for n predictions: a fault's name (or OK) for each, and what stood and should have stood there.

    `served` and `expected` float64 of shape (n, features), NaN = null; `wrong` where their bits differ in a row with a fault.
    `lag_us`: how long a newer value had been available when this one was served, -1 where there was none. `times` are
    microseconds since 1970 UTC by name (NEVER where there is none), for the examples.
    """

    source: str
    features: tuple[str, ...]
    fault: npt.NDArray[np.object_]
    served: Floats
    expected: Floats
    keys: tuple[str, ...] = ()
    lag_us: Micros | None = None
    times: Mapping[str, Micros] = field(default_factory=dict)
    also: Mapping[str, Floats] = field(default_factory=dict)  # (n,) by name: rebuilt values that the log does not hold
    away: Flags | None = None  # (n,): the record says that the online store could not be reached for this view

    @property
    def faulty(self) -> Flags:
        return np.asarray(self.fault != OK)

    @property
    def wrong(self) -> Flags:
        return np.asarray(differs(self.served, self.expected) & self.faulty[:, None])


def bits(values: Floats) -> Micros:
    """The 64 bits of each number; every NaN is the same one, as in the online store. -0.0 is not 0.0."""
    return np.where(np.isnan(values), np.nan, values).view(np.int64)


def differs(left: Floats, right: Floats) -> Flags:
    return np.asarray(bits(left) != bits(right))


def faults_of(n: int) -> npt.NDArray[np.object_]:
    """n times OK."""
    return np.full(n, OK, dtype=object)
