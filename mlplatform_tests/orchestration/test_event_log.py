"""The event log of the local profile: the stock storage's behaviour, from threads and from several processes at once."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import pytest

CONFIG = """\
telemetry:
  enabled: false
event_log_storage:
  module: mlplatform.orchestration.event_log
  class: WarmSqliteEventLogStorage
  config:
    base_dir: {history}
"""
KEY = dg.AssetKey(["raw", "orders"])
DAYS = dg.DailyPartitionsDefinition(start_date="2024-05-01", end_date="2024-05-11")

Open = Callable[[], "contextmanager[dg.DagsterInstance]"]


@dg.multi_asset(
    specs=[dg.AssetSpec(KEY, partitions_def=DAYS)],
    check_specs=[dg.AssetCheckSpec("contract", asset=KEY)],
    backfill_policy=dg.BackfillPolicy.single_run(),
    name="orders",
)
def orders(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    return dg.MaterializeResult(
        metadata={"rows": 3}, check_results=[dg.AssetCheckResult(check_name="contract", passed=True, metadata={"broken": 0})]
    )


def run(instance: dg.DagsterInstance, day: str) -> dg.ExecuteInProcessResult:
    return dg.materialize([orders], instance=instance, partition_key=day, run_config=_QUIET)


_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "dagster.yaml").write_text(CONFIG.format(history=tmp_path / "history"))
    (tmp_path / "history").mkdir()
    return tmp_path


@pytest.fixture
def opened(home: Path) -> Callable[[], contextmanager]:
    """Opens another instance on the same folder, as another process would."""

    @contextmanager
    def another() -> Iterator[dg.DagsterInstance]:
        with dg.DagsterInstance.from_config(str(home)) as instance:
            yield instance

    return another


def test_another_instance_sees_materializations_checks_and_partitions(opened):
    with opened() as writer:
        result = run(writer, "2024-05-02")
    with opened() as reader:
        assert type(reader.event_log_storage).__name__ == "WarmSqliteEventLogStorage"
        event = reader.get_latest_materialization_event(KEY)
        assert event.asset_materialization.metadata["rows"].value == 3
        assert event.asset_materialization.partition == "2024-05-02"
        assert reader.get_materialized_partitions(KEY) == {"2024-05-02"}
        check = dg.AssetCheckKey(KEY, "contract")
        record = reader.event_log_storage.get_latest_asset_check_execution_by_key([check])[check]
        assert record.event.asset_check_evaluation.passed
        assert reader.get_run_by_id(result.run_id).status == dg.DagsterRunStatus.SUCCESS
        assert {e.dagster_event.event_type for e in reader.all_logs(result.run_id)} >= {e.event_type for e in result.all_events}


def test_a_log_survives_closing_and_opening(opened):
    for day in ("2024-05-01", "2024-05-02", "2024-05-03"):
        with opened() as instance:
            run(instance, day)
    with opened() as instance:
        assert len(instance.get_materialized_partitions(KEY)) == 3
        assert instance.get_latest_materialization_event(KEY).asset_materialization.partition == "2024-05-03"


def test_it_answers_as_the_stock_storage_does(opened, tmp_path):
    (tmp_path / "stock").mkdir()
    with opened() as ours, dg.DagsterInstance.local_temp(str(tmp_path / "stock")) as stock:
        for day in ("2024-05-01", "2024-05-04"):
            assert [e.event_type for e in run(ours, day).all_events] == [e.event_type for e in run(stock, day).all_events]
        for instance in (ours, stock):
            instance.add_dynamic_partitions("shops", ["a", "b"])
        assert ours.get_materialized_partitions(KEY) == stock.get_materialized_partitions(KEY)
        assert ours.get_dynamic_partitions("shops") == stock.get_dynamic_partitions("shops")
        assert set(ours.all_asset_keys()) == set(stock.all_asset_keys())
        counts = [i.event_log_storage.get_stats_for_run(i.get_runs()[0].run_id).materializations for i in (ours, stock)]
        assert counts == [1, 1]


def test_wiping_an_asset_forgets_it(opened):
    with opened() as instance:
        run(instance, "2024-05-02")
        instance.wipe_assets([KEY])
        assert instance.get_latest_materialization_event(KEY) is None
        run(instance, "2024-05-03")
        assert instance.get_latest_materialization_event(KEY).asset_materialization.partition == "2024-05-03"


def test_deleting_a_run_deletes_its_log(opened):
    with opened() as instance:
        gone, kept = run(instance, "2024-05-02").run_id, run(instance, "2024-05-03").run_id
        instance.delete_run(gone)
        assert not instance.all_logs(gone)
        assert instance.all_logs(kept)


def test_several_threads_write_and_read_at_once(opened):
    faults: list[BaseException] = []

    def work(instance: dg.DagsterInstance, number: int) -> None:
        try:
            for _ in range(40):
                instance.report_runless_asset_event(dg.AssetMaterialization(KEY, partition=f"2024-05-{number:02}"))
                instance.get_latest_materialization_event(KEY)
        except Exception as fault:  # noqa: BLE001 - a thread's fault is the test's
            faults.append(fault)

    with opened() as instance:
        threads = [threading.Thread(target=work, args=(instance, n)) for n in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not faults
        assert instance.get_materialized_partitions(KEY) == {f"2024-05-{n:02}" for n in range(1, 9)}
        assert instance.event_log_storage.get_event_records(dg.EventRecordsFilter(dg.DagsterEventType.ASSET_MATERIALIZATION), limit=1)
        assert sum(1 for _ in _materializations(instance)) == 8 * 40


def _materializations(instance: dg.DagsterInstance) -> Iterator[object]:
    cursor = None
    while True:
        found = instance.fetch_materializations(KEY, limit=100, cursor=cursor)
        yield from found.records
        if not found.has_more:
            return
        cursor = found.cursor


_WRITER = """
import sys, time
from pathlib import Path
import dagster as dg
go = Path(sys.argv[3])
while not go.exists():
    time.sleep(0.005)
with dg.DagsterInstance.from_config(sys.argv[1]) as instance:
    for _ in range(60):
        instance.report_runless_asset_event(dg.AssetMaterialization(dg.AssetKey(["raw", "orders"]), partition=sys.argv[2]))
"""


def test_processes_that_open_a_new_folder_at_once_lose_no_event(home, opened):
    go = home / "go"
    with opened() as instance:
        run(instance, "2024-05-01")  # makes the run and schedule storages: they are the stock ones, which race
        instance.all_instigator_state()
    for file in (home / "history").glob("event_log*"):
        file.unlink()
    commands = [[sys.executable, "-c", _WRITER, str(home), f"2024-05-0{n}", str(go)] for n in (1, 2, 3)]
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    time.sleep(1.5)  # past their imports, so that they open together
    go.touch()
    errors = [writer.communicate(timeout=100)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0], "".join(errors)[-3000:]
    with opened() as instance:
        assert sum(1 for _ in _materializations(instance)) == 180
        assert instance.get_materialized_partitions(KEY) == {"2024-05-01", "2024-05-02", "2024-05-03"}


def test_who_watches_a_run_is_told_of_events_of_another_instance(opened):
    seen = threading.Event()
    with opened() as watcher, opened() as writer:
        watcher.event_log_storage.watch("run-1", None, lambda *_: seen.set())
        writer.report_engine_event("at work", run_id="run-1", job_name="j")
        assert seen.wait(20)
        watcher.event_log_storage.end_watch("run-1", _nobody)


def _nobody(*_: object) -> None:
    """Was never watching."""
