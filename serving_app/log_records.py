"""What a prediction record says, for answers and for shadows alike.

Belongs here: the fields of `contracts.PredictionRecord` from a scored request. Does not belong here: the way to the stream.
"""

from collections.abc import Sequence

import numpy as np

from serving_app.batcher import Scored
from serving_app.inputs import Given, ParsedInputs
from serving_app.log_entry import LogEntry
from serving_app.model_handle import ModelHandle
from serving_app.router import Choice


def log_entry(choice: Choice, request_id: str, parsed: ParsedInputs, scored: Scored, latency_ms: float) -> LogEntry:
    """The records of one request."""
    handle = choice.handle
    batch = scored.batch
    told = request_id.encode(), batch.requested_at.encode(), choice.logged, latency_ms
    common = b'"request_id":"%b","requested_at":"%b",%b,"latency_ms":%.3f' % told
    return LogEntry(handle.name, common, batch.texts, scored.start, parsed.received, given_features(handle, parsed.given))


def given_features(handle: ModelHandle, given: Given | None) -> Sequence[tuple[str, ...]] | None:
    """For each row the names of the features that stood in the request; None where no row brought any."""
    if given is None:
        return None
    names = handle.contract.features
    return [tuple(names[i].name for i in np.flatnonzero(row)) for row in given.mask]
