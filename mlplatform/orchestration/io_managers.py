"""The default IO manager: frames that assets return land in Delta, never in a pickle.

Belongs here: between an asset's frame and the lake. Does not belong here: assets that write with more care than
"replace my partition" (the platform's own do, and return `MaterializeResult`).
"""

from datetime import date

import dagster as dg
import polars as pl

from mlplatform.clients.lake import DAY
from mlplatform.orchestration.resources import Clients, PlatformResource
from mlplatform.records import DayRange


class DeltaIOManager(dg.ConfigurableIOManager):
    """Stores a Polars frame as the Delta table named by the asset key; daily partitions replace their own days."""

    @property
    def _clients(self) -> Clients:
        return PlatformResource().clients

    def handle_output(self, context: dg.OutputContext, obj: pl.DataFrame | None) -> None:
        """Writes a frame. None (an asset that wrote by itself) stores nothing; anything else is an error."""
        if obj is None:
            return
        if not isinstance(obj, pl.DataFrame):
            raise TypeError(
                f"{context.asset_key.to_user_string()} returned a {type(obj).__name__}: return a Polars frame or a MaterializeResult"
            )
        days = _days(context) if context.has_asset_partitions else None
        if days is not None and DAY not in obj.columns:
            raise ValueError(f"{context.asset_key.to_user_string()} has daily partitions: its frame needs the column '{DAY}'")
        version = self._clients.lake.replace(tuple(context.asset_key.path), obj, days, {"run_id": context.run_id})
        context.add_output_metadata({"dagster/row_count": obj.height, "delta_version": version})

    def load_input(self, context: dg.InputContext) -> pl.DataFrame:
        """The upstream table, or the days of it that the partition mapping names."""
        days = _days(context) if context.has_asset_partitions else None
        return self._clients.lake.read(tuple(context.asset_key.path), days)


def _days(context: dg.OutputContext | dg.InputContext) -> DayRange:
    window = context.asset_partition_keys
    return DayRange(date.fromisoformat(min(window)), date.fromisoformat(max(window)))
