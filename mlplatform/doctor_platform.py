"""Doctor's look at the platform's own parts: services, stores, sources.

Belongs here: one function per part, giving findings. Does not belong here: the machine below them (`doctor`).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlplatform.addresses import without_password
from mlplatform.local.service_state import State, kept
from mlplatform.queries import fetch
from mlplatform.queries_stream import told, worker
from mlplatform.settings import Profile, Settings

Level = Literal["ok", "warn", "fail"]

_START = "not running: `make up`"
_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Finding:
    """What one check found; `mend` says what to do about it, empty where it is well. `away`: what was asked does not answer."""

    check: str
    level: Level
    detail: str
    mend: str = ""
    away: bool = False


@dataclass(frozen=True)
class Patient:
    """What the checks look at. `expected`: services that do not answer are a fault, not merely not started."""

    home: Path
    settings: Settings
    state: State

    @property
    def expected(self) -> bool:
        return self.settings.profile is Profile.PRODUCTION or any(service.running for service in self.state.services)

    def down(self, check: str, detail: str, mend: str) -> Finding:
        """Something does not answer."""
        if self.expected:
            return Finding(check, "fail", detail, mend, away=True)
        return Finding(check, "warn", detail, f"{_START}; or {mend}", away=True)

    def lacking(self, check: str, detail: str, mend: str) -> Finding:
        """Something was never set or made."""
        return Finding(check, "fail", detail, mend) if self.expected else Finding(check, "warn", detail, _START)


# --- services --------------------------------------------------------------------------------------------------------


def services(patient: Patient) -> Iterator[Finding]:
    """Those the local profile has recorded."""
    if patient.settings.profile is Profile.PRODUCTION:
        return
    recorded = patient.state.services
    if not any(service.running for service in recorded):
        yield Finding("services", "warn", f"nothing runs under {patient.home}", _START)
        return
    running = [service.name for service in recorded if service.running]
    for service in recorded:
        log = patient.home / "logs" / f"{service.name}.log"
        if not service.running:
            yield Finding("services", "fail", f"{service.name} has ended; {log} tells why", "`make up` starts it again, and nothing else")
        elif (keeper := kept(patient.home, service.name)) is not None and keeper.last_end:
            again = "runs again" if keeper.pid else f"is started again in {keeper.wait_s:g} s"
            ended = f"{service.name} ended with {keeper.last_end} and {again} (restarts: {keeper.restarts})"
            yield Finding("services", "warn" if keeper.pid else "fail", ended, f"{log} tells why")
    # Beside one that has ended, a list of the others under a tick would read as if all were well.
    if len(running) == len(recorded):
        yield Finding("services", "ok", f"running: {', '.join(running)}")
    else:
        yield Finding("services", "warn", f"{len(running)} of {len(recorded)} run: {', '.join(running)}", "see above")


def redis(patient: Patient) -> Iterator[Finding]:
    yield _ping(patient, "redis", patient.settings.redis_url.get_secret_value(), "check MLPLATFORM_REDIS_URL, and that the server runs")
    if patient.settings.online_url.get_secret_value():
        yield _ping(patient, "online store", patient.settings.online_redis_url, "check MLPLATFORM_ONLINE_URL, and that the server runs")


def _ping(patient: Patient, check: str, url: str, mend: str) -> Finding:
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisError
    from redis.retry import Retry

    where = without_password(url)
    try:
        with Redis.from_url(url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S, retry=Retry(NoBackoff(), 0)) as client:
            client.ping()
    except (RedisError, OSError, ValueError) as fault:
        return patient.down(check, f"{where} does not answer: {_line(fault)}", mend)
    return Finding(check, "ok", where)


def _answers(patient: Patient, check: str, url: str, path: str, mend: str) -> Finding:
    """Whether `GET url + path` answers 200."""
    try:
        code, _ = fetch(url.rstrip("/") + path, _TIMEOUT_S)
    except (OSError, ValueError) as fault:
        return patient.down(check, f"{without_password(url)} does not answer: {_line(fault)}", mend)
    where = without_password(url)
    return (
        Finding(check, "ok", where)
        if code == 200
        else Finding(check, "fail", f"{where}{path} answers {code}: something else listens there", mend)
    )


def mlflow(patient: Patient) -> Iterator[Finding]:
    uri = patient.settings.mlflow_uri
    if uri.startswith(("http://", "https://")):
        yield _answers(patient, "mlflow", uri, "/health", "check MLPLATFORM_MLFLOW_URL, and that the server runs")
    elif Path(uri.removeprefix("sqlite:///")).is_file():
        yield Finding("mlflow", "ok", f"no server; its store is {uri}")
    else:
        yield patient.lacking("mlflow", "no server, and no store yet", "`make demo`")


def serving(patient: Patient) -> Iterator[Finding]:
    url = patient.settings.serving_url
    where = without_password(url)
    live = _answers(patient, "serving", url, "/health/live", "start it, or set MLPLATFORM_SERVING_URL to where it answers")
    if live.level != "ok":
        yield live
        return
    try:
        code, body = fetch(f"{url.rstrip('/')}/health/ready", _TIMEOUT_S)
    except OSError as fault:
        yield patient.down("serving", f"{where} stopped answering: {_line(fault)}", "look into its log")
        return
    if code == 200:
        yield Finding("serving", "ok", f"{where}, ready")
    else:
        yield Finding("serving", "warn", f"{where} is alive, not ready: {_problem(body)}", "promote a version, or mend what it names")


def _problem(body: bytes) -> str:
    """The detail of a problem document (RFC 9457); the start of the body where it is none."""
    try:
        return str(json.loads(body)["detail"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:200]


def dagster(patient: Patient) -> Iterator[Finding]:
    names = {service.name for service in patient.state.services}
    if patient.settings.profile is Profile.LOCAL and names and not any(name.startswith("dagster") for name in names):
        yield Finding("dagster", "warn", "its UI was not started", "`make up`")
        return
    yield _answers(
        patient, "dagster", patient.settings.dagster_url, "/server_info", "start it, or set MLPLATFORM_DAGSTER_URL to where it answers"
    )


def stream(patient: Patient) -> Iterator[Finding]:
    """Whether somebody keeps the streamed views, and all of them."""
    if patient.settings.profile is Profile.LOCAL and not any(service.name == "stream" for service in patient.state.services):
        yield Finding("stream", "warn", "the streaming worker was not started", "`make up`")
        return
    found = worker(patient.settings)
    if found is None or not found["works"]:
        yield patient.down("stream", told(found), "`make up`, or `mlplatform stream`; a worker that waits says in its log for what")
        return
    for view, reason in found["stopped"].items():
        yield Finding("stream", "fail", f"view {view} is stopped: {reason}", "mend what it names; the worker tries again by itself")
    yield Finding("stream", "ok", told(found))


# --- stores and sources ----------------------------------------------------------------------------------------------


def lake(patient: Patient) -> Iterator[Finding]:
    root = patient.settings.lake_root
    if "://" not in root:
        tables = list(Path(root).glob("*/*/_delta_log"))
        if tables:
            yield Finding("lake", "ok", f"{root}, {len(tables)} tables")
        else:
            yield Finding("lake", "warn", f"{root} holds no table yet", "`make demo`")
        return
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    options = patient.settings.storage_options() | {"timeout": "5s", "connect_timeout": "3s", "max_retries": "1"}
    try:
        # Any table will do: whether this one exists is told only after the store has answered.
        DeltaTable.is_deltatable(f"{root.rstrip('/')}/deployment/doctor", options)
    except (DeltaError, OSError, ValueError) as fault:
        yield Finding("lake", "fail", f"{root} cannot be read: {_line(fault)}", "check MLPLATFORM_LAKE and MLPLATFORM_S3_*", away=True)
    else:
        yield Finding("lake", "ok", root)


def feast(patient: Patient) -> Iterator[Finding]:
    registry = patient.settings.feast_registry_path
    if "://" in registry:
        yield _connects(patient, "feast", registry, "check MLPLATFORM_FEAST_REGISTRY")
    elif Path(registry).is_file():
        yield Finding("feast", "ok", registry)
    else:
        yield Finding("feast", "warn", "its registry is not written yet", "`make demo`, or materialize an online view")


def _connects(patient: Patient, check: str, url: str, mend: str) -> Finding:
    """Whether the database behind a SQL URL lets us in."""
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError

    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).is_file():
        return patient.lacking(check, f"{url} is not there", mend)  # connecting would make it
    try:
        engine = create_engine(url)
        try:
            with engine.connect():
                return Finding(check, "ok", engine.url.render_as_string(hide_password=True))
        finally:
            engine.dispose()
    except (SQLAlchemyError, ImportError) as fault:
        return patient.down(check, f"{without_password(url)} refuses: {_line(fault)}", mend)


def sources(patient: Patient) -> Iterator[Finding]:
    for name in ("reference", "weather", "events", "archive"):
        check, mend = f"source {name}", f"check MLPLATFORM_SOURCE_{name.upper()}, and that the system runs"
        try:
            address = patient.settings.connection(name)
        except ValueError as unset:
            yield patient.lacking(check, str(unset), mend)
            continue
        yield _source(patient, check, address, mend)


def _source(patient: Patient, check: str, address: str, mend: str) -> Finding:
    scheme = address.partition("://")[0] if "://" in address else ""
    if scheme in ("redis", "rediss", "unix"):
        return _ping(patient, check, address, mend)
    if scheme in ("http", "https"):
        try:
            fetch(address, _TIMEOUT_S)  # any answer: an API need not have anything at its base
        except (OSError, ValueError) as fault:
            return patient.down(check, f"{without_password(address)} does not answer: {_line(fault)}", mend)
        return Finding(check, "ok", without_password(address))
    if scheme == "":
        there = Path(address).is_dir()
        return Finding(check, "ok", address) if there else patient.lacking(check, f"{address} is not there", mend)
    if scheme in ("s3", "gs", "file"):
        return Finding(check, "warn", f"{address}: not looked at", "materialize its asset: that tells")
    return _connects(patient, check, address, mend)


def _line(fault: Exception) -> str:
    """The first line of what an exception says."""
    return (str(fault).strip() or type(fault).__name__).splitlines()[0][:200]


PLATFORM_CHECKS: tuple[Callable[[Patient], Iterator[Finding]], ...] = (
    services,
    redis,
    mlflow,
    lake,
    feast,
    sources,
    serving,
    dagster,
    stream,
)
