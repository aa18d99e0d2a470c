"""`mlplatform doctor`: looks at everything the platform stands on, and says how to mend each fault.

Belongs here: one function per thing looked at, giving findings. Does not belong here: mending, printing (`cli`).
No check raises, and none waits longer than a few seconds: what cannot be found out is a finding.
"""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from mlplatform.cli_faults import places
from mlplatform.doctor_platform import PLATFORM_CHECKS, Finding, Level, Patient
from mlplatform.local.service_state import read_state
from mlplatform.queries import QuestionError, use_home

_PYTHON = (3, 11)
_LOW_DISK, _NO_DISK = 5e9, 0.5e9  # bytes; the demo writes about 2 GB


def diagnose(home: Path, constraints: Path | None = None) -> list[Finding]:
    """Every finding, in the order one would mend them. `constraints` defaults to the checkout's constraints.txt."""
    found = [*_python(), *_packages(constraints or Path(__file__).parents[1] / "constraints.txt"), *_home(home)]
    try:
        patient = Patient(home, use_home(home), read_state(home))
    except QuestionError as fault:
        return [*found, Finding("settings", "fail", str(fault), "`make down`, then `make up`")]
    except ValueError as refused:
        return [*found, Finding("settings", "fail", in_one_line(refused), "set the MLPLATFORM_* variables named (mlplatform/settings.py)")]
    found.append(Finding("settings", "ok", f"profile {patient.settings.profile.value}"))
    for check in _CHECKS:
        found += check(patient)
    return found


def worst(findings: list[Finding]) -> Level:
    levels = {finding.level for finding in findings}
    return "fail" if "fail" in levels else "warn" if "warn" in levels else "ok"


def in_one_line(refused: ValueError) -> str:
    """Refused settings in one line; values stay out, they may be secrets."""
    from pydantic import ValidationError

    return places(refused, "MLPLATFORM_") if isinstance(refused, ValidationError) else str(refused)


# --- this machine ----------------------------------------------------------------------------------------------------


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < _PYTHON:
        yield Finding("python", "fail", version, "Python 3.11 or newer: make install PYTHON=/path/to/python3.11")
    else:
        yield Finding("python", "ok", version)


def _packages(constraints: Path) -> Iterator[Finding]:
    installed = {_canonical(d.metadata["Name"]): d.version for d in metadata.distributions() if d.metadata["Name"]}
    if missing := sorted(_required() - set(installed)):
        yield Finding("packages", "fail", f"missing: {', '.join(missing)}", "`make install`")
    if not constraints.is_file():
        yield Finding("packages", "warn", "no constraints.txt beside the code: versions are not compared", "run from a checkout")
        return
    pins = dict(line.split("==") for line in constraints.read_text().splitlines() if "==" in line and not line.startswith("#"))
    # A local part (2.13.0+cpu) names the build of the same version.
    other = [
        f"{name} {have} (pinned {pin})" for name, pin in pins.items() if (have := installed.get(_canonical(name), pin)).split("+")[0] != pin
    ]
    if other:
        more = f" and {len(other) - 5} more" if len(other) > 5 else ""
        yield Finding("packages", "warn", f"other versions than tested: {', '.join(other[:5])}{more}", "`make install`")
    elif not missing:
        yield Finding("packages", "ok", f"{sum(_canonical(name) in installed for name in pins)} packages as pinned")


def _canonical(name: str) -> str:
    return name.replace("_", "-").replace(".", "-").lower()


def _required() -> set[str]:
    """Names of what the project itself depends on, extras apart; empty where it is not installed but only on the path."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("mlplatform") or []
    except metadata.PackageNotFoundError:
        return set()
    wanted = (Requirement(line) for line in lines)
    return {_canonical(r.name) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})}


def _home(home: Path) -> Iterator[Finding]:
    place = next(path for path in (home.absolute(), *home.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        yield Finding("home", "fail", f"{home} cannot be written", "choose another with --home, or mend the folder's permissions")
        return
    free = shutil.disk_usage(place).free
    detail = f"{home}, {free / 1e9:.1f} GB free"
    if free < _LOW_DISK:
        yield Finding("home", "fail" if free < _NO_DISK else "warn", detail, "free some disk, or choose another disk with --home")
    else:
        yield Finding("home", "ok", detail)


def _ports(_: Patient) -> Iterator[Finding]:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError as fault:
        yield Finding("ports", "fail", f"no loopback port can be opened: {fault}", "let this process listen on 127.0.0.1")
    else:
        yield Finding("ports", "ok", "loopback ports can be opened")


def _device(patient: Patient) -> Iterator[Finding]:
    gpu, wanted = _gpu(), patient.settings.device
    builds = {name for name in ("xgboost", "xgboost-cpu") if _has(name)}
    if len(builds) == 2:
        yield Finding(
            "device", "fail", "xgboost and xgboost-cpu are both installed and overwrite each other", "remove .venv, then `make install`"
        )
    elif wanted.startswith("cuda") and gpu is None:
        yield Finding("device", "fail", f"MLPLATFORM_DEVICE={wanted}, but nvidia-smi names no GPU", "set it to auto, or install the driver")
    elif gpu is not None and builds == {"xgboost-cpu"}:
        level: Level = "fail" if wanted.startswith("cuda") else "warn"
        yield Finding(
            "device", level, f"{gpu} is here, but xgboost-cpu is installed", "remove .venv, then `make install`: it picks the CUDA build"
        )
    else:
        yield Finding("device", "ok", f"{wanted}: {gpu or 'no GPU, the processor is used'}")


def _has(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _gpu() -> str | None:
    """The first GPU's name by nvidia-smi; None where it is not there or names none."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def _chromium(_: Patient) -> Iterator[Finding]:
    from mlplatform.local.pictures import find_chromium

    found = find_chromium()
    if found:
        yield Finding("chromium", "ok", str(found))
    else:
        yield Finding(
            "chromium", "warn", "none found: `make pictures` is skipped", "install chromium, if you want to renew the guide's pictures"
        )


_CHECKS: tuple[Callable[[Patient], Iterator[Finding]], ...] = (*PLATFORM_CHECKS, _device, _chromium, _ports)
