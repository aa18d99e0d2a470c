"""Which code runs here: the commit, and what differs from it.

Belongs here: finding that out, for model versions and prediction records alike. Only the standard library may be imported. Does not
belong here: where it is written.
"""

import hashlib
import importlib.util
import subprocess
from collections.abc import Iterable
from pathlib import Path


def code_version(stated: str) -> tuple[str, bool]:
    """(commit, whether the tree differs from it). `stated`: the setting CODE_VERSION, by which an image without git says its commit."""
    if stated:
        return stated, False
    home = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=home, capture_output=True, text=True, check=False)
        if commit.returncode != 0:
            return "unknown", True
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=home, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        return "unknown", True
    return commit.stdout.strip(), bool(changes.stdout.strip())


def code_name(stated: str, packages: Iterable[str]) -> str:
    """One word for the code: the commit, and where that does not tell everything `+` and a hash of these packages' sources."""
    commit, differs = code_version(stated)
    return f"{commit}+{source_digest(packages)[:12]}" if differs else commit


def source_digest(packages: Iterable[str]) -> str:
    """SHA-256 over the Python files of packages, by their names within them. Raises LookupError for one that is not there."""
    digest = hashlib.sha256()
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise LookupError(f"there is no package {package}")
        root = Path(spec.origin)
        files = sorted(root.parent.rglob("*.py")) if root.name == "__init__.py" else [root]
        for file in files:
            digest.update(f"{package}/{file.relative_to(root.parent)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()
