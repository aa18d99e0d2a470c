"""What is written of a request is read as a record for each of its rows."""

import json
from typing import Any

import numpy as np
import pytest

from mlplatform.contracts import PredictionRecord, read_records, record_count
from serving_app.log_entry import LogEntry
from serving_app.row_texts import RowTexts, members

SHARED: dict[str, Any] = {
    "request_id": "r",
    "requested_at": "2024-05-01T10:00:00.000001+00:00",
    "model": "m",
    "version": 3,
    "variant": "champion",
    "contract_digest": "c" * 64,
    "latency_ms": 1.25,
}


def request(
    rows: int, features: int, given: bool = False, before: int = 2, quantiles: bool = False
) -> tuple[LogEntry, list[dict[str, Any]]]:
    """A request whose rows stand in a batch behind those of another, and the records wanted of it."""
    matrix = np.random.default_rng(rows).standard_normal((before + rows + 1, features)) / 3
    matrix[before, :1], matrix[-1, -1:] = np.nan, -0.0
    own = [
        {"prediction": i / 7, "feature_ages_s": {"v": None if i % 2 else i / 3}, "imputed": ["v"] * (i % 2), "shortfalls": {"v": "missing"}}
        | ({"quantiles": [0.1, i / 7, 5.0]} if quantiles else {})
        for i in range(len(matrix))
    ]
    texts = RowTexts([members(one) for one in own], [], matrix)
    inputs = [{"number": i, "town": 'Bod\u00f8 "x"'} for i in range(rows)]
    names = [("a", "b")[: i % 3] for i in range(rows)]
    entry = LogEntry("m", members(SHARED), texts, before, inputs, names if given else None)
    wanted = [
        SHARED
        | own[before + i]
        | {"input_index": i, "inputs": inputs[i], "given": names[i] if given else (), "code_version": "abc"}
        | {"features": [None if np.isnan(v) else v for v in matrix[before + i].tolist()]}
        for i in range(rows)
    ]
    return entry, wanted


def records(lines: list[bytes]) -> list[PredictionRecord]:
    return [record for line in lines for record in read_records(line)]


@pytest.mark.parametrize("quantiles", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("rows", "features"), [(1, 1), (1, 30), (7, 3), (100, 2), (101, 2), (250, 5), (3, 0)])
def test_every_row_is_a_record_of_its_own(rows: int, features: int, given: bool, quantiles: bool) -> None:
    entry, wanted = request(rows, features, given, quantiles=quantiles)
    lines = entry.lines(b'"code_version":"abc",')
    assert list(map(record_count, lines)) == [min(100, rows - start) for start in range(0, rows, 100)]
    assert not any(b"\n" in line for line in lines)
    assert records(lines) == [PredictionRecord.model_validate(one) for one in wanted]


def test_a_part_of_a_request_keeps_its_places() -> None:
    entry, wanted = request(40, 4, given=True)
    found = records([*entry.part(0, 13).lines(b'"code_version":"abc",'), *entry.part(13, 40).lines(b'"code_version":"abc",')])
    assert found == [PredictionRecord.model_validate(one) for one in wanted]


def test_a_record_is_read_as_it_would_be_on_a_line_of_its_own() -> None:
    for record in records(request(5, 3, given=True)[0].lines(b"")):
        again = read_records(record.model_dump_json())
        assert again == [record]
        assert json.loads(again[0].model_dump_json()) == json.loads(record.model_dump_json())
