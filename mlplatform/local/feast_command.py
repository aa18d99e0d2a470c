"""`mlplatform feast -- …`: Feast's own command line on our repository, with the variables its configuration reads.

Belongs here: the environment and handing over. Does not belong here: anything Feast does.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from feature_definitions.environment import feast_environment
from mlplatform.clients.features import repository
from mlplatform.settings import Settings


def run_feast(settings: Settings, arguments: Sequence[str]) -> NoReturn:
    """Becomes the Feast process, so that Ctrl-C and a service manager reach it."""
    environment = os.environ | feast_environment(settings)
    registry = environment["MLPLATFORM_FEAST_REGISTRY"]
    if "://" not in registry:
        Path(registry).parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "feast.cli.cli", "-c", str(repository()), *arguments]
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)  # noqa: S606  # no shell: the arguments are passed as they are
