"""TLS with a certificate that is renewed, web pages of other origins, and settings the service does not start with."""

import json
import ssl
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import ValidationError

from serving_app.settings import ServingSettings


def issue(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    import ipaddress

    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = folder / "tls.crt", folder / "tls.key"
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return files


def served_name(url: str) -> str:
    host, port = url.removeprefix("https://").split(":")
    certificate = x509.load_pem_x509_certificate(ssl.get_server_certificate((host, int(port))).encode())
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def test_it_speaks_tls_and_takes_up_a_renewed_certificate_without_a_restart(run_service, tmp_path) -> None:
    certificate, key = issue(tmp_path, "first")
    process = run_service(MLPLATFORM_SERVING_TLS_CERTIFICATE=str(certificate), MLPLATFORM_SERVING_TLS_KEY=str(key))
    url = process.url.replace("http://", "https://")
    trust = ssl.create_default_context(cafile=str(certificate))
    deadline = time.monotonic() + 20
    while True:
        try:
            answer = httpx.get(f"{url}/health/live", verify=trust)
            break
        except httpx.TransportError:
            assert time.monotonic() < deadline, process.log.read_text()
            time.sleep(0.05)
    assert answer.status_code == 200
    assert answer.headers["strict-transport-security"] == "max-age=31536000"
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{process.url}/health/live")
    assert served_name(url) == "first"
    issue(tmp_path, "second")
    while served_name(url) != "second":
        assert time.monotonic() < deadline + 10, process.log.read_text()
        time.sleep(0.1)


def test_no_web_page_may_ask_unless_it_is_named(make_model, open_service, tmp_path) -> None:
    make_model().into_cache(tmp_path)
    page = {"origin": "https://shop.example", "access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
    closed = open_service()
    assert closed.options("/v1/models/basket/predict", headers=page).status_code == 405
    assert not [name for name in closed.get("/v1/models", headers=page).headers if name.startswith("access-control")]

    open_for_one = open_service(serving_cors_origins="https://shop.example")
    allowed = open_for_one.options("/v1/models/basket/predict", headers=page)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://shop.example")
    assert "access-control-allow-credentials" not in allowed.headers
    assert open_for_one.options("/v1/models/basket/predict", headers=page | {"origin": "https://evil.example"}).status_code == 400
    other = open_for_one.get("/v1/models", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    refused = open_for_one.get("/nothing", headers={"origin": "https://shop.example"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (404, "https://shop.example")


def test_head_is_answered_where_get_is(make_model, open_service, tmp_path) -> None:
    make_model().into_cache(tmp_path)
    client = open_service()
    for path in ("/health/live", "/health/ready", "/v1/models", "/docs"):
        answer = client.head(path)
        assert (answer.status_code, answer.content) == (200, b""), path
        assert int(answer.headers["content-length"]) > 0
    assert client.head("/v1/models/basket/predict").status_code == 405
    assert client.get("/health/live").status_code == 200  # on the same connection


SAFE = {
    "profile": "production",
    "redis_url": "redis://:secret@redis:6379/0",
    "mlflow_url": "http://mlflow:5000",
    "serving_host": "0.0.0.0",  # noqa: S104  # what a container listens on
    "serving_auth": "keys",
}
JWT = {"serving_auth": "jwt", "serving_jwt_keys": "https://id.example/jwks", "serving_jwt_issuer": "i", "serving_jwt_audience": "a"}


def test_what_production_may_be_set_to_is_accepted() -> None:
    assert ServingSettings(**SAFE).serving_auth == "keys"
    assert ServingSettings(**SAFE | JWT).jwt_algorithms == ("RS256", "ES256")
    assert ServingSettings(serving_host="0.0.0.0", serving_trusted_proxies="10.0.0.0/8, fd00::/8").trusted_networks  # noqa: S104


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"serving_auth": "none"}, "SERVING_AUTH"),
        ({"serving_auth": "none", "serving_trusted_proxies": "10.0.0.0/8"}, "SERVING_AUTH must be"),
        ({"profile": "local", "serving_auth": "none"}, "open to everyone"),
        ({"profile": "local", "serving_auth": "none", "serving_host": "::"}, "open to everyone"),
        ({"serving_trusted_proxies": "10.0.0.1/8"}, "host bits"),
        ({"serving_trusted_proxies": "everyone"}, "everyone"),
        ({"serving_auth": "jwt"}, "needs"),
        (JWT | {"serving_jwt_keys": "http://id.example/jwks"}, "https"),
        (JWT | {"serving_jwt_algorithms": "RS256,HS256"}, "HS256"),
        (JWT | {"serving_jwt_algorithms": "none"}, "none"),
        ({"serving_jwt_algorithms": "HS256"}, "HS256"),  # whoever asks for tokens later
        ({"redis_url": "http://:secret@redis:6379/0"}, "MLPLATFORM_REDIS_URL is no address of a Redis"),
        ({"redis_url": "redis://:secret@redis:port"}, "MLPLATFORM_REDIS_URL is no address of a Redis"),
        ({"online_url": ":secret@redis"}, "MLPLATFORM_ONLINE_URL is no address of a Redis"),
        (JWT | {"serving_jwt_algorithms": ","}, "names none"),
        ({"serving_cors_origins": "*"}, "scheme://host"),
        ({"serving_cors_origins": "https://shop.example/"}, "scheme://host"),
        ({"serving_tls_certificate": "cert.pem"}, "go together"),
        ({"serving_tls_certificate": "cert.pem", "serving_tls_key": "key.pem"}, "no file"),
        ({"serving_body_timeout_s": 40}, "longer"),
    ],
    ids=str,
)
def test_settings_that_would_leave_a_door_open_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        ServingSettings(**SAFE | changes)


def test_a_start_that_cannot_be_is_told_in_one_line_that_says_what_to_mend(run_service, tmp_path) -> None:
    spoilt, empty = tmp_path / "spoilt.json", tmp_path / "empty.json"
    spoilt.write_text("no json")
    empty.write_text('{"keys": []}')
    jwt = {"MLPLATFORM_SERVING_AUTH": "jwt", "MLPLATFORM_SERVING_JWT_ISSUER": "i", "MLPLATFORM_SERVING_JWT_AUDIENCE": "a"}
    keys, tls = (
        "MLPLATFORM_SERVING_JWT_KEYS",
        {"MLPLATFORM_SERVING_TLS_CERTIFICATE": str(spoilt), "MLPLATFORM_SERVING_TLS_KEY": str(spoilt)},
    )
    cases: list[tuple[dict[str, str], str]] = [
        ({"MLPLATFORM_SERVING_AUTH": "keys"}, f"No such file or directory; `mlplatform keys create NAME --file {tmp_path}"),
        ({"MLPLATFORM_SERVING_AUTH": "keys", "MLPLATFORM_SERVING_KEYS_FILE": str(spoilt)}, "is not of the form `mlplatform keys` writes"),
        ({"MLPLATFORM_REDIS_URL": "http://:pwsecret@127.0.0.1:1"}, "MLPLATFORM_REDIS_URL is no address of a Redis"),
        (jwt | {keys: str(tmp_path / "none.json")}, f"{keys}: the file {tmp_path / 'none.json'} cannot be read: No such file"),
        (jwt | {keys: str(spoilt)}, f"{keys}: the file {spoilt} is no JSON Web Key Set"),
        (jwt | {keys: str(empty)}, "has no key for the algorithms RS256, ES256"),
        (tls, f"the certificate {spoilt} and its key {spoilt} cannot be used"),
    ]
    for settings, told in cases:
        process = run_service(**settings)
        assert process.popen.wait(20) == 2, process.log.read_text()
        [line] = process.log.read_text().splitlines()
        assert line.startswith("error: ")
        assert told in line
        assert "pwsecret" not in line


@pytest.mark.parametrize(("arguments", "status"), [(["--workers", "2"], 2), (["--port", "8001"], 2), (["--help"], 0)])
def test_arguments_are_not_passed_over(arguments: list[str], status: int) -> None:
    """Who thinks of uvicorn's would have one process, on another port, and not know it."""
    told = subprocess.run([sys.executable, "-m", "serving_app", *arguments], capture_output=True, text=True, timeout=20, check=False)
    assert told.returncode == status
    assert "takes no arguments" in (told.stderr if status else told.stdout)
    assert " ".join(arguments) in told.stderr or not status


def test_a_setting_that_is_none_is_told_at_the_start_with_the_one_that_may_be_meant(run_service) -> None:
    process = run_service(MLPLATFORM_SERVING_BODY_LIMT="3", MLPLATFORM_SERVING_URL="http://127.0.0.1:1")
    while not (process.popen.poll() or "service_started" in process.log.read_text()):
        time.sleep(0.02)
    process.stop()
    told = [line for text in process.log.read_text().splitlines() if (line := json.loads(text))["event"] == "setting_unknown"]
    assert [(line["name"], line["did_you_mean"]) for line in told] == [("MLPLATFORM_SERVING_BODY_LIMT", "MLPLATFORM_SERVING_BODY_LIMIT")]
