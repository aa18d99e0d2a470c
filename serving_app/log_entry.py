"""The records of one request on their way to the log, put together as late as can be.

Belongs here: what all rows share and what each has, and the JSON of both. Does not belong here: what stands in them (`log_records`),
the way to the stream (`prediction_log`).
"""

from binascii import b2a_base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from serving_app.row_texts import RowTexts

RECORDS_A_LINE = 100  # what is damaged on its way, or set aside, is a line


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

    def lines(self, stamp: bytes) -> list[bytes]:
        """The request's records as `contracts.RequestRecords`, with the members in `stamp`: a line for every hundred of them."""
        if self.count > RECORDS_A_LINE:
            starts = range(0, self.count, RECORDS_A_LINE)
            return [line for start in starts for line in self.part(start, start + RECORDS_A_LINE).lines(stamp)]
        end = self.place + self.count
        rows = b"},{".join(self.texts.logged[self.place : end])
        features = b2a_base64(self.texts.features[self.place : end].data, newline=False)
        given = b"" if self.given is None else b',"given":%b' % orjson.dumps(self.given)
        told = self.count, stamp, self.common, self.first, rows, orjson.dumps(self.inputs), features, given
        return [b'{"records":%d,%b%b,"first":%d,"rows":[{%b}],"inputs":%b,"features":"%b"%b}' % told]
