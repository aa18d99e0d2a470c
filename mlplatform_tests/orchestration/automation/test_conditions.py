"""The automation conditions on an ephemeral instance: what is requested after which upstream events."""

from collections.abc import Callable
from datetime import timedelta

import dagster as dg
import pytest

from mlplatform.orchestration import partitions
from mlplatform.orchestration.automation import conditions

DAYS = dg.DailyPartitionsDefinition(start_date="2024-05-01", end_date="2024-05-11")  # ten days, long over
UP, DAILY, BELOW, ONLINE = (dg.AssetKey([stage, "x"]) for stage in ("validated", "offline", "outcomes", "online"))


class Graph:
    """validated/x (checked) → offline/x (daily, any day) → online/x; or unpartitioned: validated/x → outcomes/x."""

    def __init__(self, instance: dg.DagsterInstance, partitioned: bool) -> None:
        self.instance, self.passed = instance, True
        days = DAYS if partitioned else None

        @dg.multi_asset(
            specs=[dg.AssetSpec(UP, partitions_def=days)],
            name="up",
            check_specs=[dg.AssetCheckSpec("contract", asset=UP, blocking=True)],
        )
        def up() -> dg.MaterializeResult:
            return dg.MaterializeResult(check_results=[dg.AssetCheckResult(check_name="contract", passed=self.passed)])

        mapping = partitions.lookback(timedelta(days=2)) if partitioned else None
        condition = conditions.after_gates_any_day() if partitioned else conditions.after_gates()
        key = DAILY if partitioned else BELOW

        @dg.multi_asset(
            specs=[
                dg.AssetSpec(key, deps=[dg.AssetDep(UP, partition_mapping=mapping)], partitions_def=days, automation_condition=condition)
            ],
            name="down",
        )
        def down() -> dg.MaterializeResult:
            return dg.MaterializeResult()

        made = [up, down]
        if partitioned:

            @dg.multi_asset(
                specs=[
                    dg.AssetSpec(
                        ONLINE,
                        deps=[dg.AssetDep(DAILY, partition_mapping=dg.AllPartitionMapping())],
                        automation_condition=conditions.newest_values(),
                    )
                ],
                name="newest",
            )
            def newest() -> dg.MaterializeResult:
                return dg.MaterializeResult()

            made.append(newest)
        self.definitions = dg.Definitions(assets=made)
        self.cursor = None

    def materialize(self, key: dg.AssetKey, day: str | None = None, passed: bool = True) -> None:
        self.passed = passed
        job = self.definitions.resolve_implicit_global_asset_job_def()
        job.execute_in_process(instance=self.instance, asset_selection=[key], partition_key=day, raise_on_error=False)

    def tick(self) -> dict[dg.AssetKey, set[str | None]]:
        """What one evaluation requests: partitions (None for an unpartitioned asset) by key."""
        found = dg.evaluate_automation_conditions(self.definitions, self.instance, dg.AssetSelection.all(), cursor=self.cursor)
        self.cursor = found.cursor
        graph = self.definitions.resolve_asset_graph()
        return {key: found.get_requested_partitions(key) for key in graph.get_all_asset_keys() if found.get_num_requested(key)}


@pytest.fixture
def graph(instance: dg.DagsterInstance) -> Callable[[bool], Graph]:
    return lambda partitioned: Graph(instance, partitioned)


def test_nothing_is_requested_while_nothing_happens(graph):
    made = graph(False)
    assert made.tick() == {}
    assert made.tick() == {}


def test_a_passed_gate_lets_the_update_through(graph):
    made = graph(False)
    made.tick()
    made.materialize(UP)
    assert made.tick() == {BELOW: {None}}


def test_a_failed_blocking_check_stops_it_on_this_tick_and_the_next(graph):
    made = graph(False)
    made.tick()
    made.materialize(UP, passed=False)
    assert made.tick() == {}
    assert made.tick() == {}


def test_after_a_failed_gate_the_next_passed_one_lets_it_through(graph):
    made = graph(False)
    made.tick()
    made.materialize(UP, passed=False)
    made.tick()
    made.materialize(UP, passed=True)
    assert made.tick() == {BELOW: {None}}


def test_a_late_day_is_requested_although_it_is_not_the_newest(graph):
    made = graph(True)
    for day in range(1, 6):
        made.materialize(UP, f"2024-05-0{day}")
        made.materialize(DAILY, f"2024-05-0{day}")
    made.tick()
    made.materialize(UP, "2024-05-03")
    requested = made.tick()
    # The day itself and the days whose lookback reaches it.
    assert requested[DAILY] >= {"2024-05-03"}
    assert requested[DAILY] <= {"2024-05-03", "2024-05-04", "2024-05-05"}


def test_a_day_whose_gate_failed_is_not_requested(graph):
    made = graph(True)
    for day in range(1, 4):
        made.materialize(UP, f"2024-05-0{day}")
        made.materialize(DAILY, f"2024-05-0{day}")
    made.tick()
    made.materialize(UP, "2024-05-04", passed=False)
    assert DAILY not in made.tick()
    made.materialize(UP, "2024-05-04", passed=True)
    assert "2024-05-04" in made.tick()[DAILY]


def test_the_first_days_do_not_wait_for_days_before_the_start(graph):
    made = graph(True)
    made.tick()
    made.materialize(UP, "2024-05-01")
    assert made.tick()[DAILY] == {"2024-05-01"}


def test_online_values_follow_any_day_although_other_days_are_missing(graph):
    made = graph(True)
    made.tick()
    made.materialize(DAILY, "2024-05-02")
    assert made.tick()[ONLINE] == {None}
    assert ONLINE not in made.tick()  # once per update
    made.materialize(ONLINE)
    assert ONLINE not in made.tick()
    made.materialize(DAILY, "2024-05-01")
    assert made.tick()[ONLINE] == {None}


def test_what_is_declared_is_made_once_and_again_when_it_changes(instance):
    key, fails = dg.AssetKey(["feature_registry", "x"]), False

    def declared(version: str) -> dg.Definitions:
        @dg.multi_asset(specs=[dg.AssetSpec(key, code_version=version, automation_condition=conditions.when_declared())], name="registry")
        def registry() -> dg.MaterializeResult:
            if fails:
                raise dg.Failure("no")
            return dg.MaterializeResult()

        return dg.Definitions(assets=[registry])

    cursor = None

    def requested(definitions: dg.Definitions) -> int:
        nonlocal cursor
        found = dg.evaluate_automation_conditions(definitions, instance, dg.AssetSelection.all(), cursor=cursor)
        cursor = found.cursor
        return found.total_requested

    def run(definitions: dg.Definitions) -> None:
        definitions.resolve_implicit_global_asset_job_def().execute_in_process(instance=instance, raise_on_error=False)

    first, second = declared("1"), declared("2")
    assert 1 in (requested(first), requested(first))
    run(first)
    assert [requested(first) for _ in range(3)] == [0, 0, 0]
    assert requested(second) == 1
    fails = True
    run(second)
    assert [requested(second) for _ in range(3)] == [0, 0, 0]
    third, fails = declared("3"), False
    run(third)  # a person mended it
    assert [requested(third) for _ in range(2)] == [0, 0]
    assert requested(declared("4")) == 1


def test_every_condition_says_which_incident_it_prevents():
    for condition in (conditions.after_gates, conditions.after_gates_any_day, conditions.newest_values, conditions.when_declared):
        assert "Prevents:" in (condition.__doc__ or "")
        assert isinstance(condition(), dg.AutomationCondition)
