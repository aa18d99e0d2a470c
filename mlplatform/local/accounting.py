"""What each stage did, counted in the tables themselves, and whether that was its work.

Belongs here: counting, and the least that each stage must have done. Does not belong here: showing it (`report`).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from mlplatform.contracts import PRODUCTION
from mlplatform.local.traffic import Tally
from mlplatform.orchestration.summaries import SUMMARY, newest_summary
from mlplatform.records import SkewSummary
from mlplatform.specs import Catalog, ModelSpec
from mlplatform.training.dataset import MANIFEST

if TYPE_CHECKING:
    from mlplatform.features.plan import ViewPlan
    from mlplatform.orchestration.resources import Clients


@dataclass(frozen=True)
class Account:
    """One stage's numbers; None where the word does not apply. `fault` is empty where the stage did its work."""

    stage: str
    assets: int
    rows_in: int | None
    rows_out: int | None
    quarantined: int | None = None
    fault: str = ""


def account(clients: "Clients", catalog: Catalog, model: ModelSpec, plans: "Mapping[str, ViewPlan]", tally: Tally) -> Iterator[Account]:
    """An account per stage, in the order data flows."""
    sources, views = [s.name for s in catalog.sources], list(plans)
    raw = _rows(clients, "raw", sources)
    validated, quarantined = _rows(clients, "validated", sources), _rows(clients, "quarantine", sources)
    yield Account("ingestion", len(sources), raw, raw, fault="" if raw else "no row reached the raw tables")
    empty = [s for s in sources if not _rows(clients, "validated", [s])]
    yield Account("validation", 2 * len(sources), raw, validated, quarantined, f"no valid rows of {empty}" if empty else "")
    bare = [v for v in views if not _rows(clients, "offline", [v])]
    yield Account("features", 2 * len(views) + 1, validated, _rows(clients, "offline", views), fault=f"no values in {bare}" if bare else "")
    manifest = json.loads(clients.lake.last_metadata(("training_set", model.name), MANIFEST) or "{}")
    rows_in, rows_out = manifest.get("labelled_in", 0), manifest.get("rows", 0)
    yield Account("training", 3, rows_in, rows_out, fault="" if rows_out else "there is no training set")
    version = clients.registry.by_alias(model.name, PRODUCTION)
    tested = manifest.get("rows_by_part", {}).get("test", 0)
    yield Account("evaluation", 1, tested, tested, fault="" if tested else "no test rows")
    yield Account("deployment", 1, None, None, fault="" if version else f"no version of {model.name} serves")
    yield Account("serving", 0, tally.asked, tally.answered, fault=_unanswered(tally))
    yield _monitoring(clients, model, tally)


def _unanswered(tally: Tally) -> str:
    if not tally.asked:
        return "nobody asked"
    return "" if tally.answered == tally.asked else f"{tally.asked - tally.answered} requests were not answered"


def _monitoring(clients: "Clients", model: ModelSpec, tally: Tally) -> Account:
    drained, known = 0, 0
    if clients.lake.exists(("predictions", model.name)):
        # Others may ask the service too; theirs are in the table, and no fault of the demo.
        own = pl.col("request_id").is_in(list(tally.request_ids))
        drained = int(clients.lake.scan(("predictions", model.name)).filter(own).select(pl.len()).collect().item())
    if clients.lake.exists(("outcomes", model.name)):
        known = int(clients.lake.scan(("outcomes", model.name)).filter(pl.col("state") == "known").select(pl.len()).collect().item())
    faults = []
    if drained != tally.answered:
        faults.append(f"{tally.answered} answers, but {drained} in the predictions table")
    if not known:
        faults.append("no outcome is known")
    faults += [
        f"no {stage} was measured" for stage in ("performance", "data_drift", "prediction_drift") if summary(clients, stage, model) is None
    ]
    skew = newest_summary(clients, "skew", model.name, SkewSummary)
    if skew is None or not skew.compared:
        faults.append("no skew was measured")
    elif not skew.passed:
        faults.append(f"served is not trained: {'; '.join((skew.told, *skew.unresolved))}")
    return Account("monitoring", 6, drained, known, fault="; ".join(faults))


def summary(clients: "Clients", stage: str, model: ModelSpec) -> dict[str, object] | None:
    """The newest summary of a monitoring stage, None where there is none."""
    text = clients.lake.last_metadata((stage, model.name), SUMMARY)
    found: dict[str, object] | None = json.loads(text) if text else None
    return found


def _rows(clients: "Clients", stage: str, names: list[str]) -> int:
    return sum(clients.lake.row_count((stage, name)) for name in names if clients.lake.exists((stage, name)))
