"""Which code runs: what was stated, or the commit, or the sources themselves."""

import subprocess
from pathlib import Path

import pytest

from mlplatform.code_version import code_name, code_version, source_digest

REPO = Path(__file__).parents[1]


def test_what_was_stated_counts() -> None:
    assert code_version("abc") == ("abc", False)
    assert code_name("abc", ("mlplatform",)) == "abc"


def test_in_a_checkout_it_is_the_commit_and_what_differs_from_it_is_told_by_the_sources() -> None:
    commit, differs = code_version("")
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True, check=False)
    assert commit == (asked.stdout.strip() or "unknown")
    suffix = f"+{source_digest(['serving_app'])[:12]}" if differs else ""
    assert code_name("", ["serving_app"]) == commit + suffix


def test_without_git_the_sources_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert code_version("") == ("unknown", True)
    assert code_name("", ["serving_app"]) == f"unknown+{source_digest(['serving_app'])[:12]}"


def test_a_changed_moved_or_new_file_is_another_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "digested"
    package.mkdir()
    found = []
    for name, text in (("__init__.py", ""), ("a.py", "x = 1\n"), ("a.py", "x = 2\n"), ("b.py", "")):
        (package / name).write_text(text)
        found.append(source_digest(["digested"]))
    (package / "b.py").rename(package / "c.py")
    found.append(source_digest(["digested"]))
    assert len(set(found)) == len(found)
    with pytest.raises(LookupError, match="no package"):
        source_digest(["nowhere_to_be_found"])
