"""Peers whose packages don't agree with ours get a virtual environment of their own, made once.

Belongs here: making it. Does not belong here: which packages a peer needs (`contenders`).
"""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


class PeerEnvironmentError(RuntimeError):
    """The environment could not be made; carries what pip said."""


def peer_environment(root: Path, name: str, packages: Sequence[str]) -> Path:
    """The `bin` folder of an environment with these pinned packages under `root`, made where it is not there yet.

    Other packages are another environment. One whose making was cut short is made anew.
    """
    from rich.console import Console

    wanted = hashlib.sha256(" ".join((sys.version, *packages)).encode()).hexdigest()[:12]
    folder = (root / f"{name}-{wanted}").absolute()
    done = folder / "installed"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        # On stderr: the figures may be JSON for a program.
        with Console(stderr=True).status(f"installing {', '.join(packages)} for the peer '{name}' (once, about a minute)"):
            _run([sys.executable, "-m", "venv", str(folder)])
            _run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages])
        done.touch()
    return folder / "bin"


def _run(command: list[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise PeerEnvironmentError(f"{' '.join(command)} ended with status {ended.returncode}: {ended.stderr.strip()[-1000:]}")
