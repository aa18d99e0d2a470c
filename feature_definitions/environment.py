"""The environment variables that `feature_store.yaml` and the views' sources read.

Belongs here: their names. Does not belong here: setting them, which whoever starts Feast does.
"""

from mlplatform.settings import Settings


def feast_environment(settings: Settings) -> dict[str, str]:
    """Absolute addresses for a Feast process or `os.environ`: `feast -c` changes the working directory before it loads."""
    registry = settings.feast_registry_path
    # An S3 registry is a file to Feast, any other URL a database.
    is_file = "://" not in registry or registry.startswith(("s3://", "gs://"))
    return {
        "MLPLATFORM_LAKE": settings.lake_root,
        "MLPLATFORM_FEAST_REGISTRY": registry,
        "FEAST_ONLINE_URL": settings.online_redis_url,
        "FEAST_ONLINE_CLUSTER": str(settings.online_cluster).lower(),
        # What the online store measures ages by: with a simulated clock, 2013 is now.
        "MLPLATFORM_CLOCK": settings.clock,
        "FEAST_REGISTRY_TYPE": "file" if is_file else "sql",
        **settings.storage_options(),
    }
