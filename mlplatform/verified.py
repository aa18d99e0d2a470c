"""The seal on a model version that passed its gates: made by the gates, demanded by the service and by whoever moves an alias.

Belongs here: what the seal is over, making and checking it; standard library only. Does not belong here: judging a version, reading
or writing tags.

The seal is over model, version number, contract digest, model hash, verdict and evaluation: it fits no other version and no other
files, and breaks when somebody edits the evaluation or the verdict. With a key (`MLPLATFORM_SIGNING_KEY`) it is an HMAC-SHA256: who
can write to MLflow but has not the key cannot make one. Without a key it is a bare SHA-256: that catches what is done by hand in
MLflow's pages, not somebody who computes the hash on purpose.
"""

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from mlplatform.contracts import EVALUATION_TAG, GATES_TAG, VERIFIED_TAG

_PLAIN: Final = "sha256"
_KEYED: Final = "hmac-sha256"


@dataclass(frozen=True)
class Sealed:
    """What a version's tags say of its gates; empty texts where a tag is not there."""

    gates: str = ""
    evaluation: str = ""
    seal: str = ""

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> "Sealed":
        return cls(tags.get(GATES_TAG, ""), tags.get(EVALUATION_TAG, ""), tags.get(VERIFIED_TAG, ""))


@dataclass(frozen=True)
class Identity:
    """What a seal holds on to."""

    model: str
    version: int
    contract_digest: str
    model_sha256: str


def evaluation_sha256(evaluation: str) -> str:
    """The hash by which an approval names the evaluation it was given for."""
    return hashlib.sha256(evaluation.encode()).hexdigest()


def seal(key: str, identity: Identity, evaluation: str) -> str:
    """The tag's text for a version whose gates passed with this evaluation."""
    content = [
        *("mlplatform.verified/1", identity.model, identity.version, identity.contract_digest, identity.model_sha256),
        *("passed", evaluation_sha256(evaluation)),
    ]
    message = json.dumps(content, separators=(",", ":")).encode()
    if key:
        return f"{_KEYED}:{hmac.new(key.encode(), message, hashlib.sha256).hexdigest()}"
    return f"{_PLAIN}:{hashlib.sha256(message).hexdigest()}"


def why_unverified(key: str, identity: Identity, sealed: Sealed) -> str:
    """Why the version must not answer callers; empty where the seal is right."""
    if sealed.gates != "passed":
        return f"its gates did not pass (recorded: {sealed.gates or 'never evaluated'})"
    if not sealed.seal:
        return f"it has no seal of its gates (tag {VERIFIED_TAG}): its verdict was not written by an evaluation"
    kind = sealed.seal.partition(":")[0]
    if kind == _KEYED and not key:
        return "its seal needs a key, and MLPLATFORM_SIGNING_KEY is not set here"
    if kind == _PLAIN and key:
        return "its seal was made without the key that MLPLATFORM_SIGNING_KEY demands"
    if not hmac.compare_digest(sealed.seal.encode(), seal(key, identity, sealed.evaluation).encode()):
        return "its seal does not fit: files, evaluation or verdict are not those the gates passed, or the key is another"
    return ""
