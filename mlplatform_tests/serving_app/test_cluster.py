"""The service as a process whose online store is a real Redis Cluster, as MLPLATFORM_ONLINE_CLUSTER declares it."""

from contextlib import closing
from datetime import timedelta
from typing import Any

import httpx
import polars as pl

from mlplatform.clock import SimulatedClock
from mlplatform.feature_store.commands import open_client
from mlplatform.feature_store.writer import write_frame

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
VALUES: dict[str, dict[str, Any]] = {
    "shop_stats": {"keys": {"shop": "s1"}, "features": {"orders": 10.0, "returns": 2.0}},
    "customer_stats": {"keys": {"shop": "s1", "customer": 7}, "features": {"spend": 99.5}},
    "all_stats": {"keys": {"region": "all"}, "features": {"load": 4.0}},
}


def test_the_service_answers_from_a_cluster_and_keeps_log_and_notices_on_its_plain_redis(
    make_model, run_service, tmp_path, start_cluster, clock_file, redis_url
) -> None:
    make_model().into_cache(tmp_path)
    now = SimulatedClock(clock_file).now()
    with start_cluster(primaries=2) as ports:
        url = f"redis://127.0.0.1:{ports[0]}"
        with closing(open_client(url, cluster=True)) as client:
            for minutes, (view, put) in enumerate(VALUES.items(), 1):
                at = now - timedelta(minutes=minutes)
                frame = pl.DataFrame([{**put["keys"], **put["features"], "event_timestamp": at, "created": at}])
                write_frame(client, "shop_project", view, list(put["keys"]), list(put["features"]), frame)
        service = run_service(MLPLATFORM_ONLINE_URL=url, MLPLATFORM_ONLINE_CLUSTER="true")
        service.wait_ready()
        answer = httpx.post(f"{service.url}/v1/models/basket/predict", json={"inputs": [ROW, ROW | {"shop": "nowhere"}]}, timeout=20)
        assert answer.status_code == 200, answer.text
        known, unknown = answer.json()["predictions"]
        assert (known["imputed"], known["feature_ages_s"]) == ([], {"shop_stats": 60.0, "customer_stats": 120.0, "all_stats": 180.0})
        assert (unknown["imputed"], unknown["feature_ages_s"]["all_stats"]) == (["shop_stats", "customer_stats"], 180.0)
        assert httpx.get(f"{service.url}/health/ready", timeout=5).status_code == 200
