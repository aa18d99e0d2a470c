"""Every setting of the prediction service, from environment variables `MLPLATFORM_*`; shared names mean what `mlplatform.settings` says.

Belongs here: names, types, defaults and what production refuses. Does not belong here: reading settings at import.
"""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from mlplatform.access_keys import KEYS_FILE

Network = IPv4Network | IPv6Network


# Of RFC 7518 and 8037, those with a public key: with a shared secret, whoever can check a token can make one.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")

_OTHERS = ("MLPLATFORM_SERVING_URL", "MLPLATFORM_SERVING_API_KEY")  # of the platform: where it finds this service, and with what
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:\d{1,5})?")


class ServingSettings(BaseSettings):
    """Read once, when the application starts."""

    # A refused setting is logged at start-up, and what was given may be a password.
    model_config = SettingsConfigDict(env_prefix="MLPLATFORM_", extra="ignore", hide_input_in_errors=True)

    profile: Literal["local", "production"] = Field("local", description="production refuses unsafe defaults")
    home: Path = Field(Path(".mlplatform"), description="Verified models are kept under HOME/serving/models")
    clock: str = Field("system", description="'system', or the file of a simulated clock (local profile only)")
    code_version: str = Field("", description="Commit the code was built from, where there is no git checkout (an image)")
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
    signing_key: SecretStr = Field(
        SecretStr(""),
        description="Key of the seals on versions that passed their gates, the same on both sides; empty: a bare hash",
    )
    serving_unverified: bool = Field(False, description="Also serve versions whose tags do not show that they passed their gates")
    serving_poll_s: float = Field(5.0, gt=0, description="Seconds between looks at the registry, the safety net below the notification")
    serving_registry_timeout_s: float = Field(5.0, gt=0, description="Time limit of one call to MLflow")
    serving_redis_timeout_s: float = Field(0.5, gt=0, description="Time limit of one feature read")
    serving_fallback: Literal["cache", "defaults", "refuse"] = Field(
        "cache", description="While the online store is away: values read last, within each view's limit, else defaults; defaults; or 503"
    )
    serving_cache_s: float = Field(
        0.0, ge=0, description="Seconds a value may be given again without asking the online store; 0: always ask"
    )
    serving_cache_values: int = Field(
        200_000, ge=1, description="Values (one entity of one view each) remembered for both, some 100 bytes each and 8 to 16 a feature"
    )
    serving_body_limit: int = Field(2_000_000, ge=1024, description="Bytes a request body may have")
    serving_rows_limit: int = Field(1000, ge=1, description="Inputs a request may have")
    serving_explain_rows: int = Field(100, ge=1, description="Inputs a request may have that asks for explanations")
    serving_log_queue: int = Field(50_000, ge=1, description="Prediction records kept in memory while their stream is slow or away")
    serving_log_spill_bytes: int = Field(
        1_000_000_000, ge=0, description="Bytes of prediction records a process may keep under HOME/serving/log-spill meanwhile; 0: none"
    )
    serving_drain_s: float = Field(5.0, ge=0, description="Seconds to write queued prediction records at shutdown; the rest goes to disk")
    serving_threads: int = Field(1, ge=1, description="Threads one prediction may use; 1 is fastest for small batches")
    serving_shadow_queue: int = Field(2_000, ge=1, description="Inputs that may wait for a shadow version; more are dropped and counted")
    serving_shadow_share: float = Field(
        0.2, gt=0, le=1, description="Largest share of the time in which a batch of a shadow version may be under way"
    )
    serving_webhook_secret: SecretStr = Field(
        SecretStr(""), description="Secret of MLflow's webhook, which calls /v1/hooks/mlflow; empty: the route is closed"
    )
    serving_host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 is every one of this machine")
    serving_port: int = Field(8000, ge=0, le=65_535, description="Port to listen on; 0: a free one")
    serving_auth: Literal["none", "keys", "jwt"] = Field(
        "none", description="Who may ask: none (open, to this machine only), keys (API keys), jwt (tokens of an OpenID provider)"
    )
    serving_trusted_proxies: str = Field(
        "", description="With SERVING_AUTH=none: networks whose callers count as authenticated, comma-separated, as 10.0.0.0/8"
    )
    serving_keys_file: Path | None = Field(None, description="File of API keys. Default: HOME/serving/keys.json")
    serving_jwt_keys: str = Field("", description="The provider's JSON Web Key Set: an https address (its jwks_uri), or a file")
    serving_jwt_issuer: str = Field("", description="What a token's `iss` must be")
    serving_jwt_audience: str = Field("", description="What a token's `aud` must be or contain")
    serving_jwt_algorithms: str = Field(
        "RS256,ES256", description="Signature algorithms accepted, comma-separated; none with a shared secret"
    )
    serving_jwt_leeway_s: float = Field(30.0, ge=0, le=300, description="Seconds the provider's clock may differ")
    serving_jwt_rate_per_s: float = Field(0.0, ge=0, description="Requests a second of one subject, per replica; 0: no limit")
    serving_metrics_open: bool = Field(False, description="/metrics answers without a credential, where credentials are asked for")
    serving_in_work: int = Field(1024, ge=1, description="Requests worked on at once; the next ones get 503 with Retry-After")
    serving_queue_target_s: float = Field(
        0.02, gt=0, description="Delay of the event loop above which fewer requests are taken into work, down to what keeps it"
    )
    serving_buffer_limit: int = Field(268_435_456, ge=1_000_000, description="Bytes of all request bodies in memory together")
    serving_body_timeout_s: float = Field(10.0, gt=0, description="Seconds for a request's body to arrive; then 408")
    serving_request_timeout_s: float = Field(30.0, gt=0, description="Seconds from a request's first line to its answer; then 504")
    serving_head_limit: int = Field(16_384, ge=1024, description="Bytes of a request's first line and header fields; then 431 or 414")
    serving_head_timeout_s: float = Field(10.0, gt=0, description="Seconds for them to arrive; then 408")
    serving_connections: int = Field(16_384, ge=1, description="Connections open at once; the next ones get 503 and are closed")
    serving_keep_alive_s: int = Field(30, ge=1, description="Seconds a connection without a request stays open")
    serving_stop_s: int = Field(15, ge=1, description="Seconds requests under way have to finish after SIGTERM")
    serving_tls_certificate: Path | None = Field(
        None, description="PEM file of the certificate and its chain; with it the service speaks TLS"
    )
    serving_tls_key: Path | None = Field(None, description="PEM file of the certificate's private key, without a password")
    serving_cors_origins: str = Field(
        "", description="Web pages that may ask from a browser, comma-separated, as https://shop.example; empty: none"
    )
    serving_otlp_url: str = Field(
        "",
        repr=False,
        description="OpenTelemetry collector that traces are sent to (OTLP over HTTP), as http://collector:4318; empty: none",
    )
    serving_trace_share: float = Field(
        0.01, ge=0, le=1, description="Share of the requests that are traced, where the caller's traceparent does not say"
    )
    serving_slow_s: float = Field(1.0, gt=0, description="A request that takes longer is logged, whatever its answer")
    serving_notice_s: float = Field(
        2.0, ge=0, description="Seconds after SIGTERM in which connections are still served and told to close, until none is left"
    )
    serving_log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level that is logged")

    @property
    def model_names(self) -> tuple[str, ...]:
        return _listed(self.serving_models)

    @property
    def model_cache(self) -> Path:
        return self.home.absolute() / "serving" / "models"

    @property
    def log_spill(self) -> Path:
        return self.home.absolute() / "serving" / "log-spill"

    @property
    def keys_file(self) -> Path:
        return (self.serving_keys_file or self.home / KEYS_FILE).absolute()

    @property
    def trusted_networks(self) -> tuple[Network, ...]:
        return tuple(ip_network(network) for network in _listed(self.serving_trusted_proxies))

    @property
    def jwt_algorithms(self) -> tuple[str, ...]:
        return _listed(self.serving_jwt_algorithms)

    @property
    def cors_origins(self) -> tuple[str, ...]:
        return _listed(self.serving_cors_origins)

    @property
    def online_redis_url(self) -> str:
        return self.online_url.get_secret_value() or self.redis_url.get_secret_value()

    @property
    def registry_url(self) -> str:
        """The MLflow server without a trailing slash, or '' where none is set."""
        return self.mlflow_url.rstrip("/")

    @model_validator(mode="after")
    def _stores_are_redis(self) -> Self:
        from redis.connection import parse_url

        for name, url in (("REDIS_URL", self.redis_url), ("ONLINE_URL", self.online_url)):
            try:
                parse_url(url.get_secret_value() or "redis://")  # type: ignore[no-untyped-call]  # redis has types for its clients only
            except ValueError:  # whose text may show a part of the password
                raise ValueError(
                    f"MLPLATFORM_{name} is no address of a Redis: redis://[user:password@]host[:port][/number], or rediss:// with TLS"
                ) from None
        return self

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
    def _collector_is_a_server(self) -> Self:
        if self.serving_otlp_url and not self.serving_otlp_url.startswith(("http://", "https://")):
            raise ValueError("MLPLATFORM_SERVING_OTLP_URL must be an http(s) address")
        return self

    @model_validator(mode="after")
    def _open_only_on_loopback(self) -> Self:
        loopback = self.serving_host in ("localhost", "127.0.0.1", "::1")
        trusted = self.trusted_networks  # raises ValueError for what is no network
        if self.serving_auth == "none" and not loopback and not trusted:
            raise ValueError(
                "MLPLATFORM_SERVING_AUTH=none is open to everyone who can connect: listen on 127.0.0.1, ask for keys or tokens, "
                "or name the networks of an authenticating proxy in MLPLATFORM_SERVING_TRUSTED_PROXIES"
            )
        return self

    @model_validator(mode="after")
    def _tokens_are_checked_against_something(self) -> Self:
        if wrong := sorted(set(self.jwt_algorithms) - set(ALGORITHMS)):
            raise ValueError(f"MLPLATFORM_SERVING_JWT_ALGORITHMS: {wrong[0]!r} is none of {', '.join(ALGORITHMS)}")
        if self.serving_auth != "jwt":
            return self
        if not (self.serving_jwt_keys and self.serving_jwt_issuer and self.serving_jwt_audience):
            raise ValueError("MLPLATFORM_SERVING_AUTH=jwt needs MLPLATFORM_SERVING_JWT_KEYS, _ISSUER and _AUDIENCE")
        if self.profile == "production" and self.serving_jwt_keys.startswith("http://"):
            raise ValueError("MLPLATFORM_SERVING_JWT_KEYS must be https in production: whoever can change it on its way can sign tokens")
        if not self.jwt_algorithms:
            raise ValueError("MLPLATFORM_SERVING_JWT_ALGORITHMS names none")
        return self

    @model_validator(mode="after")
    def _certificate_and_key_go_together(self) -> Self:
        files = (self.serving_tls_certificate, self.serving_tls_key)
        if (files[0] is None) != (files[1] is None):
            raise ValueError("MLPLATFORM_SERVING_TLS_CERTIFICATE and MLPLATFORM_SERVING_TLS_KEY go together")
        if missing := [str(file) for file in files if file is not None and not file.is_file()]:
            raise ValueError(f"there is no file {missing[0]}, which the settings name for TLS")
        return self

    @model_validator(mode="after")
    def _web_pages_are_named(self) -> Self:
        if wrong := [origin for origin in self.cors_origins if not _ORIGIN.fullmatch(origin)]:
            raise ValueError(f"MLPLATFORM_SERVING_CORS_ORIGINS names pages as scheme://host[:port], not {wrong[0]!r}")
        return self

    @model_validator(mode="after")
    def _a_body_is_part_of_its_request(self) -> Self:
        if self.serving_body_timeout_s > self.serving_request_timeout_s:
            raise ValueError("MLPLATFORM_SERVING_BODY_TIMEOUT_S is longer than MLPLATFORM_SERVING_REQUEST_TIMEOUT_S")
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
        if self.serving_auth == "none":
            problems.append("MLPLATFORM_SERVING_AUTH must be 'keys' or 'jwt'")
        if problems:
            raise ValueError("unsafe settings for the production profile: " + "; ".join(problems))
        return self


def what_is_wrong(fault: ValidationError) -> list[str]:
    """A line for each refused setting, without what was given: it may be a password."""
    lines: list[str] = []
    for each in fault.errors(include_input=False, include_url=False, include_context=False):
        name = f"MLPLATFORM_{str(each['loc'][0]).upper()}: " if each["loc"] else ""
        lines.append(f"{name}{each['msg'].removeprefix('Value error, ')}")
    return lines


def unknown_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables named like settings of this service that are none, each with the nearest that is one, or ''. They change nothing, so
    somebody thinks that they do."""
    known = [f"MLPLATFORM_{name.upper()}" for name in ServingSettings.model_fields]
    ours = [name for name in environment if name.upper().startswith("MLPLATFORM_SERVING_") and name.upper() not in (*known, *_OTHERS)]
    return {name: next(iter(get_close_matches(name.upper(), known, 1)), "") for name in sorted(ours)}


def _listed(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated setting."""
    return tuple(name for part in text.split(",") if (name := part.strip()))
