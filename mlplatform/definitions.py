"""The one place Dagster loads: assembles what the catalogs declare, decides nothing.

Belongs here: putting assets, checks, automation and resources together. Does not belong here: anything else.
"""

import dagster as dg

from mlplatform.catalog.discover import catalogs
from mlplatform.orchestration.build import build


@dg.definitions
def defs() -> dg.Definitions:
    """Every catalog's assets, with the automation and the resources around them."""
    return build(catalogs())
