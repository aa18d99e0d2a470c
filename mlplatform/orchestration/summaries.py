"""Measurements of a model that others act on: a row each in their stage's table, the newest in its newest commit too.

Belongs here: writing and finding them. Does not belong here: measuring, or deciding anything by them.
"""

import json
from dataclasses import asdict
from typing import TypeVar

import polars as pl

from mlplatform.orchestration.automation.decisions import summary_of
from mlplatform.orchestration.resources import Clients
from mlplatform.records import DriftSummary, PerformanceSummary, SkewSummary

SUMMARY = "mlplatform.summary"  # commit metadata: the newest summary as JSON

S = TypeVar("S")


def store_summary(clients: Clients, stage: str, summary: PerformanceSummary | DriftSummary | SkewSummary, run_id: str) -> None:
    """Appends the summary to its model's table of the stage."""
    text = json.dumps(asdict(summary), default=str)
    row = pl.DataFrame({"at": [clients.clock.now()], "summary": [text]}, schema={"at": pl.Datetime("us", "UTC"), "summary": pl.String})
    clients.lake.append((stage, summary.model), row, partitioned=False, metadata={"run_id": run_id, SUMMARY: text})


def newest_summary(clients: Clients, stage: str, model: str, kind: type[S]) -> S | None:
    """The newest measurement; None before the first."""
    return summary_of(kind, clients.lake.last_metadata((stage, model), SUMMARY))
