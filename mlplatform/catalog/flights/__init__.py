"""The flights use case: flights out of New York in 2013, and whether each will be disrupted.

Belongs here: the one declaration the platform finds. Does not belong here: what it is made of (`sources`, `models`).
"""

from datetime import date

from mlplatform.catalog.flights.models import MODELS
from mlplatform.catalog.flights.sources import SOURCES
from mlplatform.specs import Catalog

CATALOG = Catalog(
    name="flights",
    sources=SOURCES,
    models=MODELS,
    feature_package="feature_definitions.flights",
    start=date(2013, 1, 1),
    # A closed set of data: the last outcomes of 2013 become known in the first days of 2014.
    end=date(2014, 1, 6),
    timezone="America/New_York",
)
