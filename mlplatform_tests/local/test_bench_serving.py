"""The serving bench: what its generators report is read right, what it judges is judged right, and a small run of it ends well."""

import http.server
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mlplatform.cli import app
from mlplatform.local.bench_serving import open_loop, overload, profile, quota, run, server, sink_dead, world
from mlplatform.local.bench_serving.answers import unlike
from mlplatform.local.bench_serving.cases import CASES, Measured
from mlplatform.local.bench_serving.contenders import FASTAPI, MLSERVER, OURS
from mlplatform.local.bench_serving.home_world import HomeWorld, NothingToServeError
from mlplatform.local.bench_serving.load import LoadError, LoadFigures, Target, closed_loop, find_wrk, parse_figures
from mlplatform.local.bench_serving.prediction_log import LogBalance
from mlplatform.local.bench_serving.server import Cores
from mlplatform.local.bench_serving.targets import Taken, judge

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed: `make bench-tools`")

# As wrk 4.1.0 ended one run with our script.
WRK = """\
Running 1s test @ http://127.0.0.1:43123/v1/models/bench/predict
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency    28.04ms   12.10ms 181.87ms   92.01%
    Req/Sec     2.04k   310.22     2.51k    70.00%
  2043 requests in 1.00s, 1.02MB read
Requests/sec:   2043.10
Transfer/sec:      1.02MB
FIGURES {"requests": 2043, "seconds": 1.000200, "p50_ms": 28.0400, "p95_ms": 92.9800, "p99_ms": 181.8700, "errors": 3}
"""


class _Slow(http.server.BaseHTTPRequestHandler):
    """Answers POST with what it was sent; 0.3 s later where the body says `stall`, 500 where `fail`; hangs up where `hang up`."""

    protocol_version = "HTTP/1.1"
    wbufsize = 65_536  # head and body in one packet
    seen: list[bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.seen.append(body)
        if body == b"stall":
            time.sleep(0.3)
        if body == b"hang up":
            self.close_connection = True
            return
        self.send_response(500 if body == b"fail" else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # the generator opens all its connections at once


@pytest.fixture
def slow_server() -> Iterator[tuple[int, list[bytes]]]:
    """Its port, and the bodies it has seen. One request at a time, as one worker's event loop has it."""
    seen: list[bytes] = []
    handler = type("Handler", (_Slow,), {"seen": seen})
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_address[1], seen
        server.shutdown()
        thread.join()


def measured(contender: str, turn: int, requests: int, p99_ms: float = 5.0, case: str = "1x64", errors: int = 0) -> Measured:
    return Measured(contender, case, turn, LoadFigures(requests, 1.0, 1.0, 2.0, p99_ms, errors), 0.04, 100.0, 0.0)


def taken(*figures: Measured, balance: LogBalance | None = None, wrong: int = 0, scale: float | None = None) -> Taken:
    good = LogBalance({"accepted": 5, "written": 5, "dropped": 0, "queued": 0}, 5)
    return Taken(figures, {OURS: [1.0, 2.0, 9.0]}, {OURS: wrong}, balance or good, scale, "" if scale else "too few cores")


# --- load ------------------------------------------------------------------------------------------------------------


def test_the_figures_of_wrk_are_read_from_the_line_of_our_script() -> None:
    found = parse_figures(WRK)
    assert found == LoadFigures(2043, 1.0002, 28.04, 92.98, 181.87, 3)
    assert found.per_s == pytest.approx(2042.6, abs=0.1)


def test_a_generator_without_figures_is_an_error_that_carries_what_it_said() -> None:
    with pytest.raises(LoadError, match="unable to connect"):
        parse_figures("unable to connect to 127.0.0.1:1 Connection refused\n")


def test_a_missing_wrk_names_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlplatform.local.bench_serving.load.shutil.which", lambda _: None)
    with pytest.raises(LoadError, match="make bench-tools"):
        find_wrk()


@needs_wrk
def test_wrk_sends_the_bodies_in_turn_and_counts_refused_ones(slow_server: tuple[int, list[bytes]], tmp_path: Path) -> None:
    port, seen = slow_server
    bodies = tmp_path / "bodies"
    bodies.write_text("a\nb\nfail\n")
    found = closed_loop(Target(port, "/x", bodies), connections=1, seconds=1)
    # wrk asks the script for one request before it begins, to see how long it is.
    assert seen[:6] == [b"b", b"fail", b"a", b"b", b"fail", b"a"]
    assert found.requests // 3 - 1 <= found.errors <= found.requests // 3 + 1


def test_the_open_loop_sends_every_request_whatever_comes_back(slow_server: tuple[int, list[bytes]]) -> None:
    port, seen = slow_server
    found = open_loop.run(port, "/x", [b"a", b"b", b"c", b"fail"], rate=400, seconds=0.5, connections=64)
    assert sorted(set(seen)) == [b"a", b"b", b"c", b"fail"]
    assert (len(seen), found["requests"], found["errors"]) == (200, 150, 50)


def test_the_open_loop_goes_on_where_the_server_hangs_up(slow_server: tuple[int, list[bytes]]) -> None:
    port, _ = slow_server
    found = open_loop.run(port, "/x", [b"a", b"hang up", b"b", b"c"], rate=400, seconds=0.5, connections=4)
    assert (found["requests"], found["errors"]) == (150, 50)


def test_the_open_loop_counts_waiting_for_a_connection_as_latency(
    slow_server: tuple[int, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One connection, an answer in ten takes 0.3 s: what is due meanwhile has waited. A slow machine only adds to that."""
    port, _ = slow_server
    found = open_loop.run(port, "/x", [b"stall", *[b"a"] * 9], rate=50, seconds=0.4, connections=1)
    assert found["requests"] == 20
    assert found["p50_ms"] > 100


# --- judging ---------------------------------------------------------------------------------------------------------


def test_ratios_are_taken_within_each_round() -> None:
    """A machine that is twice as busy in the second round slows both sides: the ratio stays what it is."""
    found = taken(measured(OURS, 0, 2400), measured(MLSERVER, 0, 200), measured(OURS, 1, 1200), measured(MLSERVER, 1, 100))
    verdicts = {j.what: j for j in judge(found)}
    assert verdicts["requests/s to mlserver, 1 row, c=64"].figure == 12.0
    assert verdicts["requests/s to mlserver, 1 row, c=64"].met is True


def test_processor_time_is_compared_the_other_way_round() -> None:
    """A peer that needs twice the time for a request stands at 2, as one that answers half as many does."""
    mine, theirs = measured(OURS, 0, 200), replace(measured(MLSERVER, 0, 100), cpu_s_per_1000=0.08)
    found = taken(mine, theirs)
    assert (found.ratio(MLSERVER, "1x64"), found.cpu_ratio(MLSERVER, "1x64")) == (2.0, 2.0)
    assert found.cpu_ratio(FASTAPI, "1x64") is None


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    verdicts = {j.what: j for j in judge(taken(measured(OURS, 0, 100)))}
    peer, scale = verdicts[f"requests/s to {FASTAPI}, 1 row, c=64"], verdicts["requests/s of two processes to one"]
    assert (peer.figure, peer.met, scale.met, scale.why) == (None, None, None, "too few cores")


def test_a_scale_says_how_it_was_measured_where_the_processes_had_no_cores_of_their_own() -> None:
    found = replace(taken(measured(OURS, 0, 100), scale=1.7), scale_how="each held to 0.4 of a core")
    [scale] = [j for j in judge(found) if "two processes" in j.what]
    assert (scale.what, scale.met) == ("requests/s of two processes to one, each held to 0.4 of a core", True)


def test_a_process_is_held_to_its_part_of_a_core_for_as_long_as_asked() -> None:
    command = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(command) as one, subprocess.Popen(command) as other:
        try:
            with quota.held([one.pid, other.pid], 0.2):
                began, before = time.monotonic(), [server.cpu_s(p.pid) for p in (one, other)]
                time.sleep(1.0)
                used = [(server.cpu_s(p.pid) - b) / (time.monotonic() - began) for p, b in zip((one, other), before, strict=True)]
            assert max(used) < 0.3
            assert not list(Path("/sys/fs/cgroup/cpu").glob(f"mlplatform-bench-{one.pid}"))
        except quota.NoQuotaError as none:
            pytest.skip(f"nobody is held here: {none}")
        finally:
            one.kill()
            other.kill()


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("p99 ms, 1 row, c=64", taken(measured(OURS, 0, 100, p99_ms=8.1))),
        ("failed requests", taken(measured(OURS, 0, 100, errors=1))),
        ("predictions unlike Booster.predict", taken(measured(OURS, 0, 100), wrong=1)),
        ("requests/s of two processes to one", taken(measured(OURS, 0, 100), scale=1.5)),
        (
            "log records unaccounted for",
            taken(measured(OURS, 0, 100), balance=LogBalance({"accepted": 5, "written": 3, "spilled": 1, "dropped": 0}, 3)),
        ),
    ],
)
def test_a_missed_target_is_seen(what: str, found: Taken) -> None:
    assert {j.what for j in judge(found) if j.met is False} == {what}


def test_a_record_written_twice_is_not_missing_and_one_that_is_not_in_the_stream_is() -> None:
    counts = {"accepted": 7, "written": 5, "spilled": 1, "dropped": 1, "queued": 0}
    assert LogBalance(counts, in_stream=6).missing == 0
    assert LogBalance(counts, in_stream=4).missing == 1


def test_answers_are_compared_bit_by_bit() -> None:
    wanted = np.array([0.1, 0.2, np.nan], np.float32)
    assert unlike(wanted.copy(), wanted, 0.0) == 0
    assert unlike(np.array([0.1, np.nextafter(np.float32(0.2), np.float32(1)), np.nan], np.float32), wanted, 0.0) == 1
    assert unlike(wanted[:2], wanted, 0.0) == 3


def test_a_network_may_differ_by_its_tolerance_and_by_no_more() -> None:
    wanted = np.array([1.0, 2.0], np.float32)
    assert unlike(np.array([1.0, 2.0005], np.float32), wanted, 0.001) == 0
    assert unlike(np.array([1.0, 2.002], np.float32), wanted, 0.001) == 1
    assert unlike(np.array([1.0, np.nan], np.float32), wanted, 0.001) == 1


def test_the_speed_of_a_homes_own_model_is_shown_and_not_judged() -> None:
    assert {j.what for j in judge(taken(measured(OURS, 0, 100)), made_up=False)} == {
        "failed requests",
        "predictions unlike Booster.predict",
        "log records unaccounted for",
    }


def test_the_service_never_shares_its_core_with_the_load() -> None:
    assert Cores.split([0, 1], 1) == Cores(frozenset({0}), frozenset({1}))
    assert Cores.split([0, 1, 2], 2) is None
    assert Cores.split([2, 3, 4, 5], 2) == Cores(frozenset({2, 3}), frozenset({4, 5}))


# --- profile ---------------------------------------------------------------------------------------------------------


def test_a_sample_counts_for_the_innermost_function_of_ours() -> None:
    raw = (
        "run (uvicorn/server.py);predict (serving_app/routes/predict.py:31);loads (orjson.py) 6\n"
        "run (uvicorn/server.py);select (selectors.py:3) 2\n"
        "_bootstrap (threading.py);_worker (concurrent/futures/thread.py:81) 100\n"
    )
    shares = profile.by_function(list(profile.stacks(raw)))
    assert [(s.where, s.own, s.within) for s in shares] == [
        ("serving_app/routes/predict.py predict", 0.75, 0.75),
        ("selectors.py select", 0.25, 0.25),
    ]
    packages = profile.by_package(list(profile.stacks(raw)))
    assert [(s.where, s.own, s.within) for s in packages] == [("orjson.py", 0.75, 0.75), ("selectors.py", 0.25, 0.25)]


# --- the whole -------------------------------------------------------------------------------------------------------


def test_unknown_peers_and_cases_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such peer here: rayserve; there are mlserver"):
        _ = run.Options(tmp_path, peers=("rayserve",)).racing
    with pytest.raises(ValueError, match="no such peer here: mlserver"):
        _ = run.Options(tmp_path, home=tmp_path, peers=("mlserver",)).racing
    with pytest.raises(ValueError, match="no such case: 2x2"):
        _ = run.Options(tmp_path, cases=("2x2",)).racing


def test_a_home_that_was_never_asked_says_how_to_get_there(tmp_path: Path) -> None:
    with pytest.raises(NothingToServeError, match="mlplatform demo"):
        HomeWorld(tmp_path, tmp_path / "home", "flight_disruption")


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is trained, and questions that are answered, within a second."""
    for name, size in {"_SINGLES": 500, "_HUNDREDS": 10, "_CHECKED": 50, "_STARTS": 1}.items():
        monkeypatch.setattr(run, name, size)
    monkeypatch.setattr(world, "TREES", 20)
    monkeypatch.setattr(world, "_TRAINING_ROWS", 5_000)


@needs_wrk
@pytest.mark.usefixtures("small_world")
@pytest.mark.timeout(300)
def test_a_small_run_starts_the_service_drives_it_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = run.Options(tmp_path, peers=(FASTAPI,), cases=("1x64", "100x64", "open"), seconds=1.0, rounds=1, scale=False, entities=500)
    assert run.run_bench_serving(options, as_json=True) in (0, 1)  # whether it is fast enough is the bench's business, not a test's
    found = json.loads(capsys.readouterr().out)
    assert [(row["service"], row["load"]) for row in found["services"]] == [
        ("this service", "1 row, c=64"),
        ("FastAPI saying hello", "1 row, c=64"),
        ("this service", "100 rows, c=64"),
        ("this service", "1 row, 1,000 a second"),
    ]
    assert all(row["per_s"] > 0 and row["cpu_s_per_1000"] > 0 and row["mb"] > 10 for row in found["services"])
    verdicts = {target["what"]: target["met"] for target in found["targets"]}
    assert verdicts["predictions unlike Booster.predict"] is verdicts["log records unaccounted for"] is True
    assert found["prediction_log"]["written"] > 100


@needs_wrk
@pytest.mark.usefixtures("small_world")
@pytest.mark.timeout(300)
def test_with_the_sink_halted_the_service_spills_answers_and_accounts_for_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = run.Options(tmp_path, peers=(), cases=("open",), seconds=1.0, rounds=1, entities=500)
    assert sink_dead.run_sink_dead(options, as_json=True) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert [(turn["log's Redis"], turn["requests/s"] > 0) for turn in found["turns"]] == [("answers", True), ("hangs", True)]
    assert found["most_on_disk"] > 0
    log = found["prediction_log"]
    assert (log["missing"], log["spilled"], log["dropped"], found["errors"]) == (0, 0, 0, 0)
    assert log["replayed"] > 0


def test_the_p99_is_held_where_it_moves_by_less_than_five_percent_in_most_rounds_and_no_record_is_missing() -> None:
    def found(dead_ms: list[float], accepted: int = 5, spilled: int = 9, errors: int = 0) -> sink_dead.Found:
        alive = [measured(OURS, turn, 100, 10.0) for turn in range(len(dead_ms))]
        dead = [measured(OURS, turn, 100, p99, errors=errors) for turn, p99 in enumerate(dead_ms)]
        balance = LogBalance({"accepted": accepted, "written": 5, "dropped": 0, "spilled": 0, "queued": 0}, 5)
        return sink_dead.Found({("1x64", sink_dead.ALIVE): alive, ("1x64", sink_dead.DEAD): dead}, balance, spilled)

    assert found([10.4, 30.0, 9.0]).held
    assert found([10.4, 30.0, 9.0]).moved("1x64") == pytest.approx(1.04)
    assert not found([10.4, 30.0, 11.0]).held
    assert not found([10.0], accepted=6).held
    assert not found([10.0], spilled=0).held
    assert not found([10.0], errors=1).held


@needs_wrk
@pytest.mark.usefixtures("small_world")
@pytest.mark.timeout(300)
def test_with_three_times_the_load_some_are_refused_and_the_others_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert overload.run_overload(run.Options(tmp_path, peers=(), seconds=1.0, rounds=1, entities=500), as_json=True) in (0, 1)
    full, half, over = json.loads(capsys.readouterr().out)["loads"]
    assert min(load["accepted/s"] for load in (full, half, over)) > 0
    assert over["refused/s"] > 0


def test_overload_is_held_where_enough_is_answered_soon_enough_and_half_the_load_is_answered_whole() -> None:
    def found(per_s: float, p99_ms: float, refused: int = 9, refused_at_half: int = 0) -> overload.Found:
        full, half = measured(OURS, 0, 100, 10.0), measured(OURS, 0, 50, 5.0, errors=refused_at_half)
        return overload.Found([full], [half], [measured(OURS, 0, per_s, p99_ms, errors=refused)])

    assert found(80, 20.0).held
    assert not found(79, 20.0).held
    assert not found(80, 20.1).held
    assert not found(80, 20.0, refused=0).held
    assert not found(80, 20.0, refused_at_half=1).held


def test_the_command_serves_the_made_up_model_unless_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, run.Options]] = []
    commands = (
        (run, "run_check"),
        (run, "run_profile"),
        (run, "run_bench_serving"),
        (sink_dead, "run_sink_dead"),
        (overload, "run_overload"),
    )
    for module, name in commands:
        monkeypatch.setattr(module, name, lambda options, _, name=name: asked.append((name, options)) or 3)
    home = ["--home", str(tmp_path)]
    for words in (
        [],
        ["--peers", "none", "--check"],
        ["--model", "flight_disruption", "--profile", "--cases", "open"],
        ["--sink-dead"],
        ["--overload"],
        ["--model", "flight_disruption,arrival_delay"],
    ):
        assert CliRunner().invoke(app, ["bench", "serving", *home, *words]).exit_code == 3
    made_up, check, own, dead, _, both = (options for _, options in asked)
    assert [name for name, _ in asked[:-1]] == ["run_bench_serving", "run_check", "run_profile", "run_sink_dead", "run_overload"]
    assert (both.model, both.more, both.home) == ("flight_disruption", ["arrival_delay"], tmp_path)
    two = CliRunner().invoke(app, ["bench", "serving", *home, "--model", "a,b", "--check"])
    assert two.exit_code == 2
    assert len(asked) == 6
    assert (made_up.seconds, dead.seconds) == (3.0, 60.0)
    assert (made_up.cases, dead.cases) == (tuple(CASES), ("1x64", "open"))
    assert (made_up.model, made_up.home, made_up.peers, check.peers) == (world.MODEL, None, None, ())
    assert (own.model, own.home, own.cases) == ("flight_disruption", tmp_path, ("open",))
