"""Where an analyst finds a report: a file of this machine, or an object beside the lake where that is on S3.

Belongs here: publishing files others made. Does not belong here: making them.
"""

from pathlib import Path
from urllib.parse import urlsplit

import dagster as dg

from mlplatform.orchestration.resources import Clients

FOLDER = "reports"  # under HOME, and beside an S3 lake's tables


def folder(clients: Clients, kind: str) -> Path:
    """The folder for reports of a kind, made where missing."""
    path = clients.settings.home.absolute() / FOLDER / kind
    path.mkdir(parents=True, exist_ok=True)
    return path


def publish(clients: Clients, report: Path) -> dg.MetadataValue:  # type: ignore[type-arg]  # of either kind
    """Metadata that leads to an HTML report. Beside an S3 lake it is uploaded: a worker's disk goes with the worker."""
    folder = clients.settings.home.absolute() / FOLDER
    name = report.absolute().relative_to(folder).as_posix()
    lake = urlsplit(clients.settings.lake_root)
    if lake.scheme != "s3":
        # A browser follows no link from a page to a file, so the local profile serves the folder.
        served = clients.settings.reports_url
        return dg.MetadataValue.url(f"{served}/{name}" if served else report.absolute().as_uri())
    key = "/".join(part for part in (lake.path.strip("/"), FOLDER, name) if part)
    clients.s3.get_client().upload_file(str(report), lake.netloc, key, ExtraArgs={"ContentType": "text/html; charset=utf-8"})
    return dg.MetadataValue.path(f"s3://{lake.netloc}/{key}")
