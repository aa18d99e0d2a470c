"""The records of one request on their way to the log, put together as late as can be.

Belongs here: what all rows share and what each has, and the JSON of both. Does not belong here: what stands in them (`log_records`),
the way to the stream (`prediction_log`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson


@dataclass(slots=True)  # not frozen: there is one for each request
class LogEntry:
    """One request's records on their way, with the fields of `contracts.PredictionRecord`: those all share, and each row's.

    `common` what all share and `rows` what each has, members of a JSON object; `inputs` as received; `features` float64 of shape (rows,
    features); `given` the names of those that stood in the request, for each row.
    """

    model: str
    common: bytes
    rows: Sequence[bytes]
    inputs: Sequence[dict[str, Any]]
    features: npt.NDArray[np.float64]
    given: Sequence[tuple[str, ...]] | None = None
    first: int = 0  # the index of the first row in its request
    count: int = field(init=False)

    def __post_init__(self) -> None:
        self.count = len(self.rows)

    def part(self, start: int, end: int) -> "LogEntry":
        given = None if self.given is None else self.given[start:end]
        first = self.first + start
        return LogEntry(self.model, self.common, self.rows[start:end], self.inputs[start:end], self.features[start:end], given, first)

    def records(self, stamp: bytes) -> list[bytes]:
        """Each row's record as JSON, with the members in `stamp`. orjson writes NaN as null, as PredictionRecord.features wants."""
        shared = b"{%b%b" % (stamp, self.common)
        rows: Iterable[bytes] = self.rows
        if self.given is not None:
            rows = (b'%b,"given":%b' % (row, orjson.dumps(given)) for row, given in zip(self.rows, self.given, strict=True))
        indices = range(self.first, self.first + self.count)
        dumps, option = orjson.dumps, orjson.OPT_SERIALIZE_NUMPY
        return [
            b'%b,"input_index":%d,%b,"inputs":%b,"features":%b}' % (shared, index, row, dumps(received), dumps(values, option=option))
            for index, row, received, values in zip(indices, rows, self.inputs, self.features, strict=True)
        ]
