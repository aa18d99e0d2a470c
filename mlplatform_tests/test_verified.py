"""The seal fits one version with one evaluation, and nothing else."""

from dataclasses import replace

import pytest

from mlplatform.contracts import EVALUATION_TAG, GATES_TAG, VERIFIED_TAG
from mlplatform.verified import Identity, Sealed, seal, why_unverified

IDENTITY = Identity("m", 3, "d" * 64, "a" * 64)
EVALUATION = '{"auc": 0.76}'


def tags(key: str) -> dict[str, str]:
    return {GATES_TAG: "passed", EVALUATION_TAG: EVALUATION, VERIFIED_TAG: seal(key, IDENTITY, EVALUATION)}


@pytest.mark.parametrize("key", ["", "secret"])
def test_a_version_with_its_own_seal_may_answer(key: str) -> None:
    assert why_unverified(key, IDENTITY, Sealed.from_tags(tags(key))) == ""


@pytest.mark.parametrize("key", ["", "secret"])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({GATES_TAG: "refused"}, "did not pass"),
        ({GATES_TAG: ""}, "never evaluated"),
        ({VERIFIED_TAG: ""}, "no seal"),
        ({EVALUATION_TAG: '{"auc": 0.99}'}, "does not fit"),
        ({VERIFIED_TAG: "by hand"}, "does not fit"),
        ({VERIFIED_TAG: "ü"}, "does not fit"),
    ],
)
def test_edited_tags_break_the_seal(key: str, change: dict[str, str], why: str) -> None:
    assert why in why_unverified(key, IDENTITY, Sealed.from_tags(tags(key) | change))


@pytest.mark.parametrize(
    "other",
    [
        replace(IDENTITY, version=4),
        replace(IDENTITY, model="n"),
        replace(IDENTITY, contract_digest="e"),
        replace(IDENTITY, model_sha256="b"),
    ],
)
def test_a_seal_copied_to_another_version_or_other_files_does_not_fit(other: Identity) -> None:
    assert "does not fit" in why_unverified("", other, Sealed.from_tags(tags("")))


def test_with_a_key_a_bare_hash_and_a_seal_of_another_key_do_not_count() -> None:
    assert "without the key" in why_unverified("secret", IDENTITY, Sealed.from_tags(tags("")))
    assert "does not fit" in why_unverified("secret", IDENTITY, Sealed.from_tags(tags("other")))
    assert "needs a key" in why_unverified("", IDENTITY, Sealed.from_tags(tags("secret")))
