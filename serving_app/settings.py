"""Every setting of the prediction service, from environment variables `MLPLATFORM_*`; shared names mean what `mlplatform.settings` says.

Belongs here: names, types, defaults and what production refuses. Does not belong here: reading settings at import.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class ServingSettings(BaseSettings):
    """Read once, when the application starts."""

    # A refused setting is logged at start-up, and what was given may be a password.
    model_config = SettingsConfigDict(env_prefix="MLPLATFORM_", extra="ignore", hide_input_in_errors=True)

    profile: Literal["local", "production"] = Field("local", description="production refuses unsafe defaults")
    home: Path = Field(Path(".mlplatform"), description="Verified models are kept under HOME/serving/models")
    clock: str = Field("system", description="'system', or the file of a simulated clock (local profile only)")
    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="Prediction log and notifications; the online store too, unless ONLINE_URL is set",
    )
    online_url: SecretStr = Field(SecretStr(""), description="Redis URL of the online store (rediss:// is TLS). Default: REDIS_URL")
    online_cluster: bool = Field(False, description="The online store is a Redis Cluster; ONLINE_URL names one of its nodes")
    mlflow_url: str = Field("", repr=False, description="MLflow server, http(s); empty: serve what the verified cache holds")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu or cuda[:n]; cuda fails loudly where there is none"
    )

    serving_models: str = Field("", description="Models to serve, comma-separated; empty: every registered model with the alias production")
    serving_poll_s: float = Field(5.0, gt=0, description="Seconds between looks at the registry, the safety net below the notification")
    serving_registry_timeout_s: float = Field(5.0, gt=0, description="Time limit of one call to MLflow")
    serving_redis_timeout_s: float = Field(0.5, gt=0, description="Time limit of one feature read")
    serving_fallback: Literal["cache", "defaults", "refuse"] = Field(
        "cache", description="While the online store is away: values read last, within each view's limit, else defaults; defaults; or 503"
    )
    serving_cache_s: float = Field(
        0.0, ge=0, description="Seconds a value may be given again without asking the online store; 0: always ask"
    )
    serving_cache_values: int = Field(200_000, ge=1, description="Values (one entity of one view each) remembered for both")
    serving_body_limit: int = Field(2_000_000, ge=1024, description="Bytes a request body may have")
    serving_rows_limit: int = Field(1000, ge=1, description="Inputs a request may have")
    serving_log_queue: int = Field(50_000, ge=1, description="Prediction records kept in memory while their stream is slow or away")
    serving_drain_s: float = Field(5.0, ge=0, description="Seconds to write the queued prediction records at shutdown")
    serving_threads: int = Field(1, ge=1, description="Threads one prediction may use; 1 is fastest for small batches")
    serving_shadow_queue: int = Field(2_000, ge=1, description="Inputs that may wait for a shadow version; more are dropped and counted")
    serving_shadow_share: float = Field(
        0.2, gt=0, le=1, description="Largest share of the time in which a batch of a shadow version may be under way"
    )
    serving_webhook_secret: SecretStr = Field(
        SecretStr(""), description="Secret of MLflow's webhook, which calls /v1/hooks/mlflow; empty: the route is closed"
    )
    serving_log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level that is logged")

    @property
    def model_names(self) -> tuple[str, ...]:
        return tuple(name for part in self.serving_models.split(",") if (name := part.strip()))

    @property
    def model_cache(self) -> Path:
        return self.home.absolute() / "serving" / "models"

    @property
    def online_redis_url(self) -> str:
        return self.online_url.get_secret_value() or self.redis_url.get_secret_value()

    @property
    def registry_url(self) -> str:
        """The MLflow server without a trailing slash, or '' where none is set."""
        return self.mlflow_url.rstrip("/")

    @model_validator(mode="after")
    def _a_cluster_is_a_redis_of_its_own(self) -> Self:
        if self.online_cluster and not self.online_url.get_secret_value():
            raise ValueError("MLPLATFORM_ONLINE_CLUSTER needs MLPLATFORM_ONLINE_URL: log and notices do not live in a cluster")
        return self

    @model_validator(mode="after")
    def _registry_is_a_server(self) -> Self:
        if self.mlflow_url and not self.mlflow_url.startswith(("http://", "https://")):
            raise ValueError(
                "MLPLATFORM_MLFLOW_URL must be an http(s) address for the prediction service: it reads models from an MLflow server"
            )
        return self

    @model_validator(mode="after")
    def _production_refuses_defaults(self) -> Self:
        if self.profile != "production":
            return self
        problems = []
        if self.clock != "system":
            problems.append("MLPLATFORM_CLOCK must be 'system'")
        if "@" not in self.redis_url.get_secret_value():
            problems.append("MLPLATFORM_REDIS_URL must carry a password")
        if "@" not in self.online_redis_url:
            problems.append("MLPLATFORM_ONLINE_URL must carry a password")
        if not self.mlflow_url:
            problems.append("MLPLATFORM_MLFLOW_URL must be an MLflow server")
        if problems:
            raise ValueError("unsafe settings for the production profile: " + "; ".join(problems))
        return self
