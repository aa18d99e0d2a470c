"""What a request needs to be allowed, by its path.

Belongs here: the table from paths to actions and models. Does not belong here: who the caller is, or whether he may.
A path the table does not know needs a key for every model: a route that is added and forgotten here is closed, not open.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["health", "page", "hook", "predict", "about", "metrics", "admin", "unknown"]


@dataclass(frozen=True, slots=True)
class Need:
    """`model`: the one asked for; empty where no single model is meant."""

    kind: Kind
    model: str = ""


HEALTH = Need("health")  # for load balancers: never asked for a key, never refused for load
PAGE = Need("page")  # the page of the API, without any of its content
HOOK = Need("hook")  # signed by its sender, and checked where it is read: no key besides
METRICS = Need("metrics")
ADMIN = Need("admin")
ABOUT = Need("about")  # which models there are: any key
UNKNOWN = Need("unknown")

_EXACT = {
    "/health/live": HEALTH,
    "/health/ready": HEALTH,
    "/v2/health/live": HEALTH,
    "/v2/health/ready": HEALTH,
    "/ping": HEALTH,
    "/health": HEALTH,
    "/": PAGE,
    "/docs": PAGE,
    "/docs.css": PAGE,
    "/docs.js": PAGE,
    "/metrics": METRICS,
    "/openapi.json": ABOUT,
    "/v1/models": ABOUT,
    "/v1/models/": ABOUT,
    "/v2": ABOUT,
    "/v2/": ABOUT,
    "/version": ABOUT,
    "/v1/hooks/mlflow": HOOK,
}
_MODELS = ("/v1/models/", "/v2/models/")
_LONGEST_MODEL = 128


def need_of(path: str) -> Need:
    """The need of a decoded path, without the prefix the application is mounted under."""
    exact = _EXACT.get(path)
    if exact is not None:
        return exact
    if path.startswith(_MODELS):  # both prefixes have the same length
        model = path[len(_MODELS[0]) :].partition("/")[0]
        return Need("predict", model) if model and len(model) <= _LONGEST_MODEL else UNKNOWN
    return ADMIN if path.startswith("/v1/admin/") else UNKNOWN
