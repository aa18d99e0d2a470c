"""How ages read on the command line."""

import pytest

from mlplatform.printing import age


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-5, "0 s"),
        (0.4, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3_600, "1 h"),
        (11_115, "3 h 5 min"),
        (86_400, "1 d"),
        (97_200, "1 d 3 h"),
        (86_700, "1 d"),
    ],
)
def test_an_age_is_told_in_its_two_largest_units(seconds: float, words: str) -> None:
    assert age(seconds) == words
