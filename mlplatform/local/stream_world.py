"""A made-up world for the streaming worker: shoppers who click, views from an hour to a month, and a worker process.

Belongs here: what `bench stream` and the kill test run on; no Feast, so that a worker starts in about a second. Does not
belong here: measuring (`bench_stream`), killing (`stream_kills`).
"""

import json
import os
import random
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any

import polars as pl

from mlplatform.features.plan import ViewPlan, WindowPlan
from mlplatform.specs import Column, Contract, FeatureRecipe, SourceSpec, StreamReader, Tables

STREAM = "shop.clicks"
HOUR, DAY, MINUTE = timedelta(hours=1), timedelta(days=1), timedelta(minutes=1)
WORLD = "MLPLATFORM_STREAM_WORLD"  # which of the worlds below a worker process keeps
LATENESS_S = "MLPLATFORM_STREAM_WORLD_LATENESS_S"

CLICKS = SourceSpec(
    name="clicks",
    description="Clicks of shoppers, with what they spent",
    reader=StreamReader(connection="events", stream=STREAM),
    time_column="clicked_at",
    contract=Contract(
        columns=(
            Column(name="click_id", dtype="string"),
            Column(name="shopper", dtype="int"),
            Column(name="clicked_at", dtype="timestamp"),
            Column(name="spent", dtype="float", minimum=0, maximum=10_000),
        ),
        key=("click_id",),
        max_quarantine_share=0.5,  # corrections are frequent here, and the version corrected is set aside
    ),
)


def click_events(tables: Tables) -> pl.DataFrame:
    return tables["clicks"].select("shopper", pl.col("clicked_at").alias("event_timestamp"), "spent")


def view(name: str, windows: Mapping[str, timedelta], hop: timedelta, trigger: str, cadence: timedelta) -> ViewPlan:
    """Count, sum, mean and maximum of what a shopper spent, in each window."""
    found = [
        WindowPlan("spent", f, window, f"{name}_{f}_{span}") for span, window in windows.items() for f in ("count", "sum", "mean", "max")
    ]
    recipe = FeatureRecipe.model_validate(
        {
            "view": name,
            "inputs": {"clicks": max(windows.values())},
            "cadence": cadence,
            "trigger": trigger,
            "events": click_events,
            "independent_by": "click_id",
        }
    )
    return ViewPlan(name, ("shopper",), tuple(a.name for a in found), 2 * DAY, "", "", recipe, tuple(found), hop)


def plans(world: str) -> list[ViewPlan]:
    """`long`: windows from an hour to a month; `short`: as many, of up to an hour; `small`: for the kill test."""
    match world:
        case "long":
            return [
                view("recent", {"1h": HOUR, "24h": DAY}, 5 * MINUTE, "event", HOUR),
                view("habits", {"7d": 7 * DAY, "30d": 30 * DAY}, HOUR, "event", HOUR),
            ]
        case "short":
            return [
                view("recent", {"30min": 30 * MINUTE, "1h": HOUR}, 5 * MINUTE, "event", HOUR),
                view("habits", {"30min": 30 * MINUTE, "1h": HOUR}, 5 * MINUTE, "event", HOUR),
            ]
        case "small":
            return [
                view("at_click", {"1h": HOUR, "6h": 6 * HOUR}, 5 * MINUTE, "event", HOUR),
                view("by_tick", {"1h": HOUR, "6h": 6 * HOUR}, 5 * MINUTE, "cadence", 10 * MINUTE),
            ]
        case _:
            raise ValueError(f"there is no world '{world}'")


def click(number: int, shopper: int, at: datetime, spent: float) -> dict[str, Any]:
    return {"click_id": f"c{number}", "shopper": shopper, "clicked_at": at.isoformat(), "spent": spent}


def payload(event: Mapping[str, Any]) -> dict[str, str]:
    return {"event": json.dumps(event)}


def clicks(seed: int, shoppers: int) -> Iterator[tuple[int, int, float]]:
    """Number, shopper and amount of one click after the other, without end."""
    chance, number = random.Random(seed), 0  # noqa: S311  # no secret
    while True:
        number += 1
        yield number, chance.randrange(shoppers), round(chance.random() * 200, 2)


def main() -> None:
    """A worker process on the settings of the environment."""
    from mlplatform.clock import clock_from
    from mlplatform.orchestration.streaming import StreamOptions, Worker, serve
    from mlplatform.settings import load_settings

    settings = load_settings()
    lateness = timedelta(seconds=float(os.environ[LATENESS_S]))
    options = StreamOptions(
        lateness=lateness,
        keep=2 * lateness,
        interval_s=float(os.environ.get("MLPLATFORM_STREAM_WORLD_INTERVAL_S", "0.1")),
        lease_s=0.5,  # a killed worker gives nothing back, and the next one is waited for
    )
    serve(Worker(settings, clock_from(settings.clock), plans(os.environ[WORLD]), {"clicks": CLICKS}, options), None)


if __name__ == "__main__":
    main()
