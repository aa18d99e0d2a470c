"""Prints the requirements of an image from pyproject.toml, one a line, for `pip install --requirement … --constraint constraints.txt`.

Belongs here: picking from what pyproject.toml declares. Does not belong here: versions. Standard library only: it runs
before anything is installed.
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def requirements(base: bool, extras: list[str], packages: list[str]) -> list[str]:
    """The base dependencies, whole extras, and single packages wherever they are declared. Raises KeyError for an unknown name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    declared = [*project["dependencies"], *(line for lines in optional.values() for line in lines)]
    by_name = {re.split(r"[\[<>=!~ ;]", line)[0]: line for line in reversed(declared)}
    picked = [*(project["dependencies"] if base else ()), *(line for name in extras for line in optional[name])]
    return sorted({*picked, *(by_name[name] for name in packages)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", action="store_true", help="the project's own dependencies")
    parser.add_argument("--extra", action="append", default=[], help="an optional group; may be repeated")
    parser.add_argument("--package", action="append", default=[], help="one declared package; may be repeated")
    asked = parser.parse_args()
    sys.stdout.write("\n".join(requirements(asked.base, asked.extra, asked.package)) + "\n")


if __name__ == "__main__":
    main()
