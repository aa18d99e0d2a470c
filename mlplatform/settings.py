"""Every setting of the platform, from environment variables `MLPLATFORM_*`; local defaults, production refuses them.

Belongs here: names, types, defaults and what production refuses. Does not belong here: reading settings at import.
"""

import getpass
import os
import re
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Profile(StrEnum):
    LOCAL = "local"
    PRODUCTION = "production"


class Settings(BaseSettings):
    """Read once per process through `load_settings()`."""

    # Refused settings are logged where the process starts, and what was given may be a password.
    model_config = SettingsConfigDict(env_prefix="MLPLATFORM_", extra="ignore", hide_input_in_errors=True)

    profile: Profile = Field(Profile.LOCAL, description="local: embedded services; production: everything from the environment")
    home: Path = Field(Path(".mlplatform"), description="Folder of everything the local profile writes")
    clock: str = Field("system", description="'system', or the file of a simulated clock (local profile only)")

    lake: str = Field("", description="Root of the Delta tables: a folder or s3://bucket/prefix. Default: HOME/lake")
    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"), description="Streams and notifications; the online store too, unless ONLINE_URL is set"
    )
    online_url: SecretStr = Field(SecretStr(""), description="Redis URL of the online store (rediss:// is TLS). Default: REDIS_URL")
    online_cluster: bool = Field(False, description="The online store is a Redis Cluster; ONLINE_URL names one of its nodes")
    mlflow_url: str = Field("", repr=False, description="MLflow tracking server. Default: HOME's own store")
    optuna_storage: str = Field("", repr=False, description="Optuna: a journal file or an RDB URL. Default: HOME/optuna/journal.log")
    feast_registry: str = Field("", repr=False, description="Feast registry: a file or a SQL URL. Default: HOME/feast/registry.db")

    source_reference: SecretStr = Field(SecretStr(""), description="SQL URL of the reference data (planes, airlines, airports)")
    source_weather: str = Field("", repr=False, description="Base URL of the weather API")
    source_events: SecretStr = Field(SecretStr(""), description="Redis URL of the event streams. Default: REDIS_URL")
    source_archive: str = Field("", description="Folder or s3:// prefix with the archived events. Default: HOME/sources/archive")

    s3_endpoint_url: str = Field("", description="S3 endpoint, where it is not AWS")
    s3_region: str = Field("us-east-1", description="S3 region")
    s3_access_key_id: SecretStr = Field(SecretStr(""), description="S3 access key; empty: the environment's own credentials")
    s3_secret_access_key: SecretStr = Field(SecretStr(""), description="S3 secret key")
    s3_allow_http: bool = Field(False, description="Allow plain http to the S3 endpoint, for private networks only")

    stream_lateness_s: int = Field(
        86_400, gt=0, description="Streaming: how late an event may be and still restate rows; later ones are the batch's"
    )
    stream_keep_s: int = Field(345_600, gt=0, description="Streaming: how long rows are held for later rows of their group")
    stream_interval_s: float = Field(0.25, gt=0, description="Streaming: seconds from one round of reading and writing to the next")

    serving_url: str = Field("http://127.0.0.1:8000", description="Where the prediction service answers")
    serving_api_key: SecretStr = Field(SecretStr(""), description="Key or token sent to it, where it asks for one")
    dagster_url: str = Field("http://127.0.0.1:3000", description="Where the Dagster UI answers")
    reports_url: str = Field("", description="Where HOME/reports is served; empty: links are files, or objects beside an S3 lake")
    signing_key: SecretStr = Field(
        SecretStr(""),
        description="Key of the seals on versions that passed their gates, the same on both sides; empty: a bare hash",
    )
    actor: str = Field("", description="Who acts, as the deployment history names them. Default: the user of the operating system")
    alert_webhook: SecretStr = Field(
        SecretStr(""), description="Slack-compatible address that is told of rollbacks, refusals, unverified versions and a broken ledger"
    )
    alert_smtp: SecretStr = Field(
        SecretStr(""), description="Mail server for the same, as smtp://user:password@host:587 (STARTTLS where offered) or smtps://host"
    )
    alert_from: str = Field("mlplatform@localhost", description="Sender of these mails")
    alert_to: str = Field("", description="Their receivers, comma-separated; empty: no mail")
    code_version: str = Field("", description="Commit the code was built from, where there is no git checkout (an image)")
    training_workers: int = Field(
        1, ge=1, le=64, description="Processes of one machine that share one fit, for families that can (DistributedDataParallel)"
    )
    tuning_workers: int = Field(1, ge=1, le=64, description="Trials of a study that run at once, each in a process or a task of its own")
    engine: Literal["local", "ray"] = Field(
        "local", description="Where trials and fits run: local, processes of this machine; ray, tasks of Ray (extra `ray`)"
    )
    ray_address: str = Field(
        "",
        description="HOST:PORT of the Ray cluster this machine is part of; empty: a Ray of this machine, for as long as the work lasts",
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu or cuda[:n]; cuda fails loudly where there is none"
    )

    @property
    def acts_as(self) -> str:
        """Who asks for what this process does, as the deployment history names them."""
        if self.actor:
            return self.actor
        try:
            return getpass.getuser()
        except (OSError, KeyError):
            return f"uid {os.getuid()}"  # a container's user without a name

    @property
    def lake_root(self) -> str:
        return self.lake or str(self.home.absolute() / "lake")

    @property
    def online_redis_url(self) -> str:
        return self.online_url.get_secret_value() or self.redis_url.get_secret_value()

    @property
    def mlflow_uri(self) -> str:
        return self.mlflow_url or f"sqlite:///{self.home.absolute() / 'mlflow' / 'mlflow.db'}"

    @property
    def optuna_uri(self) -> str:
        return self.optuna_storage or str(self.home.absolute() / "optuna" / "journal.log")

    @property
    def feast_registry_path(self) -> str:
        return self.feast_registry or str(self.home.absolute() / "feast" / "registry.db")

    def storage_options(self, root: str | None = None) -> dict[str, str]:
        """Options for deltalake and Polars to reach `root` (default: the lake); empty for local folders."""
        if not (root or self.lake_root).startswith("s3://"):
            return {}
        options = {"AWS_REGION": self.s3_region}
        if self.s3_endpoint_url:
            options["AWS_ENDPOINT_URL"] = self.s3_endpoint_url
        if self.s3_access_key_id.get_secret_value():
            options["AWS_ACCESS_KEY_ID"] = self.s3_access_key_id.get_secret_value()
            options["AWS_SECRET_ACCESS_KEY"] = self.s3_secret_access_key.get_secret_value()
        if self.s3_allow_http:
            options["AWS_ALLOW_HTTP"] = "true"
        return options

    def connection(self, name: str) -> str:
        """The address behind a source's `connection` name: setting `source_<name>`, with the local defaults."""
        value = getattr(self, f"source_{name}", None)
        if value is None:
            raise ValueError(f"no setting MLPLATFORM_SOURCE_{name.upper()} exists for connection '{name}'")
        text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        if not text and name == "events":
            text = self.redis_url.get_secret_value()
        if not text and name == "archive":
            text = str(self.home.absolute() / "sources" / "archive")
        if not text:
            raise ValueError(f"MLPLATFORM_SOURCE_{name.upper()} is not set: say where '{name}' answers")
        return text

    @field_validator("redis_url", "online_url", "source_events")
    @classmethod
    def _is_a_redis(cls, value: SecretStr) -> SecretStr:
        return _checked(value, "redis", "rediss", "unix")

    @field_validator("mlflow_url")
    @classmethod
    def _is_an_mlflow(cls, value: str) -> str:
        if value and "://" not in value:
            raise ValueError("it is no address: a server as http://host:port, or a database as sqlite:////folder/mlflow.db")
        return value

    @field_validator("serving_url", "dagster_url", "source_weather")
    @classmethod
    def _is_a_server(cls, value: str) -> str:
        return _checked(SecretStr(value), "http", "https").get_secret_value()

    @field_validator("ray_address")
    @classmethod
    def _is_a_head_of_ray(cls, value: str) -> str:
        if value and not re.fullmatch(r"([\w.-]+|\[[0-9A-Fa-f:]+\]):\d+", value):
            raise ValueError("it is no address as HOST:PORT, the one that `ray start --head` shows (no ray://, which is another protocol)")
        return value

    @model_validator(mode="after")
    def _ray_chooses_the_device(self) -> Self:
        if self.engine == "ray" and ":" in self.device:
            raise ValueError(
                "MLPLATFORM_ENGINE=ray chooses among the devices of a machine itself: MLPLATFORM_DEVICE may be auto, cpu or cuda"
            )
        return self

    @model_validator(mode="after")
    def _a_cluster_is_a_redis_of_its_own(self) -> Self:
        if self.online_cluster and not self.online_url.get_secret_value():
            raise ValueError("MLPLATFORM_ONLINE_CLUSTER needs MLPLATFORM_ONLINE_URL: streams and notices do not live in a cluster")
        return self

    @model_validator(mode="after")
    def _production_refuses_defaults(self) -> Self:
        if self.profile is not Profile.PRODUCTION:
            return self
        problems = []
        if self.clock != "system":
            problems.append("MLPLATFORM_CLOCK must be 'system'")
        if not self.lake.startswith("s3://"):
            problems.append("MLPLATFORM_LAKE must be an s3:// address: replicas share it")
        if "@" not in self.redis_url.get_secret_value():
            problems.append("MLPLATFORM_REDIS_URL must carry a password")
        if "@" not in self.online_redis_url:
            problems.append("MLPLATFORM_ONLINE_URL must carry a password")
        if not self.mlflow_url.startswith(("http://", "https://")):
            problems.append("MLPLATFORM_MLFLOW_URL must be an MLflow server")
        if "://" not in self.optuna_storage:
            problems.append("MLPLATFORM_OPTUNA_STORAGE must be a database URL")
        if "://" not in self.feast_registry:
            problems.append("MLPLATFORM_FEAST_REGISTRY must be a database URL")
        if problems:
            raise ValueError("unsafe settings for the production profile: " + "; ".join(problems))
        return self


def _checked(address: SecretStr, *schemes: str) -> SecretStr:
    """The address, or none at all. Raises ValueError without it: it may hold a password."""
    text = address.get_secret_value()
    if not text:
        return address
    try:
        parts = urlsplit(text)
        fits = parts.scheme in schemes and (parts.port is not None or bool(parts.hostname) or parts.scheme == "unix")
    except ValueError:  # urllib's own would show the port that is none, which may be a password
        fits = False
    if not fits:
        raise ValueError(f"it is no address that begins with {' or '.join(f'{scheme}://' for scheme in schemes)}")
    return address


@lru_cache(maxsize=1)
def load_settings() -> Settings:
    """The process's settings. Tests that change the environment call `load_settings.cache_clear()`."""
    return Settings()
