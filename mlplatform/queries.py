"""What the command line's questions gather: services, models, deployment history, as plain JSON-able values.

Belongs here: asking the platform's parts and putting the answers together. Does not belong here: feature views and tables
(`queries_features`), printing (`cli`), changing anything. Heavy libraries are imported by the question that needs them.
"""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime, time
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mlplatform.addresses import with_credentials_apart

if TYPE_CHECKING:
    from mlplatform.clients.registry import Registry
    from mlplatform.local.service_state import Service
    from mlplatform.records import LedgerEntry, ModelVersion
    from mlplatform.settings import Settings

STAGES = (
    *("raw", "validated", "quarantine", "offline", "training_set", "evaluation", "deployment"),
    *("predictions", "outcomes", "performance", "data_drift", "prediction_drift", "skew"),
)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_TIMEOUT_S = 2.0


class QuestionError(LookupError):
    """The question has no answer; the message says why, and what to do."""


class RedisDownError(ConnectionError):
    """The platform's Redis does not answer."""


class NothingBuiltError(LookupError):
    """No platform was ever built under this home: most likely another one is meant."""


def use_home(home: Path) -> "Settings":
    """The settings of the platform under `home`: what its services were started with, below what the environment says already.

    Where nothing runs any more, MLflow is read from its own store: the address of the ended server is of no use.
    Raises `QuestionError` for an unreadable environment.json or a lake that is a file, `ValidationError` for settings that are refused.
    """
    from mlplatform.local.service_state import recorded_services
    from mlplatform.settings import load_settings

    os.environ["MLPLATFORM_HOME"] = str(home.absolute())
    recorded = _recorded_environment(home)
    if not recorded_services(home):
        recorded.pop("MLPLATFORM_MLFLOW_URL", None)
    for name, value in recorded.items():
        os.environ.setdefault(name, value)
    load_settings.cache_clear()
    settings = load_settings()
    if Path(settings.lake_root).is_file():
        raise QuestionError(
            f"{settings.lake_root} is a file, where the folder of the tables belongs: move it away, or mend MLPLATFORM_LAKE"
        )
    return settings


def built_home(home: Path) -> "Settings":
    """As `use_home`, for what makes no sense where no platform ever was. Raises `NothingBuiltError` there too.

    A lake that lies elsewhere needs nothing under the home.
    """
    settings = use_home(home)
    traces = [home / name for name in ("services.json", "environment.json", "clock.json", "lake")]
    if "://" not in settings.lake_root and not Path(settings.lake_root).exists() and not any(trace.exists() for trace in traces):
        raise NothingBuiltError(f"{home} holds no platform")
    return settings


def require_registry(settings: "Settings", home: Path) -> None:
    """Raises NothingBuiltError where the registry would be a file under `home` and there is none: opening it would make one."""
    if not settings.mlflow_url and not (settings.home / "mlflow" / "mlflow.db").exists():
        raise NothingBuiltError(f"{home} holds no platform")


def _recorded_environment(home: Path) -> dict[str, str]:
    path = home / "environment.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as fault:
        raise QuestionError(f"{path} cannot be read ({fault}): `make down`, then `make up` writes it anew") from fault
    if not isinstance(content, dict):
        raise QuestionError(f"{path} holds no object: `make down`, then `make up` writes it anew")
    return {str(name): str(value) for name, value in content.items()}


def fetch(url: str, timeout_s: float = _TIMEOUT_S, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    """(status, body) of a GET, whatever the status. Raises OSError where nothing answers. Loopback goes past any proxy."""
    handlers = [urllib.request.ProxyHandler({})] if urlsplit(url).hostname in _LOOPBACK else []
    address, credentials = with_credentials_apart(url)
    asked = urllib.request.Request(address, headers=credentials | dict(headers or {}))  # noqa: S310 - the address is a setting
    try:
        with urllib.request.build_opener(*handlers).open(asked, timeout=timeout_s) as answer:
            return int(answer.status), answer.read()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.read()
    except urllib.error.URLError as down:
        # Its own text is `<urlopen error …>`; the reason alone is what a person needs.
        raise ConnectionError(str(down.reason)) from down
    except HTTPException as nonsense:
        raise ConnectionError(f"something that does not speak HTTP answers ({type(nonsense).__name__})") from nonsense


# --- status ----------------------------------------------------------------------------------------------------------


def status(home: Path, settings: "Settings") -> dict[str, Any]:
    """Services with addresses, the clock, what serves, and when each stage was last written."""
    from mlplatform.clock import clock_from
    from mlplatform.local.service_state import read_state
    from mlplatform.queries_stream import worker

    served, fault = _serving(settings)
    services = [_service(home, service) for service in read_state(home).services]
    simulated = settings.clock != "system"
    clock = None if simulated and not Path(settings.clock).is_file() else clock_from(settings.clock).now().isoformat()
    return {
        "home": str(home.absolute()),
        "profile": settings.profile.value,
        "running": any(s["up"] for s in services),
        "services": services,
        "clock": {"now": clock, "simulated": simulated},
        "serving": served,
        "serving_fault": fault,
        "stream": worker(settings),
        "stages": last_writes(settings.lake_root),
    }


def _service(home: Path, service: "Service") -> dict[str, Any]:
    """`restarts`: how often it was started again by itself; None where nothing would."""
    from mlplatform.local.service_state import kept

    keeper = kept(home, service.name)
    up = service.running and (keeper is None or keeper.pid != 0)
    return {
        "service": service.name,
        "up": up,
        "url": service.url,
        "pid": service.pid if keeper is None else keeper.pid,
        "restarts": None if keeper is None else keeper.restarts,
    }


def _serving(settings: "Settings") -> tuple[list[dict[str, Any]] | None, str]:
    """The models the prediction service holds; None, and why, where it does not tell them."""
    secret = settings.serving_api_key.get_secret_value().strip()
    try:
        headers = {"authorization": f"Bearer {secret}"} if secret else {}
        code, body = fetch(f"{settings.serving_url.rstrip('/')}/v1/models", headers=headers)
        if code in (401, 403):
            return None, f"the prediction service asks for a key that may read its models (status {code}): set MLPLATFORM_SERVING_API_KEY"
        models = json.loads(body)["models"] if code == 200 else None
    except (OSError, ValueError, KeyError):
        models = None
    if models is None:
        return None, "the prediction service does not answer"
    return [{key: m.get(key) for key in ("name", "version", "previous_version", "refused")} for m in models], ""


def last_writes(lake_root: str) -> list[dict[str, Any]] | None:
    """Per stage its tables and the wall time of the newest commit, from the file system; None for a lake elsewhere."""
    root = Path(lake_root)
    if "://" in lake_root:
        return None
    found = []
    for stage in STAGES:
        # Commits only: checkpoints and their pointer are no news of the table.
        newest = [
            max(log.glob("*.json"), key=lambda file: file.stat().st_mtime, default=None) for log in root.glob(f"{stage}/*/_delta_log")
        ]
        times = [file.stat().st_mtime for file in newest if file is not None]
        if times:
            found.append({"stage": stage, "tables": len(times), "last_written": datetime.fromtimestamp(max(times), UTC).isoformat()})
    return found


# --- models ----------------------------------------------------------------------------------------------------------


def registry_of(settings: "Settings") -> "Registry":
    from mlplatform.clients.registry import Registry

    return Registry(settings.mlflow_uri)


def models(settings: "Settings") -> list[dict[str, Any]]:
    """Every registered model: what serves, what served before, how many versions there are."""
    from mlplatform.contracts import PREVIOUS, PRODUCTION

    uri = settings.mlflow_uri
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        return []  # opening the store would make it, and a question writes nothing
    registry = registry_of(settings)
    rows = []
    for name in registry.models():
        versions = registry.versions(name)
        by_alias = {alias: v.version for v in versions for alias in v.aliases}
        rows.append(
            {
                "model": name,
                "production": by_alias.get(PRODUCTION),
                "previous": by_alias.get(PREVIOUS),
                "newest": versions[0].version if versions else None,
                "versions": len(versions),
            }
        )
    return rows


def versions(settings: "Settings", model: str) -> list[dict[str, Any]]:
    """A model's versions, newest first, with their gates' verdict and evaluation. Raises UnknownModelError."""
    registry = registry_of(settings)
    return [_version(registry, version) for version in registry.versions(model)]


def _version(registry: "Registry", version: "ModelVersion") -> dict[str, Any]:
    from mlplatform.contracts import EVALUATION_TAG, GATE_RESULTS_TAG, GATES_TAG

    recorded = version.tags.get(EVALUATION_TAG)
    return {
        "version": version.version,
        "aliases": list(version.aliases),
        "gates": version.tags.get(GATES_TAG, "never evaluated"),
        # Of versions that were evaluated before results were kept: nothing.
        "gate_results": json.loads(version.tags.get(GATE_RESULTS_TAG, "[]")),
        "created_at": version.created_at.isoformat(),
        "metrics": json.loads(recorded) if recorded else {},
        "training_set_hash": version.tags.get("training_set_hash"),
        "code_commit": version.tags.get("code_commit"),
        "page": registry.model_ui_url(version),
    }


# --- history ---------------------------------------------------------------------------------------------------------


def history(settings: "Settings", model: str) -> tuple["LedgerEntry", ...]:
    """The deployment ledger, oldest first; needs no service. Raises QuestionError for a model nobody declares."""
    from mlplatform.clients.lake import Lake
    from mlplatform.clients.ledger import Ledger

    entries = Ledger(Lake(settings.lake_root, settings.storage_options())).entries(model)
    if not entries:
        require_declared(model)
    return entries


def require_known(settings: "Settings", model: str) -> None:
    """Raises QuestionError for a model that is neither declared nor registered. The registry is asked only for one that is not declared."""
    if model not in _declared() and all(row["model"] != model for row in models(settings)):
        require_declared(model)


def _declared() -> list[str]:
    from mlplatform.catalog.discover import catalogs

    return sorted(spec.name for catalog in catalogs() for spec in catalog.models)


def require_redis(settings: "Settings") -> None:
    """Raises RedisDownError where the platform's Redis, which carries the notices to the services, does not answer within seconds."""
    from redis import Redis
    from redis.exceptions import RedisError

    from mlplatform.addresses import without_password

    url = settings.redis_url.get_secret_value()
    try:
        with Redis.from_url(url, socket_connect_timeout=_TIMEOUT_S, socket_timeout=_TIMEOUT_S) as redis:
            redis.ping()
    except (RedisError, OSError) as down:
        raise RedisDownError(f"Redis at {without_password(url)} does not answer: {down}") from down


def require_declared(model: str) -> None:
    """Raises QuestionError where no catalog declares the model, naming those it does."""
    declared = _declared()
    if model not in declared:
        raise QuestionError(f"no model '{model}' is declared: choose one of {', '.join(declared)}")


def moment(text: str, now: datetime) -> datetime:
    """A time from the command line: ISO 8601, UTC where it names no zone; `14:03` is that time of the day of `now`.

    Raises QuestionError.
    """
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        try:
            found = datetime.combine(now.date(), time.fromisoformat(text))
        except ValueError:
            raise QuestionError(f"'{text}' is no time: write 2013-09-01T14:03, 2013-09-01 or 14:03 (UTC)") from None
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def entry_row(entry: "LedgerEntry") -> dict[str, Any]:
    return {
        "at": entry.at.isoformat(),
        "action": entry.action,
        "version": entry.version,
        "previous_version": entry.previous_version,
        "actor": entry.actor,
        "reason": entry.reason,
        "run_id": entry.run_id,
        "evidence": dict(entry.evidence),
    }
