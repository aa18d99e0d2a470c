"""The images install what pyproject.toml declares, at the pinned versions, from files that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCKERFILES = ("dagster.Dockerfile", "serving.Dockerfile", "mlflow.Dockerfile")


def lines(root: Path, name: str) -> list[str]:
    """Instructions, continued lines joined."""
    text = (root / "deploy" / name).read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def requirements(root: Path, instruction: str, torch: str = "") -> list[str]:
    """What the instruction's call of requirements.py prints, with the defaults of its build arguments."""
    words = instruction.partition("requirements.py")[2].partition(">")[0].replace('"$XGBOOST"', "cpu")
    words = words.replace('${TORCH:+--extra "$TORCH"}', torch and f"--extra {torch}").split()
    done = subprocess.run([sys.executable, root / "deploy/requirements.py", *words], capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[:-1]


def names(found: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~ ;]", line)[0] for line in found}


def test_the_compose_file_builds_exactly_these(root, compose) -> None:
    built = {s["build"]["dockerfile"] for s in compose["services"].values() if "build" in s}
    assert built == {f"deploy/{name}" for name in DOCKERFILES}


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_exists_and_reaches_the_builder(root, name) -> None:
    sent = {line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [word for line in lines(root, name) if line.startswith("COPY") for word in line.split()[1:-1]]
    assert copied
    for source in copied:
        assert (root / source).exists(), source
        assert source.split("/")[0] in sent, f"{source} is kept from the builder by .dockerignore"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_installs_pinned_versions_and_does_not_run_as_root(root, name) -> None:
    installs = [line for line in lines(root, name) if "pip install" in line and "--no-deps ." not in line]
    assert len(installs) == 1
    assert "--constraint constraints.txt" in installs[0]
    assert [line for line in lines(root, name) if line.startswith("USER")] not in ([], ["USER root"])


@pytest.mark.parametrize("name", DOCKERFILES)
def test_every_requirement_of_an_image_has_a_pin(root, name) -> None:
    instruction = next(line for line in lines(root, name) if "requirements.py" in line and line.startswith("RUN"))
    canonical = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in (root / "constraints.txt").read_text().splitlines()}
    found = {re.sub(r"[-_.]+", "-", name).lower() for name in names(requirements(root, instruction))}
    assert found <= canonical


def test_the_service_image_is_small_and_knows_no_dagster(root) -> None:
    instruction = next(line for line in lines(root, "serving.Dockerfile") if "requirements.py" in line and line.startswith("RUN"))
    found = names(requirements(root, instruction))
    assert {"fastapi", "xgboost-cpu", "redis"} <= found
    assert not found & {"dagster", "mlflow", "feast", "torch", "deltalake"}
    assert names(requirements(root, instruction, "torch")) - found == {"torch", "safetensors"}


def test_the_dagster_image_has_the_drivers_of_the_production_stores(root) -> None:
    instruction = next(line for line in lines(root, "dagster.Dockerfile") if "requirements.py" in line and line.startswith("RUN"))
    found = names(requirements(root, instruction))
    assert {"dagster", "dagster-aws", "dagster-postgres", "psycopg2-binary", "boto3", "xgboost-cpu"} <= found


def test_an_unknown_package_stops_the_build(root) -> None:
    done = subprocess.run(
        [sys.executable, root / "deploy/requirements.py", "--package", "no-such-package"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "no-such-package" in done.stderr
