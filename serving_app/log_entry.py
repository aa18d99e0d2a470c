"""The records of one request on their way to the log, put together as late as can be.

Belongs here: what all rows share and what each has, and the JSON of both. Does not belong here: what stands in them (`log_records`),
the way to the stream (`prediction_log`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from serving_app.row_texts import RowTexts


@dataclass(slots=True)  # not frozen: there is one for each request
class LogEntry:
    """One request's records on their way, with the fields of `contracts.PredictionRecord`: those all share, and each row's.

    `common` what all share, members of a JSON object; `texts` what each row of the batch has, of which this request's begin at `place`;
    `inputs` as received; `given` the names of the features that stood in the request, for each row.
    """

    model: str
    common: bytes
    texts: RowTexts
    place: int
    inputs: Sequence[dict[str, Any]]
    given: Sequence[tuple[str, ...]] | None = None
    first: int = 0  # the index of the first row in its request
    count: int = field(init=False)

    def __post_init__(self) -> None:
        self.count = len(self.inputs)

    def part(self, start: int, end: int) -> "LogEntry":
        given = None if self.given is None else self.given[start:end]
        return LogEntry(self.model, self.common, self.texts, self.place + start, self.inputs[start:end], given, self.first + start)

    def records(self, stamp: bytes) -> list[bytes]:
        """Each row's record as JSON, with the members in `stamp`."""
        shared = b"{%b%b" % (stamp, self.common)
        end = self.place + self.count
        rows: Iterable[bytes] = self.texts.logged[self.place : end]
        if self.given is not None:
            rows = (b'%b,"given":%b' % (row, orjson.dumps(given)) for row, given in zip(rows, self.given, strict=True))
        indices = range(self.first, self.first + self.count)
        return [
            b'%b,"input_index":%d,%b,"inputs":%b,"features":[%b]}' % (shared, index, row, orjson.dumps(received), features)
            for index, row, received, features in zip(indices, rows, self.inputs, self.texts.features.rows(self.place, end), strict=True)
        ]
