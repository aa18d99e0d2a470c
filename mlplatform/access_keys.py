"""API keys of the prediction service: their form, their hash, and the file both sides share.

Belongs here: what the command line writes and the service reads. Does not belong here: asking for a key (`serving_app.protection`),
printing one (`mlplatform.cli_keys`). Only the standard library and pydantic may be imported.

A key is `mlp_<id>_<secret>`: the id finds the record, the secret (256 random bits) proves it. At rest lies the secret's SHA-256. A slow,
salted password hash would buy nothing: it makes guessing costly, and 256 random bits are not guessed. NIST SP 800-63B (5.1.2.2) asks a
plain approved hash of secrets with at least 112 bits, and salt and a password hash only below that.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

KEYS_FILE = Path("serving") / "keys.json"  # below HOME, unless MLPLATFORM_SERVING_KEYS_FILE names another
EVERY_MODEL = "*"
Action = Literal["predict", "metrics", "admin"]

_PREFIX = "mlp_"
_ID_LENGTH = 12
_SECRET_BYTES = 32
_LENGTH = len(_PREFIX) + _ID_LENGTH + 1 + 43


class KeysFileError(Exception):
    """The file of keys is missing, unreadable or not of the form written here."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HashedSecret(_Frozen):
    """One secret of a key. `until`: when it stops working, because another took its place; None for the newest."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created_at: AwareDatetime
    until: AwareDatetime | None = None


class AccessKey(_Frozen):
    """A key, without its secrets' values. Limits count requests; None means no limit. Valid in [not_before, expires_at)."""

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    name: str = Field(min_length=1, max_length=64)
    models: tuple[str, ...] = (EVERY_MODEL,)
    actions: tuple[Action, ...] = ("predict",)
    not_before: AwareDatetime | None = None
    expires_at: AwareDatetime | None = None
    revoked_at: AwareDatetime | None = None
    rate_per_s: float | None = Field(None, gt=0)
    burst: int | None = Field(None, ge=1)
    daily_quota: int | None = Field(None, ge=1)
    secrets: tuple[HashedSecret, ...] = Field(min_length=1)


class AccessKeys(_Frozen):
    """The whole file."""

    format: Literal[1] = 1
    keys: tuple[AccessKey, ...] = ()

    def with_key(self, key: AccessKey) -> "AccessKeys":
        """The same keys with this one added, or in the place of the one of its id."""
        others = tuple(k for k in self.keys if k.id != key.id)
        return AccessKeys(keys=(*others, key))


def hash_secret(secret: str) -> str:
    """SHA-256 of a secret, in hexadecimal."""
    return hashlib.sha256(secret.encode()).hexdigest()


def new_id() -> str:
    return secrets.token_hex(_ID_LENGTH // 2)


def new_secret() -> str:
    """43 characters that carry 256 random bits."""
    return secrets.token_urlsafe(_SECRET_BYTES)


def written(key_id: str, secret: str) -> str:
    """The key as its owner sends it."""
    return f"{_PREFIX}{key_id}_{secret}"


def taken_apart(key: str) -> tuple[str, str] | None:
    """Id and secret of a key; None for a text of another form."""
    end = len(_PREFIX) + _ID_LENGTH
    if len(key) != _LENGTH or key[end] != "_" or not key.startswith(_PREFIX):
        return None
    return key[len(_PREFIX) : end], key[end + 1 :]


def rotated(key: AccessKey, secret: str, now: datetime, old_until: datetime) -> AccessKey:
    """The key with a new secret; secrets that worked until now work until `old_until` at most, older ones are dropped."""
    kept = [
        s.model_copy(update={"until": min(s.until, old_until) if s.until else old_until})
        for s in key.secrets
        if (s.until is None or s.until > now) and old_until > now
    ]
    return key.model_copy(update={"secrets": (*kept, HashedSecret(sha256=hash_secret(secret), created_at=now))})


def read(path: Path) -> AccessKeys:
    """Raises KeysFileError, which names the file and never its content."""
    try:
        return AccessKeys.model_validate_json(path.read_bytes())
    except OSError as error:
        raise KeysFileError(f"the file of API keys {path} cannot be read: {error.strerror or type(error).__name__}") from None
    except ValueError:
        raise KeysFileError(f"the file of API keys {path} is not of the form `mlplatform keys` writes") from None


def write(path: Path, keys: AccessKeys) -> None:
    """Replaces the file in one step. Others may read it: the service runs under another user, and hashes of random keys tell nothing."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(keys.model_dump(mode="json"), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:  # whatever ends it, no half file stays behind
        Path(name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[AccessKeys]:
    """The keys in the file, empty where there is none yet; two commands at once take turns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield read(path) if path.exists() else AccessKeys()
