"""Runs that nobody works on any more are ended, so that nothing waits for them."""

from pathlib import Path

import dagster as dg

from mlplatform.orchestration.runner import end_orphans


def test_a_run_left_at_work_is_failed_and_others_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n")

    @dg.job
    def work() -> None: ...

    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        left, done, waiting = (
            instance.create_run_for_job(work, status=status).run_id
            for status in (dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.NOT_STARTED)
        )
    assert end_orphans(tmp_path) == 1
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        found = {run.run_id: run.status for run in instance.get_runs()}
    assert found == {left: dg.DagsterRunStatus.FAILURE, done: dg.DagsterRunStatus.SUCCESS, waiting: dg.DagsterRunStatus.NOT_STARTED}
    assert end_orphans(tmp_path) == 0
