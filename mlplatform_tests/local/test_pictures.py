"""The guide's pictures are taken of pages that are drawn, by a browser that leaves nothing behind."""

import struct
from pathlib import Path

import pytest
from rich.console import Console

from mlplatform.local import pictures
from mlplatform.local.pictures import Browser, Picture, PictureError, find_chromium, lineage, newest_report, take_pictures
from mlplatform.local.processes import group_members

PAGE = """<!doctype html><body style="margin:0;background:#fff"><script>
setTimeout(() => { document.body.style.background = '#f00'; document.body.dataset.drawn = localStorage.getItem('kept') || 'no'; }, 400);
</script></body>"""
DRAWN = "document.body.dataset.drawn"
needs_chromium = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine")


@pytest.fixture
def page(tmp_path: Path) -> str:
    (tmp_path / "page.html").write_text(PAGE)
    return (tmp_path / "page.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    program = find_chromium()
    assert program is not None
    with Browser(program) as running:
        yield running


def test_without_chromium_the_pictures_stay_and_a_notice_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(pictures, "MAC_CHROMIUMS", ())
    console = Console(record=True)
    assert take_pictures(tmp_path, tmp_path / "out", console) == 0
    assert "No Chromium" in console.export_text()
    assert not (tmp_path / "out").exists()


def test_the_lineage_address_opens_the_groups_named() -> None:
    assert lineage("http://h:1", ["a", "b"]) == "http://h:1/asset-groups?expanded=global@global:a,global@global:b"
    alone = lineage("http://h:1", ["a"], ["other"])
    assert alone == "http://h:1/asset-groups~not%20key%3A%22%2A%2Fother%22?expanded=global@global:a"


def test_the_newest_drift_report_is_pictured_and_none_before_the_first(tmp_path: Path) -> None:
    services = {"dagster-webserver": "http://h:1", "serving": "http://h:2"}
    assert newest_report(tmp_path) is None
    before = [picture.name for picture in pictures.pictures(services, tmp_path)]
    report = tmp_path / "reports" / "data_drift" / "m" / "run.html"
    report.parent.mkdir(parents=True)
    report.write_text("<html>")
    after = {picture.name: picture.url for picture in pictures.pictures(services, tmp_path)}
    assert set(after) - set(before) == {"drift-report"}
    assert after["drift-report"] == report.as_uri()


@pytest.mark.browser
@needs_chromium
def test_a_page_is_pictured_in_its_size_once_it_is_drawn(browser: Browser, page: str) -> None:
    png = browser.take(Picture("page", page, DRAWN, width=320, height=200))
    assert png.startswith(b"\x89PNG")
    assert struct.unpack(">II", png[16:24]) == (320, 200)
    assert _first_pixel(png) == (255, 0, 0)


@pytest.mark.browser
@needs_chromium
def test_what_a_page_remembers_is_there_when_it_is_loaded_once_more(browser: Browser, page: str) -> None:
    browser.take(Picture("page", page, f"{DRAWN} === 'no' || {DRAWN} === 'yes'", 100, 100, "localStorage.setItem('kept', 'yes')"))
    assert browser.take(Picture("page", page, f"{DRAWN} === 'yes'", 100, 100))


@pytest.mark.browser
@needs_chromium
def test_a_page_that_is_never_drawn_is_named(browser: Browser, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_PAGE_S", 1.5)
    with pytest.raises(PictureError, match=r"waiting: file:.*page\.html"):
        browser.take(Picture("waiting", page, "document.title === 'never'"))


@pytest.mark.browser
@needs_chromium
def test_the_browser_leaves_no_process_and_no_profile() -> None:
    program = find_chromium()
    assert program is not None
    with Browser(program) as running:
        group, profile = running._process.pid, Path(running._profile.name)
        assert group_members(group)
        assert profile.is_dir()
    assert not group_members(group)
    assert not profile.exists()


@pytest.mark.browser
def test_a_program_that_is_no_browser_is_named(tmp_path: Path) -> None:
    program = tmp_path / "chromium"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(PictureError, match="did not start"), Browser(program):
        pass


def _first_pixel(png: bytes) -> tuple[int, ...]:
    import io

    from matplotlib import image

    return tuple(round(float(v) * 255) for v in image.imread(io.BytesIO(png))[0, 0, :3])
