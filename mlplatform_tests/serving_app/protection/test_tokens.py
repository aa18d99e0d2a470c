"""Tokens of an OpenID provider: what is accepted, what never, and keys that change or cannot be read."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from serving_app.problems import ProblemError
from serving_app.protection.callers import EXPIRED, INVALID, NOT_YET, Caller
from serving_app.protection.needs import need_of
from serving_app.protection.provider_keys import ProviderKeys
from serving_app.protection.tokens import TokenRules, TokenVerifier, understood

NOW = 1_700_000_000.0
RULES = TokenRules("https://id.example", "predictions")
PREDICT = "/v1/models/basket/predict"
ROW = {"shop": "s1", "customer": 7, "placed_at": "2013-09-01T10:30:00Z", "price": 12.5, "items": 3, "channel": "store", "age": 30}


@pytest.fixture(scope="module")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture(scope="module")
def ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_set(rsa_key: rsa.RSAPrivateKey, ec_key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
    from jwt.algorithms import ECAlgorithm, RSAAlgorithm

    return {
        "keys": [
            RSAAlgorithm.to_jwk(rsa_key.public_key(), as_dict=True) | {"kid": "r", "use": "sig", "alg": "RS256"},
            ECAlgorithm.to_jwk(ec_key.public_key(), as_dict=True) | {"kid": "e"},
            RSAAlgorithm.to_jwk(rsa_key.public_key(), as_dict=True) | {"kid": "enc", "use": "enc"},
            {"kty": "oct", "k": "c2VjcmV0", "kid": "o", "alg": "HS256"},
            {"kty": "a kind of tomorrow", "kid": "t"},
        ]
    }


def claims(**changes: Any) -> dict[str, Any]:
    plain = {"iss": RULES.issuer, "aud": RULES.audience, "sub": "shop", "exp": NOW + 60, "scope": "openid predict:basket"}
    return {name: value for name, value in (plain | changes).items() if value is not None}


@pytest.fixture
def verifier(rsa_key, ec_key) -> TokenVerifier:
    made = TokenVerifier(RULES)
    assert made.take_keys(key_set(rsa_key, ec_key)) == 2
    return made


def test_tokens_of_both_kinds_of_keys_are_recognized_with_their_scopes(verifier, rsa_key, ec_key) -> None:
    for key, algorithm, name in ((rsa_key, "RS256", "r"), (ec_key, "ES256", "e")):
        text = jwt.encode(claims(), key, algorithm, headers={"kid": name})
        for _ in range(2):  # checked, then remembered
            caller = verifier.recognize(text, NOW)
            assert isinstance(caller, Caller)
            assert caller.id == "shop"
            assert caller.may(need_of(PREDICT))
            assert not caller.may(need_of("/v1/models/other/predict"))
            assert not caller.may(need_of("/metrics"))


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "https://evil.example"},
        {"iss": None},
        {"aud": "another"},
        {"aud": None},
        {"sub": None},
        {"sub": 7},
        {"exp": None},
        {"exp": "soon"},
    ],
    ids=str,
)
def test_a_token_without_the_claims_asked_for_is_refused(verifier, rsa_key, changes) -> None:
    # Signed by hand, because the library refuses to make some of them.
    text = jwt.api_jws.encode(json.dumps(claims(**changes)).encode(), rsa_key, "RS256", headers={"kid": "r"})
    assert verifier.recognize(text, NOW) is INVALID


def test_the_token_does_not_choose_its_algorithm(verifier, rsa_key, ec_key) -> None:
    public = rsa_key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    unsigned = jwt.encode(claims(), None, "none", headers={"kid": "r"})
    import base64
    import hashlib
    import hmac

    head, body = jwt.encode(claims(), "x" * 32, "HS256", headers={"kid": "r"}).split(".")[:2]
    mac = hmac.new(public, f"{head}.{body}".encode(), hashlib.sha256).digest()
    with_the_public_key_as_secret = f"{head}.{body}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"
    with_the_published_secret = jwt.encode(claims(), b"secret".ljust(32, b"\0"), "HS256", headers={"kid": "o"})
    for text in (
        unsigned,
        with_the_public_key_as_secret,
        with_the_published_secret,
        jwt.encode(claims(), rsa_key, "RS512", headers={"kid": "r"}),
        jwt.encode(claims(), rsa_key, "RS256", headers={"kid": "e"}),
        jwt.encode(claims(), rsa_key, "RS256", headers={"kid": "enc"}),
        jwt.encode(claims(), rsa.generate_private_key(65537, 2048), "RS256", headers={"kid": "r"}),
    ):
        assert verifier.recognize(text, NOW) is INVALID
    good = jwt.encode(claims(), ec_key, "ES256", headers={"kid": "e"})
    for text in ("", "a.b.c", "...", good[:-4] + "AAAA", good + "x" * 9000, "é" * 50, "e30.e30.e30"):
        assert verifier.recognize(text, NOW) is INVALID, text[:20]


def test_times_are_checked_at_each_use_within_the_leeway(verifier, rsa_key) -> None:
    text = jwt.encode(claims(nbf=NOW - 10), rsa_key, "RS256", headers={"kid": "r"})
    assert isinstance(verifier.recognize(text, NOW), Caller)
    assert isinstance(verifier.recognize(text, NOW + 89), Caller)
    assert verifier.recognize(text, NOW + 90) is EXPIRED
    assert verifier.recognize(text, NOW + 91) is EXPIRED
    assert verifier.recognize(text, NOW - 41) is NOT_YET


def test_keys_that_were_withdrawn_end_the_tokens_they_signed(verifier, rsa_key, ec_key) -> None:
    text = jwt.encode(claims(), rsa_key, "RS256", headers={"kid": "r"})
    assert isinstance(verifier.recognize(text, NOW), Caller)
    document = key_set(rsa_key, ec_key)
    verifier.take_keys({"keys": [k for k in document["keys"] if k["kid"] != "r"]})
    assert verifier.recognize(text, NOW) is INVALID
    assert verifier.wanted  # the provider may know the key by now
    with pytest.raises(ValueError, match="no key"):
        verifier.take_keys({"keys": []})
    assert isinstance(verifier.recognize(jwt.encode(claims(), ec_key, "ES256", headers={"kid": "e"}), NOW), Caller)


def test_before_the_providers_keys_are_read_the_answer_is_not_invalid_but_unknown() -> None:
    answer = TokenVerifier(RULES).recognize("a.b.c", NOW)
    assert isinstance(answer, ProblemError)
    assert (answer.status, answer.kind) == (503, "provider-unknown")


def test_scopes_in_each_form_providers_write_them() -> None:
    assert understood({"scope": "predict"}) == ({"predict"}, None)
    assert understood({"scope": "predict:*"}) == ({"predict"}, None)
    assert understood({"scp": ["predict:a", "predict:b", 7]}) == ({"predict"}, {"a", "b"})
    assert understood({"scope": "metrics admin"}) == ({"metrics", "admin"}, set())
    for nothing in ({}, {"scope": ""}, {"scope": "predict:"}, {"scope": 3}, {"scope": "unpredict"}):
        assert understood(nothing) == (set(), set())


def test_a_second_token_of_a_subject_shares_its_rate(rsa_key, ec_key) -> None:
    limited = TokenVerifier(TokenRules(RULES.issuer, RULES.audience, rate_per_s=1.0))
    limited.take_keys(key_set(rsa_key, ec_key))
    callers = [limited.recognize(jwt.encode(claims(jti=n), rsa_key, "RS256", headers={"kid": "r"}), NOW) for n in "ab"]
    assert callers[0].bucket is callers[1].bucket is not None


async def _read(keys: ProviderKeys) -> bool:
    return await keys.read()


def test_a_provider_that_fails_leaves_the_keys_read_before(rsa_key, ec_key, tmp_path: Path) -> None:
    import asyncio

    file = tmp_path / "jwks.json"
    made = TokenVerifier(RULES)
    keys = ProviderKeys(str(file), made)
    assert not asyncio.run(_read(keys))
    assert not made.ready
    file.write_text(json.dumps(key_set(rsa_key, ec_key)))
    assert asyncio.run(_read(keys))
    for spoilt in ("", "[]", "{", '{"keys": []}', '{"keys": 3}', '{"keys": [7]}'):
        file.write_text(spoilt)
        assert not asyncio.run(_read(keys)), spoilt
    assert isinstance(made.recognize(jwt.encode(claims(), rsa_key, "RS256", headers={"kid": "r"}), NOW), Caller)


def test_a_password_in_the_provider_s_address_stays_out_of_the_log(served_json, capsys) -> None:
    import asyncio

    address = served_json({}).replace("http://", "http://user:pwsecret@") + "-which-is-not-there"
    assert not asyncio.run(_read(ProviderKeys(address, TokenVerifier(RULES))))
    told = capsys.readouterr()
    assert "provider_keys_unread" in told.out + told.err
    assert "pwsecret" not in told.out + told.err


def test_the_running_service_answers_a_bearer_and_nobody_else(
    make_model, open_service, tmp_path: Path, rsa_key, ec_key, served_json: Callable[[Any], str]
) -> None:
    make_model().into_cache(tmp_path)
    client = open_service(
        wait=False,
        serving_auth="jwt",
        serving_jwt_keys=served_json(key_set(rsa_key, ec_key)),
        serving_jwt_issuer=RULES.issuer,
        serving_jwt_audience=RULES.audience,
    )

    def ask(**changes: Any) -> Any:
        text = jwt.encode(claims(exp=time.time() + 60, **changes), ec_key, "ES256", headers={"kid": "e"})
        return client.post(PREDICT, json={"inputs": [ROW]}, headers={"authorization": f"Bearer {text}"})

    deadline = time.monotonic() + 10
    while ask().status_code != 200:
        assert time.monotonic() < deadline, ask().text
        time.sleep(0.05)
    assert ask(scope="predict:other").status_code == 403
    assert ask(aud="another").status_code == 401
    assert client.post(PREDICT, json={"inputs": [ROW]}).status_code == 401
