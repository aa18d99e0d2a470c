"""Notices from others: MLflow's webhook says that something about a model changed.

Belongs here: telling a true notice from a forged or old one. Does not belong here: what is done about it (the watcher looks at the
registry itself, so a notice can cause a look and nothing else).
"""

import base64
import hashlib
import hmac
import time
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from serving_app.deps import ServingDep
from serving_app.problems import ProblemError
from serving_app.schemas import problems

router = APIRouter(prefix="/v1/hooks", tags=["service"])

_BODY_LIMIT = 65_536
_OLDEST_S = 300.0  # as MLflow's guide says; a notice recorded and sent again later is refused
_NO_BODY: dict[int | str, dict[str, Any]] = {204: {"description": "Noted; the model is looked at now"}}


@router.post("/mlflow", summary="MLflow's webhook: a model changed", status_code=204, responses=_NO_BODY | problems(400, 401, 404, 413))
async def mlflow(request: Request, serving: ServingDep) -> Response:
    """For MLflow's events of versions and aliases. Signed with the secret in `MLPLATFORM_SERVING_WEBHOOK_SECRET`; without one, 404."""
    secret = serving.settings.serving_webhook_secret.get_secret_value()
    if not secret:
        raise ProblemError(404, "no-webhook", "no webhook is taken here: MLPLATFORM_SERVING_WEBHOOK_SECRET is not set")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _BODY_LIMIT:
            raise ProblemError(413, "body-too-large", f"a notice may have at most {_BODY_LIMIT} bytes", headers={"Connection": "close"})
    # MLflow stamps with the wall clock, whatever clock the platform simulates.
    if not genuine(request.headers, bytes(body), secret, time.time()):
        raise ProblemError(401, "bad-signature", "the notice is not signed with this service's secret, or is too old")
    model = _model(bytes(body))
    if model:
        serving.watcher.nudge(model)
    return Response(status_code=204)


def genuine(headers: Mapping[str, str], body: bytes, secret: str, now_s: float) -> bool:
    """Whether MLflow signed this body lately: `v1,` and base64 of HMAC-SHA256 over `<delivery id>.<timestamp>.<body>`
    (mlflow/webhooks/delivery.py, after standardwebhooks.com). `headers` look names up without regard to case."""
    stamp = headers.get("x-mlflow-timestamp", "")
    if not (stamp.isascii() and stamp.isdigit() and len(stamp) <= 12 and abs(now_s - int(stamp)) <= _OLDEST_S):
        return False
    signed = f"{headers.get('x-mlflow-delivery-id', '')}.{stamp}.".encode("utf-8", "surrogateescape") + body
    wanted = b"v1," + base64.b64encode(hmac.new(secret.encode(), signed, hashlib.sha256).digest())
    return hmac.compare_digest(wanted, headers.get("x-mlflow-signature", "").encode("utf-8", "surrogateescape"))


def _model(body: bytes) -> str:
    """The model a notice is about; '' for events of other things. Raises a 400 problem for what is no notice."""
    try:
        told = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ProblemError(400, "not-a-notice", f"the body is not JSON: {error}") from None
    match told:
        case {"entity": str(entity), "data": {"name": str(name)}}:
            return name if entity.startswith(("model_version", "registered_model")) else ""
        case {"entity": str()}:
            return ""
    raise ProblemError(400, "not-a-notice", "the body is not an event of MLflow's registry")
