"""`make lock`: the installed versions as the lines of constraints.txt.

Belongs here: printing them. Does not belong here: choosing versions (pip does, from pyproject.toml).
"""

import importlib.metadata
import sys

HEADER = """\
# Every version, pinned: what `make install` installs. Renewed by `make lock`.
# torch without a local part, so that a CPU build of that version is taken where one is offered."""

# Libraries of a CUDA build: which of them belong is that build's own business.
_LEFT_OUT = ("nvidia-", "triton", "mlplatform", "pip", "setuptools", "wheel")
# Both extras stay pinned, whichever of the two is installed here.
_XGBOOST = ("xgboost", "xgboost-cpu")


def lines() -> list[str]:
    """`name==version`, sorted by name."""
    found = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    xgboost = next(found[name] for name in _XGBOOST if name in found)
    found |= dict.fromkeys(_XGBOOST, xgboost)
    return [f"{name}=={version.split('+')[0]}" for name, version in sorted(found.items()) if not name.startswith(_LEFT_OUT)]


if __name__ == "__main__":
    sys.stdout.write("\n".join([HEADER, *lines()]) + "\n")
