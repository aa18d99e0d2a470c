"""The page of a feature view in the UI: what is declared of it, and what its newest rows look like.

Belongs here: which facts an analyst finds at `offline/<view>`, and when its picture is drawn. Does not belong here: the facts
themselves (room `features`), how metadata is rendered (`metadata`).
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import dagster as dg
import polars as pl

from mlplatform.clients import fingerprints
from mlplatform.clients.lake import with_day
from mlplatform.features import plots
from mlplatform.features.consumers import Consumer
from mlplatform.features.plan import TIME, ViewPlan, computed_as
from mlplatform.features.profile import QUANTILES, FeatureProfile, newest_versions, profile, recent_days
from mlplatform.fingerprint import content_hash
from mlplatform.orchestration.metadata import md_table, picture, table_schema
from mlplatform.orchestration.resources import Clients

DRAWN_AT = "distributions_drawn_at"
# A picture takes about a tenth of a second: one for each large write, and one a day while small ones come in every hour.
LARGE_WRITE_ROWS = 5_000
DRAW_EVERY = timedelta(days=1)


def declared_page(plan: ViewPlan, used_by: Sequence[Consumer]) -> dict[str, object]:
    """Metadata of the asset's definition: entity, cadence, ttl, staleness, how each feature comes about, who uses the view."""
    return {
        "rows_at": "each event of the entity" if plan.event_triggered else f"each tick, every {plan.cadence}",
        "cadence": str(plan.cadence),
        "propagation_budget": str(plan.recipe.propagation_budget),
        "ttl": str(plan.ttl),
        "entity": ", ".join(plan.join_keys),
        "on_stale": plan.recipe.on_stale,
        "inputs": dg.MetadataValue.md(md_table(("validated source", "lookback"), ((s, str(d)) for s, d in plan.recipe.inputs.items()))),
        "features": dg.MetadataValue.md(
            md_table(("feature", "unit", "computed as", "default", "meaning"), (_feature_row(plan, name) for name in plan.features))
        ),
        "consumers": dg.MetadataValue.md(_consumer_table(used_by)),
        **table_schema(plan),
    }


def _feature_row(plan: ViewPlan, name: str) -> tuple[str, str, str, str, str]:
    default = plan.recipe.defaults.get(name)
    return (
        name,
        plan.feature_units.get(name, ""),
        computed_as(plan, name),
        "" if default is None else f"{default:g}",
        plan.feature_descriptions.get(name, ""),
    )


def _consumer_table(used_by: Sequence[Consumer]) -> str:
    if not used_by:
        return "no feature service takes this view"
    rows = ((c.model or "none", c.service, len(c.features) - len(c.left_out), ", ".join(c.left_out)) for c in used_by)
    return md_table(("model", "feature service", "features taken", "left out"), rows)


def written_page(clients: Clients, plan: ViewPlan, written: pl.DataFrame, before: dg.EventLogEntry | None) -> dict[str, dg.MetadataValue]:  # type: ignore[type-arg]  # of several kinds
    """Metadata of a materialization that wrote `written` (as `write_offline` gives it); `before` is the asset's last one."""
    key, now = ("offline", plan.name), clients.clock.now()
    page: dict[str, dg.MetadataValue] = {  # type: ignore[type-arg]
        "rows_written": dg.MetadataValue.int(written.height),
        "entities": dg.MetadataValue.int(written.n_unique(list(plan.join_keys)) if written.height else 0),
        "path": dg.MetadataValue.path(clients.lake.uri(key)),
    }
    if clients.lake.exists(key):
        page["dagster/row_count"] = dg.MetadataValue.int(clients.lake.row_count(key))
        whole = fingerprints.recorded(clients.lake, key)
        if whole is not None:  # a table whose commits do not say it is not read for that at every tick
            page["fingerprint"] = dg.MetadataValue.text(whole.hash)
    drawn_at = _drawn_at(before)
    if written.height:
        newest = written[TIME].max()
        assert isinstance(newest, datetime)
        page |= {
            "fingerprint_written": dg.MetadataValue.text(content_hash(with_day(written, TIME))),
            "newest_value": dg.MetadataValue.text(newest.isoformat()),
            "newest_value_age_s": dg.MetadataValue.float((now - newest).total_seconds()),
            "null_shares": dg.MetadataValue.md(_nulls(profile(written, plan.features))),
        }
        if should_draw(written.height, drawn_at, now):
            shown = profile(_shown(clients, plan, written, now), plan.features)
            page["distributions"] = picture(plots.distributions(shown), f"{plan.name}: distributions")
            drawn_at = now
    if drawn_at is not None:
        page[DRAWN_AT] = dg.MetadataValue.timestamp(drawn_at)
    return page


def should_draw(rows: int, drawn_at: datetime | None, now: datetime) -> bool:
    """Whether a run that wrote `rows` rows draws the distributions anew; `drawn_at` is when the last picture was drawn."""
    return rows >= LARGE_WRITE_ROWS or drawn_at is None or now - drawn_at >= DRAW_EVERY


def _shown(clients: Clients, plan: ViewPlan, written: pl.DataFrame, now: datetime) -> pl.DataFrame:
    """What was written, or the rows of the last days where that was little."""
    if written.height >= LARGE_WRITE_ROWS:
        return written
    return newest_versions(clients.lake.read(("offline", plan.name), recent_days(now)), plan.join_keys, plan.features, now)


def _drawn_at(before: dg.EventLogEntry | None) -> datetime | None:
    materialization = None if before is None else before.asset_materialization
    found = None if materialization is None else materialization.metadata.get(DRAWN_AT)
    if not isinstance(found, dg.TimestampMetadataValue):
        return None
    return datetime.fromtimestamp(found.value, UTC)


def _nulls(profiles: Sequence[FeatureProfile]) -> str:
    """Null share of what was written, and quantiles (of a sample where that is much)."""
    header = ("feature", "null", *(f"{100 * q:g} %" for q in QUANTILES))
    rows = ((p.feature, f"{p.nulls / p.rows:.1%}", *(p.quantiles or ("",) * len(QUANTILES))) for p in profiles)
    return md_table(header, rows)
