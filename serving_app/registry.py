"""MLflow's model registry over plain HTTP, without importing mlflow (three seconds and 200 MB the service does not have).

Belongs here: the few REST calls the service needs. Does not belong here: caching, verifying, deciding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from mlplatform.addresses import without_password
from mlplatform.verified import Sealed
from serving_app.model_handle import VersionRef

_API = "/api/2.0/mlflow"
_MAX_FILE_BYTES = 1_000_000_000


class RegistryError(Exception):
    """MLflow did not answer, or not as a registry does. Never means 'no such model'."""


@dataclass(frozen=True)
class Registration:
    """What the registry says of a model: version numbers by alias, and the model's tags."""

    model: str
    aliases: Mapping[str, int]
    tags: Mapping[str, str]


class MlflowRegistry:
    """One MLflow server. Every call raises RegistryError where the server fails, None where it says that there is nothing."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._shown = without_password(url)
        self._http = httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 2.0)))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._http.aclose()

    async def registration(self, model: str) -> Registration | None:
        """Aliases and tags of a registered model, read at one moment; None where the model does not exist."""
        answer = await self._get(f"{_API}/registered-models/get", {"name": model})
        if answer.status_code == 404:
            return None
        told = _json(answer).get("registered_model", {})
        try:
            aliases = {str(a["alias"]): int(a["version"]) for a in told.get("aliases", [])}
            tags = {str(t["key"]): str(t.get("value", "")) for t in told.get("tags", [])}
        except (KeyError, ValueError, TypeError) as error:
            raise RegistryError(f"MLflow did not tell the aliases of {model} as expected: {error!r}") from error
        return Registration(model, aliases, tags)

    async def version(self, model: str, number: int) -> VersionRef | None:
        """A version by its number; None where it does not exist. Asked each time: the number of a deleted version is given again."""
        answer = await self._get(f"{_API}/model-versions/get", {"name": model, "version": str(number)})
        if answer.status_code == 404:
            return None
        told = _json(answer).get("model_version", {})
        try:
            tags = {str(t["key"]): str(t.get("value", "")) for t in told.get("tags", [])}
        except (KeyError, TypeError) as error:
            raise RegistryError(f"MLflow did not tell the tags of version {number} of {model} as expected: {error!r}") from error
        return VersionRef(model, number, f"{told.get('source', '')}#{told.get('creation_timestamp', '')}", Sealed.from_tags(tags))

    async def models_with(self, alias: str) -> list[str]:
        """Names of all registered models that carry the alias."""
        names: list[str] = []
        token = ""
        while True:
            page = _json(
                await self._get(f"{_API}/registered-models/search", {"max_results": "200"} | ({"page_token": token} if token else {}))
            )
            names += [m["name"] for m in page.get("registered_models", []) if any(a.get("alias") == alias for a in m.get("aliases", []))]
            token = page.get("next_page_token", "")
            if not token:
                return names

    async def file_names(self, ref: VersionRef) -> list[str] | None:
        """Every file beside the model, relative; None where the server does not proxy its artifacts and so cannot list them."""
        uri = _json(await self._get(f"{_API}/model-versions/get-download-uri", {"name": ref.model, "version": str(ref.version)})).get(
            "artifact_uri", ""
        )
        scheme, _, path = uri.partition(":")
        if scheme != "mlflow-artifacts":
            return None
        root = httpx.URL(uri).path.strip("/") if path.startswith("//") else path.strip("/")
        names: list[str] = []
        folders = [root]
        while folders:
            folder = folders.pop()
            for entry in _json(await self._get("/api/2.0/mlflow-artifacts/artifacts", {"path": folder})).get("files", []):
                full = f"{folder}/{entry['path'].rsplit('/', 1)[-1]}"
                if entry.get("is_dir"):
                    folders.append(full)
                else:
                    names.append(full.removeprefix(root + "/"))
        return names

    async def read(self, ref: VersionRef, name: str) -> bytes | None:
        """A file beside the model, by its relative name; None where there is none."""
        try:
            async with self._http.stream(
                "GET", "/model-versions/get-artifact", params={"name": ref.model, "version": str(ref.version), "path": name}
            ) as answer:
                if answer.status_code == 404:
                    return None
                if answer.status_code != 200:
                    await answer.aread()
                    raise RegistryError(
                        f"MLflow answered {answer.status_code} for {name} of {ref.model} version {ref.version}: {answer.text[:200]}"
                    )
                parts: list[bytes] = []
                size = 0
                async for part in answer.aiter_bytes():
                    size += len(part)
                    if size > _MAX_FILE_BYTES:
                        raise RegistryError(f"{name} of {ref.model} version {ref.version} is larger than {_MAX_FILE_BYTES} bytes")
                    parts.append(part)
                return b"".join(parts)
        except httpx.HTTPError as error:
            raise RegistryError(f"MLflow did not send {name} of {ref.model} version {ref.version}: {error!r}") from error

    async def _get(self, path: str, params: dict[str, str]) -> httpx.Response:
        try:
            return await self._http.get(path, params=params)
        except httpx.HTTPError as error:
            raise RegistryError(f"MLflow does not answer at {self._shown}: {error!r}") from error


def _json(answer: httpx.Response) -> dict[str, Any]:
    if answer.status_code != 200:
        raise RegistryError(f"MLflow answered {answer.status_code} to {answer.request.url.path}: {answer.text[:200]}")
    try:
        body = answer.json()
    except ValueError as error:
        raise RegistryError(f"MLflow answered {answer.request.url.path} with something that is not JSON") from error
    if not isinstance(body, dict):
        raise RegistryError(f"MLflow answered {answer.request.url.path} with {type(body).__name__}, not an object")
    return body
