"""Materializing assets in this process, on the persistent instance, with a call for every finished step.

Belongs here: one run, its progress and its failure in words. Does not belong here: which assets belong together.
"""

import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
from dagster import DagsterEventType, DagsterExecutionInterruptedError
from dagster_shared.error import SerializableErrorInfo

from mlplatform.orchestration import partitions
from mlplatform.records import DayRange

# The bars and the table tell what happens; the whole log is in the UI.
_QUIET_CONSOLE = {"console": {"config": {"log_level": "CRITICAL"}}}

INTERRUPTED = 130  # the exit status of a command that was stopped by a person

# (step that started or finished, whether it finished)
OnStep = Callable[[str, bool], None]


class RunFailedError(RuntimeError):
    """A run failed; carries the failed steps' own messages."""


AssetKey = dg.AssetKey  # for callers that import no Dagster themselves


@dataclass
class Runner:
    """Runs selections of assets. Every run is in the instance's history like any other."""

    definitions: dg.Definitions
    instance: dg.DagsterInstance

    def __post_init__(self) -> None:
        self._job = self.definitions.resolve_implicit_global_asset_job_def()
        self._graph = self.definitions.resolve_asset_graph()

    @classmethod
    def open(cls, definitions: dg.Definitions, dagster_home: Path) -> "Runner":
        return cls(definitions, dg.DagsterInstance.from_config(str(dagster_home)))

    def keys(self, *stages: str, names: Iterable[str] | None = None) -> list[dg.AssetKey]:
        """Asset keys of the stages, of all names or of some."""
        wanted = None if names is None else set(names)
        return sorted(k for k in self._graph.get_all_asset_keys() if k.path[0] in stages and (wanted is None or k.path[1] in wanted))

    def run(
        self,
        keys: Iterable[dg.AssetKey],
        days: DayRange | None = None,
        config: Mapping[str, Any] | None = None,
        on_step: OnStep | None = None,
    ) -> Mapping[dg.AssetKey, Mapping[str, Any]]:
        """One run of the assets, for `days` where they have daily partitions. Returns the last metadata of each, as plain
        values. Raises RunFailedError."""
        selection = list(keys)
        metadata: dict[dg.AssetKey, dict[str, Any]] = {}
        failures: list[str] = []
        run_id = str(uuid.uuid4())

        def listen(entry: dg.EventLogEntry) -> None:
            event = entry.dagster_event
            if event is None:
                return
            match event.event_type:
                case DagsterEventType.STEP_START | DagsterEventType.STEP_SUCCESS:
                    if on_step is not None and event.step_key:
                        on_step(event.step_key, event.event_type is DagsterEventType.STEP_SUCCESS)
                case DagsterEventType.ASSET_MATERIALIZATION:
                    found = event.step_materialization_data.materialization
                    metadata[found.asset_key] = {name: value.value for name, value in found.metadata.items()}
                case DagsterEventType.STEP_FAILURE:
                    failures.append(_failure(event))
                case DagsterEventType.RUN_FAILURE if not failures:
                    # Before any step: a resource could not be made.
                    failures.append(f"run {run_id}: {_root_cause(event.job_failure_data.error)}")
                case _:
                    return

        self.instance.add_event_listener(run_id, listen)
        result = self._job.execute_in_process(
            run_id=run_id,
            instance=self.instance,
            asset_selection=selection,
            tags=dict(partitions.range_tags(days)) if days else None,
            run_config={**dict(config or {}), "loggers": _QUIET_CONSOLE},
            raise_on_error=False,
        )
        if any(DagsterExecutionInterruptedError.__name__ in text for text in failures):
            # Dagster takes Ctrl-C and SIGTERM for the step at work; for this process they mean the whole of it.
            raise SystemExit(INTERRUPTED)
        if not result.success:
            raise RunFailedError("\n".join(failures) or f"run {run_id} failed before its first step")
        return metadata


def _failure(event: dg.DagsterEvent) -> str:
    data = event.step_failure_data
    if data.user_failure_data is not None and data.user_failure_data.description:
        return f"{event.step_key}: {data.user_failure_data.description}"
    return f"{event.step_key}: {_root_cause(data.error)}"


def _root_cause(error: SerializableErrorInfo | None) -> str:
    while error is not None and error.cause is not None:
        error = error.cause
    return error.message.strip() if error else "failed"


def end_orphans(dagster_home: Path) -> int:
    """Reports the runs that no process works on any more as failed, so that sensors and the queue go on; returns how many.

    To be called while nothing runs on the instance: a run that was at work when its platform was stopped stays "started".
    """
    unfinished = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
    with dg.DagsterInstance.from_config(str(dagster_home)) as instance:
        orphans = instance.get_runs(dg.RunsFilter(statuses=unfinished))
        for run in orphans:
            instance.report_run_failed(run, "The platform was stopped while this run was at work.")
    return len(orphans)
