"""The service's own page in a real browser: it draws itself, and its form asks for a prediction."""

import json
import time
from collections.abc import Iterator

import pytest

from mlplatform.local.pictures import Browser, Picture, find_chromium

DRAWN = "document.querySelectorAll('article').length > 3 && document.querySelector('.state.ready')"
SEND = "document.querySelector('article form button').click()"
ANSWERED = "document.querySelector('article .answer').textContent && !document.querySelector('article form button').disabled"

pytestmark = [pytest.mark.browser, pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine")]


@pytest.fixture
def browser() -> Iterator[Browser]:
    program = find_chromium()
    assert program is not None
    with Browser(program) as running:
        yield running


def test_the_page_shows_the_models_fields_and_its_example_is_answered(browser: Browser, make_model, open_service, tmp_path) -> None:
    make_model().into_cache(tmp_path)
    url = f"{open_service().base_url}/docs"
    with browser.tab(Picture("docs", url, DRAWN)) as tab:
        first = browser.evaluate(tab, "document.querySelector('article').innerText")
        assert "/v1/models/basket/predict" in first
        assert "price" in first
        assert "ready: basket v1" in browser.evaluate(tab, "document.getElementById('state').textContent")
        assert browser.evaluate(tab, "document.querySelector('input[name=model]').placeholder") == "basket"
        browser.evaluate(tab, SEND)
        deadline = time.monotonic() + 10
        while not browser.evaluate(tab, f"!!({ANSWERED})"):
            assert time.monotonic() < deadline, "the form was not answered"
            time.sleep(0.05)
        assert browser.evaluate(tab, "document.querySelector('article .answer').textContent").startswith("200 in ")
        answer = json.loads(browser.evaluate(tab, "document.querySelector('article pre').textContent"))
        assert answer["model"] == "basket"
        assert len(answer["predictions"]) == 1


def test_texts_go_in_as_text_whatever_they_hold(browser: Browser, make_model, open_service, tmp_path) -> None:
    make_model(description="<img src=x onerror=document.title='broken'> `code`").into_cache(tmp_path)
    with browser.tab(Picture("docs", f"{open_service().base_url}/docs", DRAWN)) as tab:
        assert browser.evaluate(tab, "document.querySelectorAll('article img').length") == 0
        assert browser.evaluate(tab, "document.querySelector('article p code').textContent") == "code"
        assert "<img src=x" in browser.evaluate(tab, "document.querySelector('article p').textContent")
