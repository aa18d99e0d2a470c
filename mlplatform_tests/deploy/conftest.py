"""The compose file as Compose would see it: interpolated with a filled-in `.env.example`."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILLED = {
    "IMAGE_TAG": "2026-11-22",
    "CODE_VERSION": "0123abc",
    "SOURCE_REFERENCE": "postgresql+psycopg2://reader:dummy@reference.example/erp",
    "SOURCE_WEATHER": "https://weather.example/api",
    "SOURCE_EVENTS": "rediss://:dummy@events.example:6379/0",
    "SOURCE_ARCHIVE": "s3://archive/events",
}
_VARIABLE = re.compile(r"\$(?:(\$)|\{([A-Z0-9_]+)(?:(:[-?])([^}]*))?\})")


class UnsetError(Exception):
    """Compose would stop here with this message."""


def interpolate(node: Any, values: Mapping[str, str]) -> Any:
    """Compose's interpolation, in the forms the file uses: ${A}, ${A:-default}, ${A:?message}, $$."""

    def value_of(match: re.Match[str]) -> str:
        escaped, name, operator, rest = match.groups()
        if escaped:
            return "$"
        if values.get(name):
            return values[name]
        if operator == ":-":
            return str(rest)
        raise UnsetError(f"{name}: {rest or 'neither set nor explained'}")

    if isinstance(node, str):
        return _VARIABLE.sub(value_of, node)
    if isinstance(node, dict):
        return {key: interpolate(value, values) for key, value in node.items()}
    if isinstance(node, list):
        return [interpolate(value, values) for value in node]
    return node


def example_names() -> list[str]:
    """The variables `.env.example` asks for."""
    lines = (ROOT / "deploy/.env.example").read_text().splitlines()
    return [line.partition("=")[0] for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def compose() -> dict[str, Any]:
    """The file with its anchors merged and its variables as they stand."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return content


@pytest.fixture(scope="session")
def filled() -> dict[str, str]:
    """`.env.example` filled in with dummies, each secret another."""
    return {name: FILLED.get(name, f"dummy{number}") for number, name in enumerate(example_names())}


@pytest.fixture(scope="session")
def resolve(compose: dict[str, Any]) -> Callable[[Mapping[str, str]], dict[str, Any]]:
    """The file interpolated with the values; raises UnsetError. Parts only referred to (`x-…`) are left out, as Compose does."""
    plain = {key: value for key, value in compose.items() if not key.startswith("x-")}
    return lambda values: interpolate(plain, values)


@pytest.fixture(scope="session")
def resolved(resolve: Callable[[Mapping[str, str]], dict[str, Any]], filled: dict[str, str]) -> dict[str, Any]:
    return resolve(filled)
