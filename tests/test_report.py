"The report: one page that asks for nothing, and says what the record says."

import json
import re
import shutil

import pytest
import torch

from cpsample.core.images import pixels
from cpsample.judgement.copy_audit import audit
from cpsample.judgement.report import report_html, write_report
from cpsample.practice.datasets import load_fashion

TRAIN, REAL = (pixels(load_fashion(part, small=True)[0]) for part in ("train", "test"))


@pytest.fixture(scope="module")
def audited():
    return audit(torch.cat([TRAIN[:5], REAL[:45]]), TRAIN[:60], REAL[50:150])


def test_texts_are_escaped(audited):
    page = report_html(audited, "<b>bags</b> & shirts", (False, "0 < 1"))
    assert "<h1>&lt;b&gt;bags&lt;/b&gt; &amp; shirts</h1>" in page
    assert '<p class="bad"><b>0 &lt; 1</b></p>' in page


def test_the_page_says_what_the_record_says(audited):
    page, record = report_html(audited), audited.record
    for numbers in record["tests"].values():
        assert numbers["words"] in page and numbers["words_held_out"] in page
    for images in record["sets"].values():
        assert images["fingerprint"] in page
    assert f"{record['auth_pct']:.1%}" in page and f"{record['quality']['fd']:.4g}" in page
    assert 'class="bad"' not in page and 'class="good"' not in page  # no verdict was asked for


def test_page_and_numbers_are_written_side_by_side(audited, tmp_path):
    verdict = audited.verdict(0.5)
    page, numbers = write_report(audited, tmp_path / "a.b", verdict, command="cpsample audit")
    assert (page.name, numbers.name) == ("a.b.html", "a.b.json")
    assert page.read_text() == report_html(audited, verdict=verdict)
    record = json.loads(numbers.read_text())
    assert record["command"] == "cpsample audit"
    assert record["passed"] is True and record["verdict"] == verdict.sentence


def test_the_report_opens_without_a_network(audited, tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    api = pytest.importorskip("playwright.sync_api")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    write_report(audited, tmp_path / "report", (True, "passed"))
    address = (tmp_path / "report.html").as_uri()
    source = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", source) and "<script" not in source

    messages, requests = [], []
    with api.sync_playwright() as p:
        chrome = p.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chrome.new_context(offline=True).new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        widths = page.eval_on_selector_all(
            "img", "all => all.map(i => i.complete && i.naturalWidth)"
        )
        assert len(widths) == 2 and min(widths) > 300
        assert page.inner_text("h1") == "Does the model copy?"
        assert page.locator("table").count() == 4
        chrome.close()
    assert not messages
    assert [url for url in requests if not url.startswith("data:")] == [address]
