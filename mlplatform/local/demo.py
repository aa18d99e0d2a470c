"""`mlplatform demo`: the whole loop on real flights, in one command.

Belongs here: the order of the story. Does not belong here: services (`profile`), runs (`orchestration.runner`), pictures of progress
(`report`), the application (`traffic`).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlplatform.local import warm_up
from mlplatform.local.profile import START, LocalPlatform, refuse_to_reset, reset
from mlplatform.local.report import Report, StageRow
from mlplatform.records import DayRange

if TYPE_CHECKING:
    from mlplatform.features.plan import ViewPlan
    from mlplatform.local.report import StepCounter
    from mlplatform.local.traffic import Tally
    from mlplatform.orchestration.resources import Clients
    from mlplatform.orchestration.runner import Runner
    from mlplatform.specs import Catalog, ModelSpec

TICK = timedelta(minutes=30)
MONITOR_EVERY = timedelta(hours=12)
# After the last request the clock goes on, so that most outcomes of the last day become known.
AFTERMATH = timedelta(hours=12)


def run_demo(home: Path, days: int = 2, keep: bool = False, trials: int | None = None, all_models: bool = False) -> int:
    """Runs the demo under `home` and prints its story. Returns 0 only if every stage did its work."""
    refuse_to_reset(home.absolute())
    report = Report(home, "[bold]mlplatform demo[/bold]: every flight out of New York in 2013, from source systems to a drift report")
    with report.live():
        warm_up.start()
        with LocalPlatform(home=_fresh(home, report)) as platform:
            report.started(platform)
            demo = Demo.open(platform, report, trials)
            demo.all_models = all_models
            warm_up.settle()
            demo.build()
            demo.replay(START, START + timedelta(days=days))
            demo.finish()
            if keep:
                platform.start_automation()
                platform.start_clock(1.0)
                platform.supervisor.detach()
    report.print_summary(platform, keep)
    return report.status


def _fresh(home: Path, report: Report) -> Path:
    """A demo begins from nothing but the cached sample data: half of an earlier one would tell another story."""
    from mlplatform.local.supervisor import Supervisor

    with report.task("clearing what an earlier demo left"), Supervisor(home):
        reset(home)
    return home


@dataclass
class Demo:
    """One demo on a running platform."""

    platform: LocalPlatform
    report: Report
    runner: "Runner"
    clients: "Clients"
    catalog: "Catalog"
    model: "ModelSpec"
    plans: "Mapping[str, ViewPlan]"
    tally: "Tally"
    all_models: bool = False
    training_config: "Mapping[str, Any] | None" = None  # run config of the training sets; None: the declared split

    @property
    def trained(self) -> list[str]:
        """The models the story trains: the one whose days are replayed, or all."""
        return [m.name for m in self.catalog.models] if self.all_models else [self.model.name]

    @property
    def _beside(self) -> tuple[str, ...]:
        """Trained models that can be asked the same questions, because they ask for the same fields."""
        others = (m for m in self.catalog.models if m.name != self.model.name and m.request_fields == self.model.request_fields)
        return tuple(m.name for m in others if m.name in self.trained)

    @classmethod
    def open(cls, platform: LocalPlatform, report: Report, trials: int | None, catalog: "Catalog | None" = None) -> "Demo":
        """A demo of `catalog`; None: the first that is found. `trials` replaces its models' own number of tuning trials."""
        with report.task("loading the asset graph"):
            from mlplatform.catalog.discover import catalogs
            from mlplatform.features.declared import plans
            from mlplatform.local.traffic import Tally
            from mlplatform.orchestration.build import build
            from mlplatform.orchestration.resources import Clients
            from mlplatform.orchestration.runner import Runner
            from mlplatform.settings import load_settings

            catalog = catalog or catalogs()[0]
            if trials is not None:
                catalog = with_trials(catalog, trials)
            runner = Runner.open(build([catalog]), platform.home / "dagster")
            return cls(
                platform, report, runner, Clients(load_settings()), catalog, catalog.models[0], plans(catalog.feature_package), Tally()
            )

    # --- the graph for January to August ---

    def build(self) -> None:
        """Materializes everything up to the start, and starts the prediction service."""
        # Where the start lies within a day, that day's morning is in the archive too.
        last = (self.platform.start - timedelta(microseconds=1)).date()
        self.tables(DayRange(self.catalog.start, last))
        run = self.runner.run
        for stages in (("training_set", "tuning", "model"), ("evaluation",), ("deployment",)):
            name = "training" if len(stages) > 1 else stages[0]
            with self.stage(name, *stages, names=self.trained) as step:
                config = self.training_config if "training_set" in stages else None
                run(self.runner.keys(*stages, names=self.trained), config=config, on_step=step)
        with self.stage("serving"):
            self.platform.start_serving()
            self._await_model()

    def tables(self, days: DayRange) -> None:
        """Raw, validated and feature tables of `days`, each stage in one run (two where some sources have no days)."""
        with_days = [s.name for s in self.catalog.sources if s.partitioned]
        whole = [s.name for s in self.catalog.sources if not s.partitioned]
        run, keys = self.runner.run, self.runner.keys
        with self.stage("ingestion", "raw") as step:
            run(keys("raw", names=whole), on_step=step)
            run(keys("raw", names=with_days), days, on_step=step)
        with self.stage("validation", "validated") as step:
            run(keys("validated", "quarantine", names=whole), on_step=step)
            run(keys("validated", "quarantine", names=with_days), days, on_step=step)
        with self.stage("features", "feature_registry", "offline", "online") as step:
            run(keys("feature_registry"), on_step=step)
            run(keys("offline"), days, on_step=step)
            run(keys("online"), on_step=step)

    def _await_model(self) -> None:
        from mlplatform.client import PredictionClient

        settings = self.clients.settings
        with PredictionClient(settings.serving_url, api_key=settings.serving_api_key.get_secret_value()) as client:
            client.wait_until_ready(timeout_s=60)

    # --- the first days of September ---

    def replay(self, start: datetime, end: datetime, aftermath: timedelta = AFTERMATH) -> None:
        """Lets the days pass: events, features, questions, answers, outcomes and monitoring as the clock goes."""
        from mlplatform.client import PredictionClient
        from mlplatform.local.replay import Replay

        settings = self.clients.settings
        with PredictionClient(settings.serving_url, api_key=settings.serving_api_key.get_secret_value()) as client:
            replay = Replay(
                self.platform, self.runner, self.clients, self.catalog, self.model, self.plans, client, self.tally, self._beside
            )
            with self.report.replay(start, end + aftermath) as progress:
                replay.run(start, end, aftermath, TICK, MONITOR_EVERY, progress)
        for stage, seconds in replay.seconds.items():
            self.report.add_seconds(stage, seconds)

    def finish(self) -> None:
        """Measures what the stages did, and whether that was their work."""
        from mlplatform.local.accounting import account

        for row in account(self.clients, self.catalog, self.model, self.plans, self.tally):
            seconds = self.report.seconds_of(row.stage)
            self.report.add(StageRow(row.stage, row.assets, row.rows_in, row.rows_out, row.quarantined, seconds, row.fault))
        self._tell_quality()
        for name in self._beside:
            self._tell_beside(name)

    def _tell_beside(self, name: str) -> None:
        """What there is to say of a model that was asked the same; it has no rows of its own in the table."""
        from mlplatform.contracts import EVALUATION_TAG, PRODUCTION
        from mlplatform.orchestration.summaries import newest_summary
        from mlplatform.records import PerformanceSummary, SkewSummary

        version = self.clients.registry.by_alias(name, PRODUCTION)
        tested = json.loads(version.tags.get(EVALUATION_TAG, "{}")) if version else {}
        self.report.fact(name, f"version {version.version}, on test rows: {_metrics(tested)}" if version else "no version serves")
        if (served := newest_summary(self.clients, "performance", name, PerformanceSummary)) is not None:
            told = f"{served.predictions} predictions, {served.outcomes} outcomes known so far: {_metrics(served.metrics)}"
            self.report.fact(f"{name}, served", told)
        if (skew := newest_summary(self.clients, "skew", name, SkewSummary)) is not None:
            self.report.fact(f"{name}, skew", f"{skew.mismatched:,} of {skew.compared:,} compared")

    def _tell_quality(self) -> None:
        from mlplatform.contracts import EVALUATION_TAG, PRODUCTION
        from mlplatform.local.accounting import summary
        from mlplatform.orchestration.summaries import newest_summary
        from mlplatform.records import SkewSummary

        version = self.clients.registry.by_alias(self.model.name, PRODUCTION)
        tested = json.loads(version.tags.get(EVALUATION_TAG, "{}")) if version else {}
        fact = self.report.fact
        if version and tested:
            fact("model", f"{self.model.name} version {version.version}, on test rows: {_metrics(tested)}")
        served = summary(self.clients, "performance", self.model)
        if served is not None:
            metrics = served["metrics"]
            assert isinstance(metrics, dict)
            fact("served", f"{served['predictions']} predictions, {served['outcomes']} outcomes known so far: {_metrics(metrics)}")
        if (skew := newest_summary(self.clients, "skew", self.model.name, SkewSummary)) is not None:
            fact("skew", f"{skew.mismatched:,} of {skew.compared:,} compared")
            if skew.fallback:
                fact("fallback", skew.fallback_told)
        fact("imputed", f"{self.tally.imputed} of {self.tally.answered} answers had a feature replaced by its default")
        for kind in ("data_drift", "prediction_drift"):
            if (drift := summary(self.clients, kind, self.model)) is not None:
                fact(
                    kind.replace("_", " "), f"{drift['drifted']} of {drift['columns']} columns at {drift['method']} >= {drift['threshold']}"
                )

    @contextmanager
    def stage(self, name: str, *prefixes: str, names: Iterable[str] | None = None) -> Iterator["StepCounter"]:
        with self.report.stage(name, len(self.runner.keys(*prefixes, names=names)) if prefixes else 0) as counter:
            yield counter


def _metrics(metrics: Mapping[str, float]) -> str:
    labels = {"auc": "AUC", "log_loss": "log loss", "ece": "ECE", "pinball_p50": "P50 pinball", "mae": "MAE", "coverage": "coverage"}
    shown = [f"{label} {metrics[name]:.3f}" for name, label in labels.items() if name in metrics]
    if "saving" in metrics:
        shown.append(f"saves {metrics['saving']:.1%} of the best constant policy's cost")
    return ", ".join(shown)


def with_trials(catalog: "Catalog", trials: int) -> "Catalog":
    """The catalog with another number of tuning trials for each model."""
    models = tuple(m.model_copy(update={"tuning": m.tuning.model_copy(update={"trials": trials})}) for m in catalog.models)
    return catalog.model_copy(update={"models": models})
