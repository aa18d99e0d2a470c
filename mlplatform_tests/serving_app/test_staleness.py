"""A pipeline that stands still: half a second before a view's limit answers are as ever, half a second after it they are not."""

from collections.abc import Callable
from datetime import datetime, timedelta

import httpx
import pytest

from mlplatform.clock import SimulatedClock

ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}
PATH = "/v1/models/basket/predict"
TTL_S = 3600.0
LIVE, DEFAULT = 10.0, 5.0  # the stored value of shop_stats' first feature, and its recorded default


@pytest.fixture
def frozen(put_values, clock_file) -> Callable[[float], None]:
    """Values are written once; then `frozen(age_s)` lets the clock go on until those of `shop_stats` are that old."""
    now = SimulatedClock(clock_file).now()
    put_values("shop_stats", ["s1"], [LIVE, 2.0], age_s=0)

    def until(age_s: float) -> None:
        SimulatedClock(clock_file).set(_later(now, age_s))
        put_values("customer_stats", [7, "s1"], [99.5], age_s=-age_s)  # as of the clock's new time
        put_values("all_stats", ["all"], [4.0], age_s=-age_s)

    return until


def _later(now: datetime, seconds: float) -> datetime:
    return now + timedelta(seconds=seconds)


def metric(client: httpx.Client, name: str, *labels: str) -> float:
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(f"{name}{{") and all(x in line for x in labels)]
    return float(lines[0].rpartition(" ")[2]) if lines else 0.0


@pytest.mark.parametrize(("on_stale", "flipped"), [("serve", LIVE), ("impute", DEFAULT), ("refuse", None)])
def test_answers_flip_within_half_a_second_of_the_limit_as_declared(
    make_model, open_service, tmp_path, frozen, on_stale, flipped, logged
) -> None:
    make_model(on_stale={"shop_stats": on_stale}).into_cache(tmp_path)
    client = open_service()

    frozen(TTL_S - 0.5)
    fresh = client.post(PATH, json={"inputs": [ROW]})
    assert fresh.status_code == 200
    [told] = fresh.json()["predictions"]
    assert (told["feature_ages_s"]["shop_stats"], told["imputed"]) == (TTL_S - 0.5, [])
    assert metric(client, "mlplatform_feature_shortfalls_total", 'view="shop_stats"', 'reason="expired"') == 0

    frozen(TTL_S + 0.5)
    stale = client.post(PATH, json={"inputs": [ROW]})
    assert metric(client, "mlplatform_feature_shortfalls_total", 'view="shop_stats"', 'reason="expired"') == 1
    if flipped is None:
        assert stale.status_code == 503
        assert "'shop_stats' has no usable value (expired)" in stale.json()["detail"]
        return
    [told] = stale.json()["predictions"]
    assert told["feature_ages_s"]["shop_stats"] == TTL_S + 0.5
    assert told["imputed"] == (["shop_stats"] if on_stale == "impute" else [])
    before, after = logged(2)
    assert [r.feature_ages_s["shop_stats"] for r in (before, after)] == [TTL_S - 0.5, TTL_S + 0.5]
    assert [r.features[0] for r in (before, after)] == [LIVE, flipped]
    assert list(after.imputed) == told["imputed"]
    # Ages are measured too: one observation a request, below the bucket of two hours and above that of half an hour.
    age = ("mlplatform_feature_age_seconds_bucket", 'view="shop_stats"')
    assert [metric(client, *age, f'le="{bound}"') for bound in ("1800.0", "7200.0")] == [0.0, 2.0]


def test_at_the_limit_itself_a_value_is_good_and_a_microsecond_later_it_is_not(make_model, open_service, tmp_path, frozen) -> None:
    make_model().into_cache(tmp_path)
    client = open_service()
    for beyond_s, imputed in ((0, []), (1e-6, ["shop_stats"])):
        frozen(TTL_S + beyond_s)
        assert client.post(PATH, json={"inputs": [ROW]}).json()["predictions"][0]["imputed"] == imputed
